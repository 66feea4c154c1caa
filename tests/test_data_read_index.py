"""data_pipes.index: where samples lie, against the standard library's tarfile; and when an index is believed."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import io
import lzma
import os
import random
import signal
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipes import index as module
from data_pipes import shards, tar
from data_pipes.index import INDEX_SUFFIX, ShardIndex, open_index
from data_pipes.schema import ShardInfo
from data_pipes.shards import stream_shard
from data_pipes.tar import HashedFile
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

    def read_only(path: Path, mode: str, **options: Any) -> Any:
        if mode == "wb":
            raise OSError(30, "Read-only file system")
        return open(path, mode, **options)

    monkeypatch.setattr(module, "open", read_only, raising=False)
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


def test_a_changed_index_is_not_used(tmp_path: Path) -> None:
    """Any one byte of the arrays: a label, a place, a key."""
    path, index = tmp_path / "x.tar", tmp_path / f"x.tar{INDEX_SUFFIX}"
    shard = write_tar(path, pairs(4))
    open_index(path, shard)
    good = index.read_bytes()
    begin = 8 + int.from_bytes(good[:8], "little")
    for place in range(begin, len(good)):
        index.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        check_against_tarfile(open_index(path, shard))
    header = good[8:begin]
    for changed in (header.replace(b'"bytes"', b'"bytez"'), header.replace(b'"digest"', b'"digess"')):
        assert changed != header
        index.write_bytes(good[:8] + changed + good[begin:])
        check_against_tarfile(open_index(path, shard))
        assert changed not in index.read_bytes()  # made anew


def test_the_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hash, places and CRC-32s come out of one pass, but for a little around headers of tarfile's."""
    for kind in FORMATS:
        path = tmp_path / f"{kind}.tar"
        shard = write_tar(path, [("ü" * (40 if kind == "ustar" else 60) + ".cls", b"1"), *pairs(50, 20_000)], kind)
        read = []

        class Noted(io.BufferedReader):
            def read(self, size: int | None = -1) -> bytes:
                read.append(len(data := super().read(size)))  # noqa: B023
                return data

        with monkeypatch.context() as patch:
            patch.setattr(module, "HashedFile", lambda file: HashedFile(Noted(file.raw)))
            assert open_index(path, shard).fault is None
        assert shard.bytes <= sum(read) < 1.1 * shard.bytes


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


# ---- files made to do harm ---------------------------------------------------------------------------------------


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """A tar header with this in its field of the size, and the right checksum."""
    block = bytearray(512)
    block[:100] = name.ljust(100, b"\0")
    block[100:124] = b"0000444\x000000000\x000000000\0"
    block[124:136], block[136:148], block[156:157] = size.ljust(12, b"\0"), b"00000000000\0", kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def limited(path: Path) -> tuple[list[str], str]:
    """Names of the samples of a damaged file, and what is said of it; by index and by stream alike."""
    index = open_index(path, recorded(path, 1), keep=False)
    assert index.fault is not None
    assert "is damaged after" in index.fault
    samples: list[Any] = []
    with pytest.raises(InputError, match=r"x\.tar is damaged after \d samples: ") as raised:
        samples.extend(stream_shard(path, recorded(path, 1)))
    names = [sample["__key__"] for sample in samples]
    return names, f"{index.fault} {raised.value}"


NEGATIVE = [b"-0000002000", b"-1", b"\xff" * 10 + b"\xfc\x00", b"\xff" * 12]
HUGE = [b"77777777777", b"\x80" + b"\0" * 7 + b"\x7f\xff\xff\xff", b"\x80" + b"\x7f" * 11, b"02000000001"]


