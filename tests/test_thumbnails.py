import io

import numpy as np
import pytest
from builders import encode
from PIL import Image

from pipeline.data.files import ReadFault
from pipeline.decoding.images import Fault
from pipeline.decoding.thumbnails import make_picture

NOISE = np.random.default_rng(1).integers(0, 256, (300, 400, 3), np.uint8)


def opened(picture):
    return Image.open(io.BytesIO(picture.data))


def test_a_small_image_keeps_every_pixel():
    pixels = NOISE[:28, :28, 0]
    picture = make_picture(encode(pixels), 8_000)
    assert picture.media_type == "image/png"
    assert np.array_equal(np.asarray(opened(picture)), pixels)


@pytest.mark.parametrize("max_bytes", [10_000, 4_000, 500])
def test_a_large_image_keeps_its_shape_and_fits_its_bytes(max_bytes):
    picture = make_picture(encode(NOISE), max_bytes)
    assert len(picture.data) <= max_bytes
    assert max(opened(picture).size) <= 128
    assert picture.original_size == (400, 300)
    assert abs(picture.width / picture.height - 4 / 3) < 0.1


def test_an_image_is_upright():
    image = Image.fromarray(np.zeros((20, 40), np.uint8))
    exif = Image.Exif()
    exif[274] = 6
    picture = make_picture(encode(image, exif=exif), 8_000)
    assert opened(picture).size == (20, 40)
    assert picture.original_size == (20, 40)


def test_of_a_hundred_megapixels_a_jpeg_is_reduced_and_another_is_named():
    image = Image.new("1", (10_000, 10_001))
    assert make_picture(encode(image), 8_000) == Fault("too_large", "10000 x 10001 pixels")
    assert max(opened(make_picture(encode(image.convert("L"), "JPEG"), 8_000)).size) == 128


def test_what_cannot_be_read_or_decoded_has_its_reason():
    assert make_picture(ReadFault("unreadable", "gone"), 8_000) == Fault("unreadable", "gone")
    assert make_picture(b"no image", 8_000).reason == "unidentified"
    assert make_picture(encode(NOISE)[:5_000], 8_000).reason == "damaged"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_mode_has_a_picture(mode):
    assert make_picture(encode(Image.new(mode, (30, 30))), 8_000).width == 30
