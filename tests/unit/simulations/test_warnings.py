"""What counts as an event, a warning in time and a false alert: series made by hand, whose answers can be counted."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client.monitor.alarm import DEFAULT_RULES, Alert, Rule
from server.checkpoints import save_checkpoint
from shared.tasks.glucose_forecast import TASK
from simulations.warnings import Event, Record, Warnings, compare, events_of, read_records, replay, total

LOW, HIGH = DEFAULT_RULES
STEP_S = 300


def record(text: str) -> Record:
    """Return a reading each 5 minutes: ``_`` too low, ``-`` in range, ``^`` too high, a blank for none."""
    values = {"_": 60.0, "-": 120.0, "^": 250.0}
    return [(k * STEP_S, values[mark]) for k, mark in enumerate(text) if mark != " "]


def alerts(minutes: Sequence[float], rule: Rule = LOW, patient: str = "P") -> list[Alert]:
    return [
        Alert(
            id=str(minute),
            patient_id=patient,
            kind=rule.kind,
            stage="predicted",
            time=datetime.fromtimestamp(60 * minute, UTC).isoformat(),
            episode_start="",
            glucose_mg_dl=100.0,
            threshold_mg_dl=rule.threshold_mg_dl,
            quantile=rule.quantile,
            forecast_mg_dl=None,
            expected_in_min=None,
            band_mg_dl=None,
        )
        for minute in minutes
    ]


def minutes_of(events: Sequence[Event]) -> list[tuple[float, float]]:
    return [(event.start_s / 60, event.end_s / 60) for event in events]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("------", []),
        ("^^^^^^", []),
        ("--__--", []),  # two readings are 10 minutes
        ("--___--", [(10, 20)]),
        ("___", [(0, 10)]),  # still under way at the end of the record
        ("--_--_---_---", [(10, 25)]),  # a return of 10 minutes does not end it, one of 15 does
        ("___---___", [(0, 10), (30, 40)]),
        ("___--___", [(0, 35)]),
        ("__   __", []),  # nothing is known of the time without readings: neither is a quarter of an hour
        ("___   ___", [(0, 10), (30, 40)]),
        ("___  ___", [(0, 35)]),
    ],
)
def test_an_event_lasts_a_quarter_of_an_hour_and_ends_with_another(
    text: str, expected: list[tuple[float, float]]
) -> None:
    assert minutes_of(events_of(record(text), LOW)) == expected
    assert minutes_of(events_of(record(text.translate(str.maketrans("_^", "^_"))), HIGH)) == expected


@given(st.lists(st.tuples(st.integers(1, 20), st.sampled_from([60.0, 70.0, 120.0])), max_size=40))
def test_events_are_the_stretches_of_readings_beyond_the_threshold(moments: list[tuple[int, float]]) -> None:
    """Oracle: cut the readings beyond it where two are more than 15 minutes apart, and keep what spans 10."""
    times = 60 * np.cumsum([step for step, _ in moments], dtype=int)
    beyond = times[[value < 70.0 for _, value in moments]]
    stretches = np.split(beyond, np.flatnonzero(np.diff(beyond) > 15 * 60) + 1)
    expected = [Event(part[0], part[-1]) for part in stretches if len(part) and part[-1] - part[0] >= 10 * 60]
    values = [value for _, value in moments]
    assert events_of(list(zip(times.tolist(), values, strict=True)), LOW) == expected


ONE_LOW = record("-" * 24 + "___" + "-" * 33)  # from minute 120 to minute 130; five hours less one step


@pytest.mark.parametrize(
    ("at", "lead_min", "late", "false_alerts"),
    [
        ([], (), 0, 0),
        ([59], (), 0, 1),
        ([60], (60.0,), 0, 0),
        ([115], (5.0,), 0, 0),
        ([120], (), 1, 0),
        ([130], (), 1, 0),
        ([131], (), 0, 0),  # under way for 15 minutes more, but over as far as lows go: neither late nor false
        ([145], (), 0, 0),
        ([146], (), 0, 1),
        ([100, 80, 125], (40.0,), 0, 0),  # the first counts, in whatever order they are
        ([10, 110, 200], (10.0,), 0, 2),
    ],
)
def test_an_alert_is_in_time_late_or_false(
    at: list[float], lead_min: tuple[float, ...], late: int, false_alerts: int
) -> None:
    found = compare(ONE_LOW, alerts(at), LOW)
    assert found == Warnings(1, lead_min, late, len(at), false_alerts, 295 / 1440)
    of_the_other_kind = compare(ONE_LOW, alerts(at, HIGH), LOW)
    assert of_the_other_kind == Warnings(1, (), 0, 0, 0, 295 / 1440)


def test_one_alert_can_explain_two_events_and_missing_hours_were_not_watched() -> None:
    twice = record(
        "-" * 12 + "___---___" + " " * 100 + "---"
    )  # at 60 to 70 and 90 to 100, then nothing for 505 minutes
    assert compare(twice, alerts([40]), LOW) == Warnings(2, (20.0, 50.0), 0, 1, 0, (100 + 45 + 10) / 1440)


def test_everybody_is_held_against_their_own_record_and_it_is_said_in_words() -> None:
    records = {"P": ONE_LOW, "Q": ONE_LOW, "R": record("-" * 60)}
    said = [*alerts([110], patient="P"), *alerts([10, 120], patient="Q"), *alerts([50], patient="R")]
    whole = total(records, said, LOW)
    assert whole == Warnings(2, (10.0,), 1, 4, 2, pytest.approx(3 * 295 / 1440))
    assert whole.line() == ("2 events, 1 warned of (50%), 1 late; median lead 10 min; 4 alerts, 2 false (3.25 a day)")
    assert total({}, [], LOW).line() == "0 events, 0 warned of (-), 0 late; median lead -; 0 alerts, 0 false (- a day)"


def test_a_recording_is_read_replayed_and_judged(tmp_path: Path) -> None:
    """Fresh weights forecast about the last reading, so that the monitor warns of a slow fall before it is there."""
    fall = [130.0] * 40 + [130.0 - 3.0 * k for k in range(30)]
    rows = [
        f"{name},{datetime.fromtimestamp(1_704_067_200 + STEP_S * k, UTC):%Y-%m-%dT%H:%M:%S},{value:g}"
        for name, values in (("falls", fall), ("calm", [130.0 + k % 2 for k in range(70)]))
        for k, value in enumerate(values)
    ]
    export = tmp_path / "e.csv"
    export.write_text("\n".join(["patient_id,timestamp,glucose_mg_dl", *rows]) + "\n")
    records = read_records(export)
    assert [glucose for _, glucose in records["falls"]] == fall
    torch.manual_seed(0)
    checkpoint = save_checkpoint(tmp_path / "c", TASK.build(), run="r", number=1, task=TASK.name, plan_digest="p").path
    said = replay(checkpoint, records, [replace(LOW, quantile=0.25), HIGH])
    assert {alert.patient_id for alert in said} == {"falls"}
    judged = total(records, said, LOW)
    assert (judged.events, len(judged.lead_min), judged.false_alerts) == (1, 1, 0)
    assert judged.days == pytest.approx(2 * 69 * 5 / 1440)
