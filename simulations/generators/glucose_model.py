"""A model of glucose and insulin for many patients at once, in steps of a minute.

- Glucose and insulin action: Bergman's minimal model (Bergman, Ider, Bowden and Cobelli, "Quantitative estimation
  of insulin sensitivity", Am J Physiol 1979, 236(6):E667-E677).
- Absorption of meals and of subcutaneous insulin, and glucose lost with urine: Hovorka et al., "Nonlinear model
  predictive control of glucose concentration in subjects with type 1 diabetes", Physiol Meas 2004, 25(4):905-920:
  two compartments each, with its constants as centres of the patients' distributions.
- Own insulin (type 2, healthy): a secretion that follows glucose and its rise, after Toffolo et al., Diabetes 1980,
  29(12):979-990, and Breda et al., Diabetes 2001, 50(1):150-158, without their delay.
- Insulin sensitivity changes with the time of day (dawn; Hinshaw et al., Diabetes 2013, 62(7):2223-2229) and slowly
  at random; Wilinska et al., J Diabetes Sci Technol 2010, 4(1):132-144, vary a virtual population likewise.

    G' = -(S_G + X) G + S_G G_b + Ra / V_G - renal(G) + counter-regulation(G) + w      mg/dL a minute
    X' = -p2 (X - S_I(t) (I - I_b))
    I' = -k_e I + (S2 / t_I) / V_I + secretion(G, G')                                  mU/L a minute
    S1' = doses - S1 / t_I,   S2' = (S1 - S2) / t_I                                    mU
    D1' = 1000 A_G meals - D1 / t_G,   D2' = (D1 - D2) / t_G,   Ra = D2 / t_G          mg
    C' = (G - C) / t_C                                                                 interstitial fluid

The random drift w is what the model does not explain: exercise, stress, hormones.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]

TYPES: Final = ("type1", "type2", "healthy")
ELIMINATION_PER_MIN: Final = 0.138
INSULIN_VOLUME_L_PER_KG: Final = 0.12
GLUCOSE_VOLUME_DL_PER_KG: Final = 1.6
BIOAVAILABILITY: Final = 0.8
RENAL_THRESHOLD_MG_DL: Final = 162.0
RENAL_PER_MIN: Final = 0.003
ACTION_PER_MIN: Final = 0.028
COUNTER_BELOW_MG_DL: Final = 72.0
LASTING: Final = 0.45
"""Share of a unit's action that shows: the rest is undone by glucose effectiveness during the hours it takes."""
DRIFT_CORRELATION_MIN: Final = 60.0
SENSITIVITY_CORRELATION_MIN: Final = 480.0

# Median and logarithmic standard deviation, by type. Calibrated so that the readings agree with the published
# summaries that the tests cite.
_PARAMETERS: Final[dict[str, dict[str, tuple[float, float]]]] = {
    "effectiveness_per_min": {"type1": (0.009, 0.15), "type2": (0.012, 0.15), "healthy": (0.018, 0.15)},
    "sensitivity": {"type1": (3.6e-4, 0.30), "type2": (2.4e-4, 0.30), "healthy": (7.0e-4, 0.25)},
    "basal_glucose": {"type1": (166.0, 0.14), "type2": (120.0, 0.16), "healthy": (93.0, 0.05)},
    "basal_insulin": {"type1": (13.0, 0.20), "type2": (14.0, 0.25), "healthy": (7.0, 0.25)},
    "secretion": {"type1": (1e-9, 0.0), "type2": (0.036, 0.35), "healthy": (0.13, 0.25)},
    "first_phase": {"type1": (1e-9, 0.0), "type2": (0.2, 0.35), "healthy": (1.5, 0.25)},
    "drift": {"type1": (0.44, 0.20), "type2": (0.33, 0.20), "healthy": (0.18, 0.20)},
    "sensitivity_change": {"type1": (0.42, 0.20), "type2": (0.20, 0.20), "healthy": (0.15, 0.20)},
    "dawn": {"type1": (0.22, 0.30), "type2": (0.22, 0.30), "healthy": (0.08, 0.30)},
    "weight_kg": {"type1": (74.0, 0.15), "type2": (88.0, 0.17), "healthy": (72.0, 0.15)},
    "insulin_time_min": {"type1": (55.0, 0.15), "type2": (55.0, 0.15), "healthy": (55.0, 0.15)},
    "meal_time_min": {"type1": (40.0, 0.15), "type2": (42.0, 0.15), "healthy": (38.0, 0.15)},
    "sensor_lag_min": {"type1": (9.0, 0.15), "type2": (9.0, 0.15), "healthy": (9.0, 0.15)},
}


@dataclass(frozen=True)
class Physiology:
    """Parameters of P patients, each ``(P,)``; units in the names or in the equations of the module."""

    effectiveness_per_min: Vector
    sensitivity: Vector
    basal_glucose: Vector
    basal_insulin: Vector
    secretion: Vector
    first_phase: Vector
    drift: Vector
    sensitivity_change: Vector
    dawn: Vector
    weight_kg: Vector
    insulin_time_min: Vector
    meal_time_min: Vector
    sensor_lag_min: Vector
    injects: npt.NDArray[np.bool_]

    @property
    def insulin_volume_l(self) -> Vector:
        """Distribution volume of insulin."""
        return INSULIN_VOLUME_L_PER_KG * self.weight_kg

    @property
    def glucose_volume_dl(self) -> Vector:
        """Distribution volume of glucose."""
        return GLUCOSE_VOLUME_DL_PER_KG * self.weight_kg

    @property
    def correction_mg_dl_per_unit(self) -> Vector:
        """What a unit lowers glucose by at 140 mg/dL."""
        return LASTING * self._whole_action_mg_dl_per_unit

    @property
    def carbohydrate_g_per_unit(self) -> Vector:
        """Grams that a unit covers."""
        rise_mg_dl_per_g = 1000.0 * BIOAVAILABILITY / self.glucose_volume_dl
        return self._whole_action_mg_dl_per_unit / rise_mg_dl_per_g

    @property
    def _whole_action_mg_dl_per_unit(self) -> Vector:
        exposure = 1000.0 / (ELIMINATION_PER_MIN * self.insulin_volume_l)
        return 140.0 * self.sensitivity * exposure


