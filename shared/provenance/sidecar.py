"""What a checkpoint says of itself: the JSON beside a weights file, its one format and its one parser.

Version 1 may carry a signature of the aggregator (:mod:`shared.provenance.signing`). Version 0, without the field
``version``, is what was written before; it is read, is never signed, and its origin is unknown.

A file is written by the same rules as it is read by: what this module writes it also reads.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from shared.errors import PlanError, StorageError
from shared.files import write_atomic
from shared.operating_point import OperatingPoint
from shared.provenance.ancestry import Ancestry, PastRun, Share
from shared.provenance.bounded import MOST_JSON_BYTES, is_bare, parse_json, read_bounded
from shared.provenance.fields import (
    Check,
    a_count,
    a_digest,
    a_flag,
    a_name,
    checked,
    hex_digits,
    list_of,
    number_in,
    text_that,
    words,
)

VERSION: Final = 1
_MOST_METRICS: Final = 4096
_LONGEST_SENTENCE: Final = 1000
_DOMAIN: Final = b"fedward checkpoint\n"
"""Signed first, so that a signature of this key over anything else is none of a checkpoint."""


@dataclass(frozen=True)
class Signature:
    """The aggregator's word for all other fields.

    Attributes:
        key_sha256: Of the public key's 32 bytes.
        value: Ed25519, hex.
    """

    key_sha256: str
    value: str


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """What a checkpoint says of itself. What is None is not in the file.

    Attributes:
        task: What the model does.
        sha256: Of the weights file.
        version: Of the format.
        run: The run it belongs to.
        round: Rounds aggregated so far.
        plan_digest: Of the run's plan.
        path: The weights' file name, in the sidecar's own folder.
        strategy_sha256: Of the strategy's state.
        epsilon: What no patient has spent more than at ``delta``, over the whole ancestry; None for no promise.
        delta: At which epsilon holds.
        ancestry: What the model comes from; None for unknown.
        operating_point: How its scores become decisions.
        personal: Whether it was fitted to one hospital's own patients, without privacy.
        base: SHA-256 of the weights that it was fitted from.
        salt: Of the pseudonym of its patient, hex.
        patient: That pseudonym, or ``everybody``.
        rounds: Of an exported model, as ``round``.
        sites: Of an exported model: how many hospitals took part.
        onnx_sha256: Of the ONNX file beside an exported model.
        onnx_differs_by: Its largest difference from torch.
        metrics: Of an exported model, on held-out patients.
        warnings: Of an exported model: sentences that its user should read first.
        signature: The aggregator's.
    """

    task: str
    sha256: str
    version: int = VERSION
    run: str | None = None
    round: int | None = None
    plan_digest: str | None = None
    path: str | None = None
    strategy_sha256: str | None = None
    epsilon: float | None = None
    delta: float | None = None
    ancestry: Ancestry | None = None
    operating_point: OperatingPoint | None = None
    personal: bool | None = None
    base: str | None = None
    salt: str | None = None
    patient: str | None = None
    rounds: int | None = None
    sites: int | None = None
    onnx_sha256: str | None = None
    onnx_differs_by: float | None = None
    metrics: Mapping[str, Any] | None = None
    warnings: tuple[str, ...] | None = None
    signature: Signature | None = None

    def signed_bytes(self) -> bytes:
        """Return what a signature covers: every field but itself, in the one canonical form."""
        values = _plain(replace(self, signature=None))
        return _DOMAIN + json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

    def to_json(self) -> bytes:
        """Return the file's content.

        Raises:
            StorageError: If it holds what the parser would refuse.
        """
        content = json.dumps(_plain(self), indent=1, sort_keys=True, allow_nan=False).encode()
        parse_sidecar(content, "The checkpoint's description")
        return content


def read_sidecar(path: Path) -> Sidecar:
    """Read a sidecar.

    Raises:
        StorageError: If it is missing, out of bounds or does not describe a checkpoint.
    """
    return parse_sidecar(read_bounded(path, MOST_JSON_BYTES), path.name)


def write_sidecar(path: Path, sidecar: Sidecar, *, private: bool = False) -> None:
    """Write a sidecar, for its owner's eyes only if ``private``. Raises StorageError."""
    write_atomic(path, sidecar.to_json(), private=private)


