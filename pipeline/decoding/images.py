"""Bytes of image files to uint8 tensors of one size and mode.

Input: keys, labels and bytes (or the reason why there are none). Output: an Arrow table of tensors, and the rows that
were skipped with their reasons. Invariant: every key that enters is in exactly one of the two.

Axes: N images, H height, W width, C channels (1 for mode L, 3 for RGB); pixels 0 to 255.
"""

from __future__ import annotations

import io
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import ExifTags, Image, UnidentifiedImageError

from pipeline.config import Config
from pipeline.data.files import ReadFault, display
from pipeline.decoding.plain_png import decode_plain_png
from pipeline.errors import DataError
from pipeline.model import ModelInput
from pipeline.target import Target

# What `files.IMAGE_ENDINGS` names. Others stay closed whatever a file is called: EPS would start Ghostscript.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "DIB", "PPM", "TIFF", "WEBP", "JPEG2000", "AVIF")
REASONS = ("unreadable", "not_a_file", "empty", "unidentified", "damaged", "too_large", "unsupported")
# Where Pillow finds an orientation or a transparent colour; without them the pixels are final.
_EXTRAS = frozenset(("transparency", "exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"))
_ALPHA_MODES = frozenset(("RGBA", "LA", "PA", "La", "RGBa"))
GREY_MODES = frozenset(("1", "L", "LA", "La", "I", "F"))
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNS_OF_SIDES = frozenset((5, 6, 7, 8))
# JPEG alone, and several in one file, can be decoded at 1/2, 1/4 or 1/8 of their sides.
DRAFT_FORMATS = frozenset(("JPEG", "MPO"))
# Of grey PNG files, by Pillow's name for their samples.
_GREY_BITS = {"1": 1, "L;2": 2, "L;4": 4, "L": 8}
_TIFF_BITS, _TIFF_PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
# What the pixels depend on beside the file, the target and Pillow: raise it when the same bytes decode to others.
DECODE_VERSION = 2
_NUM_SAMPLED = 64
# `auto` keeps a common size up to this many pixels a side: beyond it these classifiers gain nothing but cost. Measured
# on crops of two photographs, 16 classes, 240x320: of sides of 32 to 192 pixels, the smaller are as good or better.
_MAX_AUTO_SIDE = 64
_FALLBACK_SIDE = 64


# Height and width in pixels as shown, and whether it is grey.
Header = tuple[int, int, bool]


@dataclass(frozen=True)
class Fault:
    """Why an image is skipped: one of `REASONS`, and the words of Pillow or the system."""

    reason: str
    error: str


@dataclass(frozen=True)
class Decoded:
    """What became of a shard's images.

    Attributes:
        table: `key` string, `class` int32, `image` fixed_shape_tensor of uint8, [H, W] or [H, W, 3]; and likewise
            `model_image`, where a model is given other pixels.
        faults: The rows that were skipped, with the reasons.
        num_resized: How many images had another size than the target.
        is_from_cache: Whether all this was found in the cache.
    """

    table: pa.Table
    faults: list[tuple[int, Fault]]
    num_resized: int
    is_from_cache: bool = field(default=False, compare=False)


