"""What is written is whole, durable and, where it must be, its owner's alone from the first byte."""

import errno
import os
import sqlite3
from pathlib import Path

import pytest

from shared.errors import StorageError
from shared.files import SecretExists, complaint, reason_of, storage_errors, write_atomic, write_secret


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The permissions of each temporary file at the moment its content is flushed."""
    seen, flush = list[int](), os.fsync

    def note(descriptor: int) -> None:
        found = os.fstat(descriptor)
        seen.append(found.st_mode & 0o777)
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    return seen


@pytest.mark.parametrize("private", [True, False])
def test_a_private_file_is_private_before_it_has_its_name(tmp_path: Path, modes: list[int], private: bool) -> None:
    mask = os.umask(0o022)
    try:
        write_atomic(tmp_path / "alert.json", b"named", private=private)
    finally:
        os.umask(mask)
    assert modes[0] == (0o600 if private else 0o644)
    assert (tmp_path / "alert.json").stat().st_mode & 0o777 == modes[0]
    assert (tmp_path / "alert.json").read_bytes() == b"named"


def test_a_private_file_replaces_one_that_others_could_read(tmp_path: Path) -> None:
    path = tmp_path / "patient.json"
    path.write_bytes(b"old")
    path.chmod(0o644)
    write_atomic(path, b"new", private=True)
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"new", 0o600)


def test_a_secret_is_never_overwritten(tmp_path: Path, modes: list[int]) -> None:
    write_secret(tmp_path / "site.key", b"first")
    with pytest.raises(SecretExists, match="move it away"):
        write_secret(tmp_path / "site.key", b"second")
    assert (tmp_path / "site.key").read_bytes() == b"first"
    assert modes[0] == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["site.key"], "nothing is left of the second"


@pytest.mark.parametrize("write", [write_atomic, write_secret])
def test_nothing_is_left_where_a_folder_cannot_be_written(tmp_path: Path, write, monkeypatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        write(tmp_path / "file", b"content")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_called_a_full_disk() -> None:
    """``/dev/full`` is the system's own full disk."""
    path = Path("/dev/full")
    with pytest.raises(StorageError) as told, storage_errors(path), path.open("wb", buffering=0) as handle:
        handle.write(b"content")
    sentence = f"the disk is full ({os.strerror(errno.ENOSPC)}). Free space on it and try again."
    assert str(told.value) == f"Cannot use /dev/full: {sentence}"
    assert complaint(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) == sentence.replace("the", "The", 1)
    quota = complaint(OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "store"))
    assert quota.startswith("Cannot use store: the quota on this disk is used up (")
    assert quota.endswith("Free space on it and try again.")
    assert complaint(PermissionError(errno.EACCES, "Permission denied", "store")) == (
        "Cannot use store: Permission denied. Check the path, its permissions and the disk."
    )


def test_a_database_on_a_full_disk_says_so_and_any_other_error_is_its_own() -> None:
    database = sqlite3.connect(":memory:")
    database.execute("CREATE TABLE t (x BLOB)")
    database.execute("PRAGMA max_page_count = 2")
    with pytest.raises(sqlite3.OperationalError) as full:
        database.execute("INSERT INTO t VALUES (zeroblob(100000))")
    assert reason_of(full.value) == "the disk is full; free space on it and try again"
    with pytest.raises(sqlite3.OperationalError) as wrong:
        database.execute("SELECT y FROM t")
    assert reason_of(wrong.value) == "no such column: y"
    database.close()
