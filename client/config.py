"""A hospital's own rules, ``site.toml``: local law that no server overrides.

name = "st-elsewhere"
declared-patients = 200      # a coarse public figure, never the true count
tasks = ["nodule-classification"]
max-epsilon = 8.0            # all releases ever, composed
max-delta = 0.0005
min-noise-multiplier = 0.3
max-grad-norm = 10.0
max-sample-rate = 1.0
"""

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from shared.errors import PolicyError, StorageError
from shared.files import write_atomic


@dataclass(frozen=True, kw_only=True)
class SitePolicy:
    """What this hospital permits.

    Attributes:
        name: Public name of the site.
        declared_patients: Public, coarse number of patients: normaliser of updates and weight in the average.
        tasks: Tasks that may train here.
        max_epsilon: Cap on the composition of everything ever released.
        max_delta: Largest delta at which a plan may state its epsilon.
        min_noise_multiplier: Least noise; 0 permits training without privacy.
        max_grad_norm: Largest clipping norm.
        max_sample_rate: Largest probability of a patient joining a step.
    """

    name: str
    declared_patients: int
    tasks: tuple[str, ...]
    max_epsilon: float
    max_delta: float
    min_noise_multiplier: float = 0.3
    max_grad_norm: float = 10.0
    max_sample_rate: float = 1.0

    def __post_init__(self) -> None:
        rules = {
            "name must not be empty": bool(self.name),
            "declared-patients must be at least 1": self.declared_patients >= 1,
            "max-epsilon must be positive": self.max_epsilon > 0.0,
            "max-delta must be positive and at most 1/declared-patients": (
                0.0 < self.max_delta <= 1.0 / self.declared_patients if self.declared_patients >= 1 else False
            ),
            "min-noise-multiplier must not be negative": self.min_noise_multiplier >= 0.0,
            "max-grad-norm must be positive": self.max_grad_norm > 0.0,
            "max-sample-rate must lie in (0, 1]": 0.0 < self.max_sample_rate <= 1.0,
        }
        if broken := [rule for rule, holds in rules.items() if not holds]:  # NaN holds nowhere
            raise PolicyError(f"site.toml is wrong: {'; '.join(broken)}.")

    @classmethod
    def read(cls, path: Path) -> "SitePolicy":
        """Read ``site.toml``.

        Raises:
            StorageError: If it cannot be read.
            PolicyError: If a key is missing, unknown or of the wrong type.
        """
        try:
            raw = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise StorageError(f"There is no readable site.toml at {path.parent}.") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise PolicyError(f"{path} is not valid TOML: {error}.") from error
        raw.pop("glucose", None)  # the columns of exports, which only intake reads
        known = {field.name.replace("_", "-"): field for field in fields(cls)}
        if unknown := sorted(set(raw) - set(known)):
            raise PolicyError(f"{path} has unknown keys: {', '.join(unknown)}.")
        values = {known[key].name: _typed(key, value, known[key].type) for key, value in raw.items()}
        try:
            return cls(**values)
        except TypeError as error:
            raise PolicyError(f"{path} lacks a key that has no default.") from error

    def write(self, path: Path) -> None:
        """Write the policy as TOML."""
        lines = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                lines.append(f"{field.name.replace('_', '-')} = {_toml(value)}\n")
        write_atomic(path, "".join(lines).encode())


def _typed(key: str, value: Any, kind: Any) -> Any:
    """Return the value as its field's type; a word is no list of tasks, and true is no number."""
    if kind is float and type(value) in (int, float):
        return float(value)
    if kind in (int, str) and type(value) is kind:
        return value
    if type(value) is list and all(type(item) is str for item in value) and kind not in (int, float, str):
        return tuple(value)
    raise PolicyError(f"site.toml is wrong: {key} has the wrong type.")


def _toml(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return f'"{value}"' if isinstance(value, str) else repr(value)
