"""Checkpoints of the global model: safetensors beside a JSON sidecar, atomic and durable.

    round-00007.safetensors   the model
    round-00007.strategy      what the strategy carries from round to round, if anything, as safetensors too
    round-00007.json          run, round, plan, and the SHA-256 of both

The sidecar is written last, so a checkpoint exists once its sidecar does.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from shared.errors import StorageError
from shared.files import storage_errors, write_atomic
from shared.operating_point import OperatingPoint
from shared.personal import is_personal

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
        epsilon: What no site's patients have spent more than, at ``delta``; ``None`` where nothing is guaranteed.
        delta: See :class:`shared.plan.RunPlan`.
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
    operating_point: OperatingPoint | None = None


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    *,
    run: str,
    number: int,
    task: str,
    plan_digest: str,
    strategy_state: State | None = None,
    epsilon: float | None = None,
    delta: float | None = None,
    operating_point: OperatingPoint | None = None,
) -> Checkpoint:
    """Write the model's and the strategy's state after round ``number``; forget all but the latest checkpoints.

    Raises:
        StorageError: If the folder cannot be written.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()})
    path = folder / f"round-{number:05d}.safetensors"
    carried = safetensors.numpy.save(dict(strategy_state)) if strategy_state else None
    carried_digest = None if carried is None else hashlib.sha256(carried).hexdigest()
    digest = hashlib.sha256(content).hexdigest()
    checkpoint = Checkpoint(
        run, number, task, plan_digest, digest, path, carried_digest, epsilon, delta, operating_point
    )
    write_atomic(path, content)
    if carried is not None:
        write_atomic(path.with_suffix(_STRATEGY), carried)
    sidecar = {**asdict(checkpoint), "path": path.name}
    if operating_point is None:
        del sidecar["operating_point"]
    write_atomic(path.with_suffix(".json"), json.dumps(sidecar, indent=1, sort_keys=True).encode())
    for old in sorted(folder.glob("round-*.json"))[:-_KEPT]:
        old.unlink()
        old.with_suffix(".safetensors").unlink(missing_ok=True)
        old.with_suffix(_STRATEGY).unlink(missing_ok=True)
    return checkpoint


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest complete checkpoint in ``folder``, or ``None``.

    Raises:
        StorageError: If a sidecar is damaged.
    """
    sidecars = sorted(folder.glob("round-*.json"))
    if not sidecars:
        return None
    try:
        values = json.loads(sidecars[-1].read_bytes())
        point = OperatingPoint.parse(values.get("operating_point"))
        return Checkpoint(**{**values, "path": folder / values["path"], "operating_point": point})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise StorageError(f"The checkpoint description {sidecars[-1]} is damaged; remove it.") from error


def load_weights(path: Path, model: nn.Module, sha256: str | None = None) -> str:
    """Load a safetensors file into the model and return the file's SHA-256.

    Raises:
        StorageError: If the file is missing, damaged, not the expected one, of another model, or a hospital's own.
    """
    content, digest = _read(path, sha256)
    if is_personal(content):
        raise StorageError(
            f"{path} was fitted to patients of one hospital without privacy. It must stay there and starts no run."
        )
    try:
        model.load_state_dict(load(content))
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise StorageError(f"{path} is not a checkpoint of this task's model.") from error
    return digest


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
    path = checkpoint.path.with_suffix(_STRATEGY)
    content, _ = _read(path, checkpoint.strategy_sha256)
    try:
        return dict(safetensors.numpy.load(content))
    except (SafetensorError, ValueError) as error:
        raise StorageError(f"{path} does not hold a strategy's state.") from error


def _read(path: Path, sha256: str | None) -> tuple[bytes, str]:
    with storage_errors(path):
        content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if sha256 not in (None, digest):
        raise StorageError(f"The checkpoint {path} was changed after it was written.")
    return content, digest
