"""Memory of a training step: how much it will need, how much there is, how much a process has used. All in bytes."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mwt.config import ModelConfig, OptimConfig
from mwt.errors import InputError
from mwt.evaluation import autocast
from mwt.model import MetaWeightTransformer
from mwt.optim import make_optimizer
from mwt.stages import begin_stage
from mwt.structs import Batch
from mwt.training import Meter, train_step

OVERHEAD = {"cpu": 1.35, "cuda": 1.1}
RECOMPUTING = {"cpu": 3.0, "cuda": 1.1}
"""What a step takes of a device for each byte of its tensors: gaps between blocks, workspace of the kernels.

CPU: measured on x86 with glibc 2.36, 1.3 to 1.55 at 0.6 to 1.7 GB of tensors. Where all is recomputed it is more, 3 to
3.5 at 0.25 to 0.35 GB: that glibc does not find a freed aligned block again for one of the same size. CUDA: a margin,
not measured.
"""

REMEDIES = (
    "a smaller data.batch_size; inner_loop.checkpoint=true and reader.checkpoint=true; fewer points "
    "(inner_loop.fraction, inner_loop.points); run.precision=bf16"
)
"""What makes a step smaller."""


# ---- what a step will need ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes of one training step. The parts do not add up to the total: gradients come as activations go."""

    parameters: int
    gradients: int
    optimizer_state: int
    activations: int
    """What the forward pass leaves behind for the backward pass, and the batch itself."""
    tensors: int
    """All tensors together at the moment of the step when they are most, recomputation included."""
    total: int
    """The same with what allocators and kernels take beside the tensors: see OVERHEAD."""

    def describe(self, room: int | None) -> str:
        """What is needed beside what there is, in one line."""
        there = f", {readable(room)} available" if room is not None else ""
        return f"about {readable(self.total)} a step ({readable(self.activations)} for the backward pass){there}"

    def warning(self, room: int | None) -> str | None:
        """A sentence that says what to do where a step will probably not fit."""
        if room is None or self.total <= room:
            return None
        return f"A step needs about {readable(self.total)}, but {readable(room)} are left. What helps: {REMEDIES}."


class LiveTensors(TorchDispatchMode):
    """While it is entered, counts the bytes of all tensors made since, those that the backward pass keeps included.

    `live` is their present sum, `peak` the largest there was. Views count once, with the storage they share. Enter it
    first: an older tensor counts from when an operation gives it back, or a view of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let an operation happen and note the storages of its results."""
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, tuple | list) else (results,):
            if isinstance(result, Tensor):
                self._note(result.untyped_storage())
        return results

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key not in self._storages:
            self._storages[key] = weakref.ref(storage, partial(self._forget, key, size))
            self.live += size
            self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int, _: object) -> None:
        del self._storages[key]
        self.live -= size


