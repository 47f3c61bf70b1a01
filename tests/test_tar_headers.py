"""The walk over headers against Python's tarfile and GNU tar, which nobody here wrote."""

import io
import os
import random
import subprocess
import tarfile
from collections import Counter

import pytest
from builders import CountingStore, pack_tar

from pipeline.data.formats.index import Archive
from pipeline.data.formats.tar_headers import TarFile, walk
from pipeline.errors import DataError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
every_format = pytest.mark.parametrize("tar_format", FORMATS.values(), ids=FORMATS)


def open_tar(data, window_bytes, num_ahead=2):
    store = CountingStore("a.tar", data)
    archive = Archive("tar", "bucket/a.tar", "a.tar", len(data), 0, None, None)
    return store, TarFile(store, archive, window_bytes, num_ahead)


def walk_bytes(data, window_bytes=2**16, ignored=None, endings=()):
    ignored = Counter() if ignored is None else ignored
    with open_tar(data, window_bytes)[1] as file:
        return list(walk(file, endings, ignored))


def contents(data, **options):
    return [(name, data[start : start + size]) for name, start, size, _ in walk_bytes(data, **options)]


def as_bytes(members):
    return [(name.encode(), data) for name, data in members]


def gnu_tar(folder, *options):
    subprocess.run(["tar", "-cf", folder / "a.tar", "-C", folder / "in", *options, "."], check=True)
    return (folder / "a.tar").read_bytes()


@every_format
@pytest.mark.parametrize("window_bytes", [512, 2048, 2**20])
def test_members_are_those_that_tarfile_wrote(tar_format, window_bytes):
    chance = random.Random(0)
    members = [(f"train/{number}.png", chance.randbytes(chance.randrange(0, 3000))) for number in range(50)]
    assert contents(pack_tar(members, tar_format, mtime=1.5), window_bytes=window_bytes) == as_bytes(members)


@every_format
def test_long_names_are_read_whole(tar_format):
    members = [(f"{'d' * 90}/{'e' * 60}{number}.png", b"x") for number in range(3)]
    assert contents(pack_tar(members, tar_format)) == as_bytes(members)


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_very_long_and_foreign_names_are_read_whole(tar_format):
    members = [("ä" * 200 + ".png", b"1"), ("b.png", b"2"), ("c/" * 150 + "ß.png", b"3")]
    assert contents(pack_tar(members, tar_format)) == as_bytes(members)


