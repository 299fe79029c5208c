"""The mark of weights that were fitted to one patient: they never leave the hospital and start no run.

The mark is in the file itself, in the safetensors header's metadata, so that it travels with every copy; the JSON
beside the file says the same to people.
"""

import json
from collections.abc import Mapping
from typing import Final

from safetensors.torch import save
from torch import Tensor

_KEY: Final = "fedward"
_MARK: Final = "personal"
_LENGTH_BYTES: Final = 8


def save_personal(state: Mapping[str, Tensor]) -> bytes:
    """Return weights as a safetensors file that carries the mark."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, metadata={_KEY: _MARK})


def is_personal(content: bytes) -> bool:
    """Whether a safetensors file carries the mark; what is no such file carries none."""
    end = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")
    try:
        return bool(json.loads(content[_LENGTH_BYTES:end])["__metadata__"][_KEY] == _MARK)
    except (ValueError, KeyError, TypeError):
        return False
