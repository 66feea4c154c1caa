"""Imagenette and ImageNet-1K in the layouts of their originals, tiny: trees, archives, awkward images."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision import datasets, transforms
from torchvision.datasets import imagenet as torchvisions

from data_pipes.decode import image_to_tensor
from data_pipes.prepare import imagenet1k, imagenette
from data_pipes.prepare.__main__ import main
from data_pipes.prepare.images import ImageFile, ImageMaker, fit_to, tar_members
from data_pipes.read import open_split
from data_pipes.schema import read_info
from data_pipes.shards import iterate_shard
from mwt.errors import InputError
from mwt.structs import Batch


def run(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


def everything(folder: Path, split: str) -> Batch:
    opened = open_split(folder, split, device=torch.device("cpu"))
    return next(opened.batches(batch_size=len(opened)))


def smooth(seed: int, height: int = 40, width: int = 60) -> Image.Image:
    """A picture without sharp edges: what libraries resize differently is then small."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(seed: int, mode: str = "RGB", **options: object) -> bytes:
    stream = io.BytesIO()
    smooth(seed).convert(mode).save(stream, "JPEG", quality=95, **options)
    return stream.getvalue()


def place(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def imagenette_tree(root: Path) -> Path:
    """imagenette2/{train,val}/WNID/*.JPEG, three and one of a class."""
    for label, wnid in enumerate(imagenette.CLASSES):
        for split, count in (("train", 3), ("val", 1)):
            for index in range(count):
                place(
                    root / "imagenette2" / split / wnid / f"{wnid}_{index}.JPEG",
                    jpeg(1000 * (count == 1) + 10 * label + index),
                )
    return root


def test_imagenette(tmp_path: Path) -> None:
    src = imagenette_tree(tmp_path / "src")
    run("imagenette", "--src", src, "--out", tmp_path / "out")
    info = read_info(tmp_path / "out")
    assert (info.name, info.channels, info.height, info.width) == ("imagenette", 3, 320, 320)
    assert info.classes == tuple(names[0] for names in datasets.Imagenette._WNID_TO_CLASS.values())
    assert {split: part.count for split, part in info.splits.items()} == {"train": 30, "val": 10}
    samples = list(iterate_shard(tmp_path / "out" / "train-000000.tar"))
    stored = Image.open(io.BytesIO(samples[0]["jpg"]))
    assert (stored.format, stored.size) == ("JPEG", (320, 320))
    assert [layer[1:3] for layer in stored.layer] == [(1, 1)] * 3, "chroma is at full resolution"
    labels = everything(tmp_path / "out", "train").labels
    assert labels.bincount().tolist() == [3] * 10
    assert len(set(labels[:10].tolist())) > 4, "not sorted by class"
    run("imagenette", "--src", src / "imagenette2", "--out", tmp_path / "again")
    assert read_info(tmp_path / "again").splits == info.splits


def test_squash_and_crop_are_those_of_torchvision(tmp_path: Path) -> None:
    src = imagenette_tree(tmp_path / "src")
    image = Image.open(src / "imagenette2" / "val" / "n01440764" / "n01440764_0.JPEG")
    for fit, expected in (
        ("squash", transforms.Resize((30, 30))(image)),
        ("crop", transforms.CenterCrop(30)(transforms.Resize(30)(image))),
    ):
        out = tmp_path / fit
        run("imagenette", "--src", src, "--out", out, "--size", 30, "--fit", fit, "--quality", 100)
        batch = everything(out, "val")
        assert batch.images is not None
        found = batch.images[batch.labels == 0][0].permute(1, 2, 0).int().numpy()
        assert np.abs(found - np.array(expected, dtype=int)).max() <= 2
        assert "png" in next(iterate_shard(out / "val-000000.tar"))


@pytest.mark.parametrize(("height", "width"), [(40, 60), (60, 40), (33, 47), (20, 20)])
def test_crop_keeps_the_aspect_ratio(height: int, width: int) -> None:
    """Of a picture whose grey levels rise evenly, steps are equally wide both ways."""
    y, x = np.mgrid[:height, :width]
    ramp = torch.from_numpy(np.stack([y, x, 0 * x]).astype(np.uint8) * 4)
    out = fit_to(ramp, (24, 18), "crop").double()
    assert out.shape == (3, 24, 18)
    down = (out[0, -4, :] - out[0, 3, :]).mean() / 17
    across = (out[1, :, -4] - out[1, :, 3]).mean() / 11
    assert across / down == pytest.approx(1, abs=0.03)
    centre = [float(out[0].mean()) / 4, float(out[1].mean()) / 4]
    assert centre == pytest.approx([(height - 1) / 2, (width - 1) / 2], abs=1.2)


def awkward(kind: str) -> tuple[bytes, np.ndarray]:
    """An image as it occurs in ImageNet, and how PIL shows it."""
    picture = smooth(7)
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    if kind == "cmyk":
        picture.convert("CMYK").save(stream, "JPEG", quality=95)
        return stream.getvalue(), np.array(Image.open(stream).convert("RGB"))
    if kind == "png":
        picture.save(stream, "PNG")
        return stream.getvalue(), np.array(picture)
    if kind == "grey":
        picture.convert("L").save(stream, "JPEG", quality=95)
        return stream.getvalue(), np.array(Image.open(stream).convert("RGB"))
    picture.save(stream, "JPEG", quality=95, exif=exif if kind == "turned" else b"Exif\0\0" + b"garbage, no TIFF")
    shown = np.array(Image.open(io.BytesIO(stream.getvalue())))
    return stream.getvalue(), np.rot90(shown, -1) if kind == "turned" else shown


@pytest.mark.parametrize("kind", ["cmyk", "png", "grey", "turned", "broken exif"])
def test_awkward_images(tmp_path: Path, kind: str) -> None:
    """All are called .JPEG."""
    data, shown = awkward(kind)
    place(tmp_path / "x.JPEG", data)
    file = ImageFile(str(tmp_path / "x.JPEG"), "x.JPEG", 0)
    sample = ImageMaker(3, shown.shape[:2], "squash", 100)(file)
    pixels = image_to_tensor(Image.open(io.BytesIO(sample.data)), 3, "x")
    assert np.array_equal(pixels.permute(1, 2, 0), shown)


def test_imagenette_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    src = imagenette_tree(tmp_path / "src")
    archive = tmp_path / "packed" / "imagenette2.tgz"
    archive.parent.mkdir()
    subprocess.run(["tar", "czf", archive, "-C", src, "imagenette2"], check=True)
    run("imagenette", "--src", src, "--out", tmp_path / "tree", "--size", 20)
    with pytest.raises(InputError, match=r"imagenette2\.tgz is damaged \(its md5 sum is not that of Imagenette\)"):
        run("imagenette", "--src", archive.parent, "--out", tmp_path / "x")
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(datasets.Imagenette, "_ARCHIVES", {"full": ("https://x/imagenette2.tgz", md5)})
    for out, given in (("a", archive.parent), ("b", archive)):
        run("imagenette", "--src", given, "--out", tmp_path / out, "--size", 20)
        assert read_info(tmp_path / out).splits == read_info(tmp_path / "tree").splits
    assert [path.name for path in archive.parent.iterdir()] == ["imagenette2.tgz"], "the source is left as it is"


def test_imagenette_in_other_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = imagenette_tree(tmp_path / "src")
    (src / "imagenette2").rename(src / "imagenette2-320")
    hidden = src / "imagenette2-320" / "train" / "n01440764" / "._n01440764_0.JPEG"
    hidden.write_bytes(b"no image")  # as macOS leaves them
    for number, given in enumerate((src, src / "imagenette2-320")):
        run("imagenette", "--src", given, "--out", tmp_path / f"out{number}", "--size", 20)
        assert "Note: imagenette2-320 was resized before" in capsys.readouterr().out
        assert read_info(tmp_path / f"out{number}").splits["train"].count == 30
    (src / "imagenette2-320").rename(src / "imagenette2-160")
    (src / "imagenette2-160.tgz").touch()
    for given in (src, src / "imagenette2-160", src / "imagenette2-160.tgz"):
        with pytest.raises(InputError, match=r"^imagenette2-160 \(--src\) has images of 160 pixels, too small"):
            run("imagenette", "--src", given, "--out", tmp_path / "x")


def test_an_interrupted_download_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither half an archive nor half of its files is taken for the whole."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cache = tmp_path / "cache" / "meta-weight-transformer" / "imagenette"
    src = imagenette_tree(tmp_path / "src")
    archive = tmp_path / "imagenette2.tgz"
    subprocess.run(["tar", "czf", archive, "-C", src, "imagenette2"], check=True)
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}/{archive.name}"
    monkeypatch.setattr(datasets.Imagenette, "_ARCHIVES", {"full": (url, md5)})
    place(cache / "imagenette2.tgz", archive.read_bytes()[:1000])
    place(cache / "imagenette2" / "train" / "n01440764" / "x.JPEG", b"half")
    place(cache / "unpacked" / md5 / "imagenette2" / "train" / "n01440764" / "n01440764_0.JPEG", b"half")
    run("imagenette", "--out", tmp_path / "out", "--size", 20)
    server.shutdown()
    server.server_close()
    thread.join()
    run("imagenette", "--src", src, "--out", tmp_path / "expected", "--size", 20)
    assert read_info(tmp_path / "out").splits == read_info(tmp_path / "expected").splits
    (cache / "imagenette2.tgz").unlink()
    run("imagenette", "--out", tmp_path / "again", "--size", 20)  # unpacked once, nothing is fetched


