"""The public starts that come with Fedward: weights trained on made-up records only, so they cost no privacy."""

from pathlib import Path
from typing import Final

_FOLDER: Final = Path(__file__).parent


def start_path(task: str) -> Path:
    """Return where a task's public start lies, with its description beside it; the tasks without one have no file."""
    return _FOLDER / f"{task}.safetensors"
