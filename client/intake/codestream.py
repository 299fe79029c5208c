"""The frame size that a compressed image states itself, read before a decoder trusts it.

A decoder allocates what the code stream asks for, whatever DICOM's Rows and Columns say, so a few forged
bytes could exhaust the memory.

References: ITU-T T.81 B.2.2 (JPEG), T.87 C (JPEG-LS), T.800 A.5.1 (JPEG 2000).
"""

from typing import Final

from pydicom import uid
from pydicom.encaps import get_frame

from client.intake.rejects import RejectCode, Rejected

RLE_MARGIN: Final = 2
"""PackBits can shrink 64-fold, but a stream far larger than its image is a bomb and not an encoding."""
_NO_SIZE_MARKERS: Final = frozenset({0xC4, 0xC8, 0xCC})
_JPEG_LS_FRAME: Final = 0xF7


def check_frame(pixel_data: bytes, syntax: uid.UID, shape: tuple[int, int]) -> None:
    """Check the first frame of encapsulated pixel data against ``shape`` (rows, columns).

    Raises:
        Rejected: ``UNDECODABLE`` if the code stream states another size, or none.
    """
    if not syntax.is_encapsulated:
        return
    frame = get_frame(pixel_data, 0, number_of_frames=1)
    if syntax == uid.RLELossless:
        fits = len(frame) <= RLE_MARGIN * 2 * shape[0] * shape[1] + 64
    elif syntax in uid.JPEG2000TransferSyntaxes:
        fits = _jpeg2000_size(frame) == (*shape, 1)
    else:
        fits = _jpeg_size(frame) == (*shape, 1)
    if not fits:
        raise Rejected(RejectCode.UNDECODABLE)


def _jpeg_size(stream: bytes) -> tuple[int, ...]:
    """Return (rows, columns, components) of a JPEG or JPEG-LS frame header, or nothing."""
    at = 2
    while stream[:2] == b"\xff\xd8" and at + 10 <= len(stream) and stream[at] == 0xFF:
        marker = stream[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker == _JPEG_LS_FRAME or (0xC0 <= marker <= 0xCF and marker not in _NO_SIZE_MARKERS):
            return _big_endian(stream, at + 5, 2), _big_endian(stream, at + 7, 2), stream[at + 9]
        else:
            at += 2 + _big_endian(stream, at + 2, 2)
    return ()


def _jpeg2000_size(stream: bytes) -> tuple[int, ...]:
    """Return (rows, columns, components) of a JPEG 2000 code stream, or nothing."""
    if stream[:4] != b"\xff\x4f\xff\x51" or len(stream) < 42:
        return ()
    width, height, left, top = (_big_endian(stream, at, 4) for at in (8, 12, 16, 20))
    return height - top, width - left, _big_endian(stream, 40, 2)


def _big_endian(stream: bytes, at: int, size: int) -> int:
    return int.from_bytes(stream[at : at + size], "big")
