"""How good forecasts of glucose are, in numbers and for a patient's treatment; pure functions, mg/dL throughout.

References:
    Clarke et al., "Evaluating clinical accuracy of systems for self-monitoring of blood glucose", Diabetes Care 1987.
    Parkes et al., "A new consensus error grid to evaluate the clinical significance of inaccuracies in the
    measurement of blood glucose", Diabetes Care 2000; its coordinates: Pfützner et al., "Technical aspects of the
    Parkes error grid", J Diabetes Sci Technol 2013.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from shared.tasks.cgm import STEP_MIN

QUANTILES: Final = (0.05, 0.5, 0.95)
HYPO_MG_DL: Final = 70.0
HYPER_MG_DL: Final = 180.0
ZONES: Final = "ABCDE"
_MINUTES_A_DAY: Final = 1440
_AT_30, _AT_60 = 30 // STEP_MIN - 1, 60 // STEP_MIN - 1
Array = npt.NDArray[np.floating[Any]]
Zones = npt.NDArray[np.int64]
Line = tuple[tuple[float, float], ...]

_PARKES_TYPE_1: Final[Mapping[str, tuple[tuple[int, Line], ...]]] = {
    "above": (
        (1, ((0, 50), (30, 50), (140, 170), (280, 380), (430, 550))),
        (2, ((0, 60), (30, 60), (50, 80), (70, 110), (260, 550))),
        (3, ((0, 100), (25, 100), (50, 125), (80, 215), (125, 550))),
        (4, ((0, 150), (35, 155), (50, 550))),
    ),
    "below": (
        (1, ((50, 30), (170, 145), (385, 300), (550, 450))),
        (2, ((120, 30), (260, 130), (550, 250))),
        (3, ((250, 40), (550, 150))),
    ),
}
_PARKES_TYPE_2: Final[Mapping[str, tuple[tuple[int, Line], ...]]] = {
    "above": (
        (1, ((0, 50), (30, 50), (230, 330), (440, 550))),
        (2, ((0, 60), (30, 60), (280, 550))),
        (3, ((0, 80), (25, 80), (35, 90), (125, 550))),
        (4, ((0, 200), (35, 200), (50, 550))),
    ),
    "below": (
        (1, ((50, 30), (90, 80), (330, 230), (550, 450))),
        (2, ((90, 0), (260, 130), (550, 250))),
        (3, ((250, 40), (410, 110), (550, 160))),
    ),
}
"""Each line bounds a zone and those worse than it; it begins where the zone begins and goes on past its last point."""


def judge(forecast: Array, truth: Array, last: Array, stride: int) -> dict[str, float]:
    """Return every metric of forecasts; a ratio without cases is NaN.

    Args:
        forecast: ``(W, 12, 3)`` the quantiles ``QUANTILES`` of each path.
        truth: ``(W, 12)`` what came.
        last: ``(W,)`` the reading before the path.
        stride: Steps between one window and the next; a window stands for so much time.
    """
    median, error = forecast[..., 1], forecast[..., 1] - truth
    squared, absolute = (error**2).mean(1), np.abs(error).mean(1)
    naive = _root_mean_square(last - truth[:, _AT_30])
    days = len(truth) * stride * STEP_MIN / _MINUTES_A_DAY
    return {
        "rmse_30": (rmse_30 := _root_mean_square(error[:, _AT_30])),
        "rmse_60": _root_mean_square(error[:, _AT_60]),
        "mae_30": float(np.abs(error[:, _AT_30]).mean()),
        "mae_60": float(np.abs(error[:, _AT_60]).mean()),
        "skill_30": 1.0 - rmse_30 / naive if naive else float("nan"),
        "path_mse_median": float(np.median(squared)),
        "path_mae_median": float(np.median(absolute)),
        "path_mse_mean": float(squared.mean()),
        "path_mae_mean": float(absolute.mean()),
        "coverage_90": float(((truth >= forecast[..., 0]) & (truth <= forecast[..., 2])).mean()),
        "pinball": pinball(forecast, truth),
        **_events("hypo", -median[:, _AT_30], -truth[:, _AT_30], -last, -HYPO_MG_DL, days),
        **_events("hyper", median[:, _AT_30], truth[:, _AT_30], last, HYPER_MG_DL, days),
        **_shares("clarke", clarke_zones(truth[:, _AT_30], median[:, _AT_30])),
        **_shares("parkes", parkes_zones(truth[:, _AT_30], median[:, _AT_30])),
        "windows": float(len(truth)),
    }


def pinball(forecast: Array, truth: Array) -> float:
    """Return the mean pinball loss of the quantiles ``(W, T, 3)`` of ``truth`` ``(W, T)``, in mg/dL."""
    above = truth[..., None] - forecast
    levels = np.array(QUANTILES)
    return float(np.maximum(levels * above, (levels - 1.0) * above).mean())


def clarke_zones(reference: Array, predicted: Array) -> Zones:
    """Return Clarke's zone of each pair, 0 for A to 4 for E.

    On a boundary the rules are those of the R package ``ega`` and the Python package ``methcomp``: A within 20% or
    with both below 70, else C, else D, else E, else B, where a point of two zones belongs to the first named.
    """
    zones = np.ones(len(reference), np.int64)
    zones[((reference <= 70) & (predicted >= 180)) | ((reference >= 180) & (predicted <= 70))] = 4
    middle = (predicted >= 70) & (predicted < 180)
    zones[middle & ((reference < 70) | (reference > 240))] = 3
    lower = (reference >= 130) & (reference <= 180) & (predicted < 1.4 * (reference - 130))
    upper = (reference > 70) & (predicted > 180) & (predicted > reference + 110)
    zones[lower | upper] = 2
    close = np.abs(predicted - reference) <= 0.2 * reference
    zones[close | ((reference < 70) & (predicted < 70))] = 0
    return zones


def parkes_zones(reference: Array, predicted: Array, diabetes_type: int = 1) -> Zones:
    """Return the zone in Parkes' grid of each pair, 0 for A to 4 for E; a point on a line is in the better zone.

    Args:
        reference: ``(N,)`` what was true.
        predicted: ``(N,)`` what was said.
        diabetes_type: 1 or 2: the two have grids of their own.
    """
    grid = {1: _PARKES_TYPE_1, 2: _PARKES_TYPE_2}[diabetes_type]
    zones = np.zeros(len(reference), np.int64)
    for zone, line in grid["above"]:
        zones = np.where(predicted > _height(line, reference), np.maximum(zones, zone), zones)
    for zone, line in grid["below"]:
        below = (reference > line[0][0]) & (predicted < _height(line, reference))
        zones = np.where(below, np.maximum(zones, zone), zones)
    return zones


def _height(line: Line, reference: Array) -> Array:
    """Return the line's height over each reference; past its last point it goes on straight."""
    x, y = np.array(line).T
    slope = (y[-1] - y[-2]) / (x[-1] - x[-2])
    beyond = np.maximum(reference - x[-1], 0.0) * slope
    height: Array = np.interp(reference, x, y) + beyond
    return height