def draw_physiology(types: npt.NDArray[np.int64], rng: np.random.Generator) -> Physiology:
    """Draw lognormal parameters for patients of the given types.

    Args:
        types: ``(P,)`` positions in ``TYPES``.
        rng: Consumed.
    """
    drawn = {}
    for name, by_type in _PARAMETERS.items():
        median, spread = np.array([by_type[kind] for kind in TYPES]).T
        drawn[name] = median[types] * np.exp(spread[types] * rng.standard_normal(len(types)))
    return Physiology(**drawn, injects=types == TYPES.index("type1"))


class Body:
    """The state of P patients; ``step`` moves all of them by a minute."""

    def __init__(self, physiology: Physiology, rng: np.random.Generator) -> None:
        self.p, self._rng = physiology, rng
        people = len(physiology.weight_kg)
        self.glucose = physiology.basal_glucose.copy()
        self.interstitial = self.glucose.copy()
        self._action = np.zeros(people)
        self._insulin = physiology.basal_insulin.copy()
        basal_mu_per_min = physiology.basal_insulin * ELIMINATION_PER_MIN * physiology.insulin_volume_l
        # What the body does not make itself comes from a pump or a long-acting dose, always the same.
        self._basal_dose = np.where(physiology.injects, basal_mu_per_min, 0.0)
        self._own_basal = np.where(physiology.injects, 0.0, physiology.basal_insulin * ELIMINATION_PER_MIN)
        self._depot = self._basal_dose * physiology.insulin_time_min
        self._depot_2 = self._depot.copy()
        self._stomach = np.zeros(people)
        self._gut = np.zeros(people)
        self._meal_time = physiology.meal_time_min.copy()
        self._drift = np.zeros(people)
        self._mood = rng.standard_normal(people)

    @property
    def insulin_on_board(self) -> Vector:
        """Units of boluses that are still under the skin."""
        return (self._depot + self._depot_2 - 2 * self._basal_dose * self.p.insulin_time_min) / 1000.0

    def eat(self, grams: Vector, pace: Vector) -> None:
        """Add a meal; ``pace`` scales its time of absorption, for those who eat now."""
        self._stomach += 1000.0 * BIOAVAILABILITY * grams
        self._meal_time = np.where(grams > 0, self.p.meal_time_min * pace, self._meal_time)

    def drink(self, grams: Vector) -> None:
        """Add fast sugar, which needs no digestion."""
        self._gut += 1000.0 * BIOAVAILABILITY * grams

    def inject(self, units: Vector) -> None:
        """Add a dose of fast-acting insulin."""
        self._depot += 1000.0 * units

    def step(self, minute_of_day: float) -> None:
        """Move by a minute (explicit Euler; the fastest time constant is 7 minutes)."""
        p = self.p
        self._wander()
        # Least sensitive at half past six in the morning.
        dawn = 1.0 - p.dawn * np.exp(-0.5 * ((minute_of_day - 390.0) / 110.0) ** 2)
        sensitivity = p.sensitivity * dawn * np.exp(p.sensitivity_change * self._mood)
        absorbed = self._gut / self._meal_time
        arriving = self._depot_2 / p.insulin_time_min
        change = (
            p.effectiveness_per_min * (p.basal_glucose - self.glucose)
            - self._action * self.glucose
            + absorbed / p.glucose_volume_dl
            - RENAL_PER_MIN * np.maximum(self.glucose - RENAL_THRESHOLD_MG_DL, 0.0)
            + 0.025 * np.maximum(COUNTER_BELOW_MG_DL - self.glucose, 0.0)
            + self._drift
        )
        own = self._own_basal + p.secretion * (self.glucose - p.basal_glucose) + p.first_phase * np.maximum(change, 0.0)
        self._action += -ACTION_PER_MIN * (self._action - sensitivity * (self._insulin - p.basal_insulin))
        self._insulin += (
            -ELIMINATION_PER_MIN * self._insulin + arriving / p.insulin_volume_l + np.where(p.injects, 0.0, own)
        )
        self._insulin = np.maximum(self._insulin, 0.0)
        leaving = self._depot / p.insulin_time_min
        self._depot_2 += leaving - arriving
        self._depot += self._basal_dose - leaving
        emptied = self._stomach / self._meal_time
        self._gut += emptied - absorbed
        self._stomach -= emptied
        self.glucose = np.maximum(self.glucose + change, 20.0)
        self.interstitial += (self.glucose - self.interstitial) / p.sensor_lag_min

    def _wander(self) -> None:
        """Move the two random processes (Ornstein-Uhlenbeck, exact for a step of a minute)."""
        noise = self._rng.standard_normal((2, len(self.glucose)))
        keep = np.exp(-1.0 / np.array([DRIFT_CORRELATION_MIN, SENSITIVITY_CORRELATION_MIN]))
        fresh = np.sqrt(1.0 - keep**2)
        self._drift = keep[0] * self._drift + fresh[0] * self.p.drift * noise[0]
        self._mood = keep[1] * self._mood + fresh[1] * noise[1]
