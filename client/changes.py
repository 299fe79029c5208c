"""Change what a hospital's enrolment says of it, its declared number of patients or its key; and whom it trusts.

A running daemon keeps what it read when it started; until it is restarted the server refuses it by name.
"""

import re
import tomllib
from dataclasses import replace
from math import isclose
from pathlib import Path

from client.config import SitePolicy
from client.folder import POLICY, Folder
from client.keys import PRIVATE_KEY, make_key, read_key, write_public_key
from shared.drafting import DELTA_SHARE
from shared.errors import PolicyError, StorageError
from shared.files import storage_errors, sync_directory, write_atomic
from shared.provenance.keys import SIGNING_PUB, fingerprint, public_line, read_trusted

_OLD_KEY = "site.key.old"


def declare(folder: Path, patients: int) -> SitePolicy:
    """Write another declared number into ``site.toml`` and ``site.pub``; return the rules as they are now.

    A max-delta that was a tenth of one over the old number becomes that of the new one; one of the steward's own
    stays. What was spent stays spent: the ledger does not know the number, and epsilon does not hang on it.

    Raises:
        PolicyError: If ``site.toml`` is wrong, or would be.
        StorageError: If a file cannot be used.
    """
    path, key = folder / POLICY, read_key(folder)
    before = SitePolicy.read(path)
    values = {"declared-patients": repr(patients)}
    if isclose(before.max_delta, DELTA_SHARE / before.declared_patients, rel_tol=1e-9):
        values["max-delta"] = repr(DELTA_SHARE / patients)
    max_delta = float(values.get("max-delta", before.max_delta))
    after = replace(before, declared_patients=patients, max_delta=max_delta)
    with storage_errors(path):
        text = _rewritten(path.read_text(encoding="utf-8"), values)
    Folder(folder).audit.note("configured", policy=after.digest)
    write_atomic(path, text.encode())
    write_public_key(folder, key, after.name, patients)
    return after


def trust(folder: Path, public: Path) -> str:
    """Trust the key in another's ``signing.pub`` to sign checkpoints from now on; return its SHA-256.

    Keys that were trusted before stay. The audit log names the new one before it counts.

    Raises:
        StorageError: If ``public`` holds no such key, or a file cannot be used.
    """
    fresh, path = read_trusted(public), folder / SIGNING_PUB
    if not fresh:
        raise StorageError(f"There is no {public}. Ask the server's operator for signing.pub.")
    lines = dict.fromkeys(map(public_line, (*read_trusted(path), *fresh)))
    names = " ".join(map(fingerprint, fresh))
    Folder(folder).audit.note("trusted", key=names)
    write_atomic(path, b"".join(lines))
    return names


def renew_key(folder: Path) -> None:
    """Give the site a new key; the one before is kept as ``site.key.old``, which nothing reads.

    Raises:
        PolicyError: If ``site.toml`` is wrong.
        StorageError: If a file cannot be used.
    """
    policy, path = SitePolicy.read(folder / POLICY), folder / PRIVATE_KEY
    with storage_errors(path):
        if path.exists():  # or an earlier attempt died between this and the next
            path.replace(folder / _OLD_KEY)
            sync_directory(folder)
    make_key(folder, policy.name, policy.declared_patients)


def _rewritten(text: str, values: dict[str, str]) -> str:
    """Replace the values of top-level keys and nothing else: comments and order are the steward's."""
    wanted = tomllib.loads(text)
    for key in values.keys() & wanted.keys():
        text = re.sub(rf"(?m)^([ \t]*{key}[ \t]*=[ \t]*)[^#\s]+", rf"\g<1>{values[key]}", text, count=1)
        wanted[key] = tomllib.loads(f"value = {values[key]}")["value"]
    if tomllib.loads(text) != wanted:
        settings = ", ".join(f"{key} = {value}" for key, value in values.items())
        raise PolicyError(f"site.toml is written in a way that this command cannot change. Write into it: {settings}.")
    return text
