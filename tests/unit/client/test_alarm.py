"""When the monitor warns: once, in time, not again until it is over, and never twice within the refractory time."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.monitor.alarm import (
    DEFAULT_RULES,
    Alarm,
    Rule,
    Stage,
    advance,
    alert_id,
    first_crossing,
    watched_path,
)
from shared.errors import PlanError

LOW, HIGH = DEFAULT_RULES
STEP_S = 300
VALUES = st.floats(40.0, 300.0)
MOMENTS = st.lists(st.tuples(VALUES, st.none() | VALUES, st.integers(1, 12)), min_size=1, max_size=60)
RULES = st.builds(
    replace, st.sampled_from(DEFAULT_RULES), hysteresis_mg_dl=st.floats(0.0, 30.0), refractory_min=st.integers(0, 120)
)


def told(rule: Rule, moments: list[tuple[float, float | None, int]]) -> list[tuple[int, Stage, int | None]]:
    """Return ``(index, stage, episode's start)`` of every alert of a record with irregular steps."""
    alarm, time_s, found = Alarm(), 0, []
    for index, (glucose, ahead, steps) in enumerate(moments):
        time_s += steps * STEP_S
        alarm, stage = advance(rule, alarm, time_s, glucose, None if ahead is None else np.array([ahead]))
        if stage is not Stage.SAFE:
            found.append((index, stage, alarm.start_s))
    return found


def times(moments: list[tuple[float, float | None, int]]) -> np.ndarray:
    return np.cumsum([steps for *_, steps in moments]) * STEP_S


@given(RULES, MOMENTS)
def test_two_alerts_are_never_closer_than_the_refractory_time(rule, moments):
    at = times(moments)[[index for index, *_ in told(rule, moments)]]
    assert (np.diff(at) >= 60 * rule.refractory_min).all()


@given(RULES, MOMENTS)
def test_an_episode_tells_each_stage_once_and_only_upwards(rule, moments):
    alerts = told(rule, moments)
    assert len({(stage, start) for _, stage, start in alerts}) == len(alerts)
    assert all(a[1] < b[1] for a, b in pairwise(alerts) if a[2] == b[2])


@given(RULES, MOMENTS)
def test_a_new_episode_needs_everything_back_beyond_the_hysteresis(rule, moments):
    for (first, _, one), (second, _, other) in pairwise(told(rule, moments)):
        calm = [
            rule.excess(glucose) < -rule.hysteresis_mg_dl
            and (ahead is None or rule.excess(ahead) < -rule.hysteresis_mg_dl)
            for glucose, ahead, _ in moments[first + 1 : second]
        ]
        assert (one != other) == any(calm)


@given(RULES, MOMENTS)
def test_what_lasts_is_told_as_soon_as_the_refractory_time_is_over(rule, moments):
    """Every reading beyond the threshold is explained by an alert of its episode, or waits for the refractory time."""
    alerts, at = told(rule, moments), times(moments)
    said = {index for index, *_ in alerts}
    for index, (glucose, _, _) in enumerate(moments):
        if rule.excess(glucose) <= 0.0 or index in said:
            continue
        before = [(i, stage) for i, stage, _ in alerts if i < index]
        assert before, "a reading beyond the threshold that nobody was told of"
        waiting = at[index] - at[before[-1][0]] < 60 * rule.refractory_min
        assert waiting or before[-1][1] is Stage.PRESENT


def test_an_alert_comes_before_the_event_and_again_when_it_is_there():
    moments = [(110.0, 90.0, 1), (100.0, 65.0, 1), (95.0, 60.0, 1), (65.0, 55.0, 6), (64.0, 80.0, 1)]
    assert [(index, stage) for index, stage, _ in told(LOW, moments)] == [(1, Stage.PREDICTED), (3, Stage.PRESENT)]


def test_a_gap_ends_the_episode_but_not_the_refractory_time():
    alarm, stage = advance(LOW, Alarm(), 0, 60.0, None)
    assert stage is Stage.PRESENT
    alarm, stage = advance(LOW, alarm, 600, 60.0, None, fresh=True)
    assert (stage, alarm.start_s) == (Stage.SAFE, 600)
    _, stage = advance(LOW, alarm, 1800, 60.0, None)
    assert stage is Stage.PRESENT


def test_what_was_told_at_another_threshold_silences_nothing():
    alarm, _ = advance(LOW, Alarm(), 0, 65.0, None)
    assert advance(LOW, alarm, 300, 45.0, None)[1] is Stage.SAFE
    lower = replace(LOW, threshold_mg_dl=54.0)
    changed, stage = advance(lower, alarm, 300, 45.0, None)
    assert stage is Stage.PRESENT
    assert changed.start_s == 300
    of_old, stage = advance(LOW, replace(alarm, threshold_mg_dl=None), 300, 65.0, None)  # a state without thresholds
    assert (stage, of_old.threshold_mg_dl) == (Stage.PRESENT, 70.0)


def test_the_watched_quantile_lies_where_the_model_says():
    forecast = np.array([[80.0, 100.0, 140.0], [60.0, 90.0, 150.0], [50.0, 80.0, 160.0]])
    for column, quantile in enumerate((0.05, 0.5, 0.95)):
        np.testing.assert_allclose(watched_path(forecast, quantile, 15), forecast[:, column])
    paths = [watched_path(forecast, quantile, 15) for quantile in np.linspace(0.05, 0.95, 19)]
    assert (np.diff(paths, axis=0) > 0).all()
    assert len(watched_path(forecast, 0.3, 10)) == 2
    assert first_crossing(LOW, watched_path(forecast, 0.05, 15)) == 10
    assert first_crossing(HIGH, watched_path(forecast, 0.5, 15)) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quantile": 0.01}, "quantile"),
        ({"quantile": float("nan")}, "quantile"),
        ({"horizon_min": 65}, "horizon"),
        ({"threshold_mg_dl": 0.0}, "threshold"),
        ({"refractory_min": -1}, "refractory"),
    ],
)
def test_an_impossible_rule_is_refused(change, said):
    with pytest.raises(PlanError, match=said):
        replace(LOW, **change)


def test_an_alerts_id_depends_on_who_what_and_when_only():
    one = alert_id(b"a" * 16, LOW, Stage.PREDICTED, 5)
    assert one == alert_id(b"a" * 16, replace(LOW, quantile=0.1), Stage.PREDICTED, 5)
    others = {
        alert_id(b"b" * 16, LOW, Stage.PREDICTED, 5),
        alert_id(b"a" * 16, HIGH, Stage.PREDICTED, 5),
        alert_id(b"a" * 16, LOW, Stage.PRESENT, 5),
        alert_id(b"a" * 16, LOW, Stage.PREDICTED, 6),
    }
    assert len(others | {one}) == 5