@pytest.mark.parametrize("kind", [b"0", b"5", b"2", b"Z", b"L", b"x", b"g", b"S"])
@pytest.mark.parametrize("size", [*NEGATIVE, *HUGE, b"1_0", b"+10", b"0x10", b"\xb2"])
def test_sizes_that_cannot_be(tmp_path: Path, size: bytes, kind: bytes) -> None:
    """A negative size leads back to what was read: without end (CVE-2025-8194). One bigger than the file ends it."""
    path = tmp_path / "x.tar"
    good = [header(name + b".png", b"1") + b"7".ljust(512, b"\0") for name in (b"a", b"c", b"d")]
    path.write_bytes(good[0] + good[1] + header(b"b.png", size, kind) + good[2] + bytes(1024))
    with time_limit(10):
        index = open_index(path, recorded(path, 1), keep=False)
        assert len(index) <= 4
        stream: list[Any] = []
        with contextlib.suppress(InputError):  # tarfile takes some for the end of the archive
            stream += stream_shard(path, recorded(path, 1))
    assert len(stream) <= 4
    if kind in b"05":
        assert index.fault is not None


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        pytest.fail("it goes on for ever")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("opened", [lzma.open, gzip.open, bz2.open], ids=["lzma", "gzip", "bz2"])
def test_compressed_files_are_no_shards(tmp_path: Path, opened: Any) -> None:
    """The old format of LZMA has no magic number."""
    path = tmp_path / "x.tar"
    options = {"format": lzma.FORMAT_ALONE} if opened is lzma.open else {}
    write_tar(tmp_path / "plain.tar", [("a.cls", b"1"), ("a.npy", bytes(10**6))])
    with opened(path, "wb", **options) as file:
        file.write((tmp_path / "plain.tar").read_bytes())
    assert limited(path)[0] == []


def test_members_without_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A member, a sparse one, which is small in the file, and headers."""
    monkeypatch.setattr(tar, "MAX_MEMBER_BYTES", 5000)
    path = tmp_path / "x.tar"
    write_tar(path, [("a.png", bytes(5000)), ("b.png", bytes(5001))])
    names, said = limited(path)
    assert names == []  # a sample is whole when the next begins
    assert said.count("it holds a member of 5001 bytes; at most 5000 are taken") == 2
    pax = header(b"x", b"%o" % (2 * tar.MAX_HEADER_BYTES), b"x") + bytes(2 * tar.MAX_HEADER_BYTES)
    path.write_bytes(header(b"a.png", b"0") + pax + header(b"b.png", b"0") + bytes(1024))
    index = open_index(path, recorded(path, 1), keep=False)
    assert index.fault is not None
    assert "headers of more than 1048576 bytes" in index.fault
    monkeypatch.setattr(shards, "_BETWEEN_MARKS", 2**20)
    with pytest.raises(InputError, match=r"a member or headers of more than 1048576 bytes"):
        list(stream_shard(path, recorded(path, 1)))


def test_a_chain_of_headers(tmp_path: Path) -> None:
    """Each says something of the next; tarfile goes into them one within the other."""
    path = tmp_path / "x.tar"
    path.write_bytes(header(b"a.png", b"0") + header(b"x", b"0", b"x") * 5000 + bytes(1024))
    assert "maximum recursion depth exceeded" in limited(path)[1]


def test_long_names_take_no_memory(tmp_path: Path) -> None:
    """All keys of an index take as much as the longest."""
    path = tmp_path / "x.tar"
    fits = "n" * 1020 + ".png"
    assert open_index(path, write_tar(path, [(fits, b"1"), ("a.png", b"1")], "pax")).name(0) == fits[:-4]
    write_tar(path, [("a.png", b"1"), ("n" * 1021 + ".png", b"1")], "pax")
    assert limited(path)[1].count("it holds a name of 1025 bytes; at most 1024 are taken") == 2


def test_names_that_are_no_text(tmp_path: Path) -> None:
    """Bytes that are no UTF-8, in a plain header and behind another kind of header."""
    path = tmp_path / "x.tar"
    plain = header(b"a\xff.png", b"1") + b"7".ljust(512, b"\0")
    long = header(b"x", b"7", b"L") + b"b\xff.png\0".ljust(512, b"\0") + header(b"b", b"1") + b"7".ljust(512, b"\0")
    path.write_bytes(plain + long + bytes(1024))
    index = open_index(path, recorded(path, 2), keep=False)
    assert index.fault is None
    assert [index.extension(row) for row in range(len(index))] == ["png", "png"]
    assert [sample["png"] for sample in stream_shard(path, recorded(path, 2))] == [b"7", b"7"]
    for sample in stream_shard(path, recorded(path, 2)):
        sample["__key__"].encode()


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
