import json
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks import data as datasets


def _names(root):
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def test_links_keep_the_proportions_and_the_content(noisy_dataset, tmp_path):
    datasets.link_images(noisy_dataset, tmp_path, 100)
    assert datasets.count_images(tmp_path) == 100
    counts = {name: len(list((tmp_path / "train" / name).iterdir())) for name in ("2", "10", "b")}
    assert all(abs(count - 100 * 8 / 42) < 1 for count in counts.values())
    copies = sorted((tmp_path / "valid" / "b").glob("*-3.png"))
    assert len(copies) == 2
    assert {copy.read_bytes() for copy in copies} == {(noisy_dataset / "valid" / "b" / "3.png").read_bytes()}


def test_what_was_interrupted_is_made_anew(tmp_path):
    folder = tmp_path / "made"
    with pytest.raises(RuntimeError, match="stopped"):
        datasets.make_once(folder, _stop)
    assert not folder.exists()
    datasets.make_once(folder, lambda path: (path / "b").touch())
    datasets.make_once(folder, _stop)
    assert _names(tmp_path) == ["made/b"]


def _stop(path):
    (path / "a").touch()
    raise RuntimeError("stopped")


@pytest.mark.slow
def test_photographs_are_the_same_every_time_and_of_all_sizes(tmp_path):
    for name in ("a", "b"):
        datasets.make_photographs(tmp_path / name, 24)
    assert _names(tmp_path / "a") == _names(tmp_path / "b")
    assert all(
        (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in _names(tmp_path / "a")
    )
    classes = {path.name for split in ("train", "valid") for path in (tmp_path / "a" / split).iterdir()}
    assert classes == {"china-left", "china-right", "flower-left", "flower-right"}
    megapixels = [_megapixels(tmp_path / "a" / name) for name in _names(tmp_path / "a")]
    assert 0.09 < min(megapixels) < 1
    assert 3 < max(megapixels) < 4.01


def _megapixels(path):
    with Image.open(path) as image:
        return image.width * image.height / 1e6


def test_a_tar_holds_each_image_beside_its_class(noisy_dataset, tmp_path):
    datasets.write_tars(noisy_dataset, tmp_path)
    assert _names(tmp_path) == ["train/00000.tar", "valid/00000.tar"]
    with tarfile.open(tmp_path / "valid" / "00000.tar") as tar:
        content = {member.name: tar.extractfile(member).read() for member in tar}
    samples = sorted((content[f"{key:09d}.cls"].decode(), content[f"{key:09d}.png"]) for key in range(18))
    paths = sorted((noisy_dataset / "valid").rglob("*.png"))
    assert samples == sorted((path.parent.name, path.read_bytes()) for path in paths)


def test_parquet_is_laid_out_as_a_hugging_face_dataset(noisy_dataset, tmp_path):
    datasets.write_parquet(noisy_dataset, tmp_path)
    table = pq.read_table(tmp_path / "train" / "00000.parquet")
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features == {"image": {"_type": "Image"}, "label": {"names": ["2", "10", "b"], "_type": "ClassLabel"}}
    found = sorted((row["label"], row["image"]["bytes"]) for row in table.to_pylist())
    paths = (noisy_dataset / "train").rglob("*.png")
    assert found == sorted((("2", "10", "b").index(path.parent.name), path.read_bytes()) for path in paths)


def test_arrays_hold_the_pixels(noisy_dataset, tmp_path):
    datasets.write_arrays(noisy_dataset, tmp_path)
    images_ND, labels_N = np.load(tmp_path / "valid_images.npy"), np.load(tmp_path / "valid_labels.npy")
    assert labels_N.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    expected_HW = np.array(Image.open(noisy_dataset / "valid" / "10" / "2.png"))
    np.testing.assert_array_equal(images_ND[8].reshape(8, 8), expected_HW)


def test_classes_are_the_same_every_time_and_every_fifth_image_is_for_validation(tmp_path):
    for name in ("a", "b"):
        datasets.make_classes(tmp_path / name, 18, 3)
    names = _names(tmp_path / "a")
    assert names == _names(tmp_path / "b")
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    assert [sum(name.startswith(split) for name in names) for split in ("train", "valid")] == [12, 6]
    with Image.open(tmp_path / "a" / names[0]) as image:
        assert (image.size, image.mode) == ((64, 64), "RGB")
