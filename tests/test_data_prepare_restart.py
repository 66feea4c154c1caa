"""Preparing is taken up again after kill -9, Ctrl-C, bad input, a full disk: the same bytes, nothing done twice."""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image

from data_pipes import write
from data_pipes.index import INDEX_SUFFIX
from data_pipes.prepare.__main__ import main
from data_pipes.prepare.source import stored_order
from data_pipes.schema import read_info
from data_pipes.shards import iterate_shard
from data_pipes.write import finished_shards, partial_folder
from mwt.errors import InputError

ROOT = Path(__file__).parents[1]
COUNT = 120
OPTIONS = ("--shard-mib", "0.05", "--size", "48")


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of noise in train and test, 7 kB an image: some twenty shards of 50 KiB."""
    root = tmp_path_factory.mktemp("pictures") / "noise"
    numbers = np.random.default_rng(0)
    for split, count in (("train", COUNT // 3), ("test", COUNT // 6)):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = numbers.integers(0, 256, (48, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index:03d}.png")
    return root


@pytest.fixture(scope="module")
def whole(src: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Names and bytes of an uninterrupted preparation."""
    out = tmp_path_factory.mktemp("whole") / "out"
    main(["folder", "--src", str(src), "--out", str(out), *OPTIONS, "--workers", "0"])
    assert len(read_info(out).splits["train"].shards) > 8
    return content(out)


def content(folder: Path) -> dict[str, bytes]:
    """All but the indices, in which the time stands."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix != INDEX_SUFFIX}


@contextmanager
def begun(src: Path, out: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """With a lower priority than ours: on a busy machine it would else be done before we see it begin."""
    command = ["folder", "--src", str(src), "--out", str(out), *OPTIONS, *options]
    with subprocess.Popen(
        ["nice", "-n", "10", sys.executable, "-m", "data_pipes.prepare", *command],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        yield process


def shard_states(out: Path) -> dict[str, tuple[int, int]]:
    """Which file each finished shard is, and when it was written."""
    shards = [shard.file for part in finished_shards(partial_folder(out)).values() for shard in part]
    stats = {name: (partial_folder(out) / "data" / name).stat() for name in shards}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def session_members(leader: int) -> list[int]:
    """Living processes of the session that a program began (Linux)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def kill_at(process: subprocess.Popen[str], out: Path, shards: int, number: int) -> None:
    """Sends a signal as soon as so many shards are finished, and waits until no process of the program is left."""
    deadline = time.monotonic() + 100
    while len(shard_states(out)) < shards:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    process.wait(timeout=60)
    while session_members(process.pid):
        assert time.monotonic() < deadline, "processes outlive the one that was killed"
        time.sleep(0.01)


