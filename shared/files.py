"""Durable writes: a reader sees the old file or the new one, never half of one, even after a power cut."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.errors import StorageError


class SecretExists(StorageError):  # noqa: N818 - says what happened
    """A secret stands there already."""


def sync_directory(path: Path) -> None:
    """Flush a directory entry, so that a rename inside it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes, *, private: bool = False) -> None:
    """Write ``content`` to ``path`` through a temporary neighbour, fsync and rename.

    Args:
        path: Where to.
        content: What.
        private: Whether it is the owner's alone, from its first byte on.

    Raises:
        StorageError: If the folder cannot be written.
    """
    with storage_errors(path), _written(path, content, 0o600 if private else 0o666) as temporary:
        temporary.replace(path)


def write_secret(path: Path, content: bytes) -> None:
    """Write a new file that is its owner's alone from its first byte on; of two who start at once one wins.

    Raises:
        SecretExists: If there is one: a secret is never overwritten.
        StorageError: If the folder cannot be written.
    """
    with storage_errors(path), _written(path, content, 0o600) as temporary:
        try:
            os.link(temporary, path)  # unlike a rename, this fails where a file stands already
        except FileExistsError as error:
            raise SecretExists(f"There is a secret at {path} already; move it away if it is to be replaced.") from error


@contextmanager
def _written(path: Path, content: bytes, mode: int) -> Iterator[Path]:
    """Give a durable temporary neighbour of ``path``; what is done with it is durable afterwards."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        yield temporary
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)  # on a full disk, half a file would keep it full


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's errors about ``path`` into one clear sentence."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise StorageError(f"Cannot use {path}: {reason}. Check the path, its permissions and the disk.") from error
