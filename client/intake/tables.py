"""The tables of ``site.toml`` that only intake reads."""

import tomllib
from pathlib import Path
from typing import Any

from shared.errors import IntakeError, StorageError


def read_table(path: Path, name: str) -> dict[str, Any]:
    """Return the table ``[name]`` of the ``site.toml`` at ``path``, empty if there is none.

    Raises:
        StorageError: If the file cannot be read.
        IntakeError: If it is not TOML, or ``name`` is no table in it.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8")).get(name, {})
    except OSError as error:
        raise StorageError(f"There is no readable site.toml at {path.parent}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise IntakeError(f"{path} is not valid TOML: {error}.") from error
    if not isinstance(table, dict):
        raise IntakeError(f"In site.toml, {name} must be a table: [{name}].")
    return table
