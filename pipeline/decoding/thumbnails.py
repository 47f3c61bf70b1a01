"""Image files to small pictures that a page can hold, whatever the size and kind of the files.

Input: an image file's bytes (or the reason why there are none), and the bytes that its picture may take. Output: a PNG
or WebP file. Invariant: the same file gives the same picture, upright, with no side longer than asked for, and never
more bytes than it may take.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Any

from PIL import Image

from pipeline.data.files import ReadFault
from pipeline.decoding.images import (
    DRAFT_FORMATS,
    FORMATS,
    GREY_MODES,
    Fault,
    load_image,
    read_header,
    to_mode,
    upright,
)
from pipeline.target import Target

MAX_SIDE = 128
# A file other than JPEG, which is decoded at a reduced scale, has to be decoded whole; a pixel takes up to 4 bytes.
_MAX_PIXELS = 50_000_000
# Small pictures of few colours are lossless: each of their pixels is to be seen.
_MAX_LOSSLESS_PIXELS = 64 * 64
_QUALITIES = (80, 60, 40, 20)
_LEAST_SIDE = 16


@dataclass(frozen=True)
class Picture:
    """A small picture of an image file.

    Attributes:
        data: The picture, a PNG or WebP file.
        media_type: Of `data`.
        width: In pixels, of the picture.
        height: Likewise.
        original_size: Width and height of the image, upright.
    """

    data: bytes
    media_type: str
    width: int
    height: int
    original_size: tuple[int, int]


def make_picture(data: bytes | ReadFault, max_bytes: int, max_side: int = MAX_SIDE) -> Picture | Fault:
    """Make the small picture of one image file, or say why there is none.

    Args:
        data: The file.
        max_bytes: What the picture may take; lossless first, then with less quality, then smaller.
        max_side: Of the picture, in pixels.
    """
    if isinstance(data, ReadFault):
        return Fault(data.reason, data.error)
    header = read_header(data)
    if header is None:
        return Fault("unidentified", "cannot identify image file")
    height, width, _ = header
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of doubtful metadata and large images, which are met when evaluating
            is_reducible = Image.open(io.BytesIO(data), formats=FORMATS).format in DRAFT_FORMATS
            if width * height > _MAX_PIXELS and not is_reducible:
                return Fault("too_large", f"{width} x {height} pixels")
            image = upright(load_image(io.BytesIO(data), Target(max_side, max_side, "RGB", draft=True)))
            small = to_mode(image, "L" if image.mode in GREY_MODES else "RGB")
            small.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
            return _encode(small, max_bytes, (width, height))
    except Exception as exc:  # noqa: BLE001 - decoders raise what they like; the page names the image instead
        return Fault("damaged", type(exc).__name__)


def _encode(image: Image.Image, max_bytes: int, original_size: tuple[int, int]) -> Picture:
    attempts: list[tuple[str, dict[str, Any]]] = []
    if image.width * image.height <= _MAX_LOSSLESS_PIXELS:
        attempts.append(("PNG", {"optimize": True}))
    attempts += [("WEBP", {"quality": quality, "method": 4}) for quality in _QUALITIES]
    while True:
        for kind, options in attempts:
            stream = io.BytesIO()
            image.save(stream, kind, **options)
            if stream.tell() <= max_bytes or max(image.size) <= _LEAST_SIDE:
                return Picture(stream.getvalue(), f"image/{kind.lower()}", *image.size, original_size)
        image = image.resize((max(1, image.width // 2), max(1, image.height // 2)), Image.Resampling.BOX)
