"""A CSV file as text, and its header: encodings, packing, separators, lines before the header.

What is found out here is about the file, not about a patient: the packing, the kind of encoding (by the first line),
the header and its separator. Bytes that are no UTF-8 are read one by one as Windows-1252, and UTF-16 is cut into rows
before it is decoded, so no row changes how another is read.
"""

import codecs
import gzip
import io
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, cast

from client.intake.files import DELIMITERS, MAX_LINE, cells_of, lines_of, open_plain
from client.intake.glucose_formats import Layout
from client.intake.rejects import GlucoseCode

MAX_RATIO: Final = 200
"""A packed file may unfold to this many times its size; real exports stay below 30."""
MAX_RATIO_FROM: Final = 2**26
"""So many bytes may unfold whatever the packed size."""
_SAMPLE: Final = 65_536
_UTF_8: Final = "utf-8-sig"
_ROW_ENDS: Final = {"utf-16-le": re.compile(rb"[\n\r]\0"), "utf-16-be": re.compile(rb"\0[\n\r]")}
_MIXED: Final = "fedward-cp1252"


class FileRejected(Exception):  # noqa: N818 - an outcome that is counted, like Rejected
    """A whole file is left out. Carries its code and nothing of the data."""

    def __init__(self, code: GlucoseCode) -> None:
        super().__init__(code.value)
        self.code = code


@contextmanager
def open_lines(path: Path) -> Iterator[Iterator[str | None]]:
    """Open a file, packed or not, and give its lines, in the encoding that its first bytes show; None for a bad one.

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
    with cast(BinaryIO, io.BufferedReader(_Unpacked(raw), _SAMPLE)) if packed else raw as content:
        if encoding == _UTF_8:
            with io.TextIOWrapper(content, encoding=encoding, errors=_MIXED, newline="") as text:
                yield lines_of(text)
        else:
            yield _utf_16_lines(content, encoding)


def _utf_16_lines(content: BinaryIO, encoding: str) -> Iterator[str | None]:
    """Yield each line that holds something; None for one that is no UTF-16, or of ``MAX_LINE`` characters or more."""
    for number, row in enumerate(_utf_16_rows(content, _ROW_ENDS[encoding])):
        try:
            text = row.decode(encoding) if len(row) < 2 * MAX_LINE else None
        except UnicodeDecodeError:
            text = None
        yield text.removeprefix("\ufeff") if text and number == 0 else text


def _utf_16_rows(content: BinaryIO, end: re.Pattern[bytes]) -> Iterator[bytes]:
    """Yield the bytes of each row, of a long one only so many that it is known to be too long.

    A row's end counts at an odd position too. A stray byte in one patient's row moves all that follows by one, and
    would turn every later row to nonsense. The bytes of an end differ, with the zero always on the same side. So no
    bytes of the rows beside it can hide an end. Letters whose bytes look like one cost their own row only.
    """
    rest, most = b"", 2 * MAX_LINE
    while chunk := content.read(_SAMPLE):
        *rows, rest = end.split(rest + chunk)
        yield from filter(None, rows)
        if len(rest) > most:  # the last byte stays: it may be half of an end
            rest = rest[:most] + rest[-1:]
    if rest:
        yield rest


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
    for mark, name in ((codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")):
        if sample.startswith(mark):
            return name
    line = sample.partition(b"\n")[0]  # the rows below are patients'
    for odd, name in ((1, "utf-16-le"), (0, "utf-16-be")):  # without a mark: every other byte of Latin text is 0
        if line[odd::2].count(0) > 0.4 * len(line) / 2 and line[1 - odd :: 2].count(0) == 0:
            return name
    return _UTF_8


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