def estimate(
    config: ModelConfig, example: Batch, *, batch_size: int, precision: str, device: torch.device, stage: str = "joint"
) -> MemoryEstimate | None:
    """Memory of a training step in one process, found without taking it, in about a second.

    None where that cannot be: where the step depends on the content of tensors.

    The step itself is run, forward and backward, on tensors that have a shape and no content, and every storage is
    followed from its making to its end. So the answer holds for any engine, reader, recomputation and precision, and
    there is no formula to keep up to date. A compiled step needs less: it never makes some of the tensors. Several
    processes need the gradients twice.

    Args:
        example: any batch of the signals to train on; only the shapes beyond its first dimension count.
        batch_size: signals a step and process.
        precision: fp32, bf16 or fp16.
        stage: of `mwt.stages`.
    """
    try:
        with FakeTensorMode(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # copies of modules do
            return follow_step(config, example, batch_size=batch_size, precision=precision, device=device, stage=stage)
    except InputError:
        raise
    except Exception:  # of any kind, from inside torch; what cannot be foretold may well be trained
        return None


def follow_step(
    config: ModelConfig, example: Batch, *, batch_size: int, precision: str, device: torch.device, stage: str = "joint"
) -> MemoryEstimate:
    """Run one step of a new model on zeros and say what it took; arguments as of `estimate`."""
    with LiveTensors() as tensors:
        with torch.device(device):
            model = MetaWeightTransformer(config)
        begin_stage(model, stage)
        parameters = tensors.live
        optimizer = make_optimizer(model, OptimConfig())
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.grad = torch.zeros_like(parameter)
        gradients = tensors.live - parameters
        optimizer.step()  # makes the optimizer's state, which all but the first step find
        lasting = tensors.live - gradients
        optimizer.zero_grad()
        shapes = {name: (field.shape[1:], field.dtype) for name, field in vars(example).items() if field is not None}
        zeros = {name: torch.zeros(batch_size, *s, dtype=dtype, device=device) for name, (s, dtype) in shapes.items()}
        activations = 0

        def backward(loss: Tensor) -> None:
            nonlocal activations
            activations = tensors.live - lasting
            loss.backward()

        train_step(
            model,
            Batch(**zeros),
            step=1,
            epoch=0,
            seed=0,
            inner_loop=config.inner_loop,
            optimizer=optimizer,
            clip_norm=1.0,
            autocast=autocast(device, precision),
            backward=backward,
            unscale=lambda: None,
            meter=Meter(device),
        )
    overhead = RECOMPUTING if config.inner_loop.checkpoint and config.reader.checkpoint else OVERHEAD
    return MemoryEstimate(
        parameters=parameters,
        gradients=gradients,
        optimizer_state=lasting - parameters,
        activations=activations,
        tensors=tensors.peak,
        total=round(tensors.peak * overhead.get(device.type, 1.0)),
    )


# ---- what there is, and what has been used -----------------------------------------------------------------------


def available(device: torch.device, *, processes: int = 1, root: Path = Path("/")) -> int | None:
    """Bytes that each of `processes` can still take on `device`; None where nobody says.

    CPU (Linux): what the kernel calls available, or what the process's control groups (containers, batch systems) leave
    if that is less; shared among the processes. CUDA, where each has a device: what is free there and in torch's pool.

    Args:
        root: where /proc and /sys are; tests make their own.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.type != "cpu":
        return None
    system = _named_number(root / "proc/meminfo", "MemAvailable:")
    if system is None:
        return None
    return min([1024 * system, *_left_in_control_groups(root)]) // processes


def _left_in_control_groups(root: Path) -> Iterator[int]:
    """What each memory limit above this process leaves, of control groups in version 1 or 2.

    A group counts files that are only cached as used; they give way, so they are taken out.
    """
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, limit, usage, cached = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mount, limit, usage = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = "total_inactive_file"
        else:
            continue
        group = (root / mount).joinpath(path.lstrip("/"))
        for folder in (group, *group.parents):
            most, used = _text(folder / limit).strip(), _text(folder / usage).strip()
            if most.isdigit() and used.isdigit():  # not where it says "max", or is a path outside of a container
                yield max(0, int(most) - int(used) + (_named_number(folder / "memory.stat", cached) or 0))


def _named_number(path: Path, name: str) -> int | None:
    """The number behind a name in a file of `NAME NUMBER ...` lines."""
    for line in _text(path).splitlines():
        words = line.split()
        if words[:1] == [name]:
            return int(words[1])
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # another system, or another version of control groups
        return ""


def peak(device: torch.device) -> int:
    """The most bytes this process has held: tensors on a CUDA device, else everything; 0 where nobody says.

    On CUDA the count is torch's own; reading it does not wait for the device.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def readable(count: int) -> str:
    """A number of bytes for people: 2.1 GB, 340 MB, 1.5 MB, 12 kB; of memory, of files and of disks."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            whole = unit == "MB" and count >= 10 * size
            return f"{count / size:,.{0 if whole else 1}f} {unit}"
    return f"{count / 1e3:.0f} kB"
