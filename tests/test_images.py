import hashlib
import io
import pickle
import random
import re
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zlib
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from builders import ROOT, encode
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from pipeline.config import Config
from pipeline.data.files import ReadFault
from pipeline.decoding.images import (
    DECODE_VERSION,
    REASONS,
    Fault,
    choose_target,
    decode_image,
    decode_images,
    read_header,
    sample_rows,
)
from pipeline.decoding.plain_png import decode_plain_png
from pipeline.errors import DataError
from pipeline.target import Target

ROW_OF_FOUR = Target(1, 4, "RGB")


def target_of(images, **options):
    return choose_target(Config(**options), [header for header in map(read_header, images) if header])


def save_rows(rows, image_format, dtype=np.uint8, **options):
    return encode(np.array(rows, dtype), image_format, **options)


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(size, bits, colour_type, rows, *chunks):
    """Write a PNG by its specification: colour type 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, colour_type, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def png_row(bits, colour_type, row, *chunks):
    return png((4, 1), bits, colour_type, [row], *chunks)


def tiff_row(samples, photometric, *, bits, num_samples=1, sample_format=1, order="<", extra=None):
    """Write a TIFF of four pixels in a row by its specification, uncompressed."""
    tags = {256: [4], 257: [1], 258: [bits] * num_samples, 259: [1], 262: [photometric], 273: [0], 277: [num_samples],
            278: [1], 279: [len(samples)], 339: [sample_format] * num_samples}  # fmt: skip
    if extra is not None:
        tags[338] = [extra]
    values_at = 8 + 2 + 12 * len(tags) + 4
    tags[273] = [values_at + 16 * num_samples]
    entries, values = b"", b""
    for tag, numbers in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(numbers)}H", *numbers)
        where = packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack(f"{order}I", values_at + len(values))
        values += packed if len(packed) > 4 else b""
        entries += struct.pack(f"{order}HHI", tag, 3, len(numbers)) + where
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    return head + entries + b"\0\0\0\0" + values.ljust(16 * num_samples, b"\0") + samples


def pack16(*values, order="<"):
    return struct.pack(f"{order}{len(values)}H", *values)


def decode(data, target):
    """Decode to an array, [H, W] or [H, W, 3]."""
    decoded = decode_image(data, target)
    assert not isinstance(decoded, Fault), decoded
    return np.frombuffer(decoded[0], np.uint8).reshape(target.shape).astype(int)


def fault_of(data, target=ROW_OF_FOUR):
    fault = decode_image(data, target)
    assert isinstance(fault, Fault), "decoded, though it is no good image"
    return fault


def orientation_tag(orientation):
    return struct.pack("<4sIHHHIIi", b"II*\0", 8, 1, 0x112, 3, 1, orientation, 0)


# Modes. Pixels of these rows of four are as the specifications of the formats give them, by hand.

FOUR_COLOURS = [[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]]
PALETTE = chunk(b"PLTE", bytes(np.array(FOUR_COLOURS).ravel().tolist()))
COLOUR_IMAGE = Image.fromarray(np.array([FOUR_COLOURS], np.uint8))
RGBA_SAMPLES = bytes([100, 50, 0, 128, 1, 2, 3, 0, 255, 255, 255, 255, 10, 20, 30, 64])
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8))
FLOATS = struct.pack("<4f", 0, 0.25, 0.5, 1)
EXACT = {
    "1 PNG": (png_row(1, 0, b"\xa0"), [255, 0, 255, 0]),
    "1 PNG, one value transparent": (png_row(1, 0, b"\xa0", chunk(b"tRNS", b"\0\0")), [255, 255, 255, 255]),
    "1 PBM": (b"P4 4 1\n\x50", [255, 0, 255, 0]),
    "1 TIFF, white is zero": (tiff_row(b"\x50", 0, bits=1), [255, 0, 255, 0]),
    "1 GIF": (encode(Image.fromarray(np.array([[True, False, True, False]])), "GIF"), [255, 0, 255, 0]),
    "L PNG of 2 bits": (png_row(2, 0, b"\x1b"), [0, 85, 170, 255]),
    "L PNG of 4 bits": (png_row(4, 0, b"\x08\xcf"), [0, 136, 204, 255]),
    "L PNG": (png_row(8, 0, bytes([0, 50, 100, 255])), [0, 50, 100, 255]),
    "L PNG, one value transparent": (png_row(8, 0, bytes([0, 50, 51, 9]), chunk(b"tRNS", b"\0\x32")),
                                     [0, 255, 51, 9]),
    "L PGM": (b"P5 4 1 255\n\x00\x32\x64\xff", [0, 50, 100, 255]),
    "L PGM of 4 bits": (b"P5 4 1 15\n\x00\x01\x07\x0f", [0, 17, 119, 255]),
    "L PGM in words": (b"P2 # by hand\n4 1\n255\n0 50 100 255\n", [0, 50, 100, 255]),
    "L TIFF": (tiff_row(bytes([0, 50, 100, 255]), 1, bits=8), [0, 50, 100, 255]),
    "L TIFF, white is zero": (tiff_row(bytes([255, 205, 155, 0]), 0, bits=8), [0, 50, 100, 255]),
    "L BMP": (save_rows([[0, 50, 100, 255]], "BMP"), [0, 50, 100, 255]),
    "L GIF": (save_rows([[0, 50, 100, 255]], "GIF"), [0, 50, 100, 255]),
    "L JPEG 2000": (save_rows([[0, 50, 100, 255]], "JPEG2000"), [0, 50, 100, 255]),
    "LA PNG": (png_row(8, 4, bytes([0, 255, 100, 255, 100, 128, 50, 0])), [0, 100, 177, 255]),
    "LA PNG of 16 bits": (png_row(16, 4, pack16(0, 65535, 25700, 65535, 25700, 32896, 9, 0)), [0, 100, 177, 255]),
    "LA TIFF": (tiff_row(bytes([0, 255, 100, 255, 100, 128, 50, 0]), 1, bits=8, num_samples=2, extra=2),
                [0, 100, 177, 255]),
    "La TIFF": (tiff_row(bytes([0, 255, 100, 255, 50, 128, 0, 0]), 1, bits=8, num_samples=2, extra=1),
                [0, 100, 177, 255]),
    "P PNG": (png_row(2, 3, b"\x1b", PALETTE), FOUR_COLOURS),
    "P PNG, one colour transparent": (png_row(2, 3, b"\x1b", PALETTE, chunk(b"tRNS", b"\xff\xff\0")),
                                      [[0, 0, 0], [255, 0, 0], [255, 255, 255], [0, 0, 255]]),
    "P PNG, several colours transparent": (png_row(2, 3, b"\x1b", PALETTE, chunk(b"tRNS", b"\xff\x80\0")),
                                           [[0, 0, 0], [255, 127, 127], [255, 255, 255], [0, 0, 255]]),
    "P GIF": (encode(COLOUR_IMAGE, "GIF"), FOUR_COLOURS),
    "P GIF, one colour transparent": (save_rows([[1, 0, 2, 3]], "GIF", transparency=0), [1, 255, 2, 3]),
    "P BMP": (encode(COLOUR_IMAGE.quantize(4), "BMP"), FOUR_COLOURS),
    "P TIFF": (encode(COLOUR_IMAGE.quantize(4), "TIFF"), FOUR_COLOURS),
    "PA TIFF": (encode(COLOUR_IMAGE.quantize(4).convert("PA"), "TIFF"), FOUR_COLOURS),
    "RGB PNG": (png_row(8, 2, bytes(np.array(FOUR_COLOURS).ravel().tolist())), FOUR_COLOURS),
    "RGB PNG, one colour transparent": (
        png_row(8, 2, bytes([0, 0, 0, 10, 20, 30, 10, 20, 31, 255, 0, 255]), chunk(b"tRNS", b"\0\x0a\0\x14\0\x1e")),
        [[0, 0, 0], [255, 255, 255], [10, 20, 31], [255, 0, 255]]),
    "RGB PNG of 16 bits": (png_row(16, 2, pack16(*np.array(FOUR_COLOURS).ravel() * 257, order=">")),
                           FOUR_COLOURS),
    "RGB PPM": (b"P6 4 1 255\n" + bytes(np.array(FOUR_COLOURS).ravel().tolist()), FOUR_COLOURS),
    "RGB BMP": (encode(COLOUR_IMAGE, "BMP"), FOUR_COLOURS),
    "RGB DIB": (encode(COLOUR_IMAGE, "DIB"), FOUR_COLOURS),
    "RGB TIFF, deflated": (encode(COLOUR_IMAGE, "TIFF", compression="tiff_adobe_deflate"), FOUR_COLOURS),
    "RGB WebP": (encode(COLOUR_IMAGE, "WEBP", lossless=True), FOUR_COLOURS),
    "RGB JPEG 2000": (encode(COLOUR_IMAGE, "JPEG2000"), FOUR_COLOURS),
    "RGBA PNG": (png_row(8, 6, RGBA_SAMPLES), [[177, 152, 127], [255] * 3, [255] * 3, [194, 196, 199]]),
    "RGBA WebP": (save_rows([np.frombuffer(RGBA_SAMPLES, np.uint8).reshape(4, 4)], "WEBP", lossless=True),
                  [[177, 152, 127], [255] * 3, [255] * 3, [194, 196, 199]]),
    "RGBA TIFF": (tiff_row(RGBA_SAMPLES, 2, bits=8, num_samples=4, extra=2),
                  [[177, 152, 127], [255] * 3, [255] * 3, [194, 196, 199]]),
    "RGBa TIFF": (tiff_row(bytes([100, 50, 0, 128, 0, 0, 0, 0, 255, 255, 255, 255, 10, 20, 30, 64]), 2, bits=8,
                           num_samples=4, extra=1), [[227, 177, 127], [255] * 3, [255] * 3, [201, 211, 221]]),
    "RGBX TIFF": (tiff_row(RGBA_SAMPLES, 2, bits=8, num_samples=4, extra=0),
                  [[100, 50, 0], [1, 2, 3], [255] * 3, [10, 20, 30]]),
    "CMYK TIFF": (tiff_row(bytes([0, 0, 0, 0, 255, 0, 0, 0, 0, 255, 255, 0, 0, 0, 0, 255]), 5, bits=8, num_samples=4),
                  [[255] * 3, [0, 255, 255], [255, 0, 0], [0, 0, 0]]),
    "YCbCr TIFF": (tiff_row(bytes([0, 128, 128, 200, 128, 128, 76, 85, 255, 29, 255, 107]), 6, bits=8, num_samples=3),
                   [[0, 0, 0], [200] * 3, [254, 0, 0], [0, 0, 254]]),
    "LAB TIFF": (tiff_row(bytes([0, 0, 0, 255, 0, 0, 137, 0, 0, 138, 81, 70]), 8, bits=8, num_samples=3),
                 [[0, 0, 0], [255] * 3, [128] * 3, [255, 0, 0]]),
    "I;16 PNG": (png_row(16, 0, pack16(0, 1000, 40000, 65535, order=">")), [0, 4, 156, 255]),
    "I;16 PNG, one value transparent": (
        png_row(16, 0, pack16(0, 1000, 1001, 65535, order=">"), chunk(b"tRNS", b"\x03\xe8")), [0, 255, 4, 255]),
    "I;16 TIFF": (tiff_row(pack16(0, 1000, 40000, 65535), 1, bits=16), [0, 4, 156, 255]),
    "I;16B TIFF": (tiff_row(pack16(0, 1000, 40000, 65535, order=">"), 1, bits=16, order=">"), [0, 4, 156, 255]),
    "I;16 TIFF, white is zero": (tiff_row(pack16(65535, 64535, 25535, 0), 0, bits=16), [0, 4, 156, 255]),
    "I;16 TIFF of 12 bits": (tiff_row(b"\x00\x03\xff\x80\x0f\xff", 1, bits=12), [0, 64, 128, 255]),
    "I;16 JPEG 2000": (save_rows([[0, 1000, 40000, 65535]], "JPEG2000", np.uint16), [0, 4, 156, 255]),
    "I PGM of 16 bits": (b"P5 4 1 65535\n" + pack16(0, 1000, 40000, 65535, order=">"), [0, 4, 156, 255]),
    "I PGM up to 1000": (b"P5 4 1 1000\n" + pack16(0, 16, 612, 1000, order=">"), [0, 4, 156, 255]),
    "I TIFF": (tiff_row(struct.pack("<4i", 0, 1000, 40000, 65535), 1, bits=32, sample_format=2), [0, 4, 156, 255]),
    "F TIFF": (tiff_row(FLOATS, 1, bits=32, sample_format=3), [0, 64, 128, 255]),
    "F PFM": (b"Pf\n4 1\n-1.0\n" + FLOATS, [0, 64, 128, 255]),
}  # fmt: skip
# Where the way to RGB is rounded in steps or belongs to a colour profile.
TOLERANCE = {"YCbCr TIFF": 1, "LAB TIFF": 6, "RGBA PNG": 1, "RGBA WebP": 1, "RGBA TIFF": 1, "RGBa TIFF": 1,
             "LA TIFF": 1, "La TIFF": 1, "LA PNG": 1, "LA PNG of 16 bits": 1,
             "P PNG, several colours transparent": 1}  # fmt: skip


def as_rgb(pixels):
    return np.array([[pixel] * 3 if isinstance(pixel, int) else pixel for pixel in pixels])


@pytest.mark.parametrize("name", EXACT)
def test_every_mode_becomes_the_colours_that_a_viewer_shows(name):
    data, pixels = EXACT[name]
    assert np.abs(decode(data, ROW_OF_FOUR)[0] - as_rgb(pixels)).max() <= TOLERANCE.get(name, 0)


@pytest.mark.parametrize("name", EXACT)
def test_every_mode_becomes_grey_by_the_luma_of_its_colours(name):
    data, pixels = EXACT[name]
    grey = as_rgb(pixels) @ [0.299, 0.587, 0.114]  # ITU-R BT.601
    assert np.abs(decode(data, Target(1, 4, "L"))[0] - grey).max() <= TOLERANCE.get(name, 0) + 0.51


def test_the_table_of_modes_holds_all_that_a_file_can_bring():
    modes = {Image.open(io.BytesIO(data)).mode for data, _ in EXACT.values()}
    assert modes == {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "I;16", "I;16B", "F"}


# Samples, as bytes of a row of four; the transparent one as tRNS has it; and the pixels on white.
TRANSPARENT = {
    "grey 1": (1, 0, b"\x50", [0], [255, 255, 255, 255]),  # 0 1 0 1
    "grey 2": (2, 0, b"\x1b", [1], [0, 255, 170, 255]),  # 0 1 2 3
    "grey 4": (4, 0, b"\x08\xcf", [8], [0, 255, 204, 255]),  # 0 8 12 15
    "grey 4, none of that": (4, 0, b"\x08\xcf", [7], [0, 136, 204, 255]),
    "grey 4, higher bits": (4, 0, b"\x08\xcf", [0xF8], [0, 255, 204, 255]),
    "grey 8": (8, 0, b"\x00\x08\x88\xff", [8], [0, 255, 136, 255]),
    "grey 8, higher bits": (8, 0, b"\x00\x08\x88\xff", [0x108], [0, 255, 136, 255]),
    "grey 16": (16, 0, struct.pack(">4H", 0, 257 * 8, 257 * 8 + 1, 65535), [257 * 8], [0, 255, 8, 255]),
    "RGB 8": (8, 2, bytes([1, 2, 3] + [1, 2, 4] + [9] * 3 + [0] * 3), [1, 2, 3], [255, (1, 2, 4), 9, 0]),
    "RGB 16": (16, 2, struct.pack(">12H", *[257] * 3, *[514] * 3, *[0] * 3, *[65535] * 3), [514] * 3, [1, 255, 0, 255]),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_a_transparent_colour_is_that_of_the_file_s_own_depth(name):
    bits, colour_type, row, colour, shown = TRANSPARENT[name]
    data = png_row(bits, colour_type, row, chunk(b"tRNS", struct.pack(f">{len(colour)}H", *colour)))
    expected = [pixel if isinstance(pixel, tuple) else (pixel,) * 3 for pixel in shown]
    assert decode(data, replace(ROW_OF_FOUR, mode="RGB")).reshape(-1, 3).tolist() == [list(pixel) for pixel in expected]


def lossless_jpeg(pixels_HW):
    """Write a lossless JPEG of 8-bit grey (ITU-T T.81, annex H): each sample as its difference to the one before."""
    height, width = pixels_HW.shape
    bits = ""
    for row in range(height):
        for column in range(width):
            before = pixels_HW[row, column - 1] if column else pixels_HW[row - 1, 0] if row else 128
            difference = int(pixels_HW[row, column]) - int(before)
            category = abs(difference).bit_length()
            bits += f"{category:04b}"
            if category:
                bits += f"{difference if difference > 0 else difference + 2**category - 1:0{category}b}"
    bits += "1" * (-len(bits) % 8)
    scan = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\x00")

    def segment(marker, data):
        return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data

    table = bytes([0, 0, 0, 0, 9, *[0] * 12]) + bytes(range(9))  # nine categories, a code of four bits each
    return b"".join(
        [b"\xff\xd8", segment(0xC3, struct.pack(">BHHB3B", 8, height, width, 1, 1, 0x11, 0)), segment(0xC4, table),
         segment(0xDA, bytes([1, 1, 0x00, 1, 0, 0])), scan, b"\xff\xd9"]
    )  # fmt: skip


def test_a_lossless_jpeg_is_read_in_full_where_it_cannot_be_at_a_reduced_scale():
    pixels_HW = np.random.default_rng(0).integers(0, 256, (32, 32), np.uint8)
    data = lossless_jpeg(pixels_HW)
    assert decode(data, Target(32, 32, "L")).reshape(32, 32).tolist() == pixels_HW.tolist()
    small, in_full = (decode(data, Target(4, 4, "L", draft)) for draft in (True, False))
    np.testing.assert_array_equal(small, in_full)


def test_16_bit_grey_is_scaled_and_rounded_for_every_value():
    rows = [pack16(*range(start, start + 256), order=">") for start in range(0, 65536, 256)]
    expected = [(510 * value + 65535) // (2 * 65535) for value in range(65536)]
    assert decode(png((256, 256), 16, 0, rows), Target(256, 256, "L")).ravel().tolist() == expected


def test_16_bit_colour_is_scaled_to_within_one():
    values = list(range(0, 65536, 4)) + [65535] * 512
    rows = [pack16(*values[start : start + 192], order=">") for start in range(0, 192 * 64, 192)]
    expected = np.array(values[: 192 * 64]) / 257
    assert np.abs(decode(png((64, 64), 16, 2, rows), Target(64, 64, "RGB")).ravel() - expected).max() <= 1


def test_deep_grey_is_decoded_in_memory_of_a_few_times_its_size():
    data = encode(Image.new("I;16", (1000, 1000), 30000), "PNG")
    tracemalloc.start()
    decode_image(data, Target(28, 28, "L"))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 16 * 1000 * 1000


@pytest.mark.parametrize("image_format", ["JPEG", "TIFF"])
@pytest.mark.parametrize(
    ("cmyk", "rgb"), [((0, 255, 255, 0), (255, 0, 0)), ((0, 0, 0, 255), (0, 0, 0)), ((255, 0, 0, 0), (0, 255, 255))]
)
def test_inks_become_their_colours(image_format, cmyk, rgb):
    data = encode(Image.new("CMYK", (16, 16), cmyk), image_format)
    assert np.abs(decode(data, Target(16, 16, "RGB")) - rgb).max() <= 2


def test_a_cmyk_jpeg_is_as_pillow_converts_it():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 4), np.uint8)
    data = encode(Image.frombytes("CMYK", (7, 9), pixels.tobytes()), "JPEG")
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(decode(data, Target(9, 7, "RGB")), expected)


@pytest.mark.parametrize("image_format", ["JPEG", "WEBP", "AVIF"])
@pytest.mark.parametrize("colour", [(254, 0, 0), (0, 128, 0), (0, 0, 254), (255, 255, 255), (120, 60, 200)])
def test_lossy_formats_keep_a_plain_colour(image_format, colour):
    data = encode(Image.new("RGB", (16, 16), colour), image_format, quality=100)
    assert np.abs(decode(data, Target(16, 16, "RGB")) - colour).max() <= 3


@pytest.mark.parametrize("image_format", ["JPEG", "AVIF"])
def test_grey_of_lossy_formats_stays_grey(image_format):
    grey = Image.fromarray(np.arange(0, 256, dtype=np.uint8).reshape(16, 16))
    pixels = decode(encode(grey, image_format, quality=100), Target(16, 16, "L"))
    assert np.abs(pixels - np.asarray(grey).astype(int)).max() <= 4


@pytest.mark.parametrize(
    "values",
    [(0, 0.5, 1, 1.001), (-0.001, 0, 0.5, 1), (0, 0.5, 1, float("nan")), (0, 1, 0, float("inf")), (0, 90, 255, 128)],
)
def test_floats_outside_of_0_to_1_are_unsupported(values):
    fault = fault_of(tiff_row(struct.pack("<4f", *values), 1, bits=32, sample_format=3))
    assert fault.reason == "unsupported"
    assert re.fullmatch(r"pixels of mode F from \S+ to \S+, outside 0 to 1", fault.error)


@pytest.mark.parametrize("values", [(0, 1, 2, 65536), (-1, 0, 1, 2), (-(2**31), 0, 0, 2**31 - 1)])
def test_integers_outside_of_16_bits_are_unsupported(values):
    fault = fault_of(tiff_row(struct.pack("<4i", *values), 1, bits=32, sample_format=2))
    assert fault == Fault("unsupported", f"pixels of mode I from {min(values)} to {max(values)}, outside 0 to 65535")


# Orientation

# EXIF 2.32, table for tag 274: which side of the picture the stored row 0 is, and which the stored column 0.
ROW_0_COLUMN_0 = {1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left"),
                  5: ("left", "top"), 6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom")}  # fmt: skip
STORED = np.array([[0, 50, 100], [150, 200, 250]], np.uint8)


def show(stored, orientation):
    """Lay the stored pixels where a viewer shows them, one by one."""
    row_0, column_0 = ROW_0_COLUMN_0[orientation]
    num_rows, num_columns = stored.shape
    shown = np.zeros(stored.shape if row_0 in ("top", "bottom") else stored.shape[::-1], int)
    for row, column in np.ndindex(num_rows, num_columns):
        from_row_0 = num_rows - 1 - row if row_0 in ("bottom", "right") else row
        from_column_0 = num_columns - 1 - column if column_0 in ("bottom", "right") else column
        index = (from_row_0, from_column_0) if row_0 in ("top", "bottom") else (from_column_0, from_row_0)
        shown[index] = stored[row, column]
    return shown


def save_turned(image_format, orientation, image=None, **options):
    exif = Image.Exif()
    exif[0x112] = orientation
    image = Image.fromarray(STORED) if image is None else image
    options |= {"lossless": True} if image_format == "WEBP" else {}
    options |= {"quality": 100} if image_format in ("JPEG", "MPO", "AVIF") else {}
    return encode(image, image_format, exif=exif, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF", "MPO", "AVIF"])
def test_pixels_land_where_a_viewer_shows_them(image_format, orientation):
    shown = show(STORED, orientation)
    data = save_turned(image_format, orientation)
    pixels, is_resized = decode_image(data, Target(*shown.shape, "L"))
    assert np.abs(np.frombuffer(pixels, np.uint8).reshape(shown.shape) - shown).max() <= 4
    assert not is_resized
    assert target_of([data], mode="L") == Target(*shown.shape, "L")


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "packbits"])
def test_a_compressed_tiff_is_turned_once(orientation, compression):
    data = save_turned("TIFF", orientation, compression=compression)
    shown = show(STORED, orientation)
    np.testing.assert_array_equal(decode(data, Target(*shown.shape, "L")), shown)


@pytest.mark.parametrize(
    ("image_format", "mode"),
    [("PNG", "1"), ("PNG", "P"), ("PNG", "I;16"), ("PNG", "LA"), ("PNG", "RGBA"), ("TIFF", "I;16"), ("TIFF", "I;16B"),
     ("TIFF", "F"), ("TIFF", "I"), ("TIFF", "LA"), ("TIFF", "CMYK"), ("WEBP", "RGBA")],
)  # fmt: skip
def test_images_of_other_modes_are_turned_too(image_format, mode):
    stored = np.array([[0, 255, 0], [255, 255, 0]], np.uint8)
    image = Image.fromarray(stored)
    if mode == "F":
        image = Image.fromarray(stored.astype(np.float32) / 255)
    elif mode.startswith("I"):
        image = Image.fromarray(stored.astype({"I": "<i4", "I;16": "<u2", "I;16B": ">u2"}[mode]) * 257)
    else:
        image = image.convert("RGB" if mode == "CMYK" else mode).convert(mode)
    np.testing.assert_array_equal(decode(save_turned(image_format, 6, image), Target(3, 2, "L")), show(stored, 6))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_means_nothing_turns_nothing(orientation):
    data = encode(Image.fromarray(STORED), "PNG", exif=orientation_tag(orientation))
    np.testing.assert_array_equal(decode(data, Target(2, 3, "L")), STORED)


def test_a_png_is_turned_by_a_tag_behind_its_pixels_too():
    turned = chunk(b"eXIf", orientation_tag(6))
    data = save_rows(STORED, "PNG").replace(chunk(b"IEND", b""), turned + chunk(b"IEND", b""))
    np.testing.assert_array_equal(decode(data, Target(3, 2, "L")), show(STORED, 6))


def test_a_jpeg_that_cameras_write_is_turned_beside_a_colour_profile():
    data = save_turned("JPEG", 8, icc_profile=b"any", dpi=(72, 72), comment=b"words")
    assert np.abs(decode(data, Target(3, 2, "L")) - show(STORED, 8)).max() <= 3


def tags(*entries):
    packed = b"".join(struct.pack("<HHI4s", *entry) for entry in sorted(entries))
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + packed + b"\0\0\0\0"


TURNED = (0x112, 3, 1, b"\6\0\0\0")
HEX = "\nexif\n      10\nno hexadecimal digits"
ODD_METADATA = {
    "JPEG, no EXIF in EXIF": (save_rows(STORED, "JPEG", quality=100, exif=b"Exif\0\0garbage, garbage"), 1),
    "JPEG, EXIF cut off": (save_rows(STORED, "JPEG", quality=100, exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), 1),
    "PNG, no EXIF in EXIF": (save_rows(STORED, "PNG", exif=b"Exif\0\0garbage, garbage"), 1),
    "PNG, EXIF cut off": (save_rows(STORED, "PNG", exif=orientation_tag(6)[:9]), 1),
    "WebP, no EXIF in EXIF": (save_rows(STORED, "WEBP", lossless=True, exif=b"garbage, garbage"), 1),
    "PNG, text where hexadecimal should be": (None, 1),
    "JPEG, a width of letters": (save_rows(STORED, "JPEG", quality=100, exif=tags(TURNED, (256, 2, 3, b"ab\0\0"))), 6),
    "JPEG, a negative width": (save_rows(STORED, "JPEG", quality=100, exif=tags(TURNED, (256, 9, 1, b"\xff" * 4))), 6),
    "PNG, a negative unit": (save_rows(STORED, "PNG", exif=tags(TURNED, (296, 9, 1, b"\xff" * 4))), 6),
}


def png_with_text(key, value):
    info = PngInfo()
    info.add_text(key, value)
    return save_rows(STORED, "PNG", pnginfo=info)


@pytest.mark.parametrize("name", ODD_METADATA)
def test_broken_metadata_leaves_good_pixels_good(name):
    data, orientation = ODD_METADATA[name]
    data = data or png_with_text("Raw profile type exif", HEX)
    shown = show(STORED, orientation)
    table, faults, num_resized = decode_rows([data], Target(*shown.shape, "L"))
    assert (faults, num_resized) == ([], 0)
    assert np.abs(table["image"].chunk(0).to_numpy_ndarray()[0].astype(int) - shown).max() <= 3
    assert target_of([data], mode="L") == Target(*shown.shape, "L")


# Animations, sizes


@pytest.mark.parametrize("image_format", ["GIF", "PNG", "WEBP", "AVIF", "TIFF", "MPO"])
def test_the_first_frame_stands_for_the_file(image_format):
    first, *others = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "lime")]
    data = encode(first, image_format, save_all=True, append_images=others)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.abs(decode(data, Target(16, 16, "RGB")) - [255, 0, 0]).max() <= 5


def resize_naively(pixels, size):
    """Weigh the pixels along each axis by a triangle, as wide as the step between two new pixels."""
    for axis, num_new in enumerate(size):
        num_old = pixels.shape[axis]
        step = num_old / num_new
        centres = (np.arange(num_new) + 0.5) * step
        away = np.abs(np.arange(num_old) + 0.5 - centres[:, None]) / max(step, 1)
        weights = np.maximum(0, 1 - away)
        pixels = np.moveaxis(np.tensordot(weights / weights.sum(1, keepdims=True), pixels, (1, axis)), 0, axis)
    return pixels


@pytest.mark.parametrize("size", [(9, 7), (4, 3), (3, 20), (30, 30), (1, 1)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_another_size_is_resized_by_triangles(size, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7) if mode == "L" else (9, 7, 3), np.uint8)
    decoded, is_resized = decode_image(save_rows(pixels, "PNG"), Target(*size, mode))
    decoded = np.frombuffer(decoded, np.uint8).reshape(Target(*size, mode).shape)
    assert np.abs(decoded - resize_naively(pixels, size)).max() <= 1.01
    assert is_resized == (size != (9, 7))


@pytest.mark.parametrize("name", ["I;16 PNG", "F TIFF", "1 PNG", "CMYK TIFF", "RGBA PNG", "P GIF"])
def test_other_modes_are_resized_after_their_conversion(name):
    pixels = as_rgb(EXACT[name][1])[None]
    assert np.abs(decode(EXACT[name][0], Target(3, 9, "RGB")) - resize_naively(pixels, (3, 9))).max() <= 2


# JPEG at a reduced scale


def photograph(width, height, image_format="JPEG", orientation=1, mode="RGB", **options):
    """A smooth scene, as a photograph of one pixel a sensor is not."""
    coarse = np.random.default_rng(3).integers(0, 256, (6, 7, 3), np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)
    return save_turned(image_format, orientation, image, **options)


# The scale by hand: the smallest that leaves both sides, as they are seen, at least twice the target's.
SCALES = [
    ((255, 256), Target(16, 32, "RGB"), 1, 2), ((256, 256), Target(16, 16, "RGB"), 1, 8),
    ((255, 255), Target(16, 16, "L"), 1, 4), ((128, 127), Target(16, 16, "RGB"), 1, 2),
    ((64, 64), Target(16, 16, "L"), 1, 2), ((64, 63), Target(16, 16, "RGB"), 1, 1),
    ((640, 128), Target(16, 80, "RGB"), 1, 4), ((640, 128), Target(80, 16, "RGB"), 6, 4),
    ((640, 128), Target(80, 16, "RGB"), 1, 1), ((640, 128), Target(16, 80, "RGB"), 8, 1),
    ((4000, 16), Target(8, 8, "RGB"), 1, 1), ((999, 999), Target(1, 1, "RGB"), 3, 8),
]  # fmt: skip


def decode_by_hand(data, target, scale, orientation):
    image = Image.open(io.BytesIO(data))
    image.draft(None, (image.width // scale, image.height // scale))
    assert image.size == tuple(-(-side // scale) for side in Image.open(io.BytesIO(data)).size)
    turned = ImageOps.exif_transpose(image) if orientation > 1 else image
    return np.asarray(turned.convert(target.mode).resize((target.width, target.height), Image.Resampling.BILINEAR))


@pytest.mark.parametrize(("size", "target", "orientation", "scale"), SCALES)
def test_a_large_jpeg_is_decoded_at_the_smallest_scale_of_twice_the_target(size, target, orientation, scale):
    data = photograph(*size, orientation=orientation)
    np.testing.assert_array_equal(decode(data, target), decode_by_hand(data, target, scale, orientation))
    full = decode_by_hand(data, target, 1, orientation)
    np.testing.assert_array_equal(decode(data, replace(target, draft=False)), full)
    assert np.abs(decode(data, target) - full).mean() < 2
    assert decode_image(data, target)[1]


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"mode": "L"}, {"mode": "CMYK"}, {"orientation": 5},
                                     {"subsampling": 0}, {"image_format": "MPO"}], ids=str)  # fmt: skip
def test_a_jpeg_of_any_kind_is_much_the_same_at_a_reduced_scale(options):
    data, target = photograph(500, 400, **options), Target(20, 24, "RGB")
    reduced, full = decode(data, target), decode(data, replace(target, draft=False))
    assert 0 < np.abs(reduced - full).mean() < 2


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "AVIF", "TIFF", "JPEG2000", "BMP"])
def test_no_other_format_is_reduced(image_format):
    data, target = photograph(200, 200, image_format), Target(9, 7, "RGB")
    np.testing.assert_array_equal(decode(data, target), decode(data, replace(target, draft=False)))


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.99])
def test_a_large_jpeg_that_is_cut_off_is_damaged_at_a_reduced_scale_too(kept):
    data = photograph(800, 800)
    assert fault_of(data[: int(kept * len(data))], Target(9, 7, "L")).reason == "damaged"


def test_the_scale_is_left_to_the_options():
    assert target_of([blank(9, 7)], draft=False) == Target(9, 7, "L", draft=False)
    assert choose_target(Config(size="5x6", mode="L", draft=False), []) == Target(5, 6, "L", draft=False)


@pytest.mark.parametrize(
    ("target", "channels", "num_values", "shape"),
    [(Target(2, 3, "L"), 1, 6, [2, 3]), (Target(2, 3, "RGB"), 3, 18, [2, 3, 3]), (Target(1, 1, "L"), 1, 1, [1, 1])],
)
def test_a_target_counts_its_values(target, channels, num_values, shape):
    assert (target.channels, target.num_values, target.shape) == (channels, num_values, shape)


# What auto chooses


def blank(height, width, mode="L", image_format="PNG", **options):
    return encode(Image.new(mode, (width, height)), image_format, **options)


CHOICES = {
    "all alike": ([blank(28, 20)] * 3, Target(28, 20, "L")),
    "half alike": ([blank(28, 20), blank(28, 20), blank(5, 5), blank(6, 6)], Target(28, 20, "L")),
    "fewer than half alike": ([blank(28, 20)] * 2 + [blank(side, 5) for side in (5, 6, 7)], Target(64, 64, "L")),
    "photographs": ([blank(480 + side, 640, "RGB", "JPEG") for side in range(5)], Target(64, 64, "RGB")),
    "the longest side": ([blank(64, 20)], Target(64, 20, "L")),
    "a longer side": ([blank(65, 20)], Target(64, 64, "L")),
    "one in colour": ([blank(9, 7)] * 9 + [blank(9, 7, "RGB")], Target(9, 7, "RGB")),
    "a palette": ([blank(9, 7, "P")], Target(9, 7, "RGB")),
    "inks": ([blank(9, 7, "CMYK", "JPEG")], Target(9, 7, "RGB")),
    "greys of all kinds": ([blank(9, 7, mode) for mode in ("L", "1", "LA", "I;16")]
                           + [blank(9, 7, mode, "TIFF") for mode in ("F", "I", "I;16B")], Target(9, 7, "L")),
    "turned": ([save_turned("JPEG", 6)] * 2 + [blank(2, 3)], Target(3, 2, "L")),
    "turned and not": ([save_turned("JPEG", 6), save_turned("PNG", 3)], Target(3, 2, "L")),
    "bad ones between": ([b"", b"no image", ReadFault("unreadable", "gone"), blank(9, 7)], Target(9, 7, "L")),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_auto_chooses_what_most_images_are(name):
    images, target = CHOICES[name]
    assert target_of(images) == target


@pytest.mark.parametrize(
    ("options", "target"),
    [({"size": "5x6"}, Target(5, 6, "L")), ({"mode": "RGB"}, Target(9, 7, "RGB")), ({"mode": "L"}, Target(9, 7, "L"))],
)
def test_what_is_given_is_not_chosen(options, target):
    assert target_of([blank(9, 7)], **options) == target


def test_no_header_is_needed_where_nothing_is_auto():
    assert choose_target(Config(size="5x6", mode="RGB"), []) == Target(5, 6, "RGB")


@pytest.mark.parametrize("images", [[], [b""], [b"no image", ReadFault("unreadable", "Permission denied")]])
@pytest.mark.parametrize("options", [{}, {"size": "5x6"}, {"mode": "L"}])
def test_auto_needs_an_image_that_opens(images, options):
    with pytest.raises(DataError, match=r"--size auto: expected an image .*, got none"):
        target_of(images, **options)


@pytest.mark.parametrize(
    "data",
    [png((50, 60), 8, 0, []), encode(NOISE.resize((50, 60)).convert("L"), "JPEG")[:-200], b"P5 50 60 255\n"],
    ids=["PNG", "JPEG", "PGM"],
)
def test_auto_chooses_by_headers_alone(data):
    # A sample of large PNG files would take the driver many seconds and their pixels' memory.
    assert target_of([data]) == Target(60, 50, "L")


@pytest.mark.parametrize("num_images", [0, 1, 63, 64, 65, 1000, 12_396])
def test_a_sample_is_spread_evenly(num_images):
    rows = sample_rows(num_images)
    assert rows[:1] == [0] * min(1, num_images)
    assert len(rows) == len(set(rows)) == min(num_images, 64)
    steps = np.diff([*rows, num_images])
    assert num_images == 0 or steps.max() - steps.min() <= 1


# Faults


def claim(data, marker, offset, packed):
    """Make a header claim another size."""
    start = data.index(marker) + offset
    return data[:start] + packed + data[start + len(packed) :]


COLOUR_PNG = encode(COLOUR_IMAGE, "PNG")
HEADER = b"IHDR" + struct.pack(">II", 30_000, 30_000) + COLOUR_PNG[24:29]
FAULTS = {
    "no bytes": (b"", "empty"),
    "one byte": (b"\x89", "unidentified"),
    "text": (b"not an image\n", "unidentified"),
    "a web page": (b"<!DOCTYPE html><html><body>404</body></html>", "unidentified"),
    "random bytes": (np.random.default_rng(0).bytes(1000), "unidentified"),
    "zeros": (bytes(1000), "unidentified"),
    "a signature alone": (b"\x89PNG\r\n\x1a\n", "unidentified"),
    "a pointer of git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "unidentified"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 1\n%%EndComments\nshowpage\n", "unidentified"),
    "EPS of Pillow": (encode(COLOUR_IMAGE, "EPS"), "unidentified"),
    "PDF": (encode(COLOUR_IMAGE, "PDF"), "unidentified"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg" width="4" height="1"/>', "unidentified"),
    "icon": (encode(COLOUR_IMAGE, "ICO"), "unidentified"),
    "PNG, header's CRC": (COLOUR_PNG[:29] + b"\0\0\0\0" + COLOUR_PNG[33:], "unidentified"),
    "PNG, checksum of the pixels": (claim(COLOUR_PNG, b"IEND", -9, b"\0"), "damaged"),
    "PNG, no pixels": (png((4, 1), 8, 0, []), "damaged"),
    "PNG, no size": (png((0, 0), 8, 0, []), "unidentified"),
    "PNG bomb": (COLOUR_PNG[:12] + HEADER + struct.pack(">I", zlib.crc32(HEADER)) + COLOUR_PNG[33:], "too_large"),
    "PNG text bomb": (png_row(8, 0, bytes(4), chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2_000_000)))), "damaged"),
    "JPEG bomb": (claim(encode(NOISE, "JPEG"), b"\xff\xc0", 5, struct.pack(">HH", 60_000, 60_000)), "too_large"),
    "GIF bomb": (claim(encode(NOISE, "GIF"), b"GIF8", 6, struct.pack("<HH", 60_000, 60_000)), "too_large"),
    "GIF bomb in a frame": (claim(encode(COLOUR_IMAGE, "GIF"), b",\0\0\0\0", 5, b"\xff\xff\xff\xff"), "too_large"),
    "BMP bomb": (claim(encode(NOISE, "BMP"), b"BM", 18, struct.pack("<ii", 60_000, 60_000)), "too_large"),
    "PPM bomb": (b"P6 60000 60000 255\n" + bytes(100), "too_large"),
    "TIFF bomb": (claim(claim(encode(NOISE, "TIFF"), b"\x00\x01\x04\x00\x01\x00\x00\x00", 8, b"\xff\xff\0\0"),
                        b"\x01\x01\x04\x00\x01\x00\x00\x00", 8, b"\xff\xff\0\0"), "too_large"),
    "WebP bomb": (claim(encode(NOISE, "WEBP", lossless=True), b"VP8L", 9, b"\xff\xff\xff\x0f"), "too_large"),
    "JPEG 2000 bomb": (claim(encode(NOISE, "JPEG2000"), b"ihdr", 4, struct.pack(">II", 60_000, 60_000)), "too_large"),
    **{f"{image_format}, cut off": (encode(NOISE, image_format)[:-200], "damaged")
       for image_format in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF")},
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_no_good_image_is_a_fault_of_one_reason_in_the_same_words(name):
    data, reason = FAULTS[name]
    fault = fault_of(data)
    assert fault.reason == reason
    assert reason in REASONS
    assert fault == fault_of(bytes(bytearray(data)))
    assert re.search(r"0x[0-9a-f]{4,}|BytesIO|/tmp|/home|\.py", fault.error) is None
    assert fault.error == fault.error.strip() != ""


@pytest.mark.parametrize("fault", [ReadFault("unreadable", "Permission denied"), ReadFault("not_a_file", "no file")])
def test_a_file_that_could_not_be_read_keeps_its_fault(fault):
    assert decode_image(fault, ROW_OF_FOUR) == Fault(fault.reason, fault.error)
    assert fault.reason in REASONS


@pytest.mark.parametrize("tail", [b"junk", bytes(100), COLOUR_PNG])
def test_bytes_after_the_image_do_no_harm(tail):
    np.testing.assert_array_equal(decode(COLOUR_PNG + tail, ROW_OF_FOUR)[0], FOUR_COLOURS)


def test_a_doubtful_checksum_of_good_pixels_gives_these_pixels_or_a_fault():
    data = claim(COLOUR_PNG, b"IEND", -8, b"\0\0\0\0")
    decoded = decode_image(data, ROW_OF_FOUR)
    assert isinstance(decoded, Fault) or decoded[0] == bytes(np.array(FOUR_COLOURS).ravel().tolist())


def mutations(data, num_mutations, seed):
    chance = random.Random(seed)
    for _ in range(num_mutations):
        mutant = bytearray(data[: chance.choice((len(data), len(data), chance.randrange(len(data))))])
        for _ in range(chance.choice((1, 1, 2, 8)) if mutant else 0):
            at = chance.randrange(min(len(mutant), chance.choice((60, 10_000))))
            mutant[at] = chance.choice((0, 1, 127, 255))
        yield bytes(mutant)


SMALL = NOISE.resize((7, 9))
FUZZED = {
    "PNG": encode(SMALL.convert("L"), "PNG", exif=orientation_tag(6)),
    "PNG, palette": encode(SMALL.quantize(16), "PNG", transparency=3),
    "PNG, 16 bits": save_rows(np.arange(63).reshape(9, 7) * 1000, "PNG", np.uint16),
    "JPEG": encode(SMALL, "JPEG", exif=orientation_tag(6)),
    "JPEG, inks": encode(SMALL.convert("CMYK"), "JPEG", progressive=True),
    "GIF": encode(SMALL.quantize(16), "GIF", save_all=True, append_images=[SMALL.rotate(90)], transparency=3),
    "WebP": encode(SMALL, "WEBP", exif=orientation_tag(6)),
    "WebP, lossless": encode(SMALL.convert("RGBA"), "WEBP", lossless=True),
    "TIFF": encode(SMALL, "TIFF"),
    "TIFF, LZW": encode(SMALL, "TIFF", compression="tiff_lzw"),
    "TIFF, floats": encode(SMALL.convert("F"), "TIFF"),
}


@pytest.mark.parametrize("name", FUZZED)
def test_a_mutant_is_an_image_or_a_fault_and_the_same_each_time(name, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)  # so that mutants of the size stay small
    mutants = list(mutations(FUZZED[name], 60, name))
    target = Target(9, 7, "RGB")
    keys, labels = pa.array([b"key"] * 60), pa.array([0] * 60, pa.int32())
    first, second = (decode_images(keys, labels, mutants, target) for _ in range(2))
    assert first == second
    assert {fault.reason for _, fault in first.faults} <= set(REASONS)
    assert len(first.table) + len(first.faults) == 60
    assert len(first.faults) > 5  # mutants that all decode would show nothing


# A cache trusts this number: where this digest changes and Pillow has not, the number has to change as well.
DIGEST_OF_VERSION = {2: "1962c6db0b515854"}


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_plain_png_is_decoded_as_pillow_reads_it_whole_and_damaged(mode):
    pixels = np.random.default_rng(2).integers(0, 256, (5, 7, len(mode)), np.uint8)
    good = encode(Image.fromarray(pixels.squeeze()), "PNG")
    target, stream = Target(5, 7, mode), random.Random(0)
    assert decode_image(good, target) == (pixels.tobytes(), False)
    assert decode_plain_png(good, target) == pixels.tobytes()
    for _ in range(300):
        data = bytearray(good)
        data[stream.randrange(len(data))] = stream.randrange(256)
        decoded = decode_image(bytes(data), target)
        with warnings.catch_warnings(action="ignore"):
            try:
                image = Image.open(io.BytesIO(data))
                image.load()
            except Exception:  # noqa: BLE001 - decoders raise what they like
                assert isinstance(decoded, Fault)
            else:
                if image.mode == mode and image.size == (7, 5) and not image.info:
                    assert decoded == (image.tobytes(), False)


def test_pixels_that_change_need_another_version_of_decoding():
    digest = hashlib.sha256()
    for name in sorted(EXACT.keys() - TOLERANCE.keys()):
        for target in (ROW_OF_FOUR, Target(2, 3, "L")):
            digest.update(decode_image(EXACT[name][0], target)[0])
    for bits, colour_type, row, colour, _ in TRANSPARENT.values():
        data = png_row(bits, colour_type, row, chunk(b"tRNS", struct.pack(f">{len(colour)}H", *colour)))
        digest.update(decode_image(data, ROW_OF_FOUR)[0])
    assert digest.hexdigest()[:16] == DIGEST_OF_VERSION[DECODE_VERSION]


# Shards


def decode_rows(images, target=ROW_OF_FOUR, keys=None):
    keys = keys or [f"{number}.png".encode() for number in range(len(images))]
    labels = pa.array([number % 3 for number in range(len(images))], pa.int32())
    decoded = decode_images(pa.array(keys, pa.binary()), labels, images, target)
    return decoded.table, decoded.faults, decoded.num_resized


def schema_of(shape):
    image = pa.fixed_shape_tensor(pa.uint8(), shape)
    return pa.schema([("key", pa.string()), ("class", pa.int32()), ("image", image)])


def test_kept_rows_and_faults_are_all_rows_in_order():
    good = [EXACT[name][0] for name in ("RGB PNG", "P GIF", "CMYK TIFF", "I;16 PNG")]
    images = [good[0], b"", good[1], b"no image", ReadFault("unreadable", "gone"), good[2], good[3], b""]
    table, faults, num_resized = decode_rows(images)
    assert table["key"].to_pylist() == ["0.png", "2.png", "5.png", "6.png"]
    assert table["class"].to_pylist() == [0, 2, 2, 0]
    assert [(row, fault.reason) for row, fault in faults] == [
        (1, "empty"), (3, "unidentified"), (4, "unreadable"), (7, "empty")]  # fmt: skip
    expected = [as_rgb(EXACT[name][1])[None] for name in ("RGB PNG", "P GIF", "CMYK TIFF", "I;16 PNG")]
    np.testing.assert_array_equal(table["image"].combine_chunks().to_numpy_ndarray(), expected)
    assert num_resized == 0


@pytest.mark.parametrize(("mode", "shape"), [("L", [2, 3]), ("RGB", [2, 3, 3])])
@pytest.mark.parametrize("images", [[], [b""] * 5, [save_rows(STORED, "PNG")] * 5])
def test_a_shard_has_the_same_schema_whatever_is_left_of_it(mode, shape, images):
    table, faults, _ = decode_rows(images, Target(2, 3, mode))
    assert table.schema == schema_of(shape)
    assert len(table) + len(faults) == len(images)
    table.validate(full=True)


def test_resized_images_are_counted():
    images = [blank(9, 7), blank(7, 9), b"", save_turned("JPEG", 6), save_turned("JPEG", 1), blank(9, 7, "RGB")]
    assert decode_rows(images, Target(9, 7, "L"))[2] == 3
    assert decode_rows(images[3:5], Target(3, 2, "L"))[2] == 1


def test_keys_that_are_not_utf8_are_spelled_out():
    keys = ["train/ä.png".encode(), b"train/\xe4.png", b"train/\xff\xfe/7.png", b"plain.png"]
    table = decode_rows([COLOUR_PNG, COLOUR_PNG, b"", COLOUR_PNG], keys=keys)[0]
    assert table["key"].to_pylist() == ["train/ä.png", "train/\\xe4.png", "plain.png"]


def test_a_slice_of_a_listing_is_decoded_as_its_own_rows():
    listing = pa.table({"key": pa.array([b"0", b"1", b"2", b"3"]), "label": pa.array([0, 1, 2, 3], pa.int32())})
    rows = listing.take(pa.array([1, 3])).combine_chunks()
    decoded = decode_images(rows["key"].chunk(0), rows["label"].chunk(0), [COLOUR_PNG, COLOUR_PNG], ROW_OF_FOUR)
    assert decoded.table.drop(["image"]).to_pydict() == {"key": ["1", "3"], "class": [1, 3]}


def test_nothing_is_kept_for_images_that_are_skipped():
    [images] = decode_rows([b"", COLOUR_PNG, b"", b""])[0]["image"].chunks
    assert [buffer.size for buffer in images.buffers() if buffer] == [ROW_OF_FOUR.num_values]


def test_keys_of_a_slice_come_without_those_that_it_was_cut_from():
    keys = pa.array([b"%d" % number for number in range(10_000)])
    [texts] = decode_rows([COLOUR_PNG] * 2, keys=keys[5_000:5_002])[0]["key"].chunks
    assert texts.to_pylist() == ["5000", "5001"]
    assert sum(buffer.size for buffer in texts.buffers() if buffer) < 100


def test_pixels_lie_in_one_block_without_a_copy_for_each():
    images = decode_rows([COLOUR_PNG] * 4)[0]["image"]
    assert images.num_chunks == 1
    pixels = images.chunk(0).to_numpy_ndarray()
    assert (pixels.shape, pixels.dtype, pixels.flags.c_contiguous) == ((4, 1, 4, 3), np.uint8, True)


def test_doubtful_files_that_decode_warn_nobody():
    with_transparency = encode(COLOUR_IMAGE.quantize(4), "PNG", transparency=b"\0\x80\xff\xff")
    broken_tag = save_rows(STORED, "TIFF", tiffinfo={305: "words"}).replace(b"words", b"wor\xff\xff")
    assert decode_rows([with_transparency, broken_tag])[1] == []  # any warning would be an error here


# Processes


def test_decoding_loads_neither_torch_nor_ray():
    code = "import sys, pipeline.decoding.shards; print(sorted({'torch', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("value", [Target(2, 3, "RGB"), Fault("damaged", "OSError: image file is truncated")])
def test_targets_and_faults_cross_a_pickle_unchanged(value):
    assert pickle.loads(pickle.dumps(value)) == value


def test_a_decoded_table_crosses_a_pickle_unchanged():
    table = decode_rows([COLOUR_PNG] * 3)[0]
    copy = pickle.loads(pickle.dumps(table))
    assert copy.schema == table.schema
    assert copy.equals(table)


@pytest.mark.data
def test_mnist_is_decoded_as_pillow_and_numpy_do(mnist_sample):
    images = [path.read_bytes() for path in sorted(mnist_sample.rglob("*.png"))[:200]]
    table, faults, num_resized = decode_rows(images, target_of(images))
    assert (faults, num_resized, len(table)) == ([], 0, 200)
    expected = [np.asarray(Image.open(io.BytesIO(data))) for data in images]
    np.testing.assert_array_equal(table["image"].combine_chunks().to_numpy_ndarray(), expected)
