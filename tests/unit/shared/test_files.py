"""What is written is whole, durable and, where it must be, its owner's alone from the first byte."""

import os
from pathlib import Path

import pytest

from shared.errors import StorageError
from shared.files import SecretExists, write_atomic, write_secret


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
