"""The monitor itself: lines in; forecasts, alarms and alerts out, durable batch by batch.

The readings of one patient are taken one after another, those of different patients together: a batch is split into
waves in which nobody occurs twice, and each wave is one pass of the model. So the outcome does not depend on how a
stream is cut into batches.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from zoneinfo import ZoneInfo

from client.intake.pseudonyms import PatientIdentity, pseudonym
from client.monitor.alarm import (
    MODEL_FAILED,
    NO_FORECAST,
    SENSOR_STUCK,
    Alarm,
    Alert,
    Quantiles,
    Rule,
    Stage,
    advance,
    advance_blind,
    alert_id,
    blind_id,
    first_crossing,
    watched_path,
)
from client.monitor.forecaster import Fate, Window, forecast_all
from client.monitor.memory import Memory, Patient
from client.monitor.stream import Lines, Reading, parse_line
from client.trained import Trained
from shared.tasks.cgm import STEP_MIN

Write = Callable[[Sequence[Alert]], object]


@dataclass(frozen=True, repr=False)
class Sight:
    """A patient as the screen shows them.

    Attributes:
        patient_id: As in the stream.
        time_s: Of the last reading.
        offset_s: What its local clock is ahead of that; None if it is not known.
        history: ``(time_s, mg/dL)`` of the last hours.
        forecast: ``(HORIZON, 3)`` mg/dL, or None where none could be made.
        stages: What holds now, by rule's kind.
    """

    patient_id: str
    time_s: int
    offset_s: int | None
    history: tuple[tuple[int, float], ...]
    forecast: Quantiles | None
    stages: dict[str, Stage]


class Watch:
    """Watches any number of patients.

    Args:
        trained: The model; one patient's own model serves that patient only.
        rules: What to warn of; one of a kind.
        memory: What is known from before.
        writers: Called with new alerts, in order, before the batch counts as done; they must bear repetition.
        zone: Of times without an offset, or None.
        now: The clock, seconds since 1970.
    """

    def __init__(
        self,
        trained: Trained,
        rules: Sequence[Rule],
        memory: Memory,
        *,
        writers: Sequence[Write] = (),
        zone: ZoneInfo | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._trained, self._rules, self._memory = trained, tuple(rules), memory
        self._writers, self._zone, self._now = tuple(writers), zone, now
        self._keys: dict[str, bytes | None] = {}
        self.fates: Counter[Fate] = Counter()
        self.alerts: Counter[str] = Counter()
        """How many were raised, by kind."""
        self.sights: dict[str, Sight] = {}

    def take(self, lines: Lines) -> list[Alert]:
        """Take in a batch, make its outcome durable, and return its alerts.

        Raises:
            StorageError: If the outcome cannot be written; a monitor opened anew may then be given the same lines.
        """
        fates: Counter[Fate] = Counter({Fate.CUT_OFF: lines.cut_off} if lines.cut_off else {})
        waves = self._waves(lines.texts, fates)
        alerts = [alert for wave in waves for alert in self._wave(wave, fates)]
        for write in self._writers:
            write(alerts)
        touched = {key for wave in waves for key, _ in wave}
        if touched or lines.position:
            self._memory.save(sorted(touched), lines.position)
        self.fates.update(fates)
        self.alerts.update(alert.kind for alert in alerts)
        lines.done({fate.value: count for fate, count in fates.items()})
        return alerts

    def _waves(self, texts: Iterable[str], fates: Counter[Fate]) -> list[list[tuple[bytes, Reading]]]:
        waves: list[list[tuple[bytes, Reading]]] = []
        turns: Counter[bytes] = Counter()
        now_s = self._now()
        for text in texts:
            reading = parse_line(text, self._zone, now_s)
            if isinstance(reading, Fate):
                fates[reading] += 1
                continue
            key = self._key(reading.patient_id)
            if key is None:
                fates[Fate.OTHER_PATIENT] += 1
                continue
            if turns[key] == len(waves):
                waves.append([])
            waves[turns[key]].append((key, reading))
            turns[key] += 1
        return waves

    def _key(self, patient_id: str) -> bytes | None:
        """Return the patient's pseudonym; None if the model is another patient's own."""
        if patient_id not in self._keys:
            fits = self._trained.fits(patient_id)
            self._keys[patient_id] = pseudonym(self._memory.secret, PatientIdentity("", patient_id)) if fits else None
        return self._keys[patient_id]

    def _wave(self, wave: list[tuple[bytes, Reading]], fates: Counter[Fate]) -> list[Alert]:
        due: list[tuple[bytes, Reading, Window | None]] = []
        for key, reading in wave:
            patient = self._memory.patients.setdefault(key, Patient())
            if reading.insulin or reading.carbohydrate:
                fate = patient.history.dose(reading.time_s, reading.insulin, reading.carbohydrate)
            if reading.glucose is not None:
                fate = patient.history.add(reading.time_s, reading.glucose, reading.offset_s or 0)
            fates[fate] += 1
            if fate is Fate.READ:
                due.append((key, reading, patient.history.window()))
        windows = [window for _, _, window in due if window is not None]
        found = iter(forecast_all(self._trained.model, windows) if windows else ())
        alerts: list[Alert] = []
        for key, reading, window in due:
            forecast = None if window is None else next(found)
            stuck = window is None and self._memory.patients[key].history.stuck()
            alerts += self._judge(key, reading, forecast)
            alerts += self._judge_sight(key, reading, forecast, MODEL_FAILED if window is not None else "", stuck=stuck)
        return alerts

    def _judge_sight(
        self, key: bytes, reading: Reading, forecast: Quantiles | None, failed: str, *, stuck: bool
    ) -> list[Alert]:
        """Alert where a forecast was due and there is none: silence would look like safety."""
        patient = self._memory.patients[key]
        reason = None if forecast is not None else SENSOR_STUCK if stuck else failed or None
        blind = False if forecast is not None else True if reason else None
        wait_min = min(rule.refractory_min for rule in self._rules)
        alarm, due = advance_blind(patient.alarms.get(NO_FORECAST, Alarm()), reading.time_s, blind, wait_min)
        patient.alarms[NO_FORECAST] = alarm
        if reason:
            self.sights[reading.patient_id].stages[NO_FORECAST] = Stage.PRESENT
        if not (due and reason):
            return []
        start_s = reading.time_s if alarm.start_s is None else alarm.start_s
        return [
            Alert(
                id=blind_id(key, reason, reading.time_s),
                patient_id=reading.patient_id,
                kind=NO_FORECAST,
                stage=Stage.PRESENT.name.lower(),
                time=_stamp(reading.time_s, reading.offset_s),
                episode_start=_stamp(start_s, reading.offset_s),
                glucose_mg_dl=float(reading.glucose or 0.0),
                threshold_mg_dl=None,
                quantile=None,
                forecast_mg_dl=None,
                expected_in_min=None,
                band_mg_dl=None,
                reason=reason,
            )
        ]

    def _judge(self, key: bytes, reading: Reading, forecast: Quantiles | None) -> list[Alert]:
        patient, alerts = self._memory.patients[key], []
        glucose = reading.glucose or 0.0
        stages: dict[str, Stage] = {}
        for rule in self._rules:
            path = None if forecast is None else watched_path(forecast, rule.quantile, rule.horizon_min)
            before = patient.alarms.get(rule.kind, Alarm())
            alarm, stage = advance(rule, before, reading.time_s, glucose, path, fresh=patient.history.after_gap())
            patient.alarms[rule.kind] = alarm
            stages[rule.kind] = _present_stage(rule, alarm, glucose)
            if stage is not Stage.SAFE:
                alerts.append(self._alert(key, reading, rule, alarm, stage, forecast))
        self.sights[reading.patient_id] = Sight(
            reading.patient_id, reading.time_s, reading.offset_s, tuple(patient.history.readings), forecast, stages
        )
        return alerts

    def _alert(
        self, key: bytes, reading: Reading, rule: Rule, alarm: Alarm, stage: Stage, forecast: Quantiles | None
    ) -> Alert:
        start_s = reading.time_s if alarm.start_s is None else alarm.start_s
        worst = expected = band = None
        if forecast is not None:
            path = watched_path(forecast, rule.quantile, rule.horizon_min)
            worst = round(float(max(path, key=lambda value: rule.excess(float(value)))), 1)
            expected = first_crossing(rule, path)
            low, middle, high = (round(float(value), 1) for value in forecast[rule.horizon_min // STEP_MIN - 1])
            band = (low, middle, high)
        return Alert(
            id=alert_id(key, rule, stage, start_s),
            patient_id=reading.patient_id,
            kind=rule.kind,
            stage=stage.name.lower(),
            time=_stamp(reading.time_s, reading.offset_s),
            episode_start=_stamp(start_s, reading.offset_s),
            glucose_mg_dl=float(reading.glucose or 0.0),
            threshold_mg_dl=rule.threshold_mg_dl,
            quantile=rule.quantile,
            forecast_mg_dl=worst,
            expected_in_min=0 if stage is Stage.PRESENT else expected,
            band_mg_dl=band,
        )


def _stamp(time_s: int, offset_s: int | None) -> str:
    """Return a time on its local clock; without an offset where the stream has none."""
    if offset_s is None:
        return datetime.fromtimestamp(time_s, UTC).replace(tzinfo=None).isoformat()
    return datetime.fromtimestamp(time_s, timezone(timedelta(seconds=offset_s))).isoformat()


def _present_stage(rule: Rule, alarm: Alarm, glucose: float) -> Stage:
    """Return what the screen says: what holds now, whether or not somebody is alerted again."""
    if rule.excess(glucose) > 0.0:
        return Stage.PRESENT
    return Stage.SAFE if alarm.start_s is None else Stage.PREDICTED
