"""The bytes of a DICOM Part 10 file: opened with care, parsed into the few elements asked for, in silence.

Sizes are checked before anything is inflated, and pydicom's own warnings and log lines, which quote tag
values, never leave ``silence``. References: DICOM PS3.10 7 (file format), PS3.5 7 and A (encoding).
"""

import logging
import math
import os
import unicodedata
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Final

from pydicom import config, uid
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filereader import read_dataset
from pydicom.tag import BaseTag

from client.intake.files import NotAFileError, open_plain
from client.intake.rejects import RejectCode, Rejected

MAX_SIDE_PX: Final = 4096
MAX_FILE_BYTES: Final = 2 * MAX_SIDE_PX**2 + 2**24
"""The largest slice, uncompressed, and 16 MiB for its header."""
MAX_TAG_BYTES: Final = 2**16
UNDEFINED_LENGTH: Final = 0xFFFFFFFF
_PIXEL_DATA: Final = 0x7FE00010


@contextmanager
def silence() -> Iterator[None]:
    """Let pydicom say nothing: its warnings and log lines quote tag values."""
    loggers = [logging.getLogger("pydicom"), *_child_loggers("pydicom")]
    before = [logger.disabled for logger in loggers]
    try:
        for logger in loggers:
            logger.disabled = True
        with warnings.catch_warnings(), config.disable_value_validation():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


def _child_loggers(name: str) -> list[logging.Logger]:
    known = logging.root.manager.loggerDict
    return [x for key, x in list(known.items()) if key.startswith(f"{name}.") and isinstance(x, logging.Logger)]


def open_part10(path: Path) -> BinaryIO:
    """Open an ordinary file of bearable size; a link put there since the listing is not followed."""
    try:
        file = open_plain(path, follow=False)
    except NotAFileError:
        raise Rejected(RejectCode.NOT_A_FILE) from None
    code = None
    if file.read(132)[128:] != b"DICM":
        code = RejectCode.NOT_DICOM
    elif os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
        code = RejectCode.TOO_LARGE
    if code is not None:
        file.close()
        raise Rejected(code)
    return file


@dataclass
class PixelElement:
    """Pixel Data as its element header declares it; ``length`` is None while the parser has not met it."""

    length: int | None = None
    offset: int = 0
    available: int = 0
    syntax: uid.UID = field(default_factory=lambda: uid.UID(""))


def parse(file: BinaryIO, keywords: Iterable[str]) -> tuple[Dataset, PixelElement]:
    """Parse from behind the preamble; elements not asked for, private ones too, are skipped and never held.

    Raises:
        Rejected: ``TRUNCATED``, ``TOO_LARGE`` or ``UNREADABLE``.
        Exception: Whatever pydicom raises on a malformed file; its text must not be shown.
    """
    tags: list[BaseTag | int] = [BaseTag(tag_for_keyword(keyword) or 0) for keyword in keywords]
    with_pixels = _PIXEL_DATA in tags
    meta = read_dataset(file, False, True, stop_when=lambda tag, _vr, _length: tag.group != 2)
    found = PixelElement(syntax=uid.UID(str(meta.get("TransferSyntaxUID", ""))))
    body: BinaryIO = file
    if found.syntax == uid.DeflatedExplicitVRLittleEndian:
        body = BytesIO(_inflate(file.read()))
    start, size = body.tell(), body.seek(0, os.SEEK_END)
    body.seek(start)

    def at_pixels(tag: BaseTag, _vr: str | None, length: int) -> bool:
        if tag == _PIXEL_DATA:
            found.length, found.offset, found.available = length, body.tell(), size - body.tell()
        return tag > _PIXEL_DATA or (tag == _PIXEL_DATA and not with_pixels)

    dataset = read_dataset(
        body,
        found.syntax == uid.ImplicitVRLittleEndian,
        found.syntax != uid.ExplicitVRBigEndian,
        stop_when=at_pixels,
        # A header value of this size is no header value; touching it raises, which rejects the file.
        defer_size=None if with_pixels else MAX_TAG_BYTES,
        specific_tags=tags,
    )
    if body.tell() > size or any(map(_cut_short, dataset.elements())):  # the parser itself says nothing
        raise Rejected(RejectCode.TRUNCATED)
    dataset.file_meta = FileMetaDataset(meta)
    if found.length == UNDEFINED_LENGTH:
        found.available = _fragments_bytes(body, found)
    return dataset, found


def _cut_short(element: RawDataElement | DataElement) -> bool:
    if not isinstance(element, RawDataElement) or element.length > MAX_TAG_BYTES:
        return False
    return len(element.value or b"") < element.length


def _inflate(deflated: bytes) -> bytes:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    content = inflater.decompress(deflated, MAX_FILE_BYTES)
    if inflater.unconsumed_tail:
        raise Rejected(RejectCode.TOO_LARGE)
    if not inflater.eof:
        raise Rejected(RejectCode.TRUNCATED)
    return content


def _fragments_bytes(body: BinaryIO, found: PixelElement) -> int:
    """Walk the fragments of encapsulated pixel data without reading them; return their bytes (PS3.5 A.4)."""
    total = 0
    body.seek(found.offset)
    while True:
        item = body.read(8)
        length = int.from_bytes(item[4:], "little")
        if len(item) < 8 or length > found.available:
            raise Rejected(RejectCode.TRUNCATED)
        if item[:4] == b"\xfe\xff\xdd\xe0":
            return total
        if item[:4] != b"\xfe\xff\x00\xe0":
            raise Rejected(RejectCode.UNREADABLE)
        total += length
        body.seek(length, os.SEEK_CUR)


def _value(dataset: Dataset, keyword: str) -> Any:
    """Return an element's value, or None if it is absent or cannot be converted to its type."""
    try:
        return dataset.get(keyword)
    except (ValueError, TypeError, OverflowError):
        return None


def texts(dataset: Dataset, keyword: str) -> list[str]:
    """Return an element's texts, each in one Unicode form: one identifier, one pseudonym, in any encoding."""
    value = _value(dataset, keyword)
    parts = [] if value is None else [value] if isinstance(value, str) else list(value)
    return [unicodedata.normalize("NFC", str(part)).strip(" \0") for part in parts]


def text(dataset: Dataset, keyword: str) -> str:
    """Return an element's text, "" if it is absent."""
    return "\\".join(texts(dataset, keyword))


def numbers(dataset: Dataset, keyword: str) -> tuple[float, ...]:
    """Return an element's numbers, or none at all unless every one is finite."""
    value = _value(dataset, keyword)
    parts = [] if value is None else [value] if isinstance(value, float | int | str) else list(value)
    try:
        converted = tuple(float(part) for part in parts)
    except (ValueError, TypeError, OverflowError):
        return ()
    return converted if all(map(math.isfinite, converted)) else ()


def whole(dataset: Dataset, keyword: str) -> int:
    """Return an element's whole number, 0 if it is absent."""
    values = numbers(dataset, keyword)
    return int(values[0]) if len(values) == 1 else 0
