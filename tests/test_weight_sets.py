"""Sets of fitted networks: written, read, converted, refused when damaged; the NumPy reader of the docs."""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

from data_pipes import verify
from data_pipes.weight_manifest import DTYPES, Description, Manifest
from data_pipes.weight_moments import Moments
from data_pipes.weight_write import ShardTask, WeightSetWriter
from data_pipes.weights import load_weight_set
from mwt.errors import InputError
from mwt.memory import LiveTensors
from mwt.structs import SignalFacts
from mwt.weight_space import Layout, Weights

ROOT = Path(__file__).parents[1]
FACTS = SignalFacts(kind="image", channels=3, height=4, width=4, classes=("a", "b", "c"))
SHARED = Layout(sizes=(2, 5, 4, 3), omegas=(30.0, 1.0), shared_output=True)
COUNTS = {"train": 11, "test": 4}
STEPS = 2


def describe(**changes: Any) -> Description:
    plain = {
        "name": "t", "signal": FACTS, "layout": SHARED, "values": "delta", "has_base": True, "steps": STEPS,
        "source": {"path": "nowhere", "name": "t", "sha256": ""}, "fit": {"method": "none"},
    }  # fmt: skip
    return Description(**{**plain, **changes})


def network(layout: Layout, seed: int, count: int = 1, scale: float = 1.0) -> Weights:
    numbers = torch.randn(count, layout.count, generator=torch.Generator().manual_seed(seed))
    return Weights.unflatten(numbers * scale, layout)


def content(task: ShardTask, layout: Layout, copy: int) -> Weights:
    """Offsets that are a function of (split, position, copy) alone."""
    parts = [network(layout, 1000 * copy + 100 * (task.split == "test") + p, scale=0.1).flat()
             for p in range(task.start, task.stop)]  # fmt: skip
    return Weights.unflatten(torch.cat(parts), layout)


def fill(writer: WeightSetWriter, tasks: list[ShardTask]) -> None:
    description = writer.description
    for task in tasks:
        index = torch.arange(task.start, task.stop)
        with writer.shard(task) as shard:
            for copy in range(1 + task.copies):
                weights = content(task, description.layout, copy)
                if description.values == "phi" and writer.base is not None:
                    weights = Weights.unflatten(weights.flat() + writer.base.flat(), description.layout)
                shard.add(
                    weights, labels=index % 3, index=index, psnr=index.float() + copy,
                    losses=index[:, None].float().expand(-1, STEPS + 1), copy=copy,
                    keys=[f"ключ{i}" for i in index.tolist()],
                )  # fmt: skip


def write(out: Path, description: Description, *, shard_bytes: int = 1200, batch: int = 2) -> Path:
    base = network(description.layout, 77) if description.has_base else None
    with WeightSetWriter(out, description, COUNTS, base=base, shard_bytes=shard_bytes, batch=batch) as writer:
        fill(writer, writer.missing())
        writer.finish()
    return out


def expected(split: str, layout: Layout, position: int, copy: int = 0) -> Tensor:
    """phi of one network."""
    task = ShardTask(split=split, number=0, start=position, stop=position + 1, copies=0, batch=1)
    offsets = content(task, layout, copy).flat()[0]
    if layout.shared_output:
        offsets[-(layout.sizes[-1] * (layout.sizes[-2] + 1)) :] = 0
    return offsets + network(layout, 77).flat()[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("sets") / "plain", describe())


