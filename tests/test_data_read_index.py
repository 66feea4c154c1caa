"""data_pipes.index: where samples lie, against the standard library's tarfile; and when an index is believed."""

from __future__ import annotations

import hashlib
import io
import os
import random
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipes import index as module
from data_pipes.index import INDEX_SUFFIX, ShardIndex, open_index
from data_pipes.schema import ShardInfo
from mwt.errors import InputError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def write_tar(path: Path, files: list[tuple[str, bytes]], kind: str = "ustar") -> ShardInfo:
    with tarfile.open(path, "w", format=FORMATS[kind]) as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return recorded(path, len(files) // 2)


def recorded(path: Path, count: int) -> ShardInfo:
    data = path.read_bytes()
    return ShardInfo(file=path.name, count=count, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def pairs(count: int, size: int = 700) -> list[tuple[str, bytes]]:
    source = random.Random(0)
    files = []
    for i in range(count):
        files += [(f"{i:08d}.cls", str(i % 3).encode()), (f"{i:08d}.png", source.randbytes(size + i))]
    return files


def check_against_tarfile(index: ShardIndex) -> None:
    """Every signal's bytes at their place, by another reader of tar files."""
    with tarfile.open(index.path) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar if member.isreg()}  # type: ignore[union-attr]
    raw = index.path.read_bytes()
    for row in range(len(index)):
        data = files[f"{index.name(row)}.{index.extension(row)}"]
        assert raw[index.offset[row] : index.offset[row] + index.size[row]] == data
        assert index.crc[row] == zlib.crc32(data)
        assert bytes(index.label[row]) == files[f"{index.name(row)}.cls"]


NAMES = st.text("abcdefghij0123456789_-/ ÄÖ", min_size=1, max_size=150)


@settings(max_examples=40, deadline=None)
@given(names=st.lists(NAMES, unique=True, max_size=6), kind=st.sampled_from(["gnu", "pax"]), size=st.integers(0, 1500))
def test_any_tar_is_read_as_tarfile_reads_it(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], kind: str, size: int
) -> None:
    """Names too long for a plain header, or not ASCII, have headers of their own."""
    path = tmp_path_factory.mktemp("index") / "x.tar"
    stems = [f"{number}{name.strip('/')}x" for number, name in enumerate(names)]
    files = [(f"{stem}.{extension}", b"7" * (1 if extension == "cls" else size)) for stem in stems
             for extension in ("cls", "npy")]  # fmt: skip
    index = open_index(path, write_tar(path, files, kind))
    assert index.fault is None
    assert [index.name(row) for row in range(len(index))] == stems
    check_against_tarfile(index)


def test_only_known_extensions_and_whole_samples_are_listed(tmp_path: Path) -> None:
    files = [
        ("a.cls", b"1"), ("a.png", b"x"), ("a.txt", b"no"), ("b.pkl", b"\x80\x04."), ("c.PNG", b"y"), ("c.cls", b"2"),
        ("d.png", b"z"), ("d.jpg", b"z"), ("README", b"-"), ("e.cls", b"123456789"),
    ]  # fmt: skip
    index = open_index(tmp_path / "x.tar", write_tar(tmp_path / "x.tar", files))
    rows = [(index.name(row), index.extension(row), bytes(index.label[row])) for row in range(len(index))]
    assert rows == [("a", "png", b"1"), ("b", "", b""), ("c", "png", b"2"), ("d", "", b""), ("e", "", b"too long")]


def test_an_index_is_kept_and_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.tar"
    shard = write_tar(path, pairs(20))
    made = open_index(path, shard)
    assert [file.name for file in tmp_path.iterdir() if file != path] == [path.name + INDEX_SUFFIX]
    monkeypatch.setattr(module, "_scan", lambda *_: pytest.fail("the tar was gone through again"))
    again = open_index(path, shard)
    for name in ("key", "kind", "offset", "size", "crc", "label"):
        assert np.array_equal(getattr(made, name), getattr(again, name)), name
    check_against_tarfile(again)


def test_no_index_is_kept_where_none_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.tar"
    shard = write_tar(path, pairs(3))
    check_against_tarfile(open_index(path, shard, keep=False))

    def read_only(*_: Any) -> int:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "write_bytes", read_only)
    check_against_tarfile(open_index(path, shard))
    assert list(tmp_path.iterdir()) == [path]


