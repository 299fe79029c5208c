"""Weights files: read within limits, and loaded only if every number in them is one that a trained model has.

    8 bytes   length of the header, little endian
    header    JSON: name → dtype, shape, offsets; ``__metadata__``
    data

A forecast of NaN crosses no threshold, so weights that are not finite would silence an alarm. Weights near float32's
end overflow in the first product and come to the same. So both are refused wherever weights are loaded.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from shared.errors import StorageError
from shared.provenance.bounded import parse_json, read_bounded

MOST_WEIGHT: Final = 1e6
"""Public bound on the magnitude of a weight. Trained models stay thousands of times below."""
MOST_BYTES: Final = 2**30
_LENGTH_BYTES: Final = 8
_MOST_HEADER_BYTES: Final = 2**20
_METADATA: Final = "__metadata__"


@dataclass(frozen=True, repr=False)
class WeightsFile:
    """A file of weights as it was read, once: what is checked is what is loaded.

    Attributes:
        name: For sentences.
        content: All of it.
        sha256: Of the content.
        metadata: What its header says beside the tensors.
    """

    name: str
    content: bytes
    sha256: str
    metadata: Mapping[str, Any]


def read_weights(path: Path) -> WeightsFile:
    """Read a file of weights and its header; nothing is loaded yet.

    Raises:
        StorageError: If it cannot be read or is no file of weights.
    """
    content = read_bounded(path, MOST_BYTES)
    return WeightsFile(path.name, content, hashlib.sha256(content).hexdigest(), metadata_of(content, path.name))


def metadata_of(content: bytes, name: str = "The file") -> Mapping[str, Any]:
    """Return the metadata of a safetensors file's header, empty if there is none.

    Raises:
        StorageError: If the header is out of bounds or damaged.
    """
    length = int.from_bytes(content[:_LENGTH_BYTES], "little")
    if not 2 <= length <= min(_MOST_HEADER_BYTES, len(content) - _LENGTH_BYTES):
        raise StorageError(f"{name} is not a checkpoint: it holds no header of weights.")
    header = parse_json(
        content[_LENGTH_BYTES : _LENGTH_BYTES + length],
        f"{name} is not a checkpoint; its header",
        most_bytes=_MOST_HEADER_BYTES,
    )
    metadata = header.get(_METADATA, {})
    if not isinstance(metadata, dict):
        raise StorageError(f"{name} is not a checkpoint: its metadata is damaged.")
    return metadata


def load_into(model: nn.Module, weights: WeightsFile, *, most_norm: float | None = None) -> None:
    """Load weights into a model, or leave the model as it is.

    Args:
        model: Has the names, shapes and types that the file must have.
        weights: The file.
        most_norm: Largest L2 norm of all weights together, a site's ``max-weights-norm``; None for no such bound.

    Raises:
        StorageError: If the weights are of another model, or one of them is not finite or too large.
    """
    try:
        state = load(weights.content)
    except (SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{weights.name} is not a checkpoint: its weights cannot be read.") from error
    if _forms(state) != _forms(model.state_dict()):
        raise StorageError(f"{weights.name} is not a checkpoint of this task's model.")
    _check_numbers(state, weights.name, most_norm)
    model.load_state_dict(state)


def _forms(state: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in state.items()}


def _check_numbers(state: Mapping[str, Tensor], name: str, most_norm: float | None) -> None:
    square = 0.0
    for tensor in state.values():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        largest = float(tensor.abs().max())  # of NaN it is NaN, which is below no bound
        if not largest <= MOST_WEIGHT:
            raise StorageError(
                f"{name} holds weights that are not finite or above {MOST_WEIGHT:g}, which no trained model has. "
                "Use another checkpoint."
            )
        square += float(tensor.double().square().sum())
    if most_norm is not None and not square**0.5 <= most_norm:
        raise StorageError(
            f"{name} has weights of norm {square**0.5:.3g}, above max-weights-norm {most_norm:g} of site.toml. "
            "Use another checkpoint."
        )
