"""Checkpoints of the global model: safetensors beside a signed JSON sidecar, atomic and durable.

    round-00007.safetensors   the model
    round-00007.strategy      what the strategy carries from round to round, if anything, as safetensors too
    round-00007.json          what the model is and comes from, and the SHA-256 of both (shared.provenance.sidecar)

The sidecar is written last, so a checkpoint exists once its sidecar does.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors import SafetensorError

from shared.errors import StorageError
from shared.files import storage_errors, write_atomic
from shared.operating_point import OperatingPoint
from shared.provenance.ancestry import Ancestry
from shared.provenance.bounded import read_bounded
from shared.provenance.sidecar import Sidecar, read_sidecar, write_sidecar
from shared.provenance.signing import signed

if TYPE_CHECKING:
    from torch import nn

State = Mapping[str, npt.NDArray[np.floating]]
_KEPT = 2
_STRATEGY = ".strategy"


@dataclass(frozen=True)
class Checkpoint:
    """A saved global model.

    Attributes:
        run: The run it belongs to.
        round: Rounds aggregated so far.
        task: What the model does.
        plan_digest: Of the run's plan.
        sha256: Of the weights file.
        path: The weights file.
        strategy_sha256: Of the strategy's state, if it has one.
        epsilon: What no patient has spent more than at ``delta``, over all that the model comes from; ``None`` where
            nothing is guaranteed.
        delta: At which epsilon holds.
        ancestry: What the model comes from; ``None`` in checkpoints of earlier versions.
        operating_point: How the model's score is read, if the task decides and reference patients judged it.
    """

    run: str
    round: int
    task: str
    plan_digest: str
    sha256: str
    path: Path
    strategy_sha256: str | None = None
    epsilon: float | None = None
    delta: float | None = None
    ancestry: Ancestry | None = None
    operating_point: OperatingPoint | None = None


def save_checkpoint(
    folder: Path,
    model: "nn.Module",
    *,
    run: str,
    number: int,
    task: str,
    plan_digest: str,
    strategy_state: State | None = None,
    epsilon: float | None = None,
    delta: float | None = None,
    ancestry: Ancestry | None = None,
    operating_point: OperatingPoint | None = None,
    signer: Ed25519PrivateKey | None = None,
) -> Checkpoint:
    """Write the model's and the strategy's state after round ``number``; forget all but the latest checkpoints.

    Raises:
        StorageError: If the folder cannot be written.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    from safetensors.torch import save

    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()})
    path = folder / f"round-{number:05d}.safetensors"
    carried = safetensors.numpy.save(dict(strategy_state)) if strategy_state else None
    sidecar = Sidecar(
        task=task,
        sha256=hashlib.sha256(content).hexdigest(),
        run=run,
        round=number,
        plan_digest=plan_digest,
        path=path.name,
        strategy_sha256=None if carried is None else hashlib.sha256(carried).hexdigest(),
        epsilon=epsilon,
        delta=delta,
        ancestry=ancestry,
        operating_point=operating_point,
    )
    write_atomic(path, content)
    if carried is not None:
        write_atomic(path.with_suffix(_STRATEGY), carried)
    write_sidecar(path.with_suffix(".json"), signed(sidecar, signer) if signer else sidecar)
    for old in sorted(folder.glob("round-*.json"))[:-_KEPT]:
        old.unlink()
        old.with_suffix(".safetensors").unlink(missing_ok=True)
        old.with_suffix(_STRATEGY).unlink(missing_ok=True)
    return _checkpoint(sidecar, path)


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest complete checkpoint in ``folder``, or ``None``.

    Raises:
        StorageError: If a sidecar is damaged, or names other weights than those beside it.
    """
    sidecars = sorted(folder.glob("round-*.json"))
    if not sidecars:
        return None
    try:
        return _checkpoint(read_sidecar(sidecars[-1]), sidecars[-1].with_suffix(".safetensors"))
    except StorageError as error:
        raise StorageError(f"The checkpoint description {sidecars[-1]} is damaged; remove it. {error}") from error


def _checkpoint(sidecar: Sidecar, weights: Path) -> Checkpoint:
    """Return a checkpoint whose weights are the file beside the sidecar, and no other that either of them names."""
    if sidecar.run is None or sidecar.round is None or sidecar.plan_digest is None:
        raise StorageError("It lacks run, round or plan_digest.")
    if sidecar.path != weights.name or weights.is_symlink():
        raise StorageError("It names weights that are not the file beside it.")
    return Checkpoint(
        run=sidecar.run,
        round=sidecar.round,
        task=sidecar.task,
        plan_digest=sidecar.plan_digest,
        sha256=sidecar.sha256,
        path=weights,
        strategy_sha256=sidecar.strategy_sha256,
        epsilon=sidecar.epsilon,
        delta=sidecar.delta,
        ancestry=sidecar.ancestry,
        operating_point=sidecar.operating_point,
    )


def load_weights(path: Path, model: "nn.Module", sha256: str | None = None) -> str:
    """Load a safetensors file into the model and return the file's SHA-256.

    Raises:
        StorageError: If the file is missing, damaged, not the expected one, of another model, or a hospital's own, or
            a weight is not finite or larger than any trained model's.
    """
    from shared.personal import is_personal
    from shared.provenance.tensors import load_into, read_weights

    weights = read_weights(path)
    _require_same(path, weights.sha256, sha256)
    if is_personal(weights.metadata):
        raise StorageError(
            f"{path} was fitted to patients of one hospital without privacy. It must stay there and starts no run."
        )
    load_into(model, weights)
    return weights.sha256


def checkpoint_sha256(path: Path) -> str:
    """Return the SHA-256 of a weights file, by which a plan names it.

    Raises:
        StorageError: If it cannot be read.
    """
    with storage_errors(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()


def load_strategy(checkpoint: Checkpoint) -> State:
    """Return the strategy's state as it was saved; empty if there was none.

    Raises:
        StorageError: If the file is missing, damaged or not the expected one.
    """
    if checkpoint.strategy_sha256 is None:
        return {}
    from shared.provenance.tensors import MOST_BYTES

    path = checkpoint.path.with_suffix(_STRATEGY)
    content = read_bounded(path, MOST_BYTES)
    _require_same(path, hashlib.sha256(content).hexdigest(), checkpoint.strategy_sha256)
    try:
        return dict(safetensors.numpy.load(content))
    except (SafetensorError, ValueError) as error:
        raise StorageError(f"{path} does not hold a strategy's state.") from error


def _require_same(path: Path, found: str, wanted: str | None) -> None:
    if wanted not in (None, found):
        raise StorageError(f"The checkpoint {path} was changed after it was written.")
