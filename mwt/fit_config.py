"""Configuration of `train.fit`: a task, its signal, a field, an optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field as made
from typing import Any, Literal

from mwt.config_checks import require
from mwt.fields.config import FieldConfig


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """How Muon makes its steps (`mwt.muon.Muon`), and which matrices it takes (`mwt.muon_groups`)."""

    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    """Newton-Schulz iterations."""
    ns_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Of their products; auto: bf16 on GPUs, fp32 elsewhere."""
    eps: float = 1e-7
    """The least norm that a gradient is divided by."""
    adjust: Literal["original", "match_rms_adamw", "spectral"] = "original"
    """The factor of a step, by the matrix's sizes."""
    first: bool = False
    """Take the first layer too; for encoded coordinates."""
    exclude: tuple[str, ...] = ()
    """Patterns of parameters, such as hidden.2.*, that are left to Adam."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "exclude", tuple(self.exclude))  # YAML brings a list
        require(0 <= self.momentum < 1, f"optim.muon.momentum is {self.momentum}; it must lie in [0, 1).")
        require(self.ns_steps >= 1, f"optim.muon.ns_steps is {self.ns_steps}; it must be at least 1.")
        require(self.eps > 0, f"optim.muon.eps is {self.eps}; it must be positive.")


@dataclass(frozen=True, kw_only=True)
class FitOptimConfig:
    """How a field is fitted. Rates fall, to zero or lr_min, over exactly the steps that are run."""

    name: Literal["adam", "muon", "lbfgs"] = "adam"
    """muon: the matrices between hidden layers by Muon, everything else by Adam. lbfgs: all points, one signal."""
    lr: float = 1e-3
    """Adam's rate; with muon that of everything but the hidden matrices. lbfgs has none: it searches from 1."""
    lr_muon: float | None = None
    """Muon's; null: a share of the median spectral norm of the hidden matrices at the start, 0.03, or 0.09 of plain
    ReLU networks, less before narrow activations (docs/muon.md)."""
    muon: MuonConfig = made(default_factory=MuonConfig)
    betas: tuple[float, float] = (0.9, 0.999)
    """Decays of Adam's moments; with muon those of everything but the hidden matrices."""
    eps: float = 1e-8
    """Adam's, added to the root of the second moment. Hash grids (Instant-NGP): 1e-15, and betas of 0.9 and 0.99."""
    steps: int = 1000
    points: int | None = None
    """Points that a step sees, each once before any comes again; null: all."""
    schedule: Literal["cosine", "exponential", "constant"] = "cosine"
    """Of adam and muon. exponential: by the same factor in each step, down to lr_min."""
    lr_min: float = 0.0
    """Where `lr` ends; a Muon rate beside it falls by the same factor. A constant rate knows no end."""
    weight_decay: float = 0.0
    total_variation: float = 0.0
    """field.name=grid: what the total variation of its values is multiplied by and added to the loss."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))  # YAML brings a list
        require(self.lr > 0, f"optim.lr is {self.lr}; it must be positive.")
        require(self.lr_muon is None or self.lr_muon > 0, "optim.lr_muon must be positive, or null.")
        require(self.steps >= 1, f"optim.steps is {self.steps}; it must be at least 1.")
        require(self.points is None or self.points >= 1, "optim.points must be at least 1, or null for all.")
        require(0 <= self.lr_min <= self.lr, f"optim.lr_min is {self.lr_min}; it must lie between 0 and optim.lr.")
        require(
            self.schedule != "exponential" or self.lr_min > 0,
            "optim.schedule=exponential never reaches zero: set optim.lr_min, such as a hundredth of optim.lr.",
        )
        require(all(0 <= beta < 1 for beta in self.betas), f"optim.betas are {self.betas}; they must lie in [0, 1).")
        require(self.eps > 0, f"optim.eps is {self.eps}; it must be positive.")
        require(self.weight_decay >= 0, f"optim.weight_decay is {self.weight_decay}; it cannot be negative.")
        require(self.total_variation >= 0, "optim.total_variation cannot be negative.")
        require(
            self.name == "muon" or (self.lr_muon is None and self.muon == MuonConfig()),
            f"optim.name is {self.name}, but optim.lr_muon or optim.muon is set: say optim.name=muon, or leave it out.",
        )
        require(
            self.lr_muon is not None or self.muon.adjust == "original",
            f"optim.muon.adjust={self.muon.adjust} makes steps of another size: give optim.lr_muon with it.",
        )
        require(
            self.name != "lbfgs" or (self.schedule, self.lr_min) == ("cosine", 0.0),
            "optim.name=lbfgs searches along lines and has no rates: leave out optim.schedule and optim.lr_min.",
        )
        require(self.name != "lbfgs" or self.weight_decay == 0, "optim.name=lbfgs knows no optim.weight_decay.")
        require(
            self.name != "lbfgs" or (self.betas, self.eps) == ((0.9, 0.999), 1e-8),
            "optim.name=lbfgs knows no moments: leave out optim.betas and optim.eps.",
        )
        require(
            self.name != "lbfgs" or self.points is None,
            "optim.name=lbfgs looks along a line and needs the same points in each step: optim.points=null.",
        )


@dataclass(frozen=True, kw_only=True)
class FitRunConfig:
    """How and where the program runs."""

    dir: str = "runs/fit"
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    evaluations: int = 24
    """How often the whole signal is evaluated, more often at first: the points of curves, the frames of the film."""
    checkpoint_minutes: float = 5.0
    baselines: bool = True
    """Compute what simple methods make of the task, such as bicubic interpolation; before the fit begins."""
    film: bool = True
    """Write progress.gif."""
    curves: bool = True
    """Write curves.png; metrics.jsonl has the same numbers."""
    ranks: bool = True
    """Follow the ranks of the hidden matrices at each evaluation (ranks.png; Muon's diagnostic)."""

    def __post_init__(self) -> None:
        require(self.evaluations >= 1, f"run.evaluations is {self.evaluations}; it must be at least 1.")
        require(self.threads is None or self.threads >= 1, "run.threads must be at least 1, or null.")
        require(self.checkpoint_minutes > 0, "run.checkpoint_minutes must be positive.")


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Everything that `train.fit` takes."""

    task: str = "image"
    """One of `mwt.signals.list_tasks()`."""
    signal: dict[str, Any] = made(default_factory=dict)
    """`path`, a file, a folder or a glob, and the task's own options (mwt/signals/TASK.py, Options)."""
    field: FieldConfig = made(default_factory=FieldConfig)
    optim: FitOptimConfig = made(default_factory=FitOptimConfig)
    run: FitRunConfig = made(default_factory=FitRunConfig)


FIT_DEBUG = ("optim.steps=4", "optim.points=256", "run.evaluations=2", "run.device=cpu", "field.mlp.width=16")
"""What `--debug` adds: seconds, through everything. The points only where a step can do with some of them."""
