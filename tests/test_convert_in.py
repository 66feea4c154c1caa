"""Trees of other code bases, written here as their files are, become weight sets that every reader takes."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data_pipes import convert, verify
from data_pipes.weights import load_weight_set
from mwt.errors import InputError
from mwt.observe import grid
from mwt.weight_space import render

SIZES = (2, 32, 32, 1)
LABELS = [3, 1, 4, 1, 5, 9, 2, 6]


class Siren(nn.Module):
    """Three layers [2, 32, 32, 1] called seq.0 … seq.2, every sine of frequency 30."""

    def __init__(self, seed: int, sizes: tuple[int, ...] = SIZES) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.seq = nn.Sequential(*[nn.Linear(a, b) for a, b in pairwise(sizes)])
        with torch.no_grad():
            for layer in list(self.seq)[1:-1]:
                layer.weight.mul_(0.1)

    def forward(self, coords: Tensor) -> Tensor:
        h = coords
        for layer in list(self.seq)[:-1]:
            h = torch.sin(30.0 * layer(h))
        return self.seq[-1](h)


def numbered_tree(root: Path) -> Path:
    """NFN: folders of labels, and a folder of augmented copies that must not get into the way."""
    for number, label in enumerate(LABELS):
        for prefix, seed in (("randinit_smaller", number), ("randinit_smaller_aug0", 100 + number)):
            folder = root / f"{prefix}_{label}s"
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(Siren(seed).state_dict(), folder / f"net{number}.pth")
    return root


def listed_tree(root: Path, *, prefix: str = "dataset/mnist-inrs") -> Path:
    """DWSNets: one folder for each network, and a list whose paths begin above the tree."""
    splits: dict[str, dict[str, list[Any]]] = {name: {"path": [], "label": []} for name in ("train", "val", "test")}
    for number, label in enumerate(LABELS):
        name = f"mnist_png_training_{label}_{number}/checkpoints/model_final.pth"
        path = root / name
        path.parent.mkdir(parents=True)
        torch.save(Siren(number).state_dict(), path)
        split = splits["train" if number < 5 else "val" if number < 6 else "test"]
        split["path"].append(f"{prefix}/{name}")
        split["label"].append(str(label))
    (root / "splits.json").write_text(json.dumps(splits))
    return root


def check_set(out: Path, convention: str, first: int = 0) -> None:
    verify.main([str(out)])
    place = first
    for split, count in (("train", 5), ("val", 1), ("test", 2)):
        networks = load_weight_set(out, split)
        assert len(networks) == count
        assert networks.layout.sizes == SIZES
        assert networks.layout.omegas == (30.0, 30.0)
        assert not networks.layout.shared_output
        batch = networks.batch(range(count))
        assert batch.labels.tolist() == LABELS[place - first : place - first + count]
        assert bool(batch.psnr.isnan().all())
        for i in range(count):
            yx = grid(5, 7)
            with torch.no_grad():
                theirs = Siren(place)(yx) if convention == "nfn" else 2 * (Siren(place)(yx.flip(-1)) + 0.5) - 1
            ours = render(networks.layout, networks.batch([i]).weights, yx)[0]
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
            place += 1


def test_numbered_files_in_folders_of_labels(tmp_path: Path) -> None:
    tree = numbered_tree(tmp_path / "tree")
    points = ["--split-points", "5", "6"]
    convert.main(["--from", "nfn", "--src", str(tree), "--out", str(tmp_path / "set"), *points])
    check_set(tmp_path / "set", "nfn")
    assert load_weight_set(tmp_path / "set").classes == tuple("0123456789")
    aug = ["--prefix", "randinit_smaller_aug0"]
    convert.main(["--from", "nfn", "--src", str(tree), "--out", str(tmp_path / "aug"), *points, *aug])
    check_set(tmp_path / "aug", "nfn", first=100)


def test_a_list_of_paths_from_elsewhere(tmp_path: Path) -> None:
    tree = listed_tree(tmp_path / "tree")
    names = ["--classes", "zero,one,two,three,four,five,six,seven,eight,nine"]
    convert.main(["--from", "dws", "--src", str(tree), "--out", str(tmp_path / "set"), *names])
    check_set(tmp_path / "set", "dws")
    networks = load_weight_set(tmp_path / "set", "val")
    assert networks.classes[9] == "nine"
    assert networks.keys() == ["dataset/mnist-inrs/mnist_png_training_9_5/checkpoints/model_final.pth"]
    assert networks.manifest.psnr == {"train": None, "val": None, "test": None}
    json.loads((tmp_path / "set" / "manifest.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    convert.main(["--from", "dws", "--src", str(tree), "--out", str(tmp_path / "set"), *names])  # complete already


@pytest.mark.parametrize("name", ["nfn", "dws", "neural-graphs", "scalegmn", "scalegmn-fmnist"])
def test_there_and_back(tmp_path: Path, name: str) -> None:
    """Foreign, native, foreign: the same bits; and native, foreign, native."""
    tree = numbered_tree(tmp_path / "tree")
    origin = "nfn" if name == "nfn" else "dws"
    convert.main(["--from", origin, "--src", str(tree), "--out", str(tmp_path / "one"), "--split-points", "5", "6"])
    convert.main(["--src", str(tmp_path / "one"), "--out", str(tmp_path / "back"), "--format", name])
    for number, label in enumerate(LABELS):
        path = f"randinit_smaller_{label}s/net{number}.pth"
        before, after = torch.load(tree / path), torch.load(tmp_path / "back" / path)
        assert all(torch.equal(before[key], after[key]) for key in before)
    convert.main(["--from", origin, "--src", str(tmp_path / "back"), "--out", str(tmp_path / "two")])
    for split in ("train", "val", "test"):
        one, two = (load_weight_set(tmp_path / which, split) for which in ("one", "two"))
        assert torch.equal(one.batch(range(len(one))).weights.flat(), two.batch(range(len(one))).weights.flat())
        assert torch.equal(one.column("label"), two.column("label"))


def test_another_frequency_and_half_precision(tmp_path: Path) -> None:
    tree = numbered_tree(tmp_path / "tree")
    options = ["--split-points", "8", "8", "--omega", "15", "--dtype", "fp16"]
    convert.main(["--from", "nfn", "--src", str(tree), "--out", str(tmp_path / "set"), *options])
    networks = load_weight_set(tmp_path / "set")
    assert networks.layout.omegas == (15.0, 15.0)
    assert list(networks.manifest.splits) == ["train"]
    assert torch.equal(networks[2][0].weights[1], Siren(2).seq[1].weight.half().float())


# ---- what is wrong -----------------------------------------------------------------------------------------------


class Runs:
    """Pickled, this would be a call."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return Path.touch, (Path("touched"),)  # type: ignore[return-value]


