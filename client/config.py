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
        simulation_seed: Makes noise repeatable and therefore worthless as privacy: simulations only.
    """

    name: str
    declared_patients: int
    tasks: tuple[str, ...]
    max_epsilon: float
    max_delta: float
    min_noise_multiplier: float = 0.3
    max_grad_norm: float = 10.0
    max_sample_rate: float = 1.0
    simulation_seed: int | None = None

    def __post_init__(self) -> None:
        if not self.name or self.declared_patients < 1 or not 0 < self.max_delta < 1 or not self.max_epsilon > 0:
            raise PolicyError("site.toml needs a name, declared-patients ≥ 1, max-epsilon > 0, 0 < max-delta < 1.")

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
        known = {field.name.replace("_", "-"): field for field in fields(cls)}
        if unknown := sorted(set(raw) - set(known)):
            raise PolicyError(f"{path} has unknown keys: {', '.join(unknown)}.")
        try:
            return cls(**{known[key].name: _typed(value) for key, value in raw.items()})
        except TypeError as error:
            raise PolicyError(f"{path} lacks a key or has one of the wrong type.") from error

    def write(self, path: Path) -> None:
        """Write the policy as TOML."""
        lines = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                lines.append(f"{field.name.replace('_', '-')} = {_toml(value)}\n")
        write_atomic(path, "".join(lines).encode())


def _typed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _toml(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return f'"{value}"' if isinstance(value, str) else repr(value)
