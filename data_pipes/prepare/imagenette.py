"""Imagenette: ten classes of ImageNet that are easy to tell apart, from its tree or its archive."""

from __future__ import annotations

import shutil
import tarfile
from dataclasses import replace
from pathlib import Path, PurePosixPath
from urllib.error import URLError

from data_pipes.prepare.download import cache_folder, download_failed
from data_pipes.prepare.images import ImageFile, ImageMaker
from data_pipes.prepare.source import Part, Request, Source, checksum, other_counts, stored_order
from data_pipes.schema import IMAGE_SUFFIXES
from mwt.errors import InputError
from mwt.structs import SignalFacts

LICENCE = "Apache-2.0 (Imagenette, fast.ai); the images are ImageNet's, for non-commercial research"
CLASSES = {
    "n01440764": "tench", "n02102040": "English springer", "n02979186": "cassette player", "n03000684": "chain saw",
    "n03028079": "church", "n03394916": "French horn", "n03417042": "garbage truck", "n03425413": "gas pump",
    "n03445777": "golf ball", "n03888257": "parachute",
}  # fmt: skip
COUNTS = {"train": 9469, "val": 3925}
SPLITS = tuple(COUNTS)
SIZE = (320, 320)
QUALITY = 95
_ARCHIVE = "imagenette2.tgz"
_TOO_SMALL = "imagenette2-160"
_MAX_BYTES = 4 * 2**30  # the archive unpacks to 1.6 GB


def load(request: Request) -> Source:
    """9,469 RGB images for training and 3,925 for validation, 320 x 320 squashed unless asked for otherwise.

    Raises:
        InputError: the files are not there and cannot be downloaded, or class folders are missing or unknown.
    """
    request.only("imagenette", "size", "fit", "quality")
    if request.src is None:
        cache = cache_folder("imagenette")
        from torchvision.datasets.utils import download_url

        url, md5 = _archives()["full"]
        try:
            if not _is_whole(_unpacked(md5)):
                download_url(url, str(cache), _ARCHIVE, md5)
        except (RuntimeError, URLError, OSError) as error:
            raise download_failed("imagenette", f"{_ARCHIVE} (or the folder imagenette2 from it)", error) from error
        folder = _unpack(cache / _ARCHIVE, _unpacked(md5))
    else:
        folder = _folder(request.src)
    source = trees_source("imagenette", folder, CLASSES, COUNTS, licence=LICENCE, request=request)
    if folder.name != "imagenette2-320":
        return source
    note = "Note: imagenette2-320 was resized before, to 320 pixels along the shorter side; imagenette2 was not."
    return replace(source, notes=[note, *source.notes])


def _folder(src: Path) -> Path:
    """The folder with train and val: `src`, one in it, or the archive unpacked into the cache."""
    for folder in (src.resolve(), src / "imagenette2", src / "imagenette2-320", src / _TOO_SMALL):
        if all((folder / split).is_dir() for split in SPLITS):
            _check_not_small(folder.name)
            return folder
    archive = src if src.is_file() else src / _ARCHIVE
    if not archive.is_file():
        raise InputError(f"{src} (--src) holds neither the folders train and val, nor imagenette2, nor {_ARCHIVE}.")
    md5 = {Path(url).name: md5 for url, md5 in _archives().values()}.get(archive.name)
    if md5 is None:
        names = ", ".join(sorted(Path(url).name for url, _ in _archives().values()))
        raise InputError(f"{archive} (--src) is not one of Imagenette's archives: {names}.")
    _check_not_small(archive.name.removesuffix(".tgz"))
    from torchvision.datasets.utils import check_integrity

    if not check_integrity(str(archive), md5):
        raise InputError(f"{archive} is damaged (its md5 sum is not that of Imagenette); get it again.")
    return _unpack(archive, _unpacked(md5))


def _archives() -> dict[str, tuple[str, str]]:
    """URL and md5 sum of each archive."""
    from torchvision import datasets  # seconds, which all programs that prepare other data would wait for

    archives: dict[str, tuple[str, str]] = datasets.Imagenette._ARCHIVES
    return archives


def _check_not_small(name: str) -> None:
    if name == _TOO_SMALL:
        raise InputError(f"{name} (--src) has images of 160 pixels, too small for what is made here; get {_ARCHIVE}.")


def _unpacked(md5: str) -> Path:
    return cache_folder("imagenette") / "unpacked" / md5


def _is_whole(target: Path) -> bool:
    """Whether unpacking into `target` was finished: a mark tells it from one that was interrupted."""
    return (target / "whole").is_file()


def _unpack(archive: Path, target: Path) -> Path:
    """Unpacks into `target`, once."""
    if not _is_whole(target):
        total = 0
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                total += member.size
                if total > _MAX_BYTES:
                    raise InputError(f"{archive} would unpack to more than {_MAX_BYTES} bytes; it is not Imagenette.")
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts:
                    raise InputError(f"{archive} holds {member.name!r}, outside of its folder; it is not Imagenette.")
                if (content := tar.extractfile(member) if member.isreg() else None) is not None:
                    (target / path).parent.mkdir(parents=True, exist_ok=True)
                    with open(target / path, "wb") as file:
                        shutil.copyfileobj(content, file)
        (target / "whole").touch()
    return target / archive.name.removesuffix(".tgz")


def trees_source(
    name: str, folder: Path, names: dict[str, str], counts: dict[str, int], *, licence: str, request: Request
) -> Source:
    """A source of the trees `folder`/{train,val}/WNID/*.JPEG; `names` gives the class of each WNID, in order.

    `counts` are those of the published data set; others are noted.

    Raises:
        InputError: class folders that `names` does not have, or the other way round, or empty ones.
    """
    splits = {}
    for split in SPLITS:
        found = {path.name: path for path in (folder / split).iterdir() if path.is_dir()}
        if set(found) != set(names):
            missing, more = sorted(set(names) - set(found)), sorted(set(found) - set(names))
            differ = [f"lacks {', '.join(missing[:5])}"] * bool(missing) + [f"has {', '.join(more[:5])}"] * bool(more)
            raise InputError(f"{folder / split} does not have the class folders of {name}: it {' and '.join(differ)}.")
        files = []
        for label, wnid in enumerate(names):
            paths = sorted(
                path for path in found[wnid].iterdir()
                if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")  # ._x.JPEG of macOS
            )  # fmt: skip
            if not paths:
                raise InputError(f"Class folder {found[wnid]} holds no image.")
            files += [ImageFile(str(path), f"{split}/{wnid}/{path.name}", label) for path in paths]
        splits[split] = files
    return images_source(name, splits, tuple(names.values()), counts, licence=licence, request=request)


def images_source(
    name: str,
    splits: dict[str, list[ImageFile]],
    classes: tuple[str, ...],
    counts: dict[str, int],
    *,
    licence: str,
    request: Request,
) -> Source:
    """A source of RGB images of one size, in a fixed random order, JPEG of quality 95 unless asked for otherwise."""
    height, width = request.size or SIZE
    make = ImageMaker(3, (height, width), request.fit, request.quality or QUALITY)
    parts = {split: Part(stored_order(files, split), make) for split, files in splits.items()}
    facts = SignalFacts(kind="image", channels=3, height=height, width=width, classes=classes)
    content = checksum((split, file.name, file.label) for split, files in splits.items() for file in files)
    notes = other_counts(name, parts, counts)
    return Source(name=name, facts=facts, licence=licence, splits=parts, content=content, notes=notes)
