"""eval.export as a user calls it: the set holds what the model fits, whoever writes it, however often it is killed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipes import verify
from data_pipes.augment import augment
from data_pipes.decode import encode_png
from data_pipes.read import open_split
from data_pipes.weights import load_weight_set, row_checksums
from data_pipes.write import Sample, partial_folder, write_dataset
from eval import export
from mwt.errors import InputError
from mwt.evaluation import evaluate
from mwt.inspection import open_trained
from mwt.model import MetaWeightTransformer
from mwt.observe import grid, observe
from mwt.structs import SignalFacts
from mwt.weight_space import render
from tests.fork_server import Server
from train import classify

ROOT = Path(__file__).parents[1]
MODEL = "builtin:digits"
SMALL = ("--run", MODEL, "data.limit=20", "run.eval_batch_size=4", "run.device=cpu", "--shard-mib", "0.3")
"""40 networks of 34 kB; 8 in a shard."""


LAUNCHERS = {
    # A word that begins like one of torchrun's own options (--run) is taken for it, unless -- stands before it.
    "torchrun": ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m", "--"),
    "accelerate": (
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> MetaWeightTransformer:
    return MetaWeightTransformer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed export by one process."""
    out = tmp_path_factory.mktemp("whole") / "set"
    export.main([*SMALL, "--out", str(out)])
    return out


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def test_networks_show_what_the_model_shows(whole: Path, model: MetaWeightTransformer) -> None:
    """PSNR against evaluate, which knows nothing of weight sets; pictures against the model's own."""
    for name in ("train", "test"):
        networks = load_weight_set(whole, name, "phi")
        split = open_split(MODEL, name, device=torch.device("cpu"), limit=20)
        batches = list(split.batches(batch_size=20))
        result = evaluate(model, batches)
        assert networks.column("index").tolist() == list(range(20))
        assert torch.equal(networks.column("label"), result.labels)
        torch.testing.assert_close(networks.column("psnr"), result.psnr, rtol=0, atol=1e-3)
        torch.testing.assert_close(networks.column("loss"), result.losses, rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            fitted = model.fit(observe(batches[0], model.config.inner_loop, seed=0))
            pictures = model.reconstruct(fitted.offsets, 13, 9)
        drawn = render(networks.layout, networks.batch(range(20)).weights, grid(13, 9))
        torch.testing.assert_close(drawn.mT.reshape(20, 1, 13, 9), pictures, rtol=0, atol=1e-4)
        assert networks.manifest.psnr[name] == pytest.approx(float(result.psnr.mean()), abs=1e-3)
        keys = [str(split.locate(i)["key"]) for i in range(20)]
        assert networks.keys() == keys
        assert keys[0]
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["schema"] == 1
    assert manifest["architecture"] == {
        "sizes": [2, 64, 64, 64, 1], "omegas": [10.0, 1.0, 1.0], "shared_output": True
    }  # fmt: skip
    assert manifest["config"]["siren"]["hidden"] == 64


def test_it_is_in_order(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify.main([str(whole)])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[:6] for row in rows[1:3]] == [["train", "20", "3", "0", "0", "20"], ["test", "20", "3", "0", "0", "20"]]
    assert float(rows[1][6]) < 1e-3


@pytest.mark.parametrize("values", ["phi", "delta"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision(whole: Path, tmp_path: Path, values: str, dtype: str) -> None:
    out = tmp_path / "set"
    export.main([*SMALL, "--out", str(out), "--split", "test", "--values", values, "--dtype", dtype])
    verify.main([str(out)])  # the PSNR is of what is stored
    ours, exact = load_weight_set(out, "test", "phi"), load_weight_set(whole, "test", "phi")
    near = torch.finfo(torch.float16 if dtype == "fp16" else torch.bfloat16).eps * 4
    torch.testing.assert_close(
        ours.batch(range(20)).weights.flat(), exact.batch(range(20)).weights.flat(), rtol=0, atol=near
    )
    assert list(ours.manifest.splits) == ["test"]
    assert ours.manifest.statistics["split"] == "test"
    if dtype == "fp16" and values == "delta":
        torch.testing.assert_close(ours.column("psnr"), exact.column("psnr"), rtol=0, atol=0.1)


def test_copies_are_fitted_to_augmented_images(tmp_path: Path, model: MetaWeightTransformer) -> None:
    out = tmp_path / "set"
    export.main([*SMALL, "--out", str(out), "--copies", "2", "--augment", "crop", "data.crop_padding=2"])
    verify.main([str(out)])
    networks = load_weight_set(out, "train", "phi")
    assert len(networks) == 60
    assert len(load_weight_set(out, "test")) == 20
    pairs = set(zip(networks.column("index").tolist(), networks.column("copy").tolist(), strict=True))
    assert pairs == {(i, c) for i in range(20) for c in range(3)}
    how = networks.manifest.augment
    split = open_split(MODEL, "train", device=torch.device("cpu"), limit=20)
    batch = next(split.batches(batch_size=20))
    seen = augment(batch, "crop", seed=how["seed"], epoch=2, padding=2)
    assert not torch.equal(seen.images, batch.images)
    result = evaluate(model, [seen])
    second = (networks.column("copy") == 2).nonzero().flatten()
    found = networks.batch(second)
    torch.testing.assert_close(found.psnr[found.index.argsort()], result.psnr, rtol=0, atol=1e-3)


def check_equal(folder: Path, whole: Path, said: str) -> None:
    assert "by 2 processes" in said
    assert shards(folder) == shards(whole)
    assert (folder / "manifest.json").read_text() == (whole / "manifest.json").read_text()


def test_two_processes_write_what_one_does(whole: Path, tmp_path: Path, server: Server) -> None:
    said = server.run(*SMALL, "--out", str(tmp_path / "set"), program="eval.export", ranks=2)
    check_equal(tmp_path / "set", whole, said)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_start_processes_that_write_what_one_does(whole: Path, tmp_path: Path, launcher: str) -> None:
    done = subprocess.run(
        [sys.executable, *LAUNCHERS[launcher], "eval.export", *SMALL, "--out", str(tmp_path / "set")],
        cwd=ROOT, text=True, env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"},
        capture_output=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    check_equal(tmp_path / "set", whole, done.stdout)


def wait_for(out: Path, count: int, server: Server) -> None:
    deadline = time.monotonic() + 150
    notes = partial_folder(out) / "notes"
    while len(list(notes.glob("*-?????.json"))) < count:
        assert not out.exists(), "it was over before it could be killed"
        assert time.monotonic() < deadline, server.said()
        time.sleep(0.002)


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGTERM, signal.SIGINT))]
)
def test_killed_and_begun_again(whole: Path, tmp_path: Path, server: Server, number: signal.Signals) -> None:
    out = tmp_path / "set"
    many = ("--shard-mib", "0.14", "data.limit=80")  # four networks in a shard: forty shards
    options = (*SMALL, "--out", str(out), *many)
    process = server.start(*options, program="eval.export")
    wait_for(out, 2, server)
    os.kill(process, number)
    status, said = server.status(), server.said()
    assert status == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number], said
    if number != signal.SIGKILL:
        assert "The same command goes on" in said
    assert not out.exists()
    data = partial_folder(out) / "data"
    done = {path.name for path in (partial_folder(out) / "notes").glob("*-?????.json")}
    before = {name: (data / name).with_suffix(".safetensors").stat().st_ino for name in done}
    export.main(list(options))
    for name, inode in before.items():  # not written again
        assert (out / name).with_suffix(".safetensors").stat().st_ino == inode
    verify.main([str(out)])
    for name in ("train", "test"):
        ours, theirs = load_weight_set(out, name), load_weight_set(whole, name)
        assert torch.equal(ours.batch(range(20)).weights.flat(), theirs.batch(range(20)).weights.flat())
    export.main(list(options))  # complete already: nothing to do
    assert not partial_folder(out).exists()


