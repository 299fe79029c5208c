"""Days of simulated patients: meals, insulin, rescue sugar, and what their sensors write.

Doses and meals go together, but not always: carbohydrates are guessed, boluses forgotten, snacks eaten without one,
doses given for nothing that is eaten. Food is noted when the bolus for it is given, as pumps and pens ask for it, and
by those who take none when it is eaten. Only what varies by itself can teach a forecaster what insulin and food do;
``Behaviour`` says how much does.

The sensor lags (``Body.interstitial``), has a gain and an offset for each wear, and an autocorrelated error, after
Breton and Kovatchev, "Analysis, modeling, and simulation of the accuracy of continuous glucose sensors", J Diabetes
Sci Technol 2008, 2(5):853-862, with the smaller error of present sensors (Facchinetti et al., Med Biol Eng Comput
2015, 53:1259-1269).
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from shared.tasks.cgm import STEP_MIN
from simulations.generators.glucose_model import TYPES, Body, Physiology, Vector, draw_physiology

DAY_MIN: Final = 1440
SENSOR_LIMITS: Final = (40.0, 400.0)
WEAR_DAYS: Final = 10
WARM_UP_MIN: Final = 120
Grid = npt.NDArray[np.float32]

_MEALS: Final = ((450.0, 40.0, 0.90), (750.0, 55.0, 0.93), (1130.0, 65.0, 0.97))
"""Minute of the day, grams, and how often it is eaten."""
_MOST_G: Final = 130.0
_SNACK_G: Final = 20.0
_IDLE_UNITS: Final = (0.5, 4.0)
_APPETITE: Final = dict(zip(TYPES, (1.0, 0.95, 1.0), strict=True))
_TARGET_MG_DL: Final = 120.0
_AWAKE: Final = (400, 1390)
_RESCUE_G: Final = 16.0
_RESCUE_PAUSE_MIN: Final = 20


@dataclass(frozen=True)
class Days:
    """What P patients' exports hold: T readings of each, ``STEP_MIN`` apart.

    Attributes:
        types: ``(P,)`` positions in ``TYPES``.
        readings: float32 ``(T, P)`` mg/dL, NaN where the sensor wrote nothing.
        insulin: float32 ``(T, P)`` fast-acting units in the step that ends at the reading.
        carbohydrate: float32 ``(T, P)`` grams that the patient noted in that step.
        start_min: ``(P,)`` minute of the first reading after midnight of the first day.
    """

    types: npt.NDArray[np.int64]
    readings: Grid
    insulin: Grid
    carbohydrate: Grid
    start_min: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Behaviour:
    """How far doses and meals vary by themselves.

    Attributes:
        missed_meals: Share of meals whose bolus is forgotten.
        missed_snacks: Share of snacks without a bolus.
        count_error: Logarithmic standard deviation of the grams that are noted and dosed for.
        snacks_a_day: At most one.
        idle_doses_a_day: Doses that no meal and no high value asked for, such as for a meal that was then not eaten.
        trial_doses_a_day: Doses at random times given to everybody, those too who never inject: nobody's habit, but
            from them a forecaster can learn what a dose does.
    """

    missed_meals: float = 0.06
    missed_snacks: float = 0.35
    count_error: float = 0.30
    snacks_a_day: float = 0.8
    idle_doses_a_day: float = 0.1
    trial_doses_a_day: float = 0.0


ORDINARY: Final = Behaviour()


@dataclass(frozen=True)
class _Habits:
    """What is decided before the days begin, minute by minute ``(minutes, P)``."""

    meals_g: Grid
    boluses_for_g: Grid
    notes_g: Grid
    idle_units: Grid


def simulate_days(
    types: npt.NDArray[np.int64], days: int, rng: np.random.Generator, behaviour: Behaviour = ORDINARY
) -> Days:
    """Simulate patients of the given types; the first day is spun up and not returned.

    Args:
        types: ``(P,)`` positions in ``TYPES``.
        days: Days of readings.
        rng: Consumed.
        behaviour: How the patients eat and dose.
    """
    physiology = draw_physiology(types, rng)
    habits = _draw_habits(physiology.injects, types, days + 1, behaviour, rng)
    interstitial, insulin, carbohydrate = _live(physiology, habits, rng)
    first = DAY_MIN // STEP_MIN
    return Days(
        types=types,
        readings=_sense(interstitial[first:], rng),
        insulin=insulin[first:],
        carbohydrate=carbohydrate[first:],
        start_min=rng.integers(0, STEP_MIN, len(types)),
    )


def _draw_habits(
    injects: npt.NDArray[np.bool_],
    types: npt.NDArray[np.int64],
    days: int,
    behaviour: Behaviour,
    rng: np.random.Generator,
) -> _Habits:
    """Draw the times and sizes of meals, what is noted of them, and when and for how much is injected."""
    people, minutes = len(types), days * DAY_MIN
    habits = _Habits(*(np.zeros((minutes, people), np.float32) for _ in range(4)))
    appetite = np.array([_APPETITE[kind] for kind in TYPES])[types] * np.exp(0.2 * rng.standard_normal(people))
    # A carbohydrate ratio that is a little wrong is wrong at every meal.
    ratio_error = np.exp(0.18 * rng.standard_normal(people))

    def eat(at: Vector, grams: Vector, missed: float) -> None:
        guessed = grams * np.exp(behaviour.count_error * rng.standard_normal(people))
        _eat(habits, at, grams, guessed, ratio_error, injects & (rng.random(people) >= missed), rng)

    for usual, grams, share in _MEALS:
        own_time = usual + 45.0 * rng.standard_normal(people)
        for day in range(days):
            at = day * DAY_MIN + own_time + 30.0 * rng.standard_normal(people)
            size = np.minimum(grams * appetite * np.exp(0.35 * rng.standard_normal(people)), _MOST_G)
            eat(at, np.where(rng.random(people) < share, size, 0.0), behaviour.missed_meals)
    for day in range(days):
        at = day * DAY_MIN + rng.uniform(600.0, 1320.0, people)
        size = _SNACK_G * np.exp(0.3 * rng.standard_normal(people))
        eat(at, np.where(rng.random(people) < behaviour.snacks_a_day, size, 0.0), behaviour.missed_snacks)
    rate = behaviour.idle_doses_a_day * injects + behaviour.trial_doses_a_day
    idle = rng.random((minutes, people)) < rate / DAY_MIN
    habits.idle_units[idle] = rng.uniform(*_IDLE_UNITS, idle.sum())
    return habits


def _eat(
    habits: _Habits,
    at: Vector,
    grams: Vector,
    guessed: Vector,
    ratio_error: Vector,
    boluses: npt.NDArray[np.bool_],
    rng: np.random.Generator,
) -> None:
    """Enter one meal of everybody, the bolus for it, early or late, and the note that comes with the bolus."""
    minutes, people = habits.meals_g.shape
    who = np.arange(people)
    delay = np.clip(rng.normal(-3.0, 10.0, people), -15, 30)
    eaten = np.clip(at, 0, minutes - 1).astype(int)
    dosed = np.clip(at + delay, 0, minutes - 1).astype(int)
    habits.meals_g[eaten, who] += grams
    habits.boluses_for_g[dosed, who] += guessed * ratio_error * boluses
    habits.notes_g[np.where(boluses, dosed, eaten), who] += guessed


def _live(physiology: Physiology, habits: _Habits, rng: np.random.Generator) -> tuple[Grid, Grid, Grid]:
    """Run the patients through their days; return interstitial glucose, doses and notes of food at every reading."""
    minutes, people = habits.meals_g.shape
    body = Body(physiology, rng)
    per_gram, per_mg_dl = 1.0 / physiology.carbohydrate_g_per_unit, 1.0 / physiology.correction_mg_dl_per_unit
    glucose, insulin, carbohydrate = (np.zeros((minutes // STEP_MIN, people), np.float32) for _ in range(3))
    rested = np.zeros(people)
    for minute in range(minutes):
        step = minute // STEP_MIN
        if (meal := habits.meals_g[minute]).any():
            body.eat(meal, np.exp(0.25 * rng.standard_normal(people)))
        carbohydrate[step] += habits.notes_g[minute]
        excess = (body.interstitial - _TARGET_MG_DL) * per_mg_dl
        asked = np.zeros(people)
        if (counted := habits.boluses_for_g[minute]).any():
            correction = np.where(excess > 0, np.maximum(excess - np.maximum(body.insulin_on_board, 0.0), 0.0), excess)
            asked = np.where(counted > 0, np.maximum(counted * per_gram + correction, 0.0), 0.0)
        if minute % STEP_MIN == 0:
            awake = _AWAKE[0] <= minute % DAY_MIN <= _AWAKE[1]
            asked += _correct(body, excess, 0.02 if awake else 0.002, rng)
            sugar = _rescue(body, rested, 0.15 if awake else 0.04, rng)
            rested = np.where(sugar > 0, _RESCUE_PAUSE_MIN, rested - STEP_MIN)
            body.drink(sugar)
            carbohydrate[step] += sugar
        # Pens and pumps dose in tenths of a unit.
        dose = np.round(habits.idle_units[minute] + np.where(physiology.injects, asked, 0.0), 1)
        body.inject(dose)
        insulin[step] += dose
        body.step(minute % DAY_MIN)
        if minute % STEP_MIN == STEP_MIN - 1:
            glucose[step] = body.interstitial
    return glucose, insulin, np.round(carbohydrate).astype(np.float32)


def _correct(body: Body, excess: Vector, chance: float, rng: np.random.Generator) -> Vector:
    """Return the doses of those who see a high value and act; at times too much."""
    acts = (body.interstitial > 220.0) & (rng.random(len(excess)) < chance)
    wanted = (excess - body.insulin_on_board) * np.exp(0.3 * rng.standard_normal(len(excess)))
    return np.where(acts & (wanted > 0.5), wanted, 0.0)


def _rescue(body: Body, rested: Vector, chance: float, rng: np.random.Generator) -> Vector:
    """Return the sugar that those take who feel a low."""
    acts = (body.interstitial < 68.0) & (rested <= 0) & (rng.random(len(rested)) < chance)
    return np.where(acts & body.p.injects, _RESCUE_G, 0.0)


def _sense(interstitial: Grid, rng: np.random.Generator) -> Grid:
    """Return what the sensors write: NaN in gaps and while a new sensor warms up."""
    steps, people = interstitial.shape
    wear = WEAR_DAYS * DAY_MIN // STEP_MIN
    age = (np.arange(steps)[:, None] + rng.integers(0, wear, people)) // wear
    gain, offset = (rng.standard_normal((age.max() + 1, people)) for _ in range(2))
    who = np.arange(people)
    error = _autoregressive(rng.standard_normal((steps, people)), 0.85)
    values = interstitial * (1.0 + 0.05 * gain[age, who] + 0.012 * error) + 2.0 * offset[age, who] + 1.2 * error
    changed = np.zeros((steps, people), bool)
    changed[1:] = age[1:] != age[:-1]
    lost = _spread(changed, np.full((steps, people), WARM_UP_MIN // STEP_MIN))
    lost |= _spread(rng.random((steps, people)) < 0.0015, 1 + rng.geometric(0.15, (steps, people)))
    clipped = np.clip(np.round(values), *SENSOR_LIMITS)
    return np.where(lost, np.nan, clipped).astype(np.float32)


def _autoregressive(noise: npt.NDArray[np.float64], keep: float) -> npt.NDArray[np.float64]:
    """Turn white noise into AR(1) noise of unit variance."""
    error = noise.copy()
    for step in range(1, len(error)):
        error[step] = keep * error[step - 1] + np.sqrt(1 - keep**2) * noise[step]
    return error


def _spread(starts: npt.NDArray[np.bool_], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Mark ``lengths`` steps from each start on."""
    rows = np.arange(len(starts))[:, None]
    return rows < np.maximum.accumulate(np.where(starts, rows + lengths, 0), axis=0)