def parse_sidecar(content: bytes, what: str) -> Sidecar:
    """Return what a sidecar says; every field is of its type and within its limits.

    Raises:
        StorageError: Naming the field that is not.
    """
    values = parse_json(content, what)
    version = values.get("version", 0)
    if version not in (0, VERSION) or isinstance(version, bool):
        raise StorageError(f"{what} is of another version of Fedward; this one reads version {VERSION}.")
    if version == 0:  # written before there were versions; null stood for what is absent
        values = {name: value for name, value in values.items() if value is not None and name in _BEFORE_VERSIONS}
    try:
        return Sidecar(**checked(values, _FIELDS, required=("task", "sha256")) | {"version": version})
    except (ValueError, PlanError) as error:
        raise StorageError(
            f"{what} does not describe a checkpoint: {error}. Copy it together with the weights."
        ) from error


def parse_ancestry(content: bytes, what: str) -> Ancestry:
    """Return the ancestry in a file of its own. Raises StorageError."""
    try:
        return _ancestry(parse_json(content, what))
    except (ValueError, PlanError) as error:
        raise StorageError(f"{what} does not describe an ancestry: {error}.") from error


def ancestry_json(ancestry: Ancestry) -> bytes:
    """Return an ancestry as the content of a file of its own."""
    return json.dumps(_plain(ancestry), indent=1, sort_keys=True, allow_nan=False).encode()


def _plain(value: Any) -> Any:
    """Return a dataclass as plain JSON values, without what is None."""
    return _without_none(asdict(value))


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        # A metric that is undefined stays there as null.
        return {
            key: part if key == "metrics" else _without_none(part) for key, part in value.items() if part is not None
        }
    return [_without_none(part) for part in value] if isinstance(value, list | tuple) else value


def _metrics(value: Any) -> Mapping[str, Any]:
    """Metrics are shown to people only: numbers by name, or tables of them."""
    left = [_MOST_METRICS]

    def check(part: Any) -> Any:
        left[0] -= 1
        if isinstance(part, dict) and left[0] > 0:
            return {name: check(inner) for name, inner in part.items()}
        if (part is not None and type(part) not in (int, float)) or left[0] <= 0:
            raise ValueError
        return part

    if not isinstance(value, dict):
        raise ValueError
    plain: Mapping[str, Any] = check(value)
    return plain


def _sentence(value: Any) -> str:
    return text_that(value, lambda text: len(text) <= _LONGEST_SENTENCE)


def _share(value: Any) -> Share:
    checks = {"site": a_name, "steps": a_count, "key_sha256": a_digest}
    return Share(**checked(value, checks, required=("site", "steps")))


def _past_run(value: Any) -> PastRun:
    checks: dict[str, Check] = {
        "run": a_name,
        "plan_digest": words,
        "sample_rate": number_in(0.0, 1.0),
        "noise_multiplier": number_in(0.0, math.inf),
        "delta": number_in(0.0, 1.0),
        "sites": lambda sites: list_of(sites, _share),
    }
    return PastRun(**checked(value, checks))


def _ancestry(value: Any) -> Ancestry:
    checks: dict[str, Check] = {
        "origin": a_name,
        "start_sha256": a_digest,
        "said_by": words,
        "runs": lambda runs: list_of(runs, _past_run),
    }
    return Ancestry(**checked(value, checks, required=("origin", "runs")))


def _signature(value: Any) -> Signature:
    return Signature(**checked(value, {"key_sha256": a_digest, "value": hex_digits}))


_FIELDS: Final[Mapping[str, Check]] = {
    "task": a_name,
    "sha256": a_digest,
    "version": a_count,
    "run": a_name,
    "round": a_count,
    "plan_digest": words,
    "path": lambda value: text_that(value, is_bare),
    "strategy_sha256": a_digest,
    "epsilon": number_in(0.0, 1e6),
    "delta": number_in(0.0, 1.0),
    "ancestry": _ancestry,
    "operating_point": OperatingPoint.parse,
    "personal": a_flag,
    "base": a_digest,
    "salt": hex_digits,
    "patient": a_name,
    "rounds": a_count,
    "sites": a_count,
    "onnx_sha256": a_digest,
    "onnx_differs_by": number_in(0.0, 1e9),
    "metrics": _metrics,
    "warnings": lambda sentences: list_of(sentences, _sentence),
    "signature": _signature,
}
_BEFORE_VERSIONS: Final = frozenset(_FIELDS) - {"version", "ancestry", "signature"}
