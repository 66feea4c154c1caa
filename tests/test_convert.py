"""Weight sets in the formats of other code bases: their loaders and their SIRENs, restated here, see our pictures."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from nfn.common import state_dict_to_tensors
from torch import Tensor

from data_pipes import convert
from data_pipes.foreign_plan import Plan, plan
from data_pipes.foreign_write import ForeignWriter, write_piece
from data_pipes.weight_manifest import Description
from data_pipes.weight_write import WeightSetWriter
from data_pipes.weights import load_weight_set
from data_pipes.write import partial_folder
from eval import export
from mwt.errors import InputError
from mwt.observe import grid
from mwt.structs import SignalFacts
from mwt.weight_space import Layout, Weights, render
from tests.fork_server import Server

ROOT = Path(__file__).parents[1]
H, W = 5, 7
TREES = ("nfn", "dws", "neural-graphs", "scalegmn", "scalegmn-cifar", "scalegmn-fmnist")
META = Layout(sizes=(2, 6, 5, 3), omegas=(10.0, 1.0), shared_output=True)
"""As meta-learned SIRENs: one output layer for all, other frequencies."""
PLAIN = Layout(sizes=(2, 6, 5, 1), omegas=(30.0, 30.0), shared_output=False)
"""As SIRENs that were fitted one by one: no base, nothing shared."""
SHAPES = Layout(sizes=(3, 6, 5, 1), omegas=(30.0, 1.0), shared_output=True)
COUNTS = {"train": 9, "test": 4}


def write_native(
    out: Path, layout: Layout, *, counts: dict[str, int] = COUNTS, classes: int = 10, copies: int = 0,
    shard_bytes: int = 700,
) -> Path:  # fmt: skip
    """Random networks; two in a shard, labels 3, 4, 5 …, the copies interleaved."""
    kind = "image" if layout.coordinate_dims == 2 else "points"
    facts = SignalFacts(
        kind=kind, channels=layout.channels, height=None, width=None, classes=tuple(f"c{i}" for i in range(classes))
    )
    has_base = layout.shared_output
    description = Description(
        name="some_set", signal=facts, layout=layout, values="delta" if has_base else "phi", has_base=has_base, steps=1,
        source={"path": "nowhere", "name": "t", "sha256": ""}, fit={"method": "none"}, copies=copies,
    )  # fmt: skip
    numbers = torch.Generator().manual_seed(7)

    def draw(count: int, scale: float) -> Weights:
        return Weights.unflatten(torch.randn(count, layout.count, generator=numbers) * scale, layout)

    base = draw(1, 0.3) if has_base else None
    with WeightSetWriter(out, description, counts, base=base, shard_bytes=shard_bytes) as writer:
        for task in writer.missing():
            index = torch.arange(task.start, task.stop)
            with writer.shard(task) as shard:
                for copy in range(1 + task.copies):
                    n = len(index)
                    shard.add(
                        draw(n, 0.1), labels=(index + 3) % classes, index=index, psnr=index + 0.5,
                        losses=torch.zeros(n, 2), copy=copy,
                    )  # fmt: skip
        writer.finish()
    return out


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("native")
    export.main(
        ["--run", "builtin:digits", "data.limit=6", "run.device=cpu", "--out", str(folder / "digits")]
    )  # 12 real networks
    return {
        "digits": folder / "digits",
        "meta": write_native(folder / "meta", META),
        "plain": write_native(folder / "plain", PLAIN),
    }


def pictures(native: Path, split: str, height: int = H, width: int = W) -> Tensor:
    """What our networks draw, [n, height, width, channels] in [-1, 1]."""
    networks = load_weight_set(native, split, "phi")
    drawn = render(networks.layout, networks.batch(range(len(networks))).weights, grid(height, width))
    return drawn.reshape(len(networks), height, width, -1)


# ---- what other code bases do with a network, from their descriptions ---------------------------------------------


def plain_siren(weights: list[Tensor], biases: list[Tensor], coords: Tensor) -> Tensor:
    """sin(30 (W x + b)) in every layer but the last."""
    h = coords.float()
    for w, b in zip(weights[:-1], biases[:-1], strict=True):
        h = torch.sin(30.0 * torch.nn.functional.linear(h, w, b))
    return torch.nn.functional.linear(h, weights[-1], biases[-1])


def nfn_draws(weights: list[Tensor], biases: list[Tensor], height: int = H, width: int = W) -> Tensor:
    """(row, column), 'ij'; values in [-1, 1]."""
    axes = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return plain_siren(weights, biases, torch.stack(axes, -1).reshape(-1, 2)).reshape(height, width, -1)


def dws_draws(weights: list[Tensor], biases: list[Tensor], height: int = H, width: int = W) -> Tensor:
    """numpy's 'xy' mesh: the column first; 0.5 added; values in [0, 1], here brought to [-1, 1]."""
    x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
    coords = torch.from_numpy(np.stack([x.flatten(), y.flatten()]).T).float()
    return (plain_siren(weights, biases, coords) + 0.5).reshape(height, width, -1) * 2 - 1