@pytest.mark.parametrize("stored", ["phi", "delta"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_what_is_written_is_read(tmp_path: Path, stored: str, shared: bool, dtype: str) -> None:
    layout = replace(SHARED, shared_output=shared)
    out = write(tmp_path / "set", describe(values=stored, layout=layout, dtype=dtype), shard_bytes=700)
    phi, delta = (load_weight_set(out, "train", values) for values in ("phi", "delta"))
    assert len(phi) == 11
    assert len(phi.manifest.split("train").shards) > 2
    epsilon = torch.finfo(DTYPES[dtype]).eps * (4 if stored == "phi" else 0.5)  # delta is of the order of 0.1
    order = [7, 0, 10, 7, 3]
    batch = phi.batch(order)
    whole = torch.stack([expected("train", layout, i) for i in order])
    torch.testing.assert_close(batch.weights.flat(), whole, rtol=0, atol=max(epsilon, 1e-6))
    base = network(layout, 77).flat()
    torch.testing.assert_close(delta.batch(order).weights.flat(), whole - base, rtol=0, atol=max(epsilon, 1e-6))
    assert batch.weights.weights[0].dtype == torch.float32
    assert batch.index.tolist() == order
    assert batch.labels.tolist() == [i % 3 for i in order]
    assert batch.psnr.tolist() == order
    one, label = phi[-1]
    assert torch.equal(one.weights[1], phi.batch([10]).weights.weights[1][0])
    assert label == 10 % 3
    assert phi.keys()[10] == "ключ10"
    assert phi.column("loss").tolist() == [[float(i)] * (STEPS + 1) for i in range(11)]


def test_statistics_against_numpy(tmp_path: Path) -> None:
    out = write(tmp_path / "set", describe(copies=1, augment={"kind": "crop"}))
    rows = np.stack([expected("train", SHARED, i, copy).numpy() for i in range(11) for copy in (0, 1)]).astype(float)
    base = network(SHARED, 77).flat()[0].numpy()
    for values, shift in (("phi", 0), ("delta", base)):
        mean, std = load_weight_set(out, "test", values).statistics()
        np.testing.assert_allclose(mean.flat()[0], (rows - shift).mean(0), rtol=0, atol=1e-6)
        np.testing.assert_allclose(std.flat()[0], rows.std(0), rtol=0, atol=1e-6)
    manifest = json.loads((out / "manifest.json").read_text())
    of_layer = (rows - base)[:, 15 : 15 + 20]
    assert manifest["statistics"]["layers"]["layers.1.weight"] == {
        "mean": pytest.approx(of_layer.mean(), abs=1e-7), "std": pytest.approx(of_layer.std(), rel=1e-6)
    }  # fmt: skip
    assert manifest["statistics"]["count"] == 22
    assert load_weight_set(out, "test").batch(range(4)).copies.tolist() == [0] * 4


def test_moments_keep_their_digits_against_numpy() -> None:
    rows = torch.randn(300, 5, dtype=torch.float64) * 1e-4 + 1e4
    total = sum((Moments.of(part) for part in rows[7:].split(41)), Moments.of(rows[:7]))
    np.testing.assert_allclose(total.std, rows.numpy().std(0), rtol=1e-6)
    np.testing.assert_allclose(total.mean, rows.numpy().mean(0), rtol=1e-14)
    assert (Moments.of(rows[:0]) + total).count == 300


def test_resident_and_mapped_are_one(folder: Path) -> None:
    mapped = load_weight_set(folder, "train", "phi")
    kept = mapped.resident("cpu")
    for path in kept.path.glob("train-*"):
        assert path.is_file()
    ours, theirs = kept.batch([9, 1, 1]), mapped.batch([9, 1, 1])
    assert torch.equal(ours.weights.flat(), theirs.weights.flat())
    assert torch.equal(ours.labels, theirs.labels)
    assert torch.equal(kept.column("index"), mapped.column("index"))
    assert len(mapped.batch([]).labels) == 0
    with pytest.raises(IndexError):
        mapped.batch([11])


def test_a_split_is_kept_without_a_second_copy(tmp_path: Path) -> None:
    """As torch counts what is alive: the split, a piece of it, and no more."""
    description = describe(layout=replace(SHARED, sizes=(2, 50, 40, 3)))
    networks, pieces = 1100, 256
    with WeightSetWriter(tmp_path / "set", description, {"train": networks}, base=network(description.layout, 1)) as w:
        [task] = w.missing()
        index = torch.arange(networks)
        with w.shard(task) as shard:
            shard.add(network(description.layout, 2, networks), labels=index % 3, index=index, psnr=index.float(),
                      losses=torch.zeros(networks, STEPS + 1))  # fmt: skip
        w.finish()
    found = load_weight_set(tmp_path / "set", "train")
    found.batch([0])  # the shard is mapped now, which would count
    with LiveTensors() as alive:
        kept = found.resident("cpu")
    nbytes = found.resident_bytes
    assert nbytes == networks * description.network_bytes
    assert 0.95 * nbytes < alive.peak < (1 + 3 * pieces / networks) * nbytes < 2 * nbytes
    assert torch.equal(kept.batch(range(9)).weights.flat(), found.batch(range(9)).weights.flat())


def test_it_goes_through_a_data_loader_and_through_pickle(folder: Path) -> None:
    networks = load_weight_set(folder, "train")
    weights, labels = next(iter(DataLoader(networks, batch_size=4)))
    assert torch.equal(weights.weights[0], networks.batch(range(4)).weights.weights[0])
    assert labels.tolist() == [0, 1, 2, 0]
    again = pickle.loads(pickle.dumps(networks))
    assert torch.equal(again.batch([5]).weights.flat(), networks.batch([5]).weights.flat())


def read_as_the_docs_do(folder: Path) -> dict[str, Any]:
    text = (ROOT / "docs" / "weight_sets.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "import numpy" in block)
    names: dict[str, Any] = {}
    exec(code.replace("sets/fashion_mnist", str(folder)), names)
    return names


def test_the_numpy_reader_of_the_docs(folder: Path, tmp_path: Path) -> None:
    names = read_as_the_docs_do(folder)
    batch = load_weight_set(folder, "train", "phi").batch(range(11))
    for i in range(2):
        np.testing.assert_allclose(names["weights"][i], batch.weights.weights[i], rtol=0, atol=1e-7)
        np.testing.assert_allclose(names["biases"][i], batch.weights.biases[i], rtol=0, atol=1e-7)
    np.testing.assert_array_equal(names["output"][0], batch.weights.weights[2][0])
    assert names["labels"].tolist() == batch.labels.tolist()
    assert names["psnr"].tolist() == batch.psnr.tolist()
    alone = replace(SHARED, shared_output=False)  # as independent fits: no base, an output layer for each network
    out = write(tmp_path / "set", describe(values="phi", layout=alone, has_base=False))
    batch, names = load_weight_set(out, "train").batch(range(11)), read_as_the_docs_do(out)
    ours, theirs = ((*x["weights"], *x["biases"]) for x in (names, batch.weights._asdict()))
    for found, expected in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_without_a_base_there_are_no_differences(tmp_path: Path) -> None:
    layout = replace(SHARED, shared_output=False)
    out = write(tmp_path / "set", describe(values="phi", layout=layout, has_base=False))
    assert not (out / "base.safetensors").exists()
    assert len(load_weight_set(out)) == 11
    with pytest.raises(InputError, match="no base"):
        load_weight_set(out, values="delta")


# ---- damage ------------------------------------------------------------------------------------------------------


def copy_of(folder: Path, out: Path) -> Path:
    out.mkdir()
    for path in folder.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    return out


def flip(out: Path) -> None:
    shard = out / "train-00001.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-8 * 8] ^= 1  # within the tensors
    shard.write_bytes(raw)


def cut(out: Path) -> None:
    shard = out / "train-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-7])


def reshape(out: Path) -> None:
    shard = out / "train-00001.safetensors"
    tensors = load_file(shard)
    tensors["layers.1.weight"] = tensors["layers.1.weight"].mT.contiguous()
    save_file(tensors, shard)
    manifest(out, lambda m: m["splits"]["train"]["shards"][1].update(bytes=shard.stat().st_size))


def manifest(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((out / "manifest.json").read_text())
    change(content)
    (out / "manifest.json").write_text(json.dumps(content))


def read_all(out: Path) -> None:
    networks = load_weight_set(out)
    networks.statistics()
    assert sum(len(batch.labels) for batch in networks.batches(3)) == 11


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped byte": (flip, r"train-00001\.safetensors has changed .*CRC-32"),
    "cut off": (cut, r"train-00001\.safetensors has \d+ bytes"),
    "another shape": (reshape, r"train-00001\.safetensors: layers\.1\.weight is \[\d+, 5, 4\]"),
    "no shard": (lambda out: (out / "train-00001.safetensors").unlink(), r"train-00001\.safetensors.* is missing"),
    "no base": (lambda out: (out / "base.safetensors").unlink(), r"base\.safetensors is missing"),
    "no statistics": (lambda out: (out / "statistics.safetensors").unlink(), r"statistics\.safetensors is missing"),
    "no manifest": (lambda out: (out / "manifest.json").unlink(), "has no manifest.json"),
    "no JSON": (lambda out: (out / "manifest.json").write_text("{"), r"manifest\.json cannot be read as JSON"),
    "other schema": (lambda out: manifest(out, lambda m: m.update(schema=9)), "schema version 9"),
    "a key less": (lambda out: manifest(out, lambda m: m.pop("values")), "lacks the key 'values'"),
    "other layers": (lambda out: manifest(out, lambda m: m["architecture"].update(omegas=[1.0])), "manifest.json"),
    "way out": (
        lambda out: manifest(out, lambda m: m["splits"]["train"]["shards"][0].update(file="../x")), "plain file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(folder: Path, tmp_path: Path, name: str) -> None:
    out = copy_of(folder, tmp_path / "set")
    damage, sentence = DAMAGE[name]
    damage(out)
    with pytest.raises(InputError, match=sentence):
        read_all(out)


def test_other_things_that_are_not_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no split 'val'; it has train, test"):
        load_weight_set(folder, "val")
    with pytest.raises(InputError, match="it is not there"):
        load_weight_set(tmp_path / "nothing")


# ---- writing -----------------------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_taken_up_again_and_dealt_out_it_is_the_same_set(folder: Path, tmp_path: Path) -> None:
    out, base = tmp_path / "set", network(SHARED, 77)
    options: dict[str, Any] = {"base": base, "shard_bytes": 1200, "batch": 2}
    with WeightSetWriter(out, describe(), COUNTS, **options) as writer:
        every = writer.missing()
        fill(writer, every[:2])
        with pytest.raises(RuntimeError, match="killed"), writer.shard(every[2]):
            raise RuntimeError("killed")
        with pytest.raises(InputError, match="are missing"):
            writer.finish()
    assert not out.exists()
    with WeightSetWriter(out, describe(), COUNTS, **options) as writer:
        shares = [writer.missing(rank=rank, world=2) for rank in range(2)]
        assert sorted(t.name for share in shares for t in share) == sorted(t.name for t in every[2:])
        with pytest.raises(InputError, match="Another process"), WeightSetWriter(out, describe(), COUNTS, **options):
            pass
        other = WeightSetWriter(out, describe(), COUNTS, main=False, **options)
        with other:
            fill(other, shares[1])
        fill(writer, shares[0])
        writer.finish()
    assert files(out) == files(folder)
    assert not list(tmp_path.glob(".*"))
    with WeightSetWriter(out, describe(), COUNTS, **options) as again:
        assert again.complete
        assert again.missing() == []
        assert again.finish().split("train").count == 11


def test_another_set_is_refused(folder: Path, tmp_path: Path) -> None:
    base = network(SHARED, 77)
    with (
        pytest.raises(InputError, match="holds something else"),
        WeightSetWriter(folder, describe(dtype="fp16"), COUNTS, base=base),
    ):
        pass
    out = tmp_path / "set"
    with WeightSetWriter(out, describe(), COUNTS, base=base, shard_bytes=1200) as writer:
        fill(writer, writer.missing()[:1])
    with (
        pytest.raises(InputError, match=r"begun otherwise \(values\)"),
        WeightSetWriter(out, describe(values="phi"), COUNTS, base=base, shard_bytes=1200),
    ):
        pass
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(InputError, match="exists already"),
        WeightSetWriter(tmp_path / "file", describe(), COUNTS, base=base),
    ):
        pass


def test_two_programs_at_once(tmp_path: Path) -> None:
    """The second is refused, and takes nothing from the first, which has finished no shard yet."""

    def begun() -> WeightSetWriter:
        return WeightSetWriter(tmp_path / "set", describe(), COUNTS, base=network(SHARED, 77), shard_bytes=1200)

    with begun() as first:
        with pytest.raises(InputError, match="Another process is writing"), begun():
            pass
        fill(first, first.missing())
        first.finish()
    assert len(load_weight_set(tmp_path / "set", "train")) == 11


def test_a_full_disk_is_refused_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with (
        pytest.raises(InputError, match=r"needs 3 kB, but its disk has only 1 kB free"),
        WeightSetWriter(tmp_path / "set", describe(), COUNTS, base=network(SHARED, 77)),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_what_does_not_belong_into_a_shard(tmp_path: Path) -> None:
    with WeightSetWriter(tmp_path / "set", describe(dtype="fp16"), {"train": 4}, base=network(SHARED, 77)) as writer:
        (task,) = writer.missing()
        ones = torch.ones(2, dtype=torch.int64)
        rest: dict[str, Any] = {"labels": ones, "psnr": ones.float(), "losses": torch.ones(2, STEPS + 1)}
        good = network(SHARED, 0, 2)
        for index, sentence in (([1, 1], "already"), ([3, 4], "positions 0 … 3")):
            with pytest.raises(ValueError, match=sentence), writer.shard(task) as shard:
                shard.add(good, index=torch.tensor(index), **rest)
        with pytest.raises(ValueError, match="2 networks of 4"), writer.shard(task) as shard:
            shard.add(good, index=torch.tensor([0, 1]), **rest)
        with writer.shard(task) as shard:
            shard.add(good, index=torch.tensor([0, 2]), **rest)
            shard.skipped = 2
        found = writer.finish()
    assert found.skipped == {"train": 2}
    assert load_weight_set(tmp_path / "set").column("index").tolist() == [0, 2]


# ---- networks that diverged --------------------------------------------------------------------------------------


def write_with(out: Path, wrong: dict[int, float], *, counts: dict[str, int], size: int) -> Manifest:
    """Networks of which those of the signals `wrong` are multiplied by a number, in fp16."""
    description = describe(dtype="fp16")
    nbytes = size * description.network_bytes
    with WeightSetWriter(out, description, counts, base=network(SHARED, 77), shard_bytes=nbytes) as writer:
        for task in writer.missing():
            index = torch.arange(task.start, task.stop)
            factor = torch.tensor([wrong.get(place, 1.0) if task.split == "train" else 1.0 for place in index.tolist()])
            weights = network(SHARED, task.number, len(index)).map(
                lambda x, f=factor: x * f.view(-1, *[1] * (x.ndim - 1))
            )
            with writer.shard(task) as shard:
                shard.add(
                    weights, labels=torch.ones_like(index), index=index, psnr=torch.where(factor == 1, 20.0, math.nan),
                    losses=torch.ones(len(index), STEPS + 1), keys=[f"k{place}" for place in index.tolist()],
                )  # fmt: skip
        return writer.finish()


def test_networks_that_diverged_are_left_out_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """NaN, and numbers that fp16 has not; a whole shard among them."""
    wrong = {1: math.nan, 4: 1e9, 5: math.inf}
    manifest = write_with(tmp_path / "set", wrong, counts={"train": 9, "test": 2}, size=2)
    assert manifest.diverged == {"train": [[1, 0], [4, 0], [5, 0]]}
    assert [manifest.splits[name].count for name in ("train", "test")] == [6, 2]
    assert "3 of 'train'" in str(manifest.left_out)
    found = load_weight_set(tmp_path / "set", "train")
    assert found.column("index").tolist() == [0, 2, 3, 6, 7, 8]
    assert found.keys() == ["k0", "k2", "k3", "k6", "k7", "k8"]
    assert bool(found.batch(range(6)).weights.flat().isfinite().all())
    assert manifest.psnr["train"] == pytest.approx(20)
    assert manifest.statistics["count"] == 6
    verify.main([str(tmp_path / "set")])
    assert "3 of 'train'" in capsys.readouterr().out


def test_a_split_of_which_most_diverged_is_no_split(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"3 of 5 networks of 'train' .*sample 0, copy 0.* not finite in fp16"):
        write_with(tmp_path / "set", dict.fromkeys((0, 1, 2), math.nan), counts={"train": 5, "test": 9}, size=2)
    assert not list(tmp_path.iterdir())  # nothing that the same command would trip over again
    many = dict.fromkeys(range(20), math.nan)
    with pytest.raises(InputError, match="20 of 20 networks"):  # at once, not at the end
        write_with(tmp_path / "set", many, counts={"train": 40}, size=20)
