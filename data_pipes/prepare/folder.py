"""Any folder of images: SRC/{train,val,test}/CLASS/IMAGE, or SRC/CLASS/IMAGE."""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm import tqdm

from data_pipes.decode import open_image, seen_size
from data_pipes.parallel import ordered_map
from data_pipes.prepare.images import ImageFile, ImageMaker
from data_pipes.prepare.source import DEFAULT_TEST_FRACTION, Part, Request, Source, checksum, split_off, stored_order
from data_pipes.schema import IMAGE_SUFFIXES
from mwt.errors import InputError
from mwt.structs import SignalFacts

SPLITS = ("train", "val", "test")
LAYOUT = "SRC/{train,val,test}/CLASS/IMAGE or SRC/CLASS/IMAGE"
_GREY_MODES = ("1", "L", "LA", "La", "I")
_WORKERS = 4

_Images = list[tuple[Path, int]]  # file, class


def load(request: Request) -> Source:
    """The images of a folder, classes in alphabetical order, at any depth below their class folder.

    They are stored in a fixed random order.
    Without `size`, PNG, JPEG and WebP files keep their own bytes; everything else becomes PNG.

    Raises:
        InputError: no images, empty or differing class folders, a file that cannot be decoded (named), or a fraction
            for a split that the folder has already.
    """
    if request.src is None:
        raise InputError(f"folder needs --src SRC, the folder with the images ({LAYOUT}).")
    if request.size is None and (request.quality is not None or request.fit != "squash"):
        raise InputError("--fit and --quality are for images that are resized; give --size too.")
    classes, images, ignored = _read_tree(request.src)
    images = _make_splits(images, request)
    files = [path for part in images.values() for path, _ in part]
    scan = ordered_map(_look, files, workers=_WORKERS)
    looks = list(tqdm(scan, total=len(files), desc="looking", unit="image", disable=None))
    channels = request.channels or (1 if all(grey for grey, _ in looks) else 3)
    sizes = {request.size} if request.size is not None else {size for _, size in looks}
    height, width = sizes.pop() if len(sizes) == 1 else (None, None)
    facts = SignalFacts(kind="image", channels=channels, height=height, width=width, classes=classes)
    make = ImageMaker(channels, request.size, request.fit, request.quality or 100)
    splits = {
        split: Part(
            [
                ImageFile(str(path), str(path.relative_to(request.src)), label)
                for path, label in stored_order(part, split)
            ],
            make,
        )
        for split, part in images.items()
    }
    content = checksum((split, item.name, item.label) for split, part in splits.items() for item in part.items)
    notes = [f"{ignored} files that are no images were ignored."] if ignored else []
    if height is None:
        notes.append("The images differ in size. Training needs one size: prepare them with --size N (or HxW).")
    name = request.src.absolute().name or "folder"
    return Source(name=name, facts=facts, licence="not stated", splits=splits, content=content, notes=notes)


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _read_tree(src: Path) -> tuple[tuple[str, ...], dict[str, _Images], int]:
    """Class names, images by split ("" where there are no splits), and the number of files ignored."""
    if not src.is_dir():
        raise InputError(f"No folder at {src} (--src).")
    # a class may be called "train", so a split is a folder of that name with folders in it
    parts = {split: src / split for split in SPLITS if (src / split).is_dir() and _folders(src / split)}
    if parts and "train" not in parts:
        raise InputError(f"{src} has {' and '.join(parts)}, but no train with class folders; expected is {LAYOUT}.")
    others = [path.name for path in _folders(src) if path.name not in parts]
    if parts and others:
        raise InputError(f"{src} has, beside {', '.join(parts)}, the folders {', '.join(others)}; move them elsewhere.")
    parts = parts or {"": src}
    names = {split: [path.name for path in _folders(folder)] for split, folder in parts.items()}
    classes = next(iter(names.values()))
    for split, found in names.items():
        if found != classes:
            missing, more = sorted(set(classes) - set(found)), sorted(set(found) - set(classes))
            differ = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has {', '.join(more)} more"] * bool(more)
            raise InputError(f"Class folders of {src / split} differ from those of train: it {' and '.join(differ)}.")
    ignored = sum(path.is_file() for path in src.iterdir())
    images: dict[str, _Images] = {}
    for split, folder in parts.items():
        ignored += sum(path.is_file() for path in folder.iterdir()) if split else 0
        images[split] = []
        for label, name in enumerate(classes):
            files = sorted(path for path in (folder / name).rglob("*") if path.is_file())
            good = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")]
            ignored += len(files) - len(good)
            if not good:
                raise InputError(f"Class folder {folder / name} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}).")
            images[split] += [(path, label) for path in good]
    if not classes:
        raise InputError(f"{src} (--src) holds no class folders with images; expected is {LAYOUT}.")
    return tuple(classes), images, ignored


def _make_splits(images: dict[str, _Images], request: Request) -> dict[str, _Images]:
    wanted = {"test": request.test_fraction, "val": request.val_fraction}
    if "" in images:
        images = {"train": images[""]}
        wanted["test"] = wanted["test"] or DEFAULT_TEST_FRACTION
    for split, fraction in wanted.items():
        if fraction is None:
            continue
        if split in images:
            raise InputError(f"{request.src} has a {split} folder already; leave --{split}-fraction out.")
        train = images["train"]
        kept, taken = split_off(torch.tensor([label for _, label in train]), fraction, request.seed)
        if len(taken) == 0:
            raise InputError(f"Too few images in {request.src} for a {split} split: every class keeps one for train.")
        images = {**images, "train": [train[i] for i in kept.tolist()], split: [train[i] for i in taken.tolist()]}
    return {split: images[split] for split in SPLITS if split in images}


def _look(path: Path) -> tuple[bool, tuple[int, int]]:
    """Whether an image is grey, and its (height, width) as it is meant to be seen."""
    with open_image(path, str(path)) as image:
        height, width = seen_size(image, str(path))
        return image.mode in _GREY_MODES or image.mode.startswith("I;16"), (height, width)