def _events(name: str, said: Array, came: Array, now: Array, threshold: float, days: float) -> dict[str, float]:
    """Return how warnings of crossing a threshold fare, one forecast a window.

    The onset sensitivity looks at the windows that begin on the safe side: a crossing that is still to come.
    """
    event, warned, safe = came > threshold, said > threshold, now <= threshold
    return {
        f"{name}_sensitivity": _share(warned, event),
        f"{name}_onset_sensitivity": _share(warned, event & safe),
        f"{name}_false_alarms_per_day": float((warned & ~event).sum() / days) if days else float("nan"),
    }


def _shares(grid: str, zones: Zones) -> dict[str, float]:
    return {f"{grid}_{letter.lower()}": float((zones == code).mean()) for code, letter in enumerate(ZONES)}


def _share(hit: npt.NDArray[np.bool_], among: npt.NDArray[np.bool_]) -> float:
    return float(hit[among].mean()) if among.any() else float("nan")


def _root_mean_square(error: Array) -> float:
    return float(np.sqrt((error**2).mean()))


def by_part(
    forecast: Array, truth: Array, last: Array, stride: int, part: npt.NDArray[np.int64], names: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Return :func:`judge` for each named part that has windows; ``part`` ``(W,)`` holds positions in ``names``."""
    return {
        name: judge(forecast[chosen], truth[chosen], last[chosen], stride)
        for code, name in enumerate(names)
        if (chosen := part == code).any()
    }
