"""``monitor --demo``: a simulated patient's day, watched with the public start that ships.

``demo.csv`` is what the generator of simulated hospitals writes as ``OUT/site-1/glucose.csv`` by
``generate_glucose_hospitals(OUT, sites=1, seed=8, patients_per_site=1, days=1)``: a day with lows and highs.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from typing import Final

from client.monitor.alarm import Alert, Rule
from client.monitor.memory import Memory
from client.monitor.stream import Lines
from client.monitor.watch import Sight, Watch
from client.trained import load_trained
from shared.starts import start_path
from shared.tasks.cgm import STEP_MIN

SIMULATED: Final = (
    "Demo: the patient is simulated, and the model is the public start, trained on simulated records. Nothing is "
    "written. Not for clinical use."
)
_NAME: Final = "simulated"
"""What the patient is called on the screen, in place of the generator's number."""
_TASK: Final = "glucose-forecast"
_EVERY: Final = 60 // STEP_MIN
_AT_30: Final = 30 // STEP_MIN - 1
_PAUSE_S: Final = 0.05
"""Between readings on a screen: a day takes a quarter of a minute."""


def demo_watch(rules: Sequence[Rule], tell: Callable[[str], object]) -> Watch:
    """Return a watch with the public start, which tells each alert in words and remembers nothing once it ends.

    Raises:
        StorageError: If the start is missing or damaged.
    """
    trained = load_trained(start_path(_TASK), _TASK, "forecast glucose")

    def write(alerts: Sequence[Alert]) -> None:
        for alert in alerts:
            tell(alert_words(alert))

    return Watch(trained, rules, Memory(None), writers=[write])


def demo_day(watch: Watch, tell: Callable[[str], object], *, shown: bool) -> Iterator[Lines]:
    """Yield the day's readings one by one; where no screen shows them, tell the forecast once an hour.

    Args:
        watch: Takes each reading before the next is asked for.
        tell: Given a sentence.
        shown: Whether a screen draws each reading; the day then passes slowly enough to look at.
    """
    rows = files("client.monitor").joinpath("demo.csv").read_text(encoding="utf-8").splitlines()[1:]
    for number, row in enumerate(rows, start=1):
        yield Lines([_NAME + row[row.index(",") :]])
        if shown:
            time.sleep(_PAUSE_S)
        elif number % _EVERY == 0:
            for sight in watch.sights.values():
                tell(forecast_words(sight))


def last_time(watch: Watch) -> float:
    """Return the demo's clock: the time of the last reading, seconds since 1970."""
    return float(max((sight.time_s for sight in watch.sights.values()), default=0))


def forecast_words(sight: Sight) -> str:
    """Return the last reading and the forecast of 30 minutes later, as a sentence."""
    clock = time.strftime("%H:%M", time.gmtime(sight.time_s + (sight.offset_s or 0)))
    now = f"{clock}  {sight.history[-1][1]:.0f} mg/dL"
    if sight.forecast is None:
        return f"{now}; no forecast yet: it needs three hours of readings"
    low, middle, high = sight.forecast[_AT_30]
    return f"{now}; forecast in 30 min: {middle:.0f} ({low:.0f} to {high:.0f}) mg/dL"


def alert_words(alert: Alert) -> str:
    """Return an alert as a sentence."""
    clock, now = alert.time[11:16], f"{alert.glucose_mg_dl:.0f} mg/dL"
    if alert.threshold_mg_dl is None:
        return f"{clock}  ALERT {alert.kind}: {now}, {alert.reason}"
    side = "below" if alert.kind == "low" else "above"
    bound = f"{side} {alert.threshold_mg_dl:.0f}"
    when = f"{bound} now" if alert.stage == "present" else f"{bound} expected in {alert.expected_in_min} min"
    return f"{clock}  ALERT {alert.kind}: {now}, {when}"