def sample_rows(num_images: int) -> list[int]:
    """Choose rows of a listing, evenly, whose headers `choose_target` is to see."""
    num_sampled = min(num_images, _NUM_SAMPLED)
    return [index * num_images // num_sampled for index in range(num_sampled)]


def choose_target(config: Config, headers: Sequence[Header]) -> Target:
    """Settle what `auto` leaves open from the headers of some images.

    The size is that of at least half of them, if no side is longer than 64, else 64x64; the mode is L if all are
    grey, else RGB.

    Args:
        config: The options.
        headers: As `read_header` returns them, of `sample_rows`.

    Raises:
        DataError: If something is `auto` and there is no header.
    """
    if config.height_width and config.mode != "auto":
        return Target(*config.height_width, _as_mode(config.mode), config.draft)
    if not headers:
        raise DataError(
            "--size auto: expected an image among the first that were looked at, got none that Pillow can open; "
            "check the files, or give --size and --mode"
        )
    sizes = Counter((height, width) for height, width, _ in headers)
    common_size, num_common = sizes.most_common(1)[0]
    is_agreed = 2 * num_common >= len(headers) and max(common_size) <= _MAX_AUTO_SIDE
    agreed_size = common_size if is_agreed else (_FALLBACK_SIDE, _FALLBACK_SIDE)
    mode = "L" if all(is_grey for _, _, is_grey in headers) else "RGB"
    chosen_mode = _as_mode(mode if config.mode == "auto" else config.mode)
    return Target(*(config.height_width or agreed_size), chosen_mode, config.draft)


def decode_images(
    keys: pa.BinaryArray, labels: pa.Int32Array, images: Iterable[bytes | ReadFault], target: Target
) -> Decoded:
    """Decode a shard's images into one Arrow table.

    Args:
        keys: Of N images, as `listing` lists them.
        labels: Of the same images, indexes of classes.
        images: Their bytes, in the same order.
        target: What every image becomes.
    """
    shapes = {"image": target.shape}
    if target.model_input is not None and target.model_input.is_made:
        shapes["model_image"] = target.model_input.shape
    sizes = [math.prod(shape) for shape in shapes.values()]
    pixels = [bytearray(len(keys) * size) for size in sizes]
    kept: list[int] = []
    faults: list[tuple[int, Fault]] = []
    num_resized = 0
    with warnings.catch_warnings():
        # Pillow warns of doubtful metadata and large images in files that it decodes all the same.
        warnings.simplefilter("ignore")
        for row, data in enumerate(images):
            decoded = decode_image(data, target)
            if isinstance(decoded, Fault):
                faults.append((row, decoded))
                continue
            *images_bytes, is_resized = decoded
            for own, size, image_bytes in zip(pixels, sizes, images_bytes, strict=True):
                start = len(kept) * size
                own[start : start + size] = image_bytes
            kept.append(row)
            num_resized += is_resized
    if faults:
        for own, size in zip(pixels, sizes, strict=True):
            del own[len(kept) * size :]  # unused bytes that would be sent with the rest
        keys, labels = keys.take(pa.array(kept, pa.int64())), labels.take(pa.array(kept, pa.int64()))
    columns = {
        name: _to_tensors(own, len(kept), shape) for (name, shape), own in zip(shapes.items(), pixels, strict=True)
    }
    table = pa.table({"key": _to_text(keys), "class": labels, **columns})
    return Decoded(table, faults, num_resized)


def decode_image(data: bytes | ReadFault, target: Target) -> tuple[bytes, bool] | tuple[bytes, bytes, bool] | Fault:
    """Decode one image file.

    Returns:
        The pixels, H·W·C bytes in row-major order, those for a model where it is given others, and whether it was
        resized; or why there are none.
    """
    if isinstance(data, ReadFault):
        return Fault(data.reason, data.error)
    if not data:
        return Fault("empty", "the file has no bytes")
    stream = io.BytesIO(data)
    try:
        if pixels := decode_plain_png(data, target):
            return pixels, False
        image = load_image(stream, target)
        if target.model_input is not None and target.model_input.is_made:
            return _decode_twice(image, target, target.model_input)
        is_plain = image.size == (target.width, target.height) and image.mode == target.mode
        if not is_plain or not _EXTRAS.isdisjoint(image.info):
            image = to_mode(upright(image), target.mode)
        plain, is_resized = _resize(image, target)
        return plain.tobytes(), is_resized
    except UnidentifiedImageError:
        # Pillow's own words name the stream's address, which differs from run to run.
        return Fault("unidentified", "cannot identify image file")
    except Image.DecompressionBombError as exc:
        return Fault("too_large", str(exc))
    except _UnsupportedPixelsError as exc:
        return Fault("unsupported", str(exc))
    except Exception as exc:  # noqa: BLE001 - decoders raise what they like; the fault is recorded, with its words
        words = str(exc).replace(repr(stream), "the file")
        return Fault("damaged", f"{type(exc).__name__}: {words}" if words else type(exc).__name__)


def _resize(image: Image.Image, target: Target) -> tuple[Image.Image, bool]:
    """Bring an image to the target's size, and say whether it had another."""
    size = (target.width, target.height)
    return (image, False) if image.size == size else (image.resize(size, Image.Resampling.BILINEAR), True)


def _decode_twice(image: Image.Image, target: Target, wanted: ModelInput) -> tuple[bytes, bytes, bool]:
    """Make the pixels of a decoded image for the classifiers and for the model."""
    turned = upright(image)
    by_mode = {mode: to_mode(turned, mode) for mode in {target.mode, wanted.mode}}
    plain, is_resized = _resize(by_mode[target.mode], target)
    return plain.tobytes(), to_model_input(by_mode[wanted.mode], wanted).tobytes(), is_resized


def to_model_input(image: Image.Image, wanted: ModelInput) -> Image.Image:
    """Resize an image, and cut its middle out, as timm and torchvision do when they evaluate.

    `squash` resizes both sides to the size before the cut. `crop` keeps the aspect ratio: of a square one the shorter
    side gets that length, the longer one the whole pixels of it; else the image covers it, rounded (timm 1.0,
    `transforms_imagenet_eval`; torchvision, `Resize` and `CenterCrop`).
    """
    height, width = wanted.scaled
    resized = (width, height)
    if wanted.resize == "crop" and height == width:
        short, long = sorted(image.size)
        other = int(height * long / short)
        resized = (height, other) if image.width <= image.height else (other, height)
    elif wanted.resize == "crop":
        ratio = min(image.height / height, image.width / width)
        resized = (round(image.width / ratio), round(image.height / ratio))
    if resized != image.size:
        image = image.resize(resized, Image.Resampling[wanted.interpolation.upper()])
    left, top = round((resized[0] - wanted.width) / 2), round((resized[1] - wanted.height) / 2)
    if (left, top) == (0, 0) and image.size == (wanted.width, wanted.height):
        return image
    return image.crop((left, top, left + wanted.width, top + wanted.height))


def load_image(stream: io.BytesIO, target: Target) -> Image.Image:
    """Open and decode an image, at a reduced scale where that is enough."""
    image = Image.open(stream, formats=FORMATS)
    if "transparency" in image.info:
        _rescale_transparency(image)
    if target.draft and image.format in DRAFT_FORMATS and _reduce_scale(image, target):
        try:
            image.load()
        except Exception:  # noqa: BLE001 - as of a lossless JPEG: what fails at a smaller scale may not in full
            stream.seek(0)
            image = Image.open(stream, formats=FORMATS)
    image.load()
    return image


class _UnsupportedPixelsError(ValueError):
    """Pixels whose scale no rule tells."""


def _reduce_scale(image: Image.Image, target: Target) -> bool:
    """Have an image decoded at the smallest scale that leaves at least twice the target in both sides; say if it is.

    libjpeg does so in whole numbers from fewer coefficients of each block; the rest is averaged by the resizing, which
    twice the target leaves something to do.
    """
    height, width = (2 * side for side in target.largest)
    if image.width * image.height < 4 * width * height:
        return False  # however it is turned; most images need not be asked
    image.draft(None, (height, width) if _orientation(image) in _TURNS_OF_SIDES else (width, height))
    return True


def _rescale_transparency(image: Image.Image) -> None:
    """Bring a PNG's transparent colour to the depth to which Pillow brings its pixels: it leaves it as it was written.

    Of a sample of less than 16 bits only these count (PNG, third edition, 11.3.2.1 tRNS).
    """
    colour = image.info["transparency"]
    tiles: Any = getattr(image, "tile", None)
    if image.format != "PNG" or not tiles or isinstance(colour, bytes) or image.mode == "P":
        return
    rawmode = tiles[0].args
    if rawmode == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in colour)
    elif rawmode == "RGB":
        image.info["transparency"] = tuple(value & 255 for value in colour)
    elif rawmode in _GREY_BITS:
        white = 2 ** _GREY_BITS[rawmode] - 1
        image.info["transparency"] = (colour & white) * 255 // white


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Bring an image of any of Pillow's modes to L or RGB, 8 bits."""
    if image.mode.startswith("I") or image.mode == "F":
        return _scale_grey(image).convert(mode)
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        if image.mode in ("La", "RGBa"):
            image = image.convert("LA" if image.mode == "La" else "RGBA")
        # White, as browsers and viewers show it; without it the colour behind full transparency would come out.
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba).convert(mode)
    if image.mode == mode:
        return image  # convert would copy it
    if image.mode in ("L", "RGB", "1"):
        return image.convert(mode)
    return image.convert("RGB").convert(mode)


