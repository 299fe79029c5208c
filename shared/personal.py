"""The mark of weights that were fitted to one patient: they never leave the hospital and start no run.

The mark is in the file itself, in the safetensors header's metadata, so that it travels with every copy; the JSON
beside the file says the same to people.
"""

from collections.abc import Mapping
from typing import Any, Final

from safetensors.torch import save
from torch import Tensor

_KEY: Final = "fedward"
_MARK: Final = "personal"


def save_personal(state: Mapping[str, Tensor]) -> bytes:
    """Return weights as a safetensors file that carries the mark."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, metadata={_KEY: _MARK})


def is_personal(metadata: Mapping[str, Any]) -> bool:
    """Whether the metadata of a weights file carries the mark."""
    return metadata.get(_KEY) == _MARK
