"""Files of predictions, looked at and read piece by piece, against the csv module and NumPy; what is refused."""

import csv
import hashlib
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import score_files
from pipeline.data.score_files import check_classes, cut, hash_file, open_scores
from pipeline.data.score_rows import read_piece
from pipeline.data.storage import open_root
from pipeline.errors import DataError

CLASSES = ("3", "7", "salt, pepper")
KEYS = [f'valid/7/{number} "ä", {number}.png' for number in range(50)]


def write_csv(path, columns, end="\r\n", mark=""):
    """Write columns by Python's csv module."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator=end)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    path.write_bytes((mark + text.getvalue()).encode())
    return path


def read_all(path, classes=CLASSES):
    """Read all pieces of a file: keys, codes, scores, and how many pieces there are."""
    file = open_scores(str(path))
    check_classes(file, classes)
    pieces = [read_piece(file, piece, classes) for piece in cut(file)]
    keys = [key for rows in pieces for key in rows.keys.to_pylist()]
    codes = np.concatenate([rows.codes_N for rows in pieces])
    return keys, codes, np.concatenate([rows.scores_NK for rows in pieces]), len(pieces)


@pytest.mark.parametrize("size", [1, 40, 64, 1000, 2**26])
@pytest.mark.parametrize(("end", "mark"), [("\r\n", ""), ("\n", "\ufeff")])
def test_every_line_of_a_csv_file_is_read_once_however_it_is_cut(tmp_path, monkeypatch, size, end, mark):
    monkeypatch.setattr(score_files, "PIECE_BYTES", size)
    predicted = [CLASSES[number % 3] for number in range(50)]
    path = write_csv(tmp_path / "p.csv", {"split": ["é"] * 50, "prediction": predicted, "key": KEYS}, end, mark)
    content = path.read_bytes()
    path.write_bytes(content[: -len(end)] if size == 64 else content + end.encode())  # no line end, or two
    keys, codes, scores, num_pieces = read_all(path)
    assert (keys, codes.tolist(), scores.shape) == (KEYS, [number % 3 for number in range(50)], (50, 0))
    assert num_pieces == len(range(content.index(b"\n") + 1, path.stat().st_size, size))


@pytest.mark.parametrize("size", [*range(1, 12), 40, 64, 2**26])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_line_ends_in_quotes_belong_to_their_value(tmp_path, monkeypatch, size, end):
    monkeypatch.setattr(score_files, "PIECE_BYTES", size)
    keys = [f'a{end}"{row}", b{end}{end}c' for row in range(9)]
    with (tmp_path / "p.csv").open("w", newline="") as stream:
        rows = csv.writer(stream, lineterminator=end)
        rows.writerows(
            [["key", f"salt{end}pepper", "7"], *([key, "0.5", str(row % 2)] for row, key in enumerate(keys))]
        )
    found, codes, _, num_pieces = read_all(tmp_path / "p.csv", (f"salt{end}pepper", "7"))
    assert (found, codes.tolist()) == (keys, [row % 2 for row in range(9)])
    assert num_pieces > 1 or size == 2**26


@pytest.mark.parametrize("size", [1, 300, 2**26])
@pytest.mark.parametrize("group_rows", [1, 7, 50])
@pytest.mark.parametrize("kind", ["local", "bucket"])
def test_every_row_of_a_parquet_file_is_read_once_however_it_is_cut(tmp_path, monkeypatch, size, group_rows, kind):
    monkeypatch.setattr(score_files, "PIECE_BYTES", size)
    scores = np.random.default_rng(1).normal(size=(50, 3)).astype(np.float32)
    path = str(tmp_path / "p.parquet") if kind == "local" else "memory://bucket/scores/p.parquet"
    store, place = open_root("", path, DataError)
    table = pa.table({"key": KEYS, **dict(zip(CLASSES, scores.T, strict=True))})
    store.write(place, lambda stream: pq.write_table(table, stream, row_group_size=group_rows))
    keys, codes, found, num_pieces = read_all(path)
    assert (keys, codes.tolist()) == (KEYS, scores.argmax(1).tolist())
    np.testing.assert_array_equal(found, scores)
    assert (num_pieces == 1) == (size == 2**26)


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64(), pa.int8(), pa.uint64()])
def test_of_equal_scores_the_first_class_of_the_dataset_is_meant(tmp_path, kind):
    rows = [(1, 1, 1, 0), (0, 1, 1, 2), (2, 0, 2, 2), (0, 0, 1, 1), (0, 5, 0, 0)]
    names = ("7", "3", "extra", "other")  # other columns than classes, in another order
    columns = {
        name: pa.array(np.array(values), pa.int64()).cast(kind) for name, *values in zip(names, *rows, strict=True)
    }
    pq.write_table(pa.table({"key": list("abcde"), **columns}), tmp_path / "p.parquet")
    _, codes, scores, _ = read_all(tmp_path / "p.parquet", ("3", "7", "salt"))
    assert codes.tolist() == [0, -1, 1, -1, 0]
    assert scores.tolist() == [[three, seven, -np.inf] for seven, three, *_ in rows]
    file = open_scores(str(tmp_path / "p.parquet"))
    assert check_classes(file, ("3", "7", "salt")) == (("salt",), ("extra", "other"))


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["3", "tench", "7"]),
        pa.array(["3", "tench", "7"]).dictionary_encode(),
        pa.array(["3", "tench", "7"], pa.large_string()),
        pa.array([3, -1, 7], pa.int16()),
    ],
)
def test_predictions_are_names_of_classes_in_any_form(tmp_path, column):
    pq.write_table(
        pa.table({"key": pa.array(list("abc"), pa.string_view()), "prediction": column}), tmp_path / "p.parquet"
    )
    keys, codes, _, _ = read_all(tmp_path / "p.parquet")
    assert (keys, codes.tolist()) == (list("abc"), [0, -1, 1])


@pytest.mark.parametrize("name", ["top", "p.dat", "P.CSV"])
def test_a_file_of_another_name_is_what_its_first_bytes_say(tmp_path, name):
    path = write_csv(tmp_path / name, {"key": KEYS, "prediction": ["7"] * 50})
    assert read_all(path)[1].tolist() == [1] * 50
    if name != "P.CSV":
        pq.write_table(pa.table({"key": KEYS, "prediction": ["3"] * 50}), path)
        assert read_all(path)[1].tolist() == [0] * 50


def test_the_digest_is_that_of_the_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(score_files, "_HASHED_BYTES", 100)
    path = write_csv(tmp_path / "p.csv", {"key": KEYS, "prediction": ["3"] * 50})
    file = open_scores(str(path))
    assert hash_file(file) == hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"as at the beginning, got .*; leave the file as it is while a job runs"):
        hash_file(file)


def parquet_of(**columns):
    """Write columns as a Parquet file; return its bytes."""
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream)
    return stream.getvalue()


TWO = ["a", "b"]
BROKEN = {
    "nothing.csv": (None, "expected auto, top, all or a file, got nothing; name a"),
    "empty.csv": (b"", "expected rows, got an empty file"),
    "empty.parquet": (b"", "expected rows, got an empty file"),
    "no_rows.csv": (b"key,prediction\n", "expected rows below the names of columns, got none"),
    "no_rows.parquet": (parquet_of(key=pa.array([], pa.string()), prediction=pa.array([], pa.string())), "got none"),
    "no_key.csv": (b"name,prediction\na,3\n", "expected a column key, got name, prediction"),
    "no_key.parquet": (parquet_of(prediction=["3", "7"]), "expected a column key, got prediction"),
    "key_alone.csv": (b"key\na\n", "expected a column prediction, or one for each class, got key alone"),
    "no_class.csv": (b"key,left,right\na,1,2\n", 'each class, as 3, 7, "salt, pepper", got key, left, right'),
    "row_numbers.csv": (b",key,3,7\n0,a,1,2\n", "expected a class as the name of each column, got one without a name"),
    "row_numbers.parquet": (parquet_of(key=TWO, **{"3": [1.0, 2.0], "__index_level_0__": [0, 1]}), "got __index_level"),
    "twice.csv": (b"key,3,3\na,1,2\n", "expected each column once, got 3 twice"),
    "text.parquet": (parquet_of(key=TWO, **{"3": TWO}), "expected numbers in column 3, got string"),
    "text.csv": (b"key,3\na,1\nb,x\n", "expected rows of 2 columns in UTF-8, got In CSV column #1: Row #2: .* 'x'"),
    "floats.parquet": (parquet_of(key=TWO, prediction=[1.0, 2]), "expected text or whole numbers in .*, got double"),
    "numbers.parquet": (parquet_of(key=[1, 2], prediction=TWO), "expected text in column key, got int64"),
    "cut.parquet": (parquet_of(key=TWO, prediction=TWO)[:-9], "expected a Parquet or CSV file that can be read, got"),
    "text_in.parquet": (b"key,prediction\na,3\n", "expected a Parquet or CSV file that can be read, got"),
    "ragged.csv": (b"key,3,7\na,1,2\nb,1\n", "expected rows of 3 columns in UTF-8, got .* Expected 3 columns, got 2"),
    "latin.csv": ("key,prediction\ncaf\xe9,3\n".encode("latin-1"), "in UTF-8, got .* invalid UTF8 data"),
    "utf16.csv": ("key,prediction\na,3\n".encode("utf-16"), "expected a Parquet or CSV file that can be read, got"),
    "nan.csv": (b"key,3,7\na,1,2\nb,nan,1\nc,nan,1\n", "score of class 3, got nan for key b and 1 more nearby"),
    "none.csv": (b"key,3,7\na,1,\n", "expected a finite score of class 7, got none for key a"),
    "inf.csv": (b"key,3,7\na,1,2\nb,1,1e39\n", "expected a finite score of class 7, got inf for key b"),
    "inf.parquet": (parquet_of(key=TWO, **{"3": [0.0, -np.inf]}), "score of class 3, got -inf for key b"),
    "null.parquet": (parquet_of(key=TWO, **{"3": [0.0, None]}), "score of class 3, got none for key b"),
    "no_prediction.csv": (b"key,prediction\na,3\nb,\n", "expected a class, got none for key b"),
    "no_prediction.parquet": (parquet_of(key=TWO, prediction=[None, "3"]), "expected a class, got none for key a"),
    "null_key.parquet": (parquet_of(key=["a", None], prediction=TWO), "expected a key in every row, got none in row 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_line_that_names_it(tmp_path, name):
    content, message = BROKEN[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"\A--scores [^\n]*{name}: (?=[^\n]*; )[^\n]*{message}[^\n]*\Z"):
        read_all(tmp_path / name)
