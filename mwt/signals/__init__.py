"""The tasks of `train.fit`: what a signal is, what a fit sees of it, and how good the result is. One file each."""

from __future__ import annotations

from glob import glob, has_magic
from pathlib import Path

from mwt.errors import InputError
from mwt.signals.audio import AudioTask
from mwt.signals.dicom import PYDICOM, pydicom_file
from mwt.signals.image import ImageTask
from mwt.signals.poisson import PoissonTask
from mwt.signals.radiance import RadianceTask
from mwt.signals.restoration import DenoisingTask, InpaintingTask, SuperResolutionTask
from mwt.signals.shape import ShapeTask
from mwt.signals.task import Evaluation, Sampler, Task, make_tasks
from mwt.signals.tomography import TomographyTask
from mwt.signals.video import VideoTask

SKIMAGE = "skimage:"

TASKS: dict[str, type[Task]] = {
    "image": ImageTask,
    "super_resolution": SuperResolutionTask,
    "inpainting": InpaintingTask,
    "denoising": DenoisingTask,
    "poisson": PoissonTask,
    "video": VideoTask,
    "audio": AudioTask,
    "tomography": TomographyTask,
    "shape": ShapeTask,
    "radiance": RadianceTask,
}


def list_tasks() -> list[str]:
    """Names that `task` accepts."""
    return list(TASKS)


def signal_paths(text: str, task: type[Task]) -> list[Path]:
    """The files that `signal.path` names: a file, a folder (those of its files that the task takes) or a glob, sorted.

    `skimage:NAME` is one of the pictures that scikit-image brings, `pydicom:NAME` one of pydicom's DICOM files.

    Raises:
        InputError: there is nothing of the kind.
    """
    if text.startswith(SKIMAGE):
        return [skimage_picture(text.removeprefix(SKIMAGE))]
    if text.startswith(PYDICOM):
        return [pydicom_file(text.removeprefix(PYDICOM))]
    if "://" in text:
        raise InputError(
            f"signal.path is {text}; fetch it first: a signal is a file, a folder or a glob on this machine."
        )
    path = Path(text).expanduser()
    if path.is_dir() and not task.takes_folder:
        found = sorted(p for p in path.iterdir() if task.takes(p))
        if not found:
            below = next((p for p in sorted(path.glob("*/**/*")) if task.takes(p)), None)
            hint = f" Those of its folders are signal.path='{path}/**/*{below.suffix}'." if below else ""
            raise InputError(f"{path} holds no file that ends in {', '.join(task.endings)}.{hint}")
        return found
    if path.exists():
        return [path]
    found = sorted(Path(p) for p in glob(str(path), recursive=True) if Path(p).is_file())
    if not found:
        raise InputError(f"There is no file {'that matches ' if has_magic(text) else ''}{path}.")
    return found


def skimage_picture(name: str) -> Path:
    """The file of a picture that scikit-image brings, such as astronaut, camera, coffee or retina.

    Raises:
        InputError: scikit-image is not installed, or has no such picture at hand.
    """
    try:
        import skimage
    except ImportError as error:
        raise InputError("signal.path=skimage:NAME needs scikit-image: pip install scikit-image.") from error
    folder = Path(skimage.__file__).parent / "data"
    found = sorted(
        path for path in folder.iterdir() if path.suffix in (".png", ".jpg", ".jpeg", ".tif", ".npy", ".gif")
    )
    for path in found:
        if path.stem == name:
            return path
    raise InputError(f"scikit-image has no picture {name!r} at hand; there are {', '.join(p.stem for p in found)}.")


__all__ = ["TASKS", "Evaluation", "Sampler", "Task", "list_tasks", "make_tasks", "signal_paths"]
