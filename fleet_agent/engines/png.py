"""A PNG writer made for speed: one filter, one cheap compression, in bands that stay in the cache.

The 'up' filter is a single subtraction in NumPy, and run-length coding (Z_RLE) of what it leaves is smaller and
faster on photo-like content than zlib's default at level 1. The file is plain PNG that any reader opens.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_BAND_ROWS = 64


def encode(pixels: npt.NDArray[np.uint8], texts: Mapping[str, str] | None = None) -> bytes:
    """Return the PNG of an RGB picture of shape (height, width, 3), with text chunks before the pixels.

    Keywords are 1 to 79 printable Latin-1 characters; values any text (ASCII as tEXt, the rest as UTF-8 iTXt).
    Raises ValueError for another shape or keyword.
    """
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or 0 in pixels.shape:
        raise ValueError(f"expected uint8 pixels of shape (height, width, 3), got {pixels.dtype} {pixels.shape}")
    height, width, _ = pixels.shape
    parts = [SIGNATURE, _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))]
    parts += [_text(keyword, value) for keyword, value in (texts or {}).items()]
    rows = np.ascontiguousarray(pixels).reshape(height, width * 3)
    packer = zlib.compressobj(1, zlib.DEFLATED, 15, 9, zlib.Z_RLE)
    band = np.empty((_BAND_ROWS, 1 + width * 3), np.uint8)
    band[:, 0] = 2  # filter type 'up'
    for top in range(0, height, _BAND_ROWS):
        count = min(_BAND_ROWS, height - top)
        above = rows[top - 1] if top else np.zeros(width * 3, np.uint8)
        np.subtract(rows[top], above, out=band[0, 1:])
        np.subtract(rows[top + 1 : top + count], rows[top : top + count - 1], out=band[1:count, 1:])
        data = packer.compress(band[:count].data)
        if data:
            parts.append(_chunk(b"IDAT", data))
    parts += [_chunk(b"IDAT", packer.flush()), _chunk(b"IEND", b"")]
    return b"".join(parts)


def write(path: Path, pixels: npt.NDArray[np.uint8], texts: Mapping[str, str] | None = None) -> int:
    """Write the PNG of `encode` to `path` and return its size in bytes."""
    data = encode(pixels, texts)
    path.write_bytes(data)
    return len(data)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))


def _text(keyword: str, value: str) -> bytes:
    key = keyword.encode("latin-1", "strict")
    if not 1 <= len(key) <= 79 or not keyword.isprintable() or keyword != keyword.strip():
        raise ValueError(f"PNG keyword {keyword!r} must be 1 to 79 printable Latin-1 characters")
    value = value.replace("\x00", "\ufffd")
    if value.isascii():
        return _chunk(b"tEXt", key + b"\x00" + value.encode("ascii"))
    return _chunk(b"iTXt", key + b"\x00\x00\x00\x00\x00" + value.encode("utf-8", "replace"))