def by_name(state: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """As DWSNets, neural-graphs and ScaleGMN take tensors out of a file."""
    return [v for k, v in state.items() if "weight" in k], [v for k, v in state.items() if "bias" in k]


Loaded = Iterator[tuple[list[Tensor], list[Tensor], int]]


def nfn_loader(root: Path, split: str, points: list[int], pattern: str = "randinit_smaller_*/*.pth") -> Loaded:
    """nfn's SirenDataset, and with another glob ScaleGMN's for CIFAR."""
    paths: dict[int, str] = {}
    for path in glob.glob(os.path.join(root, pattern)):
        match = re.search(r"net(\d+)\.pth", path)
        assert match is not None
        paths[int(match[1])] = path
    ranges = {"train": range(points[0]), "val": range(*points), "test": range(points[1], len(paths))}
    for i in ranges[split]:
        label = re.search(r"_(\d)s", paths[i])
        assert label is not None
        weights, biases = state_dict_to_tensors(torch.load(paths[i]))  # nfn's own, of [1, …]
        yield [w[0] for w in weights], [b[0] for b in biases], int(label[1])


def json_loader(root: Path, split: str, place: Callable[[str], Path]) -> Loaded:
    """DWSNets, ScaleGMN for MNIST (paths as they are) and neural-graphs (joined to the folder)."""
    listed = json.loads((root / "splits.json").read_text())[split]
    for path, label in zip(listed["path"], listed["label"], strict=True):
        yield *by_name(torch.load(place(path))), int(label)


def fmnist_loader(root: Path, split: str) -> Loaded:
    """ScaleGMN for Fashion-MNIST: the last two parts of the path, the label in the file."""
    dataset_path = f"{root}/"
    for path in json.loads((root / "splits.json").read_text())[split]:
        state = torch.load(dataset_path + "/".join(path.split("/")[-2:]))
        label = int(state.pop("label"))
        yield *by_name(state), label


LOADERS: dict[str, Callable[[Path, str, list[int]], Loaded]] = {
    "nfn": nfn_loader,
    "scalegmn-cifar": lambda root, split, points: nfn_loader(root, split, points, "randinit_smaller_[0-9]s/*.pth"),
    "scalegmn mnist": lambda root, split, points: json_loader(root, split, Path),
    "dws": lambda root, split, points: json_loader(root, split, Path),
    "neural-graphs": lambda root, split, points: json_loader(root, split, lambda p: Path(root) / Path(p)),
    "scalegmn-fmnist": lambda root, split, points: fmnist_loader(root, split),
}
AFTER_RELOCATE = {"dws", "scalegmn mnist"}


@pytest.mark.parametrize("kind", ["digits", "meta", "plain"])
@pytest.mark.parametrize("loader", LOADERS)
def test_trees_in_the_hands_of_their_loaders(sets: dict[str, Path], tmp_path: Path, kind: str, loader: str) -> None:
    name, root = loader.split()[0], tmp_path / "tree"
    convert.main(["--src", str(sets[kind]), "--out", str(root), "--format", name])
    if loader in AFTER_RELOCATE:
        convert.main(["--relocate", str(root)])
    points = json.loads((root / "converted.json").read_text())["split_points"]
    draws = nfn_draws if name in ("nfn", "scalegmn-cifar") else dws_draws
    for split in ("train", "test"):
        native = load_weight_set(sets[kind], split)
        found = list(LOADERS[loader](root, split, points))
        assert [label for _, _, label in found] == native.column("label").tolist()
        assert all(x.dtype == torch.float32 for weights, biases, _ in found for x in (*weights, *biases))
        drawn = torch.stack([draws(weights, biases) for weights, biases, _ in found])
        torch.testing.assert_close(drawn, pictures(sets[kind], split), rtol=0, atol=1e-5)
    assert list(LOADERS[loader](root, "val", points)) == []
    paths = sorted(root.glob("*/*.pth"), key=lambda path: int(path.stem[3:]))
    assert [path.stem for path in paths] == [f"net{i}" for i in range(len(load_weight_set(sets[kind])) + len(native))]
    for path in paths[:2]:
        content = torch.load(path)
        count = len(native.layout.shapes)
        expected = [f"seq.{i}.{kind}" for i in range(count) for kind in ("weight", "bias")]
        assert list(content) == expected + ["label"] * (name == "scalegmn-fmnist")
        assert path.stat().st_size < 4 * native.layout.count + 500 * (2 * count + 4)  # no other network's numbers in it


@pytest.mark.parametrize("name", TREES)
def test_either_convention_can_be_chosen(sets: dict[str, Path], tmp_path: Path, name: str) -> None:
    for chosen, draws in (("nfn", nfn_draws), ("dws", dws_draws)):
        root = tmp_path / chosen
        convert.main(["--src", str(sets["meta"]), "--out", str(root), "--format", name, "--convention", chosen])
        weights, biases = by_name(torch.load(root / "randinit_smaller_3s" / "net0.pth"))
        ours = pictures(sets["meta"], "train")[0]
        torch.testing.assert_close(draws(weights, biases), ours, rtol=0, atol=1e-5)
        assert not torch.allclose((nfn_draws if draws is dws_draws else dws_draws)(weights, biases), ours, atol=1e-2)


def tree_statistics(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(root / "statistics.pth")
    return found


def test_statistics_are_those_of_the_files(sets: dict[str, Path], tmp_path: Path) -> None:
    """As DWSNets and neural-graphs normalise: (w - mean) / std on [in, out, 1]; finite for a shared layer too."""
    root = tmp_path / "tree"
    convert.main(["--src", str(sets["meta"]), "--out", str(root), "--format", "neural-graphs"])
    files = [
        by_name(torch.load(root / path)) for path in json.loads((root / "splits.json").read_text())["train"]["path"]
    ]
    stats, per_layer = tree_statistics(root), yaml.safe_load((root / "statistics.yaml").read_text())["stats"]
    for i in range(3):
        weights = torch.stack([f[0][i].permute(1, 0).unsqueeze(-1) for f in files]).double()
        biases = torch.stack([f[1][i].unsqueeze(-1) for f in files]).double()
        for name, rows in (("weights", weights), ("biases", biases)):
            mean, std = stats[name]["mean"][i], stats[name]["std"][i]
            assert mean.shape == std.shape == rows.shape[1:]
            torch.testing.assert_close(mean.double(), rows.mean(0), rtol=0, atol=1e-7)
            deviation = rows.std(0, correction=0)
            assert bool((deviation < 1e-7).all()) == (i == 2)  # all share the output layer
            expected = torch.where(deviation < 1e-5, 1.0, deviation)
            torch.testing.assert_close(std.double(), expected, rtol=1e-4, atol=0)
            assert bool(((rows - mean) / std).isfinite().all())
            assert per_layer[f"{name}_mean"][i] == pytest.approx(float(rows.mean()), abs=1e-6)
            assert per_layer[f"{name}_std"][i] == pytest.approx(float(rows.std(correction=0)), rel=1e-4)


def test_differences_and_the_base(sets: dict[str, Path], tmp_path: Path) -> None:
    whole, apart = tmp_path / "phi", tmp_path / "delta"
    convert.main(["--src", str(sets["meta"]), "--out", str(whole), "--format", "dws"])
    convert.main(["--src", str(sets["meta"]), "--out", str(apart), "--format", "dws", "--values", "delta"])
    base = torch.load(apart / "base.pth")
    for path in whole.glob("*/*.pth"):
        phi, delta = torch.load(path), torch.load(apart / path.relative_to(whole))
        for key in phi:
            torch.testing.assert_close(base[key] + delta[key], phi[key], rtol=0, atol=1e-7)
    assert float(delta["seq.2.weight"].abs().max()) == 0
    assert bool((tree_statistics(apart)["weights"]["std"][2] == 1).all())
    with pytest.raises(InputError, match="holds phi and no base"):
        plan(sets["plain"], "dws", tmp_path / "x", values="delta")


def test_held_out_networks_and_copies(tmp_path: Path) -> None:
    """Copies lie in another folder: nfn's glob would take them for the networks themselves. None is of a val signal."""
    native = write_native(tmp_path / "native", META, copies=2)
    root = tmp_path / "tree"
    convert.main(["--src", str(native), "--out", str(root), "--format", "nfn", "--val", "4"])
    networks = load_weight_set(native, "train", "phi")
    assert json.loads((root / "converted.json").read_text())["split_points"] == [5, 9]
    used = []
    for copy, folder in enumerate([root, tmp_path / "tree-copy1", tmp_path / "tree-copy2"]):
        index, copies = networks.column("index"), networks.column("copy")
        for split, positions in (("train", range(5)), ("val", range(5, 9) if copy == 0 else ())):
            found = list(nfn_loader(folder, split, [5, 9 if copy == 0 else 5]))
            assert [label for *_, label in found] == [(i + 3) % 10 for i in positions]
            for (weights, biases, _), position in zip(found, positions, strict=True):
                (place,) = ((index == position) & (copies == copy)).nonzero().flatten().tolist()
                ours = render(META, networks.batch([place]).weights, grid(H, W)).reshape(H, W, -1)
                torch.testing.assert_close(nfn_draws(weights, biases), ours, rtol=0, atol=1e-5)
                used += [weights[1]] if split == "train" else []
    assert len(list(nfn_loader(root, "test", [5, 9]))) == 4
    mean = tree_statistics(root)["weights"]["mean"][1][..., 0]  # of all copies of the five that are left
    torch.testing.assert_close(mean, torch.stack(used).mean(0).T, rtol=0, atol=1e-7)
    with pytest.raises(InputError, match="less than the 9 training signals"):
        plan(native, "nfn", tmp_path / "x", val=9)


def test_arena(sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """neural-field-arena: ranges over sorted files of rows, cut by param_config; flax layers h @ kernel + b."""
    h5py = pytest.importorskip("h5py")
    monkeypatch.setattr("data_pipes.foreign_plan._PIECE", 5)  # some files
    for kind, native in sets.items():
        root = tmp_path / kind
        convert.main(["--src", str(native), "--out", str(root), "--format", "arena-hdf5", "--val", "2"])
        files = sorted(root.glob("*.hdf5"), key=lambda p: int(p.stem.split("_")[1].split("-")[0]))
        assert len(files) > 2
        rows, labels, configs = [], [], set()
        for path in files:
            first, last = map(int, path.stem.split("_")[1].split("-"))
            with h5py.File(path) as file:
                assert first == sum(map(len, rows))
                assert last - first == len(file["params"]) == len(file["labels"])
                rows.append(file["params"][:])
                labels += file["labels"][:].tolist()
                configs.add(file["param_config"][0])
        (config,) = configs
        native_train, native_test = (load_weight_set(native, split) for split in ("train", "test"))
        assert labels == native_train.column("label").tolist() + native_test.column("label").tolist()
        ours = torch.cat([pictures(native, split) for split in ("train", "test")])
        coords = grid(H, W).numpy()
        for row, picture in zip(np.concatenate(rows), ours, strict=True):
            assert row.dtype == np.float32
            at, tensors = 0, []
            for key, shape in json.loads(config):
                tensors.append((key, row[at : at + np.prod(shape)].reshape(shape)))
                at += int(np.prod(shape))
            assert at == len(row)
            h = coords
            for (bias_key, bias), (kernel_key, kernel) in zip(tensors[::2], tensors[1::2], strict=True):
                assert (bias_key.split(".")[-1], kernel_key.split(".")[-1]) == ("bias", "kernel")
                h = h @ kernel + bias
                h = h if kernel_key.startswith("output_linear.") else np.sin(30 * h)
            np.testing.assert_allclose(h.reshape(H, W, -1), picture, rtol=0, atol=1e-5)
        counts = len(native_train) - 2, 2, len(native_test)
        metadata = json.loads((root / "metadata.json").read_text())
        train = np.concatenate(rows)[: counts[0]].astype(float)
        for name in ("train", "val", "test", f"0_{counts[0]}", f"{counts[0]}_{sum(counts[:2])}"):
            np.testing.assert_allclose(metadata[name]["mean"], train.mean(0), rtol=0, atol=1e-6)
            std = np.where(train.std(0) < 1e-5, 1, train.std(0))
            np.testing.assert_allclose(metadata[name]["std"], std, rtol=1e-3)


def test_npz(sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipes.foreign_plan._PIECE", 4)
    for kind, native in sets.items():
        root = tmp_path / kind
        convert.main(["--src", str(native), "--out", str(root), "--format", "npz"])
        for split in ("train", "test"):
            networks = load_weight_set(native, split)
            with np.load(root / f"{split}.npz", allow_pickle=False) as arrays:
                content = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
            assert torch.equal(content["label"], networks.column("label"))
            assert torch.equal(content["index"], networks.column("index"))
            assert torch.equal(content["psnr"], networks.column("psnr"))
            layers = range(len(networks.layout.shapes))
            for i, picture in enumerate(pictures(native, split)):
                parts = [[content[f"layers.{n}.{what}"][i] for n in layers] for what in ("weight", "bias")]
                torch.testing.assert_close(nfn_draws(parts[0], parts[1]), picture, rtol=0, atol=1e-5)
            if split == "train":
                with np.load(root / "statistics.npz", allow_pickle=False) as stats:
                    mean = content["layers.1.weight"].double().mean(0)
                    np.testing.assert_allclose(stats["layers.1.weight.mean"], mean, rtol=0, atol=1e-7)
        assert {path.name for path in root.iterdir()} == {
            "train.npz", "test.npz", "statistics.npz", "converted.json", *["base.npz"] * (kind != "plain")
        }  # fmt: skip


def test_points_keep_their_values(tmp_path: Path) -> None:
    native = write_native(tmp_path / "native", SHAPES)
    convert.main(["--src", str(native), "--out", str(tmp_path / "tree"), "--format", "dws"])
    networks = load_weight_set(native, "train", "phi")
    coords = torch.rand(20, 3) * 2 - 1
    weights, biases = by_name(torch.load(tmp_path / "tree" / "randinit_smaller_3s" / "net0.pth"))
    ours = render(SHAPES, networks.batch([0]).weights, coords)[0]
    torch.testing.assert_close(plain_siren(weights, biases, coords), ours, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="--convention dws is about pictures"):
        plan(native, "dws", tmp_path / "x", convention="dws")


# ---- labels, places, restarts ------------------------------------------------------------------------------------


def test_more_labels_than_digits(tmp_path: Path) -> None:
    native = write_native(tmp_path / "native", PLAIN, classes=12)
    for name in ("nfn", "scalegmn-cifar"):
        with pytest.raises(InputError, match="10 classes at most, and this set has 12"):
            plan(native, name, tmp_path / "x")
    convert.main(["--src", str(native), "--out", str(tmp_path / "tree"), "--format", "dws"])
    convert.main(["--src", str(native), "--out", str(tmp_path / "scale"), "--format", "scalegmn"])
    for tree in ("tree", "scale"):
        found = json_loader(tmp_path / tree, "train", lambda p, tree=tree: tmp_path / tree / p)
        assert [label for *_, label in found] == [3, 4, 5, 6, 7, 8, 9, 10, 11]


def test_a_path_that_looks_like_a_label(sets: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "sets_3small" / "tree"
    with pytest.raises(InputError, match="would find '_3s'"):
        plan(sets["meta"], "nfn", out)
    convert.main(["--src", str(sets["meta"]), "--out", str(out), "--format", "dws"])
    convert.main(["--relocate", str(out)])
    convert.main(["--src", str(sets["meta"]), "--out", str(tmp_path / "tree"), "--format", "nfn"])
    moved = tmp_path / "runs_7s"
    (tmp_path / "tree").rename(moved)
    with pytest.raises(InputError, match="would find '_7s'"):
        convert.main(["--relocate", str(moved)])
    labels = [label for *_, label in nfn_loader(moved, "train", [9, 9])]
    assert labels == [7] * 9  # what would have come of it


@pytest.mark.parametrize("name", ["dws", "scalegmn-fmnist"])
def test_relocated_again_and_again(sets: dict[str, Path], tmp_path: Path, name: str) -> None:
    root = tmp_path / "tree"
    convert.main(["--src", str(sets["meta"]), "--out", str(root), "--format", name])
    for _ in range(2):
        moved = root.with_name(root.name + "x")
        root.rename(moved)
        root = moved
        convert.main(["--relocate", str(root)])
        content = json.loads((root / "splits.json").read_text())
        for split, count in (("train", 9), ("val", 0), ("test", 4)):
            paths = content[split] if name == "scalegmn-fmnist" else content[split]["path"]
            assert len(paths) == count
            assert all(Path(path).is_absolute() and Path(path).is_file() for path in paths)
    next(root.glob("*/net0.pth")).unlink()
    with pytest.raises(InputError, match=r"net0\.pth, listed in .* is missing"):
        convert.main(["--relocate", str(root)])
    with pytest.raises(InputError, match="is no tree that"):
        convert.main(["--relocate", str(tmp_path)])


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one(native: Path, name: str, out: Path) -> Plan:
    (single,) = plan(native, name, out)
    return single


@pytest.mark.parametrize("name", ["nfn", "arena-hdf5", "npz"])
def test_stopped_in_the_middle(
    sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What is finished is not written again; the result is the same (of zips, which hold the time, the content)."""
    monkeypatch.setattr("data_pipes.foreign_plan._PIECE", 2)
    whole, out = tmp_path / "whole", tmp_path / "set"
    convert.main(["--src", str(sets["meta"]), "--out", str(whole), "--format", name])
    written = []

    def stop(planned: Plan, piece: Any) -> dict[str, int]:
        written.append(piece.number)
        if len(written) == 4:
            raise KeyboardInterrupt
        return write_piece(planned, piece)

    monkeypatch.setattr("data_pipes.foreign_write.write_piece", stop)
    with pytest.raises(KeyboardInterrupt):
        convert.main(["--src", str(sets["meta"]), "--out", str(out), "--format", name])
    assert not out.exists()
    with pytest.raises(InputError, match="begun otherwise"):
        convert.main(["--src", str(sets["meta"]), "--out", str(out), "--format", name, "--values", "delta"])
    if name == "nfn":  # a file that a power cut emptied: its piece is written again
        lost = next((partial_folder(out) / "data").glob("*/net3.pth"))
        lost.write_bytes(b"")
    convert.main(["--src", str(sets["meta"]), "--out", str(out), "--format", name])
    assert written == [0, 1, 2, 3, *([1] if name == "nfn" else []), 3, 4, 5, 6]
    assert not partial_folder(out).exists()
    assert files(out).keys() == files(whole).keys()
    for path, content in files(out).items():
        if path.endswith(".npz"):
            ours, theirs = np.load(out / path), np.load(whole / path)
            assert ours.files == theirs.files
            assert all(np.array_equal(ours[key], theirs[key]) for key in ours.files)
        else:
            assert content == (whole / path).read_bytes(), path
    convert.main(["--src", str(sets["meta"]), "--out", str(out), "--format", name])  # complete already
    with pytest.raises(InputError, match="exists already and is something else"):
        convert.main(["--src", str(sets["plain"]), "--out", str(out), "--format", name])


def test_killed(tmp_path: Path, server: Server) -> None:
    """kill -9 of the real program: nothing is there before all is, and what was finished is not written again."""
    native = write_native(tmp_path / "native", PLAIN, counts={"train": 1000}, shard_bytes=2**20)
    out = tmp_path / "tree"
    arguments = ["--src", str(native), "--out", str(out), "--format", "nfn", "--workers", "0"]
    process = server.start(*arguments, program="data_pipes.convert")
    try:
        deadline = time.monotonic() + 150
        while not (notes := list((partial_folder(out) / "notes").glob("0*.json"))):
            assert not out.exists(), "it was over before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        os.kill(process, signal.SIGKILL)
        assert server.status() == -signal.SIGKILL, server.said()
    assert not out.exists()
    first = next(iter(json.loads(min(notes).read_text())))
    before = (partial_folder(out) / "data" / first).stat()
    convert.main(arguments)
    after = (out / first).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    found = list(nfn_loader(out, "train", [1000, 1000]))
    ours = load_weight_set(native).batch(range(1000)).weights.flat()
    assert len(found) == 1000
    for i, (weights, biases, label) in enumerate(found):
        assert label == (i + 3) % 10
        flat = torch.cat([part.flatten() for pair in zip(weights, biases, strict=True) for part in pair])
        assert torch.equal(flat, ours[i])  # frequencies of 30: the same bits


def test_two_programs_at_once(sets: dict[str, Path], tmp_path: Path) -> None:
    """The second is refused, and takes nothing from the first, which has finished no piece yet."""
    planned = one(sets["meta"], "npz", tmp_path / "set")
    with ForeignWriter(planned) as first:
        with pytest.raises(InputError, match="Another process is writing"), ForeignWriter(planned):
            pass
        assert sum(first.write()) == 13
        first.finish()
    assert (tmp_path / "set" / "train.npz").is_file()


@pytest.mark.slow
def test_processes_write_what_one_does(sets: dict[str, Path], tmp_path: Path) -> None:
    for workers in (0, 2):
        with ForeignWriter(one(sets["meta"], "scalegmn", tmp_path / str(workers))) as writer:
            assert sum(writer.write(workers=workers)) == 13
            writer.finish()
    assert files(tmp_path / "0") == files(tmp_path / "2")


def test_room_is_stated_and_asked_for(
    sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = one(sets["digits"], "nfn", tmp_path / "tree")
    convert.convert([planned], 0)
    said = capsys.readouterr().out
    taken = sum(-(-path.stat().st_size // 4096) * 4096 for path in planned.out.glob("*/*.pth"))
    need = ForeignWriter(planned).need
    assert need.bytes == taken
    assert need.files == 12 + 16 >= len(files(planned.out))
    assert f"{taken / 1e3:.0f} kB needed in 28 files" in said
    assert "sin(30 (W h + b))" in said
    assert "no val split" in said
    free = shutil.disk_usage(tmp_path)._replace(free=taken - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(InputError, match=r"needs .* kB, but its disk has only"):
        convert.convert([one(sets["digits"], "nfn", tmp_path / "full")], 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tree"]
    monkeypatch.undo()
    real = os.statvfs(tmp_path)
    numbers = {name: getattr(real, name) for name in dir(real) if name.startswith("f_")}
    few = SimpleNamespace(**{**numbers, "f_files": 1000, "f_favail": 20})
    monkeypatch.setattr(os, "statvfs", lambda path: few)
    with pytest.raises(InputError, match="needs 28 files, but its disk takes only 20 more"):
        convert.convert([one(sets["digits"], "nfn", tmp_path / "full")], 0)


def test_splits_that_nobody_else_knows(tmp_path: Path) -> None:
    native = write_native(tmp_path / "native", PLAIN, counts={"train": 2, "holdout": 2})
    with pytest.raises(InputError, match="has the split 'holdout'"):
        plan(native, "dws", tmp_path / "x")
    of_three = write_native(tmp_path / "three", PLAIN, counts={"test": 2, "val": 3, "train": 4})
    planned = one(of_three, "dws", tmp_path / "x")
    assert planned.split_points == [4, 7]  # train, val, test, whatever the order of the set
    with pytest.raises(InputError, match="has one already"):
        plan(of_three, "dws", tmp_path / "x", val=1)
    alone = one(write_native(tmp_path / "alone", PLAIN, counts={"test": 2}), "nfn", tmp_path / "alone tree")
    convert.convert([alone])
    assert [label for *_, label in nfn_loader(alone.out, "test", [0, 0])] == [3, 4]


# ---- eval.export -------------------------------------------------------------------------------------------------


def test_export_in_one_go(sets: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "tree"
    options = ["--run", "builtin:digits", "data.limit=6", "run.device=cpu"]
    export.main([*options, "--out", str(out), "--format", "nfn"])
    convert.main(["--src", str(sets["digits"]), "--out", str(tmp_path / "again"), "--format", "nfn"])
    ours, theirs = files(out), files(tmp_path / "again")
    assert {name: content for name, content in ours.items() if name.endswith(".pth")} == {
        name: content for name, content in theirs.items() if name.endswith(".pth")
    }
    assert len(load_weight_set(tmp_path / "tree-native", "test")) == 6
    export.main(
        [*options, "--out", str(tmp_path / "more"), "--native", str(tmp_path / "tree-native"), "--format", "dws"]
    )
    with pytest.raises(InputError, match="--val is 6; it must be positive and less than the 6"):
        export.main([*options, "--out", str(tmp_path / "c"), "--format", "nfn", "--val", "6"])
    with pytest.raises(InputError, match="--val is for another --format"):
        export.main([*options, "--out", str(tmp_path / "c"), "--val", "2"])
    assert not list(tmp_path.glob("c*"))
    with pytest.raises(InputError, match="would find '_3s'"):
        export.main([*options, "--out", str(tmp_path / "a_3s"), "--format", "nfn"])
    assert not list(tmp_path.glob("a_3s*"))
    with pytest.raises(InputError, match="--native is for another --format"):
        export.main([*options, "--out", str(tmp_path / "b"), "--native", "c"])


def test_export_in_one_go_with_differences_and_a_val_split(sets: dict[str, Path], tmp_path: Path) -> None:
    """As two programs after one another: what is asked for is what the tree holds."""
    options = ["--values", "delta", "--val", "2", "--format", "dws"]
    run = ["--run", "builtin:digits", "data.limit=6", "run.device=cpu", "--native", str(sets["digits"])]
    export.main([*run, "--out", str(tmp_path / "one"), *options])
    convert.main(["--src", str(sets["digits"]), "--out", str(tmp_path / "two"), *options])
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert [len(paths["path"]) for paths in json.loads((tmp_path / "one" / "splits.json").read_text()).values()] == [
        4, 2, 6,
    ]  # fmt: skip
    about = json.loads((tmp_path / "one" / "converted.json").read_text())
    assert about["values"] == "delta"


def test_layouts_are_replaced_exactly() -> None:
    """Factors are applied once, in double precision: frequencies of 30 change no bit."""
    from data_pipes.foreign import from_foreign, to_foreign

    weights = Weights.unflatten(torch.randn(3, PLAIN.count), PLAIN)
    for convention in ("nfn", "dws"):
        there = to_foreign(weights, PLAIN, convention)
        assert torch.equal(from_foreign(there, convention).flat(), weights.flat())
    ten = replace(PLAIN, omegas=(10.0, 1.0))
    exact = weights.weights[0].double() * (10 / 30)
    assert torch.equal(to_foreign(weights, ten, "nfn").weights[0], exact.float())