def legacy_pickle(path: Path) -> None:
    with open(path, "wb") as file:
        pickle.dump({"seq.0.weight": Runs()}, file)


def changed(change: Callable[[OrderedDict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        state = torch.load(path)
        change(state)
        torch.save(state, path)

    return apply


def rename_bias(state: OrderedDict[str, Any]) -> None:
    state["seq.0.offset"] = state.pop("seq.0.bias")


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (Path.unlink, "missing"),
    "empty": (lambda p: p.write_bytes(b""), "cannot be read as a file of tensors"),
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:700]), "cannot be read as a file of tensors"),
    "code": (lambda p: torch.save({"seq.0.weight": Runs()}, p), "cannot be read as a file of tensors"),
    "code in an old file": (legacy_pickle, "cannot be read as a file of tensors"),
    "a whole model": (lambda p: torch.save(Siren(0), p), "cannot be read as a file of tensors"),
    "a tensor": (lambda p: torch.save(torch.zeros(3), p), "holds a Tensor, not weights and biases by name"),
    "an image": (lambda p: p.write_bytes(b"\x89PNG\r\n"), "cannot be read as a file of tensors"),
    "other archive": (lambda p: zipfile.ZipFile(p, "w").close(), "cannot be read as a file of tensors"),
    "wider": (lambda p: torch.save(Siren(0, (2, 33, 33, 1)).state_dict(), p), r"\[2, 33, 33, 1\] neurons, the first"),
    "deeper": (lambda p: torch.save(Siren(0, (2, 32, 32, 32, 1)).state_dict(), p), "neurons, the first network has"),
    "nothing": (lambda p: torch.save({}, p), "it holds nothing"),
    "another name": (changed(rename_bias), "is no plain network .* seq.0.offset"),
    "no bias": (changed(lambda s: s.pop("seq.1.bias")), "is no plain network"),
    "a number": (changed(lambda s: s.__setitem__("epoch", 3)), "holds epoch, which is no tensor"),
    "nan": (changed(lambda s: s["seq.1.bias"].fill_(torch.nan)), "seq.1.bias holds numbers that are not finite"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_file_is_named(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    damage, sentence = FAULTS[name]
    tree = listed_tree(tmp_path / "tree")
    path = next(tree.glob("*_1_3/checkpoints/*.pth"))
    damage(path)
    with pytest.raises(InputError, match=f"(?s)_1_3/checkpoints/model_final.pth.*{sentence}"):
        convert.main(["--from", "dws", "--src", str(tree), "--out", str(tmp_path / "set")])
    assert not (tmp_path / "set").exists()
    assert not (tmp_path / "touched").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tree"]


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"train": {"path": ["a"]}}', '{"train": {"path": ["a"], "label": []}}']
)
def test_a_wrong_list(tmp_path: Path, content: str) -> None:
    (tmp_path / "splits.json").write_text(content)
    with pytest.raises(InputError, match="is no list of splits"):
        convert.main(["--from", "dws", "--src", str(tmp_path), "--out", str(tmp_path / "set")])


