"""data_pipes.verify: what is wrong with a folder of shards, each thing by its name; and data_pipes.processes."""

from __future__ import annotations

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from data_pipes import verify
from data_pipes.decode import encode_png
from data_pipes.processes import ordered_processes
from data_pipes.write import Sample, write_dataset
from mwt.errors import InputError
from mwt.structs import SignalFacts
from tests.fork_server import Server

FACTS = SignalFacts(kind="image", channels=1, height=2, width=3, classes=("a", "b"))


def sample(value: int) -> Sample:
    return Sample(extension="png", data=encode_png(torch.full((1, 2, 3), value, dtype=torch.uint8)), label=value % 2)


def make(out: Path, train: list[Sample], test: list[Sample], shard_bytes: int = 4096) -> Path:
    splits = {"train": train, "test": test}
    write_dataset(out, name="t", facts=FACTS, licence="", splits=splits, shard_bytes=shard_bytes)
    return out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven samples of which no two are the same, two in a shard."""
    return make(tmp_path / "data", [sample(value) for value in range(5)], [sample(value) for value in (10, 11)])


def faults(folder: Path, *options: str) -> str:
    with pytest.raises(InputError) as raised:
        verify.main([str(folder), *options])
    return str(raised.value)


def test_in_order(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify.main([str(folder)])
    output = capsys.readouterr().out
    assert [line.split() for line in output.splitlines()[1:3]] == [
        ["train", "5", "3", "0", "0"],
        ["test", "2", "1", "0", "0"],
    ]
    assert "in order" in output
    verify.main(["builtin:digits"])


def test_what_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(file: Any, _: str) -> Any:
        if file.name.endswith("train-000001.tar"):
            raise OSError(5, "Input/output error")
        return hashlib.sha256(file.read())

    monkeypatch.setattr(verify.hashlib, "file_digest", broken)
    shard = folder / "train-000001.tar"
    assert faults(folder) == f"1 faults in {folder}:\nShard {shard} cannot be read (Input/output error)."


def test_remote_data_is_refused(folder: Path) -> None:
    content = json.loads((folder / "dataset.json").read_text())
    content["splits"]["test"]["shards"][0]["file"] = "https://example.org/test-000000.tar?token=secret"
    (folder / "dataset.json").write_text(json.dumps(content))
    assert faults(folder) == (
        "Only local shards can be verified, but https://example.org/test-000000.tar is not; copy the data here first."
    )


def test_damage(folder: Path) -> None:
    shard = folder / "train-000001.tar"
    whole = shard.read_bytes()
    data = bytearray(whole)
    data[512] = ord("9")  # the first label
    shard.write_bytes(data + b"\0")
    message = faults(folder)
    assert message.startswith(f"3 faults in {folder}:\nShard {shard} has {len(data) + 1} bytes, not the {len(data)}")
    assert "another sha256" in message
    assert f"Sample 00000002 of shard {shard}: label '9' is not a class number in 0 … 1." in message

    data = bytearray(whole)
    place = whole.index(b"IDAT") + 6
    data[place] ^= 0xFF
    shard.write_bytes(data)
    message = faults(folder)
    assert message.startswith("2 faults in ")
    assert f"Sample 00000002 of shard {shard} cannot be decoded: " in message

    shard.write_bytes(whole[: 5 * 512 + 1])
    message = faults(folder)
    assert f"Shard {shard} is damaged after 1 samples" in message
    assert f"Shard {shard} holds 1 samples, not the 2 recorded." in message
    shard.unlink()
    assert faults(folder) == f"1 faults in {folder}:\nShard {shard} is missing."


def test_wrong_count(folder: Path) -> None:
    file = folder / "dataset.json"
    content = json.loads(file.read_text())
    content["splits"]["test"]["shards"][0]["count"] = content["splits"]["test"]["count"] = 3
    file.write_text(json.dumps(content))
    assert faults(folder).endswith("test-000000.tar holds 2 samples, not the 3 recorded.")


def test_a_signal_in_two_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Found by its pixels: the other encoding does not hide it. Twice in one split is nobody's fault."""
    stream = io.BytesIO()
    Image.new("L", (3, 2), 3).save(stream, "WEBP", lossless=True)
    other = Sample(extension="webp", data=stream.getvalue(), label=0)
    train = [sample(1), sample(1), sample(2), sample(3)]
    folder = make(tmp_path / "data", train, [sample(9), other, sample(2)], shard_bytes=2**20)
    message = faults(folder)
    assert message.splitlines()[1:] == [
        "Sample 00000001 of test-000000.tar (test) is the same signal as 00000003 of train-000000.tar (train).",
        "Sample 00000002 of test-000000.tar (test) is the same signal as 00000002 of train-000000.tar (train).",
    ]
    capsys.readouterr()
    verify.main([str(folder), "--allow-duplicates"])
    output = capsys.readouterr().out
    assert "test             3       1       0           2" in output
    assert "in order" in output


def test_only_the_first_faults_are_named(tmp_path: Path) -> None:
    folder = make(tmp_path / "data", [sample(value) for value in range(30)], [sample(value) for value in range(12)])
    lines = faults(folder).splitlines()
    assert lines[0].startswith("12 faults in ")
    assert len(lines) == 12
    assert lines[-1] == "… and 2 more"


@pytest.mark.slow
def test_as_a_program_with_processes(folder: Path, server: Server) -> None:
    shard = folder / "test-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    server.start(str(folder), "--workers", "2", program="data_pipes.verify")
    assert server.status() == 2, server.said()
    said = server.said().splitlines()
    assert said[said.index(f"error: 1 faults in {folder}:") + 1] == f"Shard {shard} has another sha256 than recorded."
    assert ["train", "5", "3", "0", "0"] in [line.split() for line in said]
    with pytest.raises(InputError, match="--workers is -1; it cannot be negative"):
        verify.main([str(folder), "--workers", "-1"])


def test_ordered_processes() -> None:
    items = list(range(50))
    assert list(ordered_processes(abs, items, workers=0)) == items
    assert list(ordered_processes(abs, [-item for item in items], workers=2, piece=3)) == items
    assert list(ordered_processes(abs, [], workers=2)) == []
    with pytest.raises(TypeError, match="bad operand type for abs"):
        list(ordered_processes(abs, [1, "x"], workers=1))
    with pytest.raises(InputError, match="A worker process was killed, perhaps for want of memory"):
        list(ordered_processes(os._exit, [9], workers=1))
