"""What decoding makes for a model: its own size and mode, resized and cut as timm and torchvision do."""

import io

import numpy as np
import pyarrow as pa
import pytest
from builders import encode
from PIL import Image

from pipeline.decoding.images import Fault, decode_image, decode_images, to_model_input
from pipeline.model import ModelInput
from pipeline.target import Target

SIZES = [(60, 40), (40, 60), (51, 51), (37, 100), (20, 23), (300, 211)]  # width, height


def draw(width, height, mode="RGB"):
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, shape, np.uint8))


def by_the_definition(image, size, crop_pct, interpolation):
    """The shorter side to floor(size / crop_pct), the longer one in proportion, and the middle: square inputs."""
    scale, (width, height) = int(size / crop_pct), image.size
    is_upright = width <= height
    resized = (scale, int(scale * height / width)) if is_upright else (int(scale * width / height), scale)
    image = image.resize(resized, interpolation)
    left, top = (round((side - size) / 2.0) for side in resized)
    return image.crop((left, top, left + size, top + size))


@pytest.mark.parametrize("crop_pct", [1.0, 0.95, 0.875])
@pytest.mark.parametrize("size", SIZES)
def test_a_crop_is_that_of_the_definition(size, crop_pct):
    image = draw(*size)
    for name in ("bilinear", "bicubic"):
        got = to_model_input(image, ModelInput(32, 32, "RGB", "crop", crop_pct, name))
        expected = by_the_definition(image, 32, crop_pct, Image.Resampling[name.upper()])
        assert got.tobytes() == expected.tobytes()


@pytest.mark.parametrize("crop_pct", [1.0, 0.9])
@pytest.mark.parametrize("sides", [(32, 32), (24, 40), (17, 16)])
def test_it_is_what_timm_does(sides, crop_pct):
    timm_data = pytest.importorskip("timm.data", reason="timm needs torchvision, of this torch's version")
    for resize, mode in (("squash", "squash"), ("crop", "center")):
        for name in ("bilinear", "bicubic"):
            transform = timm_data.create_transform(
                (3, *sides), interpolation=name, crop_pct=crop_pct, crop_mode=mode, mean=(0,) * 3, std=(1,) * 3
            )
            for size in SIZES:
                image = draw(*size)
                expected_CHW = transform(image).numpy()
                got = np.asarray(to_model_input(image, ModelInput(*sides, "RGB", resize, crop_pct, name)))
                np.testing.assert_array_equal(got.transpose(2, 0, 1) / np.float32(255), expected_CHW)


def test_it_is_what_torchvision_does():
    pytest.importorskip("torchvision", reason="needs a torchvision of this torch's version")
    from torchvision.transforms._presets import ImageClassification

    transform = ImageClassification(crop_size=32, resize_size=36, mean=(0,) * 3, std=(1,) * 3)
    for size in SIZES:
        image = draw(*size)
        got = np.asarray(to_model_input(image, ModelInput(32, 32, "RGB", "crop", 32 / 36)))
        np.testing.assert_array_equal(got.transpose(2, 0, 1) / np.float32(255), transform(image).numpy())


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_classifiers_get_the_same_pixels_with_a_model_beside_them(mode):
    wanted = ModelInput(24, 16, "RGB" if mode == "L" else "L", "crop", 0.9)
    for image in (draw(60, 40), draw(11, 9, "L"), draw(60, 40).convert("RGBA").rotate(10), draw(30, 30).convert("P")):
        data = encode(image)
        pixels, is_resized = decode_image(data, Target(8, 10, mode))
        both = decode_image(data, Target(8, 10, mode, model_input=wanted))
        assert both[0] == pixels
        assert both[2] == is_resized
        plain = decode_image(data, Target(*image.size[::-1], wanted.mode))[0]
        shape = image.size[::-1] + (() if wanted.mode == "L" else (3,))
        upright = Image.fromarray(np.frombuffer(plain, np.uint8).reshape(shape))
        assert both[1] == to_model_input(upright, wanted).tobytes()


def test_a_turned_image_is_turned_for_the_model_too():
    image, exif = draw(40, 20), Image.Exif()
    exif[0x0112] = 6
    turned = image.transpose(Image.Transpose.ROTATE_270)
    _, got, _ = decode_image(encode(image, exif=exif), Target(8, 8, "RGB", model_input=ModelInput(20, 10, "RGB")))
    assert got == turned.resize((10, 20), Image.Resampling.BILINEAR).tobytes()


def test_a_large_jpeg_is_decoded_at_a_scale_that_is_enough_for_both():
    smooth = Image.fromarray(np.linspace(0, 255, 900 * 800, dtype=np.uint8).reshape(800, 900)).convert("RGB")
    data = encode(smooth, "JPEG", quality=95)
    for wanted, draft_side in ((ModelInput(100, 100, "RGB", "crop", 1.0), 400), (ModelInput(90, 90, "RGB"), 200)):
        opened = Image.open(io.BytesIO(data))
        opened.draft(None, (2 * wanted.width, 2 * wanted.height))
        assert min(opened.size) >= draft_side / 2
        decoded = decode_image(data, Target(8, 8, "RGB", model_input=wanted))
        assert decoded[1] == to_model_input(opened, wanted).tobytes()
    full = decode_image(data, Target(8, 8, "RGB", draft=False, model_input=wanted))
    assert full[1] == to_model_input(Image.open(io.BytesIO(data)), wanted).tobytes()


def test_a_shard_has_both_images_of_what_could_be_decoded():
    images = [encode(draw(60, 40)), b"none", encode(draw(10, 10, "L"))]
    target = Target(4, 5, "L", model_input=ModelInput(6, 7, "RGB"))
    decoded = decode_images(pa.array([b"a", b"b", b"c"]), pa.array([0, 1, 1], pa.int32()), images, target)
    assert decoded.table["key"].to_pylist() == ["a", "c"]
    assert decoded.table["image"].combine_chunks().to_numpy_ndarray().shape == (2, 4, 5)
    assert decoded.table["model_image"].combine_chunks().to_numpy_ndarray().shape == (2, 6, 7, 3)
    assert isinstance(decode_image(images[1], target), Fault)


def test_training_images_that_no_model_sees_have_the_same_pixels_and_no_others():
    wanted = ModelInput(90, 90, "RGB")
    target = Target(8, 8, "RGB", model_input=wanted)
    large = encode(draw(60, 40).resize((900, 800)), "JPEG")
    pixels, is_resized = decode_image(large, target.without_model)
    assert (pixels, is_resized) == (decode_image(large, target)[0], True)
    decoded = decode_images(pa.array([b"a"]), pa.array([0], pa.int32()), [large], target.without_model)
    assert decoded.table.column_names == ["key", "class", "image"]
    assert Target(8, 8, "L").without_model == Target(8, 8, "L")
