"""Grey images as PNG, without an imaging library."""

import struct
import zlib
from typing import Any, Final

import numpy as np
import numpy.typing as npt

_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
Images = npt.NDArray[np.floating[Any]]


def grid(images: Images, columns: int, gap_px: int = 1) -> Images:
    """Return images ``(N, H, W)`` in [0, 1] as one sheet, row by row, white between them."""
    count, height, width = images.shape
    rows = -(-count // columns)
    sheet = np.ones((rows * (height + gap_px) - gap_px, columns * (width + gap_px) - gap_px))
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + gap_px), (index % columns) * (width + gap_px)
        sheet[top : top + height, left : left + width] = image
    return sheet


def grey_png(image: Images, enlarge: int = 1) -> bytes:
    """Return an image ``(H, W)`` in [0, 1] as an 8-bit grey PNG, each pixel ``enlarge`` pixels wide."""
    pixels = (np.nan_to_num(image).clip(0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
    pixels = pixels.repeat(enlarge, axis=0).repeat(enlarge, axis=1)
    height, width = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    lines = np.concatenate([np.zeros((height, 1), np.uint8), pixels], axis=1).tobytes()
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    return _SIGNATURE + b"".join(_chunk(name, content) for name, content in chunks)


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
