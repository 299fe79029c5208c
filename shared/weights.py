"""A model's weights as one flat vector: few large arrays travel better than many small ones."""

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from shared.errors import ProtocolError

Vector = npt.NDArray[np.float32]


def pack(model: nn.Module) -> Vector:
    """Return the model's whole state as float32 ``(D,)``, tensors in the order of ``state_dict``."""
    return np.concatenate(
        [tensor.detach().cpu().float().numpy().ravel() for tensor in model.state_dict().values()]
    ).astype(np.float32)


def unpack(vector: Vector, model: nn.Module) -> None:
    """Load a flat vector ``(D,)`` into the model, after checking it.

    Raises:
        ProtocolError: If the vector has another length or type, or a value that is not finite.
    """
    state = model.state_dict()
    expected = sum(tensor.numel() for tensor in state.values())
    if vector.dtype != np.float32 or vector.shape != (expected,):
        raise ProtocolError(f"Expected {expected} float32 weights, got {vector.shape} of {vector.dtype}.")
    if not np.isfinite(vector).all():
        raise ProtocolError("The weights hold values that are not finite.")
    pieces = torch.from_numpy(vector.copy()).split([tensor.numel() for tensor in state.values()])
    model.load_state_dict(
        {name: piece.view(old.shape).to(old) for (name, old), piece in zip(state.items(), pieces, strict=True)}
    )