@pytest.mark.parametrize("tar_format", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_members_are_those_that_gnu_tar_wrote(tmp_path, tar_format):
    chance = random.Random(1)
    members = {f"train/{number}/{'n' * 60}.png": chance.randbytes(number * 700) for number in range(6)}
    for name, data in members.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        (tmp_path / "in" / name).write_bytes(data)
    data = gnu_tar(tmp_path, f"--format={tar_format}")
    assert dict(contents(data)) == {name.encode(): content for name, content in members.items()}


def test_hard_links_have_bytes_and_symbolic_links_and_devices_are_counted(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"1")
    (tmp_path / "in" / "b.png").symlink_to("a.png")
    os.link(tmp_path / "in" / "a.png", tmp_path / "in" / "c.png")
    os.mkfifo(tmp_path / "in" / "d.png")
    ignored = Counter()
    found = contents(gnu_tar(tmp_path, "--sort=name"), ignored=ignored)
    assert found == [(b"a.png", b"1"), (b"c.png", b"1")]
    assert ignored == {"link": 1, "no file": 1}


def test_names_are_no_paths():
    names = ["./a.png", "/b.png", "x//c.png", "x/./d.png", "../e.png", "x/../f.png", ".git/g.png", "x/.h.png"]
    ignored = Counter()
    assert [name for name, _ in contents(pack_tar([(name, b"") for name in names]), ignored=ignored)] == [
        b"a.png", b"b.png", b"x/c.png", b"x/d.png", b"e.png", b"f.png", b"x/.h.png"
    ]  # fmt: skip
    assert ignored == {".git/": 1}


def add_links(tar, links):
    for name, target in links:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = tarfile.LNKTYPE, target
        tar.addfile(member)


@every_format
def test_a_hard_link_is_found_wherever_its_target_is(tar_format):
    long = "objects/e" if tar_format == tarfile.USTAR_FORMAT else f"objects/{'d' * 90}/{'e' * 60}"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        add_links(tar, [("train/cat/first.png", "./train/cat/0.png"), ("none.png", "gone")])
        for name, data in (("train/cat/0.png", b"zero"), (long, b"long")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        add_links(tar, [("train/dog/1.png", long), ("train/dog/1.cls", "train/cat/0.png")])
    ignored = Counter()
    found = walk_bytes(buffer.getvalue(), ignored=ignored, endings=(b".cls",))
    assert [(name, text) for name, _, _, text in found] == [
        (b"train/cat/0.png", b""), (long.encode(), b""), (b"train/cat/first.png", b""), (b"train/dog/1.png", b""),
        (b"train/dog/1.cls", b"zero"),
    ]  # fmt: skip
    assert dict(contents(buffer.getvalue()))[b"train/dog/1.png"] == b"long"
    assert ignored == {"link": 1}


@pytest.mark.parametrize("window_bytes", [512, 2**16])
def test_the_text_of_side_files_comes_along(window_bytes):
    data = pack_tar([("a.CLS", b"3\n"), ("a.png", b"x"), ("b.cls", b"7" * 700)])
    found = walk_bytes(data, window_bytes, endings=(b".cls",))
    assert [text for *_, text in found] == [b"3\n", b"", b"7" * 700]


@pytest.mark.parametrize("num_ahead", [0, 2])
def test_large_members_are_skipped_and_small_ones_read_through(num_ahead):
    members = [(f"{number}", b"x") for number in range(1000)] + [(f"l{number}", bytes(2**20)) for number in range(9)]
    store, file = open_tar(pack_tar(members), 2**17, num_ahead)
    with file:
        assert len(list(walk(file, (), Counter()))) == 1009
    assert sum(store.sizes) <= 2**20 + (11 + num_ahead) * 2**17
    assert len(store.sizes) <= 20 + num_ahead


def test_tars_that_are_joined_are_read_to_the_end():
    assert contents(pack_tar([("a", b"1")]) + pack_tar([("b", b"2")])) == [(b"a", b"1"), (b"b", b"2")]


def test_what_is_behind_the_end_and_no_header_is_padding():
    assert contents(pack_tar([("a", b"1")]) + b"padding" * 500) == [(b"a", b"1")]


def test_a_tar_without_the_mark_of_its_end_is_read():
    data = pack_tar([("a.png", b"x" * 400), ("b.png", b"y" * 400)])[:2048]
    assert contents(data) == [(b"a.png", b"x" * 400), (b"b.png", b"y" * 400)]


@pytest.mark.parametrize("cut", [0, 100, 512, 700, 1500, 1536, 2047])
def test_a_tar_that_is_cut_off_is_an_error(cut):
    data = pack_tar([("a.png", b"x" * 400), ("b.png", b"y" * 400)])[:cut]
    with pytest.raises(DataError, match=f"bucket/a.tar: expected .* first {cut} bytes"):
        walk_bytes(data)


@pytest.mark.parametrize("first", [b"\x1f\x8b" + b"gzip" * 200, b"PK" + b"zip " * 200])
def test_another_file_is_an_error(first):
    with pytest.raises(DataError, match=r"bucket/a\.tar: expected an uncompressed tar"):
        walk_bytes(first)


def test_a_sparse_member_is_an_error(tmp_path):
    for tar_format in ("gnu", "posix"):
        folder = tmp_path / tar_format
        (folder / "in").mkdir(parents=True)
        with (folder / "in" / "a.png").open("wb") as file:
            file.truncate(2**20)
        with pytest.raises(DataError, match=r"bucket/a\.tar: expected .* as a sparse file"):
            walk_bytes(gnu_tar(folder, "--sparse", f"--format={tar_format}"))


def with_field(data, offset, field):
    """Change a header's field, and its checksum to fit."""
    header = bytearray(data[:512])
    header[offset : offset + len(field)] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[512:]


@pytest.mark.parametrize(
    ("size", "message"),
    [(b"-0000000777\0", "an uncompressed tar"), (b"abc\0", "an uncompressed tar"),
     (b"\xff" * 12, "an uncompressed tar"), (b"\x80" + b"\xff" * 11, "a whole tar file"),
     (b"77777777777\0", "a whole tar file")],
)  # fmt: skip
def test_an_impossible_size_is_an_error(size, message):
    with pytest.raises(DataError, match=f"bucket/a.tar: expected {message}"):
        walk_bytes(with_field(pack_tar([("a", b"1")]), 124, size))


def test_a_binary_size_is_read():
    data = with_field(pack_tar([("a", b"123")]), 124, b"\x80" + bytes(10) + b"\3")
    assert contents(data) == [(b"a", b"123")]


def test_a_changed_header_is_an_error():
    data = bytearray(pack_tar([("a", b"1"), ("b", b"2")]))
    data[1024] ^= 1
    with pytest.raises(DataError, match="expected a header of tar at byte 1024"):
        walk_bytes(bytes(data))


@pytest.mark.parametrize(
    "records", [b"path=x", b"9999999 path=a\n", b"0 path=a\n", b"-5 path=a\n", b"11 path=abcdefg\n", b"10 size=-\n"]
)
def test_a_malformed_pax_header_is_an_error(records):
    data = pack_tar([("x", records)], type=tarfile.XHDTYPE)[:1024] + pack_tar([("a.png", b"1")])
    with pytest.raises(DataError, match="expected a header of tar at byte 512"):
        walk_bytes(data)


def test_a_long_header_is_not_read():
    data = pack_tar([("x", bytes(2**20 + 1))], type=tarfile.GNUTYPE_LONGNAME)
    with pytest.raises(DataError, match="expected a header of tar at byte 512"):
        walk_bytes(data)


def test_damage_is_an_error_or_is_not_seen():
    chance = random.Random(2)
    whole = pack_tar([(f"{'n' * 120}{number}.png", b"x" * 30) for number in range(5)], tarfile.PAX_FORMAT)
    for _ in range(2000):
        data = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            found = walk_bytes(bytes(data)[: chance.randrange(len(data)) if chance.random() < 0.3 else None])
        except DataError:
            continue
        assert all(start + size <= len(data) for _, start, size, _ in found)
