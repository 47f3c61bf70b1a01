"""The bundled sample, made anew from its origin: this file, run as a script, writes `pipeline/data/digits.parquet`."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from sklearn.datasets import load_digits

from pipeline.config import Config
from pipeline.data import files
from pipeline.data.listing import list_dataset

ORIGIN = (
    "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak (1998), UCI Machine Learning Repository, "
    "https://doi.org/10.24432/C50P49, licence CC BY 4.0; its test part, as scikit-learn's load_digits ships it. "
    "Pixels 0 to 16 scaled to 0 to 255; the first 898 images are for training, the other 899 for validation."
)
NUM_TRAIN = 898


def make_digits():
    """Make the table anew; 898 and 899 images, as scikit-learn's example cuts the set into halves."""
    digits = load_digits()
    keys, images = [], []
    for row, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        stream = io.BytesIO()
        Image.fromarray(np.rint(pixels * 255 / 16).astype(np.uint8)).save(stream, "PNG", optimize=True)
        keys.append(f"{'train' if row < NUM_TRAIN else 'valid'}/{label}/{row:04d}.png")
        images.append(stream.getvalue())
    table = pa.table({"key": pa.array(keys, pa.string()), "image": pa.array(images, pa.binary())})
    return table.replace_schema_metadata({"origin": ORIGIN})


def decode_all(table):
    return [np.asarray(Image.open(io.BytesIO(data))) for data in table["image"].to_pylist()]


def test_the_bundled_file_is_what_its_origin_gives():
    bundled, made = pq.read_table(files.DIGITS), make_digits()
    assert bundled["key"].equals(made["key"])
    # Pixels, since the bytes of a PNG file depend on the compressor's version.
    np.testing.assert_array_equal(decode_all(bundled), decode_all(made))


def test_the_bundled_file_says_where_it_is_from():
    metadata = pq.read_schema(files.DIGITS).metadata
    assert metadata[b"origin"].decode() == ORIGIN


def test_digits_lists_ten_classes_in_two_halves():
    listing = list_dataset(files.locate("digits"), Config())
    assert listing.classes == tuple("0123456789")
    assert (len(listing.train), len(listing.valid)) == (898, 899)


if __name__ == "__main__":
    pq.write_table(make_digits(), files.DIGITS, compression="zstd", compression_level=19)