def test_a_stale_index_is_not_used(tmp_path: Path) -> None:
    """Other bytes of the same size, with and without another time; and a file that says it is an index."""
    path, index = tmp_path / "x.tar", tmp_path / f"x.tar{INDEX_SUFFIX}"
    first = write_tar(path, pairs(4))
    time = path.stat().st_mtime_ns
    open_index(path, first)
    other = [(name, bytes(reversed(data))) for name, data in pairs(4)]
    second = write_tar(path, other)
    assert second.bytes == first.bytes
    os.utime(path, ns=(time, time))  # a copy that kept the time
    check_against_tarfile(open_index(path, second))
    os.utime(path, ns=(time + 10**9, time + 10**9))
    check_against_tarfile(open_index(path, second))
    good = index.read_bytes()
    for content in (b"", b"\x80\x04.", good[:-5], good[:100], b"\xff" * 64):
        index.write_bytes(content)
        check_against_tarfile(open_index(path, second))
        assert index.stat().st_size == len(good)  # made anew


def test_changed_bytes_are_found_and_which_sample_it_is(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    shard = write_tar(path, pairs(4))
    sound = open_index(path, shard)
    data = bytearray(path.read_bytes())
    place = int(sound.offset[2]) + 5
    data[place] ^= 1
    path.write_bytes(data)
    for known in (True, False):  # with the index of the bytes as they were, and without
        if not known:
            (tmp_path / f"x.tar{INDEX_SUFFIX}").unlink()
        found = open_index(path, shard)
        assert found.fault is not None
        assert "x.tar has another sha256 than dataset.json records. Copy or prepare the data again." in found.fault
        wrong = [
            row
            for row in range(4)
            if zlib.crc32(data[found.offset[row] : found.offset[row] + found.size[row]]) != found.crc[row]
        ]
        assert wrong == ([2] if known else [])
    assert list(tmp_path.iterdir()) == [path]  # what cannot be trusted is not kept


@pytest.mark.parametrize("share", [0.999, 0.6, 0.3, 0.01])
def test_a_tar_that_is_cut_off(tmp_path: Path, share: float) -> None:
    path = tmp_path / "x.tar"
    shard = write_tar(path, pairs(8))
    whole = path.read_bytes()
    end = whole.rstrip(b"\0")
    cut = int(len(end) * share)
    path.write_bytes(whole[:cut])
    index = open_index(path, shard)
    assert index.fault is not None
    assert f"{cut} bytes, not {len(whole)}" in index.fault
    assert "it is cut off" in index.fault
    assert all(index.offset + index.size <= cut)


def test_a_damaged_header_ends_the_list(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    shard = write_tar(path, pairs(8))
    sound = open_index(path, shard, keep=False)
    data = bytearray(path.read_bytes())
    data[int(sound.offset[3]) - 512 + 20] ^= 1
    path.write_bytes(data)
    index = open_index(path, shard)
    assert index.fault is not None
    assert "is damaged after 4 samples: a header with a wrong checksum" in index.fault
    assert index.extension(2) == "png"
    assert index.extension(3) == ""  # its label came before


@pytest.mark.parametrize("name", ["../x.png", "/etc/x.png", "a/../../x.png"])
def test_names_that_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.tar"
    index = open_index(path, write_tar(path, [("a.png", b"1"), (name, b"2")]))
    assert index.fault is not None
    assert f"it holds {name!r}, which leads out of the folder" in index.fault
    assert len(index) == 1


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_no_samples(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = kind, "/etc/passwd"
        tar.addfile(link)
        label = tarfile.TarInfo("a.cls")
        label.size = 1
        tar.addfile(label, io.BytesIO(b"1"))
    index = open_index(path, recorded(path, 1))
    assert [index.extension(row) for row in range(len(index))] == [""]


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    shard = ShardInfo(file="x.tar", count=1, bytes=1, sha256="")
    with pytest.raises(InputError, match=r"x\.tar cannot be read \(Is a directory\)"):
        open_index(make_folder(tmp_path / "x.tar"), shard)


def make_folder(path: Path) -> Path:
    path.mkdir()
    return path
