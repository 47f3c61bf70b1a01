"""Four thousand odd files: every mode in every format, cut off, bits turned over. Each has the outcome of Pillow."""

import io
import random
import warnings

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.decoding.images import FORMATS, REASONS, decode_image, decode_images
from pipeline.target import Target

# How Pillow writes each format; WebP and JPEG 2000 lossless as well, since their decoders differ.
FORMS = [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("GIF", {}), ("BMP", {}), ("DIB", {}), ("PPM", {}),
         ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("TIFF", {"compression": "tiff_adobe_deflate"}),
         ("WEBP", {}), ("WEBP", {"lossless": True}), ("JPEG2000", {}), ("JPEG2000", {"irreversible": True}),
         ("AVIF", {})]  # fmt: skip
MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16"]
NUM_CUTS, NUM_FLIPPED = 10, 16
TARGETS = [Target(6, 5, "L"), Target(8, 8, "RGB"), Target(2, 2, "RGB"), Target(2, 2, "RGB", draft=False)]


def make_files():
    """Yield names and contents, the same in every run."""
    chance = random.Random(0)
    colours = np.random.default_rng(0).integers(0, 256, (19, 23, 4), np.uint8)
    for mode in MODES:
        for image_format, options in FORMS:
            buffer = io.BytesIO()
            try:
                image = Image.fromarray(colours[..., :3] if mode not in ("RGBA", "LA", "PA") else colours)
                image = (
                    image.convert("L").convert(mode)
                    if mode in ("I", "F", "I;16", "LAB", "HSV")
                    else image.convert(mode)
                )
                image.save(buffer, image_format, **options)
            except (OSError, ValueError, KeyError):
                continue  # there is no such file
            data = buffer.getvalue()
            name = f"{mode} {image_format} {options}"
            yield name, data
            for cut in range(NUM_CUTS):
                yield f"{name}, cut {cut}", data[: len(data) * cut // NUM_CUTS + cut]
            for number in range(NUM_FLIPPED):
                flipped = bytearray(data)
                for _ in range(1 + number % 4):
                    flipped[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
                yield f"{name}, flipped {number}", bytes(flipped)


def is_read_by_pillow(data):
    """Say whether Pillow alone decodes a file and brings it to colours."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            image.load()
            Image.Image.convert(image, "RGBA" if "transparency" in image.info else "RGB")
    except Exception:  # noqa: BLE001 - whatever Pillow raises
        return False
    return True


FILES = dict(make_files())


def test_there_are_thousands_of_files():
    assert len(FILES) > 3000
    assert len({name.split()[1] for name in FILES}) == len(FORMATS)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_every_file_is_an_image_where_it_is_one_to_pillow_and_else_a_fault(target):
    keys = pa.array([name.encode() for name in FILES], pa.binary())
    decoded = decode_images(keys, pa.array([0] * len(FILES), pa.int32()), FILES.values(), target)
    faults = {list(FILES)[row]: fault for row, fault in decoded.faults}
    assert len(decoded.table) + len(faults) == len(FILES)
    assert all(fault.reason in REASONS and "\n" not in fault.error for fault in faults.values())
    # That values lie outside what a mode may hold is said of files that Pillow reads.
    refused = {name for name, fault in faults.items() if fault.reason in ("unsupported", "too_large")}
    wrong = [
        name for name, data in FILES.items() if name not in refused and is_read_by_pillow(data) == (name in faults)
    ]
    assert wrong == []


def test_the_outcome_is_the_same_again():
    for name, data in list(FILES.items())[::7]:
        assert decode_image(data, TARGETS[0]) == decode_image(data, TARGETS[0]), name