def check_restarts(src: Path, out: Path, whole: dict[str, bytes], stops: list[int], workers: list[str]) -> None:
    kept: dict[str, tuple[int, int]] = {}
    for shards, count in zip(stops, workers, strict=True):
        with begun(src, out, "--workers", count) as process:
            kill_at(process, out, shards, signal.SIGKILL)
        assert not out.exists()
        now = shard_states(out)
        assert kept.items() <= now.items(), "a finished shard was made again"
        kept = now
    main(["folder", "--src", str(src), "--out", str(out), *OPTIONS, "--workers", "0"])
    assert content(out) == whole
    for name, (inode, written) in kept.items():
        stat = (out / name).stat()
        assert (stat.st_ino, stat.st_mtime_ns) == (inode, written)
    keys = {split: [s["__key__"] for shard in info.shards for s in iterate_shard(out / shard.file)]
            for split, info in read_info(out).splits.items()}  # fmt: skip
    assert keys == {
        "train": [f"{i:08d}" for i in range(COUNT * 2 // 3)],
        "test": [f"{i:08d}" for i in range(COUNT // 3)],
    }
    assert not partial_folder(out).exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_killed_with_processes(src: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    check_restarts(src, tmp_path / "out", whole, [3], ["2"])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_killed_again_and_again(src: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    check_restarts(src, tmp_path / "out", whole, [1, 2, 3, 5, 8, 9, 11], ["2", "0", "1", "2", "0", "1", "2"])


@pytest.mark.slow
def test_bytes_do_not_depend_on_the_processes(src: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    main(["folder", "--src", str(src), "--out", str(tmp_path / "out"), *OPTIONS, "--workers", "3"])
    assert content(tmp_path / "out") == whole


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_interrupted_by_ctrl_c(
    src: Path, whole: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with begun(src, out, "--workers", "1") as process:
        kill_at(process, out, 2, signal.SIGINT)
        lines = process.communicate()[1].splitlines()
    assert process.returncode == 130
    kept = len(shard_states(out))
    assert lines[-2:] == [
        f"{kept} finished shards are kept in {partial_folder(out)}; the same command goes on from there.",
        "error: interrupted.",
    ]
    assert not any("Traceback" in line for line in lines)
    prepare(src, out)
    assert re.match(r"train: \d+ samples are finished already; going on after them\.\n", capsys.readouterr().out)
    assert content(out) == whole


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int, error: BaseException) -> None:
    """The writing of samples fails after so many."""
    original, calls = write.TarWriter.write, []

    def failing(self: object, sample: object) -> object:
        calls.append(1)
        if len(calls) > count:
            raise error
        return original(self, sample)

    monkeypatch.setattr(write.TarWriter, "write", failing)


def prepare(src: Path, out: Path, *options: str) -> None:
    main(["folder", "--src", str(src), "--out", str(out), *OPTIONS, "--workers", "0", *options])


def test_full_disk(
    src: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 20, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(
            InputError, match=r"^The disk of .*out is full; 2 finished shards were kept in .*make room and"
        ):
            prepare(src, out)
    assert capsys.readouterr().err == "", "one sentence is enough"
    assert sorted(path.name for path in partial_folder(out).iterdir()) == ["data", "lock", "progress.json"]
    (partial_folder(out) / "data" / ".train-000002.tar.index.partial-1").write_bytes(b"half of it")
    prepare(src, out)
    assert content(out) == whole


def test_other_arguments_are_refused(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 20, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            prepare(src, out)
    before = content(partial_folder(out) / "data")
    for options, named in ((("--size", "47"), r"facts, size"), (("--fit", "crop"), "fit"), (("--seed", "1"), "seed")):
        with pytest.raises(
            InputError, match=rf"was begun with other arguments or files \({named}\)\. Give those again"
        ):
            prepare(src, out, *options)
    elsewhere = tmp_path / "elsewhere" / src.name  # files of the same names
    shutil.copytree(src, elsewhere)
    with pytest.raises(InputError, match=r"other arguments or files \(src\)"):
        prepare(elsewhere, out)
    with monkeypatch.context() as patch:
        patch.setattr(PIL, "__version__", "0.1")
        with pytest.raises(InputError, match=r"other arguments or files \(version of Pillow\)"):
            prepare(src, out)
    extra = src / "train" / "a" / "more.png"
    extra.write_bytes((src / "train" / "a" / "000.png").read_bytes())
    try:
        with pytest.raises(InputError, match=r"other arguments or files \(list of files\)"):
            prepare(src, out)
    finally:
        extra.unlink()
    assert content(partial_folder(out) / "data") == before, "a refusal changes nothing"
    (partial_folder(out) / "data" / "train-000001.tar").write_bytes(b"")
    with pytest.raises(
        InputError, match=r"train-000001\.tar is not as it was finished; remove .*partial to begin anew"
    ):
        prepare(src, out)
    (partial_folder(out) / "progress.json").write_text("{")
    with pytest.raises(InputError, match=r"progress\.json cannot be read; remove .*partial to begin anew"):
        prepare(src, out)


def test_what_is_kept_is_said_whenever_it_is(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where a command that goes on fails before it has finished one more; not where it is refused."""
    out = tmp_path / "out"
    said = f"2 finished shards are kept in {partial_folder(out)}; the same command goes on from there.\n"
    for count in (20, 1):
        with monkeypatch.context() as patch:
            stop_after(patch, count, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                prepare(src, out)
        assert said in capsys.readouterr().err
    with pytest.raises(InputError, match="other arguments"):
        prepare(src, out, "--seed", "1")
    assert "finished shards" not in capsys.readouterr().err

    def spoil(self: object, sample: object) -> object:
        (partial_folder(out) / "progress.json").write_text("{")
        raise ZeroDivisionError

    monkeypatch.setattr(write.TarWriter, "write", spoil)
    with pytest.raises(ZeroDivisionError):  # not what is wrong with the journal
        prepare(src, out)


def test_killed_before_anything_was_finished(src: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """There is nothing to go on with, so the arguments are free."""
    out = tmp_path / "out"
    (partial_folder(out) / "data").mkdir(parents=True)
    (partial_folder(out) / "progress.json").write_text('{"begun_with": {"size": [1, 1]}, "shards": {"train": []}}')
    (partial_folder(out) / "unfinished.tar").write_bytes(b"half of it")
    prepare(src, out)
    assert content(out) == whole


def test_two_at_once_are_refused(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    original, tried = write.TarWriter.write, []

    def second_comes(self: object, sample: object) -> object:
        if not tried:
            tried.append(1)
            with pytest.raises(InputError, match=r"Another process is writing to .*partial; wait for it"):
                prepare(src, out)
        return original(self, sample)

    monkeypatch.setattr(write.TarWriter, "write", second_comes)
    prepare(src, out)
    assert tried
    assert out.is_dir()


def test_a_corrupted_image_is_named_and_mended(
    src: Path, whole: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    files = [src / "train" / name / f"{index:03d}.png" for name in "ab" for index in range(COUNT // 3)]
    bad = stored_order(files, "train")[60]
    data = bad.read_bytes()
    stream = io.BytesIO()
    Image.open(io.BytesIO(data)).save(stream, "JPEG")
    bad.write_bytes(stream.getvalue()[:-200])  # its header, which is looked at before all work, is in order
    try:
        with pytest.raises(InputError, match=rf"train/{bad.parent.name}/{bad.stem}\.png cannot be decoded: "):
            prepare(src, out, "--workers", "2")
    finally:
        bad.write_bytes(data)
    kept = len(shard_states(out))
    assert kept >= 5
    assert f"{kept} finished shards are kept in {partial_folder(out)}" in capsys.readouterr().err
    prepare(src, out)
    assert content(out) == whole
