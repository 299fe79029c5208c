"""A hospital's own rules, ``site.toml``: local law that no server overrides.

``fedward-site init`` writes every key with a comment on it. Where plan and site differ, the stricter wins: what the
site permits less of than the plan asks for is refused with a code.
"""

import hashlib
import json
import tomllib
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from client.budget import Cap
from client.hours import DAYS, Hours
from shared.drafting import DELTA_SHARE
from shared.errors import PolicyError, StorageError
from shared.files import write_atomic
from shared.provenance.bounded import is_name
from shared.suggest import suggestion
from shared.tasks.registry import task_names

COMMENTS = {
    "name": "Public name of this site, as it is enrolled at the server.",
    "declared_patients": "Public, coarse number of patients, fixed at enrolment: never the true count.",
    "tasks": "What may be trained here. init lists every installed task; strike out what you do not want.",
    "max_epsilon": "Cap on everything ever released, all runs and tasks composed. When it is reached, nothing more.",
    "max_delta": "Delta of that cap, and the largest of a plan. Default: a tenth of 1/declared-patients.",
    "min_noise_multiplier": "Least noise, as a multiple of the clipping norm; 0 would permit training without privacy.",
    "max_grad_norm": "Largest clipping norm of one patient's gradient.",
    "max_sample_rate": "Largest probability of a patient joining a step; 1 permits every rate.",
    "max_weights_norm": "Largest L2 norm of the weights that the server may send. A trained model stays far below.",
    "hours": 'When new rounds may train: "any", or with its offset from UTC, e.g. "22:00-06:00 +01:00".',
    "days": "Weekdays on which those hours begin.",
    "augment_with": "Checkpoint of ct-synthesis that adds synthetic patients to nodule-classification; empty for none.",
    "augment_patients": "How many synthetic patients it adds. They cost no privacy; see client/augmentation.py.",
    "server": 'Where the server listens, "host:port". Its certificate must come from ca.crt in this folder.',
    "proxy": 'HTTP proxy towards the server, "http://host:port"; empty for none.',
    "keep_alive_s": "A sign of life after so many idle seconds, so that a firewall keeps the connection.",
    "health_port": "Port of /healthz and /metrics on this machine's loopback; 0 lets the system choose.",
    "threads": "Threads that train here; 0 for one a core. The setting OMP_NUM_THREADS does not count.",
    "max_message_mib": "Larger weights from the server are refused, in MiB.",
}
_AUTOMATIC = 0.0


@dataclass(frozen=True, kw_only=True)
class SitePolicy:
    """What this hospital permits, and how it reaches the server. ``COMMENTS`` says what each key means."""

    name: str
    declared_patients: int
    tasks: tuple[str, ...]
    max_epsilon: float
    max_delta: float = _AUTOMATIC
    min_noise_multiplier: float = 0.3
    max_grad_norm: float = 10.0
    max_sample_rate: float = 1.0
    max_weights_norm: float = 1e4
    hours: str = "any"
    days: tuple[str, ...] = DAYS
    augment_with: str = ""
    augment_patients: int = 200
    server: str = ""
    proxy: str = ""
    keep_alive_s: float = 60.0
    health_port: int = 0
    threads: int = 0
    max_message_mib: int = 256

    def __post_init__(self) -> None:
        if self.max_delta == _AUTOMATIC and self.declared_patients >= 1:
            object.__setattr__(self, "max_delta", DELTA_SHARE / self.declared_patients)
        rules = {
            "name must be letters, digits, dots, dashes or underscores": is_name(self.name),
            "declared-patients must be at least 1": self.declared_patients >= 1,
            "max-epsilon must be positive": self.max_epsilon > 0.0,
            "max-delta must be positive and at most 1/declared-patients": (
                0.0 < self.max_delta <= 1.0 / self.declared_patients if self.declared_patients >= 1 else False
            ),
            "min-noise-multiplier must not be negative": self.min_noise_multiplier >= 0.0,
            "max-grad-norm must be positive": self.max_grad_norm > 0.0,
            "max-sample-rate must lie in (0, 1]": 0.0 < self.max_sample_rate <= 1.0,
            "max-weights-norm must be positive": self.max_weights_norm > 0.0,
            "augment-patients must lie between 1 and 10000": 1 <= self.augment_patients <= 10_000,
            'server must be "host:port"': not self.server or is_address(self.server),
            'proxy must be "http://host:port"': not self.proxy or is_address(self.proxy.removeprefix("http://")),
            "keep-alive-s must lie between 10 and 7200": 10.0 <= self.keep_alive_s <= 7200.0,
            "health-port must lie between 0 and 65535": 0 <= self.health_port <= 65_535,
            "threads must lie between 0 and 1024": 0 <= self.threads <= 1024,
            "max-message-mib must lie between 1 and 256": 1 <= self.max_message_mib <= 256,
        }
        if broken := [rule for rule, holds in rules.items() if not holds]:  # NaN holds nowhere
            raise PolicyError(f"site.toml is wrong: {'; '.join(broken)}.")
        _ = self.opening_hours

    @cached_property
    def opening_hours(self) -> Hours:
        """When new rounds may train."""
        return Hours.parse(self.hours, self.days)

    @property
    def cap(self) -> Cap:
        """What may ever be released."""
        return Cap(self.max_epsilon, self.max_delta)

    @property
    def digest(self) -> str:
        """SHA-256 of all values: the audit log's name for these rules."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

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
        for table in ("glucose", "intake"):  # how exports are read, which only intake asks
            raw.pop(table, None)
        known = {field.name.replace("_", "-"): field for field in fields(cls)}
        if unknown := sorted(set(raw) - set(known)):
            raise PolicyError(
                f"{path} has unknown keys: {', '.join(unknown)}. The keys are: {', '.join(known)}."
                f"{suggestion(unknown[0], known)}"
            )
        if missing := sorted(key for key, field in known.items() if field.default is MISSING and key not in raw):
            raise PolicyError(f"{path} lacks {', '.join(missing)}. Write it as 'fedward-site init' does.")
        values = {known[key].name: _typed(key, value, known[key].type) for key, value in raw.items()}
        policy = cls(**values)
        if strangers := [task for task in policy.tasks if task not in task_names()]:
            raise PolicyError(
                f"{path} permits tasks that are not installed here: {', '.join(strangers)}. The tasks are: "
                f"{', '.join(task_names())}.{suggestion(strangers[0], task_names())}"
            )
        return policy

    def write(self, path: Path) -> None:
        """Write every key, with a comment on each. Raises StorageError."""
        keys = [
            f"# {COMMENTS[field.name]}\n{field.name.replace('_', '-')} = {_toml(getattr(self, field.name))}\n"
            for field in fields(self)
        ]
        write_atomic(path, ("# What this hospital permits. No server overrides it.\n\n" + "\n".join(keys)).encode())


def is_address(text: str) -> bool:
    """Whether this is ``host:port``; an IPv6 address stands in brackets."""
    host, colon, port = text.rpartition(":")
    plausible = bool(host) and host.isascii() and host.isprintable() and " " not in host and "/" not in host
    return bool(colon) and plausible and port.isascii() and port.isdigit() and 0 < int(port) <= 65_535


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
    return json.dumps(value) if isinstance(value, str) else repr(value)
