"""A CSV file as text, and its header: encodings, packing, separators, lines before the header.

What is found out here is about the file, not about a patient: the packing, the kind of encoding (by the first line),
the header and its separator. Bytes that are no UTF-8 are read one by one as Windows-1252, so no row changes how
another is read.
"""

import codecs
import gzip
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, TextIO

from client.intake.files import DELIMITERS, cells_of, open_plain
from client.intake.glucose_formats import Layout
from client.intake.rejects import GlucoseCode

MAX_RATIO: Final = 200
"""A packed file may unfold to this many times its size; real exports stay below 30."""
MAX_RATIO_FROM: Final = 2**26
"""So many bytes may unfold whatever the packed size."""
_SAMPLE: Final = 65_536
_MIXED: Final = "fedward-cp1252"


class FileRejected(Exception):  # noqa: N818 - an outcome that is counted, like Rejected
    """A whole file is left out. Carries its code and nothing of the data."""

    def __init__(self, code: GlucoseCode) -> None:
        super().__init__(code.value)
        self.code = code


def open_text(path: Path) -> TextIO:
    """Open a file, packed or not, as text in the encoding that its first bytes show.

    Raises:
        FileRejected: If there is nothing in it; while reading, if it unfolds to too much.
        OSError, EOFError, zlib.error: If it cannot be opened or unpacked.
    """
    raw = open_plain(path)
    try:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        sample = (gzip.GzipFile(fileobj=raw) if packed else raw).read(_SAMPLE)
        raw.seek(0)
        if not sample.strip(b"\0\r\n\t ,;\xef\xbb\xbf\xff\xfe"):
            raise FileRejected(GlucoseCode.EMPTY)
        encoding = _encoding(sample)
    except BaseException:
        raw.close()
        raise
    unpacked = io.BufferedReader(_Unpacked(raw), _SAMPLE) if packed else raw
    errors = _MIXED if encoding == "utf-8-sig" else "replace"
    return io.TextIOWrapper(unpacked, encoding=encoding, errors=errors, newline="")


class _Unpacked(io.RawIOBase):
    """What a packed file holds, up to a bound: a small file can unfold to more than any memory."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw, self._content, self._count = raw, gzip.GzipFile(fileobj=raw), 0
        self._most = MAX_RATIO_FROM + MAX_RATIO * os.fstat(raw.fileno()).st_size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]
        """Read on. Raises FileRejected beyond the bound."""
        count = self._content.readinto(buffer)
        self._count += count
        if self._count > self._most:
            raise FileRejected(GlucoseCode.TOO_LARGE)
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


def _encoding(sample: bytes) -> str:
    if sample[:2] in {b"\xff\xfe", b"\xfe\xff"}:
        return "utf-16"
    line = sample.partition(b"\n")[0]  # the rows below are patients'
    for odd, name in ((1, "utf-16-le"), (0, "utf-16-be")):  # without a mark: every other byte of Latin text is 0
        if line[odd::2].count(0) > 0.4 * len(line) / 2 and line[1 - odd :: 2].count(0) == 0:
            return name
    return "utf-8-sig"


def _as_cp1252(error: UnicodeError) -> tuple[str, int]:
    """Decode bytes that are no UTF-8, for ``codecs``."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return error.object[error.start : error.end].decode("cp1252", "replace"), error.end


codecs.register_error(_MIXED, _as_cp1252)


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
        for delimiter in DELIMITERS:
            if delimiter in line:
                cells = cells_of(line, delimiter)
                names = {_normal(cell): position for position, cell in reversed(list(enumerate(cells)))}
                for layout in layouts:
                    header = Header(layout, names, delimiter)
                    if header.complete():
                        return number, header
    raise FileRejected(GlucoseCode.COLUMNS_MISSING)
