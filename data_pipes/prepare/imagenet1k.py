"""ImageNet-1K (ILSVRC 2012), from class trees or from the official tar files, which are read in place."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_pipes.prepare.imagenette import SPLITS, images_source, trees_source
from data_pipes.prepare.images import ImageFile, tar_members
from data_pipes.prepare.source import Request, Source
from mwt.errors import InputError

LICENCE = "ImageNet terms of access: non-commercial research and education (Russakovsky et al. 2015)"
TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12"
COUNTS = {"train": 1_281_167, "val": 50_000}
_WNID = re.compile(r"n\d{8}")
_VAL_NAME = re.compile(r"(?:.*/)?ILSVRC2012_val_(\d{8})\.JPEG")
_TRUTH, _META = "data/ILSVRC2012_validation_ground_truth.txt", "data/meta.mat"
_MAX_BYTES = 2**26  # of a devkit file; the true ones are below 1 MB
LAYOUT = f"train/WNID and val/WNID with images, or {TRAIN_TAR}, {VAL_TAR} and {DEVKIT}.tar.gz"


def load(request: Request) -> Source:
    """1,281,167 RGB images for training and 50,000 for validation, 320 x 320 squashed unless asked for otherwise.

    Class folders in alphabetical order of their WordNet numbers are classes 0 … 999, as everywhere. Their names are
    torchvision's; for other sets of classes in this layout they come from the devkit, or are the WordNet numbers.

    Raises:
        InputError: no --src, files missing from it, or files that do not fit each other.
    """
    request.only("imagenet1k", "size", "fit", "quality")
    src = request.src
    if src is None:
        raise InputError(f"imagenet1k cannot be downloaded freely; give its folder as --src: {LAYOUT}.")
    if all((src / split).is_dir() for split in SPLITS):
        wnids = sorted(path.name for path in (src / "train").iterdir() if path.is_dir())
        if not wnids or not all(_WNID.fullmatch(wnid) for wnid in wnids):
            raise InputError(f"{src / 'train'} must hold class folders named by WordNet numbers (n01440764), only.")
        return trees_source("imagenet1k", src, class_names(wnids, {}), COUNTS, licence=LICENCE, request=request)
    missing = [name for name in (TRAIN_TAR, VAL_TAR) if not (src / name).is_file()]
    if missing:
        raise InputError(f"{src} (--src) lacks {' and '.join(missing)}; expected is {LAYOUT}.")
    return _from_tars(src, request)


def class_names(wnids: list[str], words: dict[str, str]) -> dict[str, str]:
    """WordNet number -> readable name, in the order of `wnids`; names are unique.

    Torchvision's list for all 1,000, else `words`, else the numbers themselves.
    """
    from torchvision.models import ResNet18_Weights  # seconds, as in imagenette.py

    categories = ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    if len(wnids) == len(categories):
        words = dict(zip(wnids, categories, strict=True))
    names = [words.get(wnid, wnid) for wnid in wnids]
    return {
        wnid: f"{name} ({wnid})" if names.count(name) > 1 else name for wnid, name in zip(wnids, names, strict=True)
    }


def _from_tars(src: Path, request: Request) -> Source:
    truth, wnid_of, words = _read_devkit(src)
    train_tar, val_tar = src / TRAIN_TAR, src / VAL_TAR
    train: dict[str, list[tuple[str, int, int]]] = {}
    for name, offset, _ in tqdm(tar_members(train_tar), desc="looking into the tar", unit="class", disable=None):
        wnid = Path(name).stem
        if not _WNID.fullmatch(wnid) or not name.endswith(".tar"):
            raise InputError(f"{train_tar} holds {name}, which is no tar file of a class (n01440764.tar).")
        train[wnid] = sorted(tar_members(train_tar, offset))
        if not train[wnid]:
            raise InputError(f"{train_tar}: {name} holds no image.")
    wnids = sorted(train)
    if set(wnids) != set(wnid_of.values()):
        raise InputError(f"{train_tar} has {len(wnids)} classes, which are not the {len(wnid_of)} of {DEVKIT}.")
    label = {wnid: index for index, wnid in enumerate(wnids)}
    files: dict[str, list[ImageFile]] = {"train": [], "val": []}
    for wnid in wnids:
        files["train"] += [
            ImageFile(str(train_tar), f"{wnid}.tar/{name}", label[wnid], offset, size)
            for name, offset, size in train[wnid]
        ]
    for name, offset, size in sorted(tar_members(val_tar)):
        match = _VAL_NAME.fullmatch(name)
        if match is None or not 1 <= int(match[1]) <= len(truth):
            raise InputError(f"{val_tar} holds {name}, for which {DEVKIT} has no class.")
        wnid = wnid_of[truth[int(match[1]) - 1]]
        files["val"].append(ImageFile(str(val_tar), name, label[wnid], offset, size))
    files["val"].sort(key=lambda file: (file.label, file.name))  # as class folders would give them
    if len(files["val"]) != len(truth):
        raise InputError(f"{val_tar} holds {len(files['val'])} images, {DEVKIT} has the classes of {len(truth)}.")
    names = class_names(wnids, words)
    return images_source("imagenet1k", files, tuple(names.values()), COUNTS, licence=LICENCE, request=request)


def _read_devkit(src: Path) -> tuple[list[int], dict[int, str], dict[str, str]]:
    """Class id of each validation image; id -> WordNet number; WordNet number -> its first name."""
    texts = {part: _devkit_file(src, part) for part in (_TRUTH, _META)}
    try:
        from scipy.io import loadmat

        # MATLAB's format 5 holds arrays; nothing in it is unpickled or run
        synsets: Any = loadmat(io.BytesIO(texts[_META]), squeeze_me=True)["synsets"]
        rows = [row for row in synsets if int(row["num_children"]) == 0]
        wnid_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows}
        words = {str(row["WNID"]): str(row["words"]).split(",")[0] for row in rows}
    except Exception as error:  # the reader raises many kinds
        raise InputError(f"{_META} of {DEVKIT} in {src} cannot be read: {error}.") from error
    lines = texts[_TRUTH].decode("ascii", errors="replace").split()
    if not lines or not all(line.isdecimal() and int(line) in wnid_of for line in lines):
        raise InputError(f"{_TRUTH} of {DEVKIT} in {src} does not hold one class number per line.")
    return [int(line) for line in lines], wnid_of, words


def _devkit_file(src: Path, part: str) -> bytes:
    path = src / DEVKIT / part
    if path.is_file():
        return path.read_bytes()
    archive = src / f"{DEVKIT}.tar.gz"
    if not archive.is_file():
        raise InputError(f"{src} (--src) lacks {DEVKIT}.tar.gz (or its folder), which says the classes of {VAL_TAR}.")
    try:
        with tarfile.open(archive, "r:gz") as tar:
            member = tar.getmember(f"{DEVKIT}/{part}")
            stream = tar.extractfile(member)
            if stream is None or member.size > _MAX_BYTES:
                raise InputError(f"{archive}: {part} is no file, or too large to be true.")
            return stream.read()
    except (OSError, tarfile.TarError, EOFError, KeyError) as error:
        raise InputError(f"{archive} cannot be read: {error}; get it again.") from error
