"""The commonest PNG files of small images, decoded without the look for what else a file may hold.

Input: a file's bytes. Output: its pixels, or nothing, where Pillow is to open the file. Invariant: pixels are Pillow's.

The format: https://www.w3.org/TR/png-3/#5Chunk-layout
"""

from __future__ import annotations

import functools
import struct
import zlib

from PIL import Image

from pipeline.target import Target

_END = b"\0\0\0\0IEND\xaeB`\x82"


def decode_plain_png(data: bytes, target: Target) -> bytes | None:
    """Decode a PNG that is the target already, and holds one chunk of pixels and nothing else; None for all others.

    Pillow's decoder gives the same pixels in half the time without the look for what else there may be.
    """
    head = _plain_png_head(target.height, target.width, target.mode)
    is_twice = target.model_input is not None and target.model_input.is_made
    if is_twice or not data.startswith(head) or not data.endswith(_END):
        return None
    begin, end = len(head) + 8, len(data) - len(_END) - 4
    if data[len(head) : begin] != struct.pack(">I4s", max(0, end - begin), b"IDAT"):
        return None
    try:
        return Image.frombytes(
            target.mode, (target.width, target.height), data[begin:end], "zip", target.mode
        ).tobytes()
    except ValueError:  # damaged: the usual way says how
        return None


@functools.cache
def _plain_png_head(height: int, width: int, mode: str) -> bytes:
    """Write what a PNG of eight bits a sample begins with: its signature, and the chunk of its size and mode."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0 if mode == "L" else 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n\0\0\0\r" + chunk + struct.pack(">I", zlib.crc32(chunk))