def test_points_have_no_psnr(tmp_path: Path) -> None:
    """A point set: coordinates and distances. A fresh model, exported from its folder."""
    facts = SignalFacts(kind="points", channels=1, height=None, width=None, classes=("a", "b"))
    numbers = np.random.default_rng(0)

    def sample(label: int) -> Sample:
        buffer = io.BytesIO()
        np.save(buffer, numbers.uniform(-1, 1, (30, 4)).astype(np.float32))
        return Sample(extension="npy", data=buffer.getvalue(), label=label)

    write_dataset(
        tmp_path / "data", name="p", facts=facts, licence="", splits={"train": [sample(i % 2) for i in range(6)]}
    )
    config = json.loads((ROOT / "mwt" / "builtin" / "digits" / "config.json").read_text())
    config["signal"] = {"kind": "points", "channels": 1, "height": None, "width": None, "classes": ["a", "b"]}
    MetaWeightTransformer(config).save_pretrained(tmp_path / "model")
    export.main(["--run", str(tmp_path / "model"), "--out", str(tmp_path / "set"), f"data.path={tmp_path / 'data'}"])
    verify.main([str(tmp_path / "set")])
    networks = load_weight_set(tmp_path / "set")
    assert networks.layout.sizes[0] == 3
    assert networks.column("psnr").isnan().all()
    assert networks.manifest.psnr == {"train": None}
    assert bool(networks.column("loss").isfinite().all())


# ---- what is wrong -----------------------------------------------------------------------------------------------


