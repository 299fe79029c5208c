"""A CSV file as text, and its header: encodings, packing, separators, lines before the header."""

import csv
import gzip
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, TextIO, cast

from client.intake.glucose_formats import Layout
from client.intake.rejects import GlucoseCode

_SAMPLE: Final = 65_536
_DELIMITERS: Final = ",;\t|"


class FileRejected(Exception):  # noqa: N818 - an outcome that is counted, like Rejected
    """A whole file is left out. Carries its code and nothing of the data."""

    def __init__(self, code: GlucoseCode) -> None:
        super().__init__(code.value)
        self.code = code


def open_text(path: Path) -> TextIO:
    """Open a file, packed or not, as text in the encoding that its first bytes show.

    Raises:
        FileRejected: If there is nothing in it.
        OSError, EOFError, zlib.error: If it cannot be opened or unpacked.
    """
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
    opener = cast(Callable[..., IO[bytes]], gzip.open if packed else Path.open)
    with opener(path, "rb") as raw:
        sample = raw.read(_SAMPLE)
    if not sample.strip(b"\0\r\n\t ,;\xef\xbb\xbf\xff\xfe"):
        raise FileRejected(GlucoseCode.EMPTY)
    return cast(TextIO, opener(path, "rt", encoding=_encoding(sample), errors="replace", newline=""))


def _encoding(sample: bytes) -> str:
    if sample[:2] in {b"\xff\xfe", b"\xfe\xff"}:
        return "utf-16"
    for odd, name in ((1, "utf-16-le"), (0, "utf-16-be")):  # without a mark: every other byte of Latin text is 0
        if sample[odd::2].count(0) > 0.4 * len(sample) / 2 and sample[1 - odd :: 2].count(0) == 0:
            return name
    try:
        # The sample may end within a character.
        sample[: -4 if len(sample) == _SAMPLE else None].rstrip(b"\x80\xbf").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start < len(sample) - 8:
            return "cp1252"
    return "utf-8-sig"


def _normal(name: str) -> str:
    return "".join(name.split()).replace("_", "").strip('"').casefold()


@dataclass(frozen=True)
class Header:
    """Positions of a layout's columns in a file; -1 where there is none."""

    layout: Layout
    names: dict[str, int]
    delimiter: str

    def at(self, *columns: str) -> int:
        """Return the position of the first of ``columns`` that is there, or -1."""
        return next((self.names[_normal(c)] for c in columns if _normal(c) in self.names), -1)

    def complete(self) -> bool:
        """Return whether every column that the layout needs is there."""
        layout = self.layout
        chosen = (layout.glucose_rows, layout.insulin_rows, layout.excluded_rows)
        needed = [self.at(*layout.time), self.at(*layout.glucose), *(self.at(rows[0]) for rows in chosen if rows)]
        return -1 not in needed and (not layout.patient or self.at(*layout.patient) >= 0)


def find_header(lines: Sequence[str], layouts: Sequence[Layout]) -> tuple[int, Header]:
    """Return the number of the header's line, and the header.

    Raises:
        FileRejected: If no line has the columns of one of the layouts.
    """
    for number, line in enumerate(lines):
        for delimiter in _DELIMITERS:
            if delimiter in line:
                cells = next(csv.reader([line], delimiter=delimiter), [])
                names = {_normal(cell): position for position, cell in reversed(list(enumerate(cells)))}
                for layout in layouts:
                    header = Header(layout, names, delimiter)
                    if header.complete():
                        return number, header
    raise FileRejected(GlucoseCode.COLUMNS_MISSING)
