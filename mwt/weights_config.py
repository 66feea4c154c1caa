"""Configuration of `train.weights`: a reader that learns from a set of fitted networks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mwt.config import ReaderConfig
from mwt.config_checks import require


@dataclass(frozen=True, kw_only=True)
class WeightsDataConfig:
    """Which networks, and how they are read. Layout, classes and statistics come with the set."""

    path: str = "runs/quickstart/weights"
    """A set of fitted networks, as `eval.export` and `train.fit_set` make them."""
    values: Literal["phi", "delta"] | None = None
    """phi: whole networks. delta: what differs from the base that they began with. null: as the set holds them."""
    train_split: str = "train"
    test_split: str = "test"
    val_split: str | None = None
    """Where `best` is chosen; by default `val` where the set has it and is not tested on it."""
    holdout: float = 0.0
    """The share of the training split's signals that is held out instead, where there is no such split."""
    batch_size: int = 64
    limit: int | None = None
    """Use only the first so many networks of each split (for trying things)."""
    copies: int | None = None
    """Of sets with augmented copies of each training signal: so many of them are used to train; null: all, 0: none."""
    images: str | None = None
    """For readers of images: the data set that the networks were fitted to; null: the one that the set names."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"data.batch_size is {self.batch_size}; it must be at least 1.")
        require(0 <= self.holdout < 1, f"data.holdout is {self.holdout}; it must lie in [0, 1).")
        require(self.limit is None or self.limit >= 1, "data.limit must be at least 1, or null.")
        require(self.copies is None or self.copies >= 0, "data.copies cannot be negative; null uses all.")


@dataclass(frozen=True, kw_only=True)
class WeightsOptimConfig:
    """AdamW; first, for readers that have such a phase, on the fields alone, then on the labels."""

    epochs: int = 100
    lr: float = 1e-3
    weight_decay: float = 5e-4
    amsgrad: bool = False
    """Divide by the largest second moment so far (Reddi et al. 2018), as DWSNets and neural-graphs were trained."""
    schedule: Literal["onecycle", "cosine", "constant"] = "cosine"
    """As of train.classify; over each phase by itself."""
    warmup: float = 0.05
    clip_norm: float | None = 10.0
    """Largest norm of the gradient; null switches clipping off."""
    label_smoothing: float = 0.0
    pretrain_epochs: int = 0
    """Of the first phase; its encoder is then frozen. 0: there is none, and all is learned from the labels."""
    pretrain_lr: float | None = None
    """null: as `lr`."""
    pretrain_points: int = 1024
    """Coordinates at which fields are compared in a step: all pixels where there are no more, else random ones."""

    def __post_init__(self) -> None:
        require(self.epochs >= 1, f"optim.epochs is {self.epochs}; it must be at least 1.")
        require(self.lr > 0, f"optim.lr is {self.lr}; it must be positive.")
        require(self.pretrain_lr is None or self.pretrain_lr > 0, "optim.pretrain_lr must be positive, or null.")
        require(self.weight_decay >= 0, f"optim.weight_decay is {self.weight_decay}; it cannot be negative.")
        require(0 <= self.warmup < 1, f"optim.warmup is {self.warmup}; it must lie in [0, 1).")
        require(self.clip_norm is None or self.clip_norm > 0, "optim.clip_norm must be positive, or null.")
        require(0 <= self.label_smoothing < 1, "optim.label_smoothing must lie in [0, 1).")
        require(self.pretrain_epochs >= 0, "optim.pretrain_epochs cannot be negative.")
        require(self.pretrain_points >= 1, "optim.pretrain_points must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class WeightsAugmentConfig:
    """What training does to the networks first (`mwt.symmetry`): everything is off unless set.

    The field is moved, turned and scaled through its first layer, exactly. Where offsets are read, that happens to the
    whole networks, and noise and dropout to the offsets.
    """

    translation: float = 0.0
    """Each coordinate of the shift is uniform in +- this."""
    rotation: float = 0.0
    """Degrees, uniform in +- this; fields of two coordinates only."""
    scaling: float = 0.0
    """A factor uniform in 1 +- this."""
    noise: float = 0.0
    """Standard deviation of noise, in standard deviations of each network's tensor."""
    dropout: float = 0.0
    """Probability of a weight of being set to 0."""
    permute: bool = False
    """Random orders of the hidden neurons, which change no field. Not for offsets: the base stays as it is."""

    def __post_init__(self) -> None:
        for name in ("translation", "rotation", "scaling", "noise"):
            require(getattr(self, name) >= 0, f"augment.{name} is {getattr(self, name)}; it cannot be negative.")
        require(0 <= self.dropout < 1, f"augment.dropout is {self.dropout}; it must lie in [0, 1).")

    @property
    def any(self) -> bool:
        """Whether anything is on."""
        return self != WeightsAugmentConfig()


@dataclass(frozen=True, kw_only=True)
class WeightsRunConfig:
    """How and where the program runs: one process."""

    dir: str = "runs/weights"
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: int | None = None
    """CPU threads; null leaves it to torch."""
    log_every: int = 50
    """Optimizer steps between two lines of metrics.jsonl; the device is read only then."""
    monitor_every: int = 1
    """Epochs between two evaluations of the validation split."""
    checkpoint_minutes: float = 5.0
    """Besides the best and the last step, a checkpoint is written so often."""
    eval_batch_size: int = 256

    def __post_init__(self) -> None:
        require(self.threads is None or self.threads >= 1, "run.threads must be at least 1, or null.")
        require(self.checkpoint_minutes > 0, "run.checkpoint_minutes must be positive.")
        for name in ("log_every", "monitor_every", "eval_batch_size"):
            require(getattr(self, name) >= 1, f"run.{name} is {getattr(self, name)}; it must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """Everything that `train.weights` takes."""

    reader: ReaderConfig = field(default_factory=ReaderConfig)
    data: WeightsDataConfig = field(default_factory=WeightsDataConfig)
    augment: WeightsAugmentConfig = field(default_factory=WeightsAugmentConfig)
    optim: WeightsOptimConfig = field(default_factory=WeightsOptimConfig)
    run: WeightsRunConfig = field(default_factory=WeightsRunConfig)

    def __post_init__(self) -> None:
        require(
            self.data.val_split is None or self.data.holdout == 0,
            "data.val_split and data.holdout both name networks to choose `best` on; set one of them.",
        )


DEBUG = (
    "data.limit=16", "data.batch_size=8", "optim.epochs=1", "run.device=cpu", "run.precision=fp32", "run.log_every=1",
)  # fmt: skip
"""What `--debug` adds: a run of seconds on any set, that goes through everything."""
