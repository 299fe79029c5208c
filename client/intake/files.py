"""Files that a user names or an export holds: only ordinary ones are opened, and lines are bounded as they are read.

A pipe blocks whoever opens it, and opening a device can act on it. So a file's kind is asked before it is opened, and
again after. A link that the user names is followed; a link found inside an export never is.
"""

import csv
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import BinaryIO, Final, TextIO

MAX_LINE: Final = 131_072
"""Characters of a line; a longer one is no row of any export."""
DELIMITERS: Final = ",;\t|"
_ENDS: Final = ("\n", "\r")


class NotAFileError(OSError):
    """A pipe, socket, device or folder stands where a file should."""

    def __init__(self) -> None:
        super().__init__(0, "it is a pipe, socket, device or folder, not a file")


def open_plain(path: Path, *, follow: bool = True) -> BinaryIO:
    """Open an ordinary file for reading, without ever waiting for one.

    Args:
        path: The file.
        follow: Whether a link is followed.

    Raises:
        NotAFileError: If it is of another kind.
        OSError: If it cannot be opened, or is a link and ``follow`` is false.
    """
    _check_kind(path.stat(follow_symlinks=follow).st_mode)
    flags = os.O_RDONLY | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    descriptor = os.open(path, flags)
    try:
        _check_kind(os.fstat(descriptor).st_mode)  # another file may stand there by now
    except NotAFileError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def open_table(path: Path) -> TextIO:
    """Open a small table of a hospital's own, UTF-8 with or without mark. Raises OSError as ``open_plain`` does."""
    return TextIOWrapper(open_plain(path), encoding="utf-8-sig", errors="replace", newline="")


def _check_kind(mode: int) -> None:
    if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
        raise NotAFileError


@dataclass(frozen=True)
class Listing:
    """What a folder holds, with all its folders.

    Attributes:
        files: Ordinary files, sorted.
        links: How many symbolic links; none is followed.
        special: How many pipes, sockets and devices; none is opened.
        unreadable: How many folders that cannot be listed.
    """

    files: list[Path]
    links: int
    special: int
    unreadable: int


def list_files(root: Path, leave_out: frozenset[Path] = frozenset()) -> Listing:
    """List what is below ``root``; files and folders of ``leave_out`` (resolved paths) are passed over."""
    kinds: dict[str, list[Path]] = {"file": [], "link": [], "special": []}
    closed: list[OSError] = []
    for folder, folders, names in os.walk(root.resolve(), onerror=closed.append):
        here = Path(folder)
        kinds["link"] += [here / name for name in folders if (here / name).is_symlink()]
        folders[:] = [name for name in folders if here / name not in leave_out]
        for path in (here / name for name in names):
            if path not in leave_out:
                kinds[_kind(path)].append(path)
    return Listing(sorted(kinds["file"]), len(kinds["link"]), len(kinds["special"]), len(closed))


def _kind(path: Path) -> str:
    try:
        mode = path.lstat().st_mode
    except OSError:  # gone since it was listed: reading it will say so
        return "file"
    return "link" if stat.S_ISLNK(mode) else "file" if stat.S_ISREG(mode) else "special"


def lines_of(handle: TextIO) -> Iterator[str | None]:
    """Yield each line; None for one of ``MAX_LINE`` characters or more, of which never more than that is held."""
    while line := handle.readline(MAX_LINE):
        if len(line) < MAX_LINE or line.endswith(_ENDS):
            yield line
            continue
        while (rest := handle.readline(MAX_LINE)) and not rest.endswith(_ENDS):
            pass
        yield None


def cells_of(line: str, delimiter: str) -> list[str]:
    """Return the cells of one row. A row is one line: a stray quotation mark cannot swallow the rows below it.

    Raises:
        csv.Error: If the line is no row.
    """
    if '"' not in line:
        return line.rstrip("\r\n").split(delimiter)
    return next(csv.reader([line], delimiter=delimiter), [])


def delimiter_of(header: str) -> str:
    """Return the separator that occurs most often in a first row."""
    return max(DELIMITERS, key=header.count)