def change_shard(folder: Path, change: Any) -> None:
    """Change tensors of a shard as somebody would who knows the format, checksums included."""
    path = folder / "test-00001.safetensors"
    tensors = load_file(path)
    change(tensors)
    tensors["crc32"] = row_checksums(tensors)
    save_file(tensors, path)
    content = json.loads((folder / "manifest.json").read_text())
    (entry,) = (s for s in content["splits"]["test"]["shards"] if s["file"] == path.name)
    entry.update(bytes=path.stat().st_size, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    (folder / "manifest.json").write_text(json.dumps(content))


def add(name: str, amount: float) -> Any:
    return lambda tensors: tensors[name][1].add_(amount)


FAULTS = {
    "weights of a network": (add("layers.1.weight", 0.01), r"Network 9 of 'test' \(sample 9, copy 0\) differs by"),
    "psnr": (add("psnr", 0.01), r"Network 9 .* differs by 0.01 dB"),
    "label": (add("label", 100), "a label is not in 0 … 9"),
    "another label": (lambda t: t["label"].__setitem__(1, (t["label"][1] + 1) % 10), "its signal's is"),
    "doubled": (add("index", -1), "sample 8, copy 0, is double"),
    "a copy too many": (add("copy", 1), "a copy is not in 0 … 0"),
    "not finite": (add("loss", float("nan")), "loss holds numbers that are not finite"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_verify_finds(whole: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "set"))
    change, sentence = FAULTS[name]
    change_shard(folder, change)
    with pytest.raises(InputError, match=sentence):
        verify.main([str(folder)])


def test_verify_finds_changed_files(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "set"))
    shard = folder / "train-00000.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-40_000] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(InputError, match=r"(?s)train-00000.safetensors has another sha256.*CRC-32"):
        verify.main([str(folder)])
    shutil.copy(whole / shard.name, shard)
    statistics = folder / "statistics.safetensors"
    raw = bytearray(statistics.read_bytes())
    raw[-1] ^= 0x40  # the deviation of the shared output layer, which is 0
    statistics.write_bytes(raw)
    with pytest.raises(InputError, match=r"statistics\.safetensors: .* differs by"):
        verify.main([str(folder)])
    statistics.write_bytes(raw[:100])
    with pytest.raises(InputError, match=r"statistics\.safetensors is missing or damaged"):
        verify.main([str(folder)])


def test_verify_wants_the_very_data(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = SignalFacts(kind="image", channels=1, height=8, width=8, classes=tuple("0123456789"))
    image = Sample(extension="png", data=encode_png(torch.zeros(1, 8, 8, dtype=torch.uint8)), label=0)
    write_dataset(tmp_path / "other", name="o", facts=facts, licence="", splits={"train": [image], "test": [image]})
    with pytest.raises(InputError, match="is not the data that the networks were fitted to"):
        verify.main([str(whole), "--data", str(tmp_path / "other")])
    folder = Path(shutil.copytree(whole, tmp_path / "set"))
    content = json.loads((folder / "manifest.json").read_text())
    content["source"]["path"] = str(tmp_path / "gone")
    (folder / "manifest.json").write_text(json.dumps(content))
    verify.main([str(folder)])
    assert "are not at hand: no network was drawn. Name them with --data DIR" in capsys.readouterr().out
    verify.main([str(folder), "--data", MODEL])
    with pytest.raises(InputError, match="--data is for sets of fitted networks"):
        verify.main([MODEL, "--data", MODEL])


BAD = {
    "no such run": (["--run", "nowhere"], "nowhere"),
    "no such model": (["--run", "builtin:letters"], "builtin:letters"),
    "model changed": ([*SMALL, "siren.hidden=3"], "siren.hidden cannot be changed"),
    "no such split": ([*SMALL, "--split", "val"], "no split 'val'; it has train, test"),
    "copies of nothing": ([*SMALL, "--copies", "2"], "trained without augmentation: name one with --augment"),
    "copies of test": ([*SMALL, "--copies", "1", "--augment", "crop", "--split", "test"], "--split test leaves out"),
    "fewer than no copies": ([*SMALL, "--copies", "-1"], "cannot be negative"),
    "augment alone": ([*SMALL, "--augment", "crop"], "add --copies N"),
    "too small": ([*SMALL, "--copies", "1", "--augment", "affine_flip"], "too small for this augmentation"),
    "no shard": ([*SMALL, "--shard-mib", "0"], "must be positive"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(tmp_path: Path, name: str) -> None:
    arguments, sentence = BAD[name]
    with pytest.raises(InputError, match=sentence):
        export.main([*arguments, "--out", str(tmp_path / "set")])
    assert not list(tmp_path.iterdir())  # nothing is left behind


def test_a_run_directory_whose_fits_see_subsets(tmp_path: Path) -> None:
    """The subsets are those of eval.classify, so that the PSNR over all pixels is the same."""
    run = tmp_path / "run"
    assert classify.main(["--debug", "data.limit=24", f"run.dir={run}"]) == 0
    trained = open_trained(run)
    assert trained.model.config.inner_loop.points == 16
    export.main(["--run", str(run), "--out", str(tmp_path / "set"), "--split", "test"])
    networks = load_weight_set(tmp_path / "set", "test")
    split = open_split(MODEL, "test", device=torch.device("cpu"), limit=24)
    result = evaluate(trained.model, split.batches(batch_size=24))
    torch.testing.assert_close(networks.column("psnr"), result.psnr, rtol=0, atol=1e-3)
    assert networks.manifest.fit["step"] == trained.step
    with pytest.raises(InputError, match="best"):
        export.main(["--run", str(run), "--out", str(tmp_path / "other"), "--checkpoint", "best"])
    with pytest.raises(InputError, match="holds something else"):
        export.main(["--run", str(run), "--out", str(tmp_path / "set"), "--split", "train"])