def test_wrong_trees(tmp_path: Path) -> None:
    tree = numbered_tree(tmp_path / "tree")

    def refused(sentence: str, *options: str, src: Path = tree) -> None:
        with pytest.raises(InputError, match=sentence):
            convert.main(["--from", "nfn", "--src", str(src), "--out", str(tmp_path / "set"), *options])

    refused("There is no folder", src=tmp_path / "nowhere")
    refused("--split-points 45000 50000 in NFN's")
    refused("must rise, and .* has 8 networks", "--split-points", "6", "5")
    refused("must rise, and .* has 8 networks", "--split-points", "6", "9")
    refused("has no files other_LABELs", "--split-points", "5", "6", "--prefix", "other")
    refused("net0.pth has the label 3, and there are 2", "--split-points", "5", "6", "--classes", "a,b")
    refused("--omega is 0", "--split-points", "5", "6", "--omega", "0")
    (tree / "randinit_smaller_4s" / "net2.pth").rename(tree / "randinit_smaller_4s" / "net3.pth")
    refused("net3.pth and .*net3.pth have the same number", "--split-points", "5", "6")
    (tree / "randinit_smaller_4s" / "net3.pth").unlink()
    refused(r"net2\.pth is missing, though there are 7", "--split-points", "5", "6")
    with pytest.raises(InputError, match="Name what is to be converted"):
        convert.main(["--from", "nfn", "--src", str(tree)])


def test_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = numbered_tree(tmp_path / "tree")
    options = ["--from", "nfn", "--src", str(tree), "--out", str(tmp_path / "set"), "--split-points", "5", "6"]
    last = next(tree.glob("randinit_smaller_6s/net7.pth"))
    content = last.read_bytes()
    last.write_bytes(bytes(len(content)))
    with pytest.raises(InputError, match=r"net7\.pth cannot be read"):
        convert.main(options)
    last.write_bytes(content)
    read = []
    monkeypatch.setattr("data_pipes.foreign_read.read_network", _counting(read))
    convert.main(options)
    assert read == ["net0.pth", "net6.pth", "net7.pth"]  # the first says the layout; train and val are there already
    check_set(tmp_path / "set", "nfn")


def _counting(read: list[str]) -> Callable[..., Any]:
    from data_pipes.foreign_read import read_network as plain

    def counted(item: Any, layout: Any) -> Any:
        read.append(item.path.name)
        return plain(item, layout)

    return counted