def test_imagenette_that_is_not_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = imagenette_tree(tmp_path / "src")
    val = src / "imagenette2" / "val"

    def refused(message: str, *more: object, given: Path = src) -> None:
        with pytest.raises(InputError, match=message):
            run("imagenette", "--src", given, "--out", tmp_path / "out", *more)
        assert not (tmp_path / "out").exists()

    refused(r"holds neither the folders train and val, nor imagenette2, nor imagenette2\.tgz", given=tmp_path)
    refused(r"--val-fraction has no meaning for imagenette; leave it out", "--val-fraction", 0.1)
    refused(r"--quality is 101; it must lie between 1 and 100", "--quality", 101)
    bad = src / "imagenette2" / "train" / "n03028079" / "n03028079_1.JPEG"
    data = bad.read_bytes()
    bad.write_bytes(data[:-200])
    refused(r"train/n03028079/n03028079_1\.JPEG cannot be decoded: ")
    bad.write_bytes(b"no image")
    refused(r"train/n03028079/n03028079_1\.JPEG cannot be read as an image: unknown or damaged content", "--workers", 1)
    bad.write_bytes(data)
    (val / "n03888257").rename(val / "parachute")
    refused(r"imagenette2/val does not have the class folders of imagenette: it lacks n03888257 and has parachute\.")
    (val / "parachute").rename(val / "n03888257")
    next((val / "n03888257").iterdir()).unlink()
    refused(r"Class folder .*n03888257 holds no image")

    def fail(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("urllib.request.urlopen", fail)
    with pytest.raises(InputError, match=r"^imagenette could not be downloaded \(.*prepare imagenette --src FOLDER"):
        run("imagenette", "--out", tmp_path / "out")


WNIDS = ("n02000002", "n01000001", "n03000003")  # ILSVRC2012_ID 1, 2, 3: not in alphabetical order
WORDS = ("crane", "tench, Tinca tinca", "crane, lifting device")
TRUTH = (3, 1, 2, 2, 1)


def devkit_meta(path: Path) -> None:
    """meta.mat as it is distributed: synsets with the leaves first, then inner nodes."""
    kinds = [
        ("ILSVRC2012_ID", "f8"),
        ("WNID", "O"),
        ("words", "O"),
        ("gloss", "O"),
        ("num_children", "f8"),
        ("children", "O"),
    ]
    rows = [(i + 1, wnid, word, "x", 0, np.zeros(0)) for i, (wnid, word) in enumerate(zip(WNIDS, WORDS, strict=True))]
    rows.append((4, "n00000000", "entity", "x", 3, np.arange(3.0)))
    # torchvision takes the fields by their order
    order = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children"]
    assert [name for name, _ in kinds] == order
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"synsets": np.array(rows, dtype=kinds)[:, None]})


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def official(root: Path) -> Path:
    """The three files that ImageNet is distributed as, and beside them the same images as class trees."""
    kit = root / "tars" / imagenet1k.DEVKIT
    devkit_meta(kit / "data" / "meta.mat")
    (kit / "data" / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{number}\n" for number in TRUTH))
    with tarfile.open(root / "tars" / imagenet1k.TRAIN_TAR, "w") as outer:
        for number, wnid in enumerate(WNIDS):
            stream = io.BytesIO()
            with tarfile.open(fileobj=stream, mode="w") as inner:
                for index in (2, 0, 1):
                    data = jpeg(10 * number + index, "CMYK" if index == 2 else "RGB")
                    add(inner, f"{wnid}_{index}.JPEG", data)
                    place(root / "trees" / "train" / wnid / f"{wnid}_{index}.JPEG", data)
            add(outer, f"{wnid}.tar", stream.getvalue())
    with tarfile.open(root / "tars" / imagenet1k.VAL_TAR, "w") as tar:
        for index, number in enumerate(TRUTH):
            name, data = f"ILSVRC2012_val_{index + 1:08d}.JPEG", jpeg(100 + index)
            add(tar, name, data)
            place(root / "trees" / "val" / WNIDS[number - 1] / name, data)
    return root


def test_imagenet1k_from_tars_is_that_from_trees(tmp_path: Path) -> None:
    root = official(tmp_path)
    run("imagenet1k", "--src", root / "tars", "--out", tmp_path / "a", "--size", 24)
    run("imagenet1k", "--src", root / "trees", "--out", tmp_path / "b", "--size", 24)
    a, b = read_info(tmp_path / "a"), read_info(tmp_path / "b")
    assert a.splits == b.splits
    assert {split: part.count for split, part in a.splits.items()} == {"train": 9, "val": 5}
    assert a.classes == ("tench", "crane (n02000002)", "crane (n03000003)"), "names are unique"
    assert b.classes == tuple(sorted(WNIDS))
    kit = root / "tars" / imagenet1k.DEVKIT
    subprocess.run(["tar", "czf", f"{kit}.tar.gz", "-C", root / "tars", kit.name], check=True)
    for path in sorted(kit.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    run("imagenet1k", "--src", root / "tars", "--out", tmp_path / "c", "--size", 24, "--workers", 2)
    assert read_info(tmp_path / "c").splits == a.splits
    assert read_info(tmp_path / "c").classes == a.classes


def test_the_devkit_is_read_as_torchvision_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = official(tmp_path) / "tars"
    archive = src / f"{imagenet1k.DEVKIT}.tar.gz"
    subprocess.run(["tar", "czf", archive, "-C", src, imagenet1k.DEVKIT], check=True)
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setitem(torchvisions.ARCHIVE_META, "devkit", (archive.name, md5))
    torchvisions.parse_devkit_archive(str(src))
    wnid_to_classes, val_wnids = torchvisions.load_meta_file(str(src))
    truth, wnid_of, words = imagenet1k._read_devkit(src)
    assert [wnid_of[number] for number in truth] == val_wnids
    assert words == {wnid: names[0] for wnid, names in wnid_to_classes.items()}


def test_a_thousand_classes_have_torchvisions_names() -> None:
    wnids = [f"n{number:08d}" for number in range(1000)]
    names = imagenet1k.class_names(wnids, {})
    assert list(names) == wnids
    assert [names[wnids[i]] for i in (0, 1, 999)] == ["tench", "goldfish", "toilet tissue"]
    assert len(set(names.values())) == 1000


def test_imagenet1k_that_is_not_right(tmp_path: Path) -> None:
    src = official(tmp_path) / "tars"

    def refused(message: str, *more: object, given: Path = src) -> None:
        with pytest.raises(InputError, match=message):
            run("imagenet1k", "--src", given, "--out", tmp_path / "out", "--size", 8, *more)
        assert not (tmp_path / "out").exists()

    with pytest.raises(
        InputError, match=r"imagenet1k cannot be downloaded freely; give its folder as --src: train/WNID"
    ):
        run("imagenet1k", "--out", tmp_path / "out")
    refused(r"lacks ILSVRC2012_img_train\.tar and ILSVRC2012_img_val\.tar; expected is train/WNID", given=tmp_path)
    (tmp_path / "trees" / "train" / "dogs").mkdir()
    refused(r"train must hold class folders named by WordNet numbers", given=tmp_path / "trees")
    train = src / imagenet1k.TRAIN_TAR
    data = bytearray(train.read_bytes())
    [(_, offset, size), *_] = list(tar_members(train, next(iter(tar_members(train)))[1]))
    train.write_bytes(data[:offset] + b"\0" * size + data[offset + size :])
    refused(r"ILSVRC2012_img_train\.tar: n02000002\.tar/n02000002_2\.JPEG cannot be read as an image")
    train.write_bytes(data[: len(data) // 2])
    refused(r"ILSVRC2012_img_train\.tar cannot be read as a tar file: .*; get the whole file again")
    train.write_bytes(data)
    truth = src / imagenet1k.DEVKIT / "data" / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("3\n1\n2\n2\n")
    refused(r"img_val\.tar holds ILSVRC2012_val_00000005\.JPEG, for which ILSVRC2012_devkit_t12 has no class")
    truth.write_text("3\n1\n2\n2\n1\n1\n")
    refused(r"img_val\.tar holds 5 images, ILSVRC2012_devkit_t12 has the classes of 6")
    truth.write_text("3\n9\n")
    refused(r"does not hold one class number per line")
    (src / imagenet1k.DEVKIT / "data" / "meta.mat").write_bytes(b"x" * 200)
    refused(r"meta\.mat of ILSVRC2012_devkit_t12 in .* cannot be read: ")
    truth.unlink()
    refused(r"lacks ILSVRC2012_devkit_t12\.tar\.gz \(or its folder\), which says the classes of")


@pytest.mark.parametrize("name", ["../outside.JPEG", "/outside.JPEG", "imagenette2/../../outside.JPEG"])
def test_an_archive_that_leaves_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    archive = tmp_path / "imagenette2.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(InputError, match=r"outside of its folder; it is not Imagenette"):
        imagenette._unpack(archive, tmp_path / "made" / "here")
    assert not (tmp_path / "made" / "here" / "whole").exists()
    assert not list(tmp_path.rglob("outside.JPEG"))