def _scale_grey(image: Image.Image) -> Image.Image:
    """Bring 16-bit grey (0 to 65535) and float grey (0 to 1) to L; Pillow's own conversion would saturate.

    Raises:
        _UnsupportedPixelsError: If values lie outside these ranges, since no rule says what white is then.
    """
    values: npt.NDArray[Any] = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    white = 1 if image.mode == "F" else 4095 if tags.get(_TIFF_BITS) == (12,) else 65535
    if not (values.min() >= 0 and values.max() <= white):  # so that NaN fails too
        raise _UnsupportedPixelsError(
            f"pixels of mode {image.mode} from {values.min()} to {values.max()}, outside 0 to {white}"
        )
    if image.mode == "F":
        return Image.fromarray(np.floor(values * np.float32(255) + np.float32(0.5)).astype(np.uint8))
    # In place and in whole numbers: a scan of many megapixels should cost a few times its size, no more.
    scaled = values.astype(np.uint32)
    scaled *= 255
    scaled += white // 2
    scaled //= white
    grey = scaled.astype(np.uint8)
    if tags.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 255 - grey
    if isinstance(transparent := image.info.get("transparency"), int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF orientation says; broken metadata leaves good pixels as they are."""
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    if hasattr(image, "tag_v2"):
        return 1  # Pillow turns TIFF files itself
    try:
        # Not the method of PNG files, which decodes the whole image first.
        orientation: int = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001 - metadata that cannot be read says nothing about the pixels
        return 1
    return orientation


def read_header(data: bytes | ReadFault) -> Header | None:
    """Look at the header alone; None for what cannot be opened."""
    if isinstance(data, ReadFault):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            orientation = _orientation(image)
    except Exception:  # noqa: BLE001 - a header that cannot be read is met again, and recorded, when it is decoded
        return None
    width, height = image.size[::-1] if orientation in _TURNS_OF_SIDES else image.size
    is_grey = image.mode in GREY_MODES or image.mode.startswith("I;16")
    return height, width, is_grey


def _as_mode(mode: str) -> Literal["L", "RGB"]:
    return "L" if mode == "L" else "RGB"


def _to_text(keys: pa.BinaryArray) -> pa.StringArray:
    # Of its own memory, as a slice is sent with all that it was cut from; and not cast, which loads pyarrow.compute.
    texts = pa.concat_arrays([keys]).view(pa.string())
    try:
        texts.validate(full=True)
        return texts
    except pa.ArrowInvalid:  # a name that is not UTF-8
        return pa.array([display(key) for key in keys.to_pylist()], pa.string())


def _to_tensors(pixels: bytearray, num_images: int, shape: list[int]) -> pa.FixedShapeTensorArray:
    size = math.prod(shape)
    num_bytes = num_images * size
    values = pa.Array.from_buffers(pa.uint8(), num_bytes, [None, pa.py_buffer(pixels)])
    # From the storage, since from_numpy_ndarray refuses a shard of which nothing was left.
    storage = pa.FixedSizeListArray.from_arrays(values, size)
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.uint8(), shape), storage)
