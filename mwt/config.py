"""Configuration: frozen dataclasses, never written to afterwards. `mwt.config_files` fills them from YAML."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mwt.config_checks import require
from mwt.errors import NotDefinedError
from mwt.field_config import AdaptedFieldConfig
from mwt.structs import SignalFacts

VARIANTS: dict[str, dict[str, Any]] = {
    # Gielisse and van Gemert (CVPR 2025), section 4.1 and table 2; MWT-W is in their released code only.
    "MWT": {"siren.hidden": 128, "reader.mlp_ratio": 1.0, "loss.classification_weight": 0.01},
    "MWT-L": {"siren.hidden": 256, "reader.mlp_ratio": 1.0, "loss.classification_weight": 0.01},
    "WT": {"siren.hidden": 128, "reader.mlp_ratio": 1.0, "loss.classification_weight": 0.0},
    "MWT-W": {"siren.hidden": 128, "reader.mlp_ratio": 4.0, "loss.classification_weight": 0.01},
}


SAFE_SCHEMES = ("https", "http", "s3", "gs")
"""Schemes of URLs that data is read from unless `data.schemes` says otherwise: none of them runs anything."""

TRACKERS = ("tensorboard", "wandb", "trackio")
"""What `run.trackers` may name, beside the metrics.jsonl that is always written."""


def list_variants() -> list[str]:
    """Names of the published models that `variant=` selects."""
    return list(VARIANTS)


@dataclass(frozen=True, kw_only=True)
class SirenConfig:
    """The field: `hidden_layers` hidden layers after the input layer, all sine, then a linear head."""

    hidden: int = 128
    """H, the width; also the width of the Transformer."""
    hidden_layers: int = 4
    """L, hidden-to-hidden layers; the paper's 'depth'. There are L + 1 sine layers."""
    omega: float = 10.0
    """Frequency of the first layer: 10 for small images and shapes, 30 for 320 x 320."""
    out_scale: float = 0.1
    """Initial scale of the output, learned per channel."""

    def __post_init__(self) -> None:
        require(self.hidden >= 1, f"siren.hidden is {self.hidden}; it must be at least 1.")
        require(self.hidden_layers >= 1, f"siren.hidden_layers is {self.hidden_layers}; it must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class InnerLoopConfig:
    """Fitting: `steps` gradient steps from the learned base, with learned rates (Meta-SGD)."""

    steps: int = 6
    """S, the paper's k."""
    shared_alpha: bool = False
    """One vector of learned rates for all steps instead of one per step."""
    alpha_min: float = 0.1
    alpha_max: float = 1.0
    """Learned rates start uniform between alpha_min and alpha_max."""
    learn_alpha: bool = True
    """false: the rates stay as they start; with alpha_min equal to alpha_max, plain gradient descent."""
    fraction: float = 1.0
    """s, the share of points that each step sees: max(1, floor(s * N)) fresh ones per signal, without replacement."""
    points: int | None = None
    """The same as a count; takes precedence over `fraction`."""
    eval_fraction: float | None = None
    """s when evaluating and predicting; null: as in training, as the paper does. More points make a better fit."""
    engine: str = "analytic"
    """How it is computed, one of `mwt.engines.list_engines()`; all give the same. analytic is written for the paper's
    SIREN: a model of another field (field.name) has func in its place."""
    optimizer: Literal["sgd", "momentum", "adam"] = "sgd"
    """The inner optimizer; other than the paper's gradient descent only with `engine: higher`."""
    first_order: bool = False
    """Leave out the gradient through the inner gradients (first-order MAML): cheaper, another result."""
    checkpoint: bool = False
    """Compute each inner step again in the backward pass instead of keeping it: less memory, the same result."""

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"inner_loop.steps is {self.steps}; it must be at least 1.")
        require(self.alpha_min <= self.alpha_max, "inner_loop.alpha_min is larger than inner_loop.alpha_max.")
        require(0 < self.fraction <= 1, f"inner_loop.fraction is {self.fraction}; it must lie in (0, 1].")
        require(self.points is None or self.points >= 1, "inner_loop.points must be at least 1, or null.")
        require(
            self.eval_fraction is None or 0 < self.eval_fraction <= 1, "inner_loop.eval_fraction must lie in (0, 1]."
        )

    def for_evaluation(self) -> InnerLoopConfig:
        """The same with the points that evaluation uses."""
        return self if self.eval_fraction is None else replace(self, fraction=self.eval_fraction, points=None)


@dataclass(frozen=True, kw_only=True)
class ReaderConfig:
    """The weight-space classifier."""

    name: str = "transformer"
    """One of `mwt.readers.list_readers()`."""
    input: Literal["scale", "standardise", "standardise_layers", "raw"] = "scale"
    """What is done to the weights first. scale: times token_scale. standardise: each weight by its own mean and
    standard deviation over the training split. standardise_layers: all weights of a layer, and all its biases, by
    theirs. Statistics come with a set of fitted networks; end to end, where there are none, it is scale or raw."""
    token_scale: float = 500.0
    """lambda, the factor on (offsets + beta); 0 means layer norm over tokens and features together."""
    options: dict[str, Any] = field(default_factory=dict)
    """What is special to a reader, such as `reader.options.width=64`; see the Options of its file in mwt/readers."""
    blocks: int = 10
    """This and the next three: the Transformer's."""
    mlp_ratio: float = 1.0
    head_dim: int = 64
    layer_scale: float = 0.1
    checkpoint: bool = False
    """Compute each block again in the backward pass instead of keeping it: less memory, the same result."""

    def __post_init__(self) -> None:
        require(
            self.token_scale >= 0, f"reader.token_scale is {self.token_scale}; it must be 0 (layer norm) or positive."
        )
        for name in ("blocks", "head_dim"):
            require(getattr(self, name) >= 1, f"reader.{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("mlp_ratio", "layer_scale"):
            require(getattr(self, name) > 0, f"reader.{name} is {getattr(self, name)}; it must be positive.")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The outer loss."""

    classification_weight: float = 0.01
    """w_cls: how much of the classification gradient reaches the SIREN and the learned rates. 0 detaches (WT)."""

    def __post_init__(self) -> None:
        weight = self.classification_weight
        require(weight >= 0, f"loss.classification_weight is {weight}; it must be 0 (WT) or positive.")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the signals come from. Classes, channels and sizes come with the data."""

    path: str = "builtin:digits"
    """A folder made by `python -m data_pipes.prepare`, the URL of one, or builtin:NAME."""
    batch_size: int = 16
    """Signals per optimizer step, over all processes."""
    augment: Literal["none", "crop", "crop_flip", "affine_flip", "coords", "points"] = "none"
    """crop: reflect padding and random crop. crop_flip: and horizontal flip. affine_flip: the paper's augmentation
    for 320 x 320 (reflect pad, rotate, crop, rescale, flip). coords: rotate, scale and shift the coordinates, not the
    pixels. points: scale and jitter of point sets."""
    crop_padding: int = 4
    train_split: str = "train"
    test_split: str = "test"
    """What `eval.*` reads unless told otherwise."""
    monitor_split: str | None = None
    """Split to evaluate while training; by default `val` where the data has one. `best` is chosen on `val` alone, and
    not where `val` is the test split."""
    resident_mb: int = 4096
    """`auto` keeps a split up to this size (decoded, MiB) on the device."""
    reader: Literal["auto", "resident", "indexed", "stream"] = "auto"
    """resident: decoded once and kept on the device. indexed: random access to local shards. stream: shards read one
    after the other. auto: resident up to `resident_mb`; above, indexed for local shards and stream for remote ones."""
    workers: int = 2
    """Decoding threads."""
    on_bad_sample: Literal["raise", "skip"] = "raise"
    """Whether a damaged sample or shard ends the run, or is counted, logged and replaced (data_pipes.faults)."""
    max_bad: float = 0.01
    """The share of a split that may be skipped; above it the run ends. One sample always may."""
    schemes: tuple[str, ...] = SAFE_SCHEMES
    """Schemes of URLs that may be opened. `pipe` runs the command that the URL holds: name it only for data that you
    trust as much as a program."""
    limit: int | None = None
    """Use only the first so many samples of each split (for trying things)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "schemes", tuple(self.schemes))  # YAML brings a list
        require(0 <= self.max_bad <= 1, f"data.max_bad is {self.max_bad}; it must lie in [0, 1].")
        require(self.batch_size >= 1, f"data.batch_size is {self.batch_size}; it must be at least 1.")
        require(self.limit is None or self.limit >= 1, "data.limit must be at least 1, or null.")
        for name in ("crop_padding", "resident_mb", "workers"):
            require(getattr(self, name) >= 0, f"data.{name} is {getattr(self, name)}; it cannot be negative.")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with three groups, OneCycle, gradient clipping per group (released code; paper section 4)."""

    epochs: int = 10
    name: Literal["adamw", "muon"] = "adamw"
    """muon: matrices between hidden layers, of the SIREN and of the reader, go to Muon; the rest stays with AdamW."""
    lr_siren: float = 1e-4
    lr_alpha: float = 1e-2
    lr_reader: float = 1e-4
    muon_factor: float = 3.0
    """Muon's rates over lr_siren and lr_reader. At 1 its updates are as large as AdamW's; 3 did better on digits."""
    weight_decay: float = 1e-4
    clip_norm: float | None = 1.0
    """Largest gradient norm of each group; null switches clipping off."""
    schedule: Literal["onecycle", "cosine", "constant"] = "onecycle"
    """onecycle: up and down along cosines, the momentum against it. cosine: up a line, down a cosine to 0. constant: up
    a line, then level."""
    warmup: float = 0.05
    """The share of all steps in which the rates rise (OneCycle's pct_start)."""
    accumulate: int = 1
    """Micro batches that each process computes its share of a step in: less memory, the same result up to rounding."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights, such as 0.999; null: none. The average is what is
    evaluated, saved as the model and predicted with; the weights being trained are saved beside it."""

    def __post_init__(self) -> None:
        require(self.epochs >= 1, f"optim.epochs is {self.epochs}; it must be at least 1.")
        for name in ("lr_siren", "lr_alpha", "lr_reader", "muon_factor"):
            require(getattr(self, name) > 0, f"optim.{name} is {getattr(self, name)}; it must be positive.")
        require(self.weight_decay >= 0, f"optim.weight_decay is {self.weight_decay}; it cannot be negative.")
        require(self.clip_norm is None or self.clip_norm > 0, "optim.clip_norm must be positive, or null.")
        require(0 <= self.warmup < 1, f"optim.warmup is {self.warmup}; it must lie in [0, 1).")
        require(self.accumulate >= 1, f"optim.accumulate is {self.accumulate}; it must be at least 1.")
        require(self.ema is None or 0 < self.ema < 1, f"optim.ema is {self.ema}; it must lie in (0, 1), or be null.")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How and where the program runs."""

    dir: str = "runs/classify"
    seed: int = 0
    stage: Literal["joint", "reconstruction", "classifier"] = "joint"
    """What learns: all; SIREN and learned rates alone (the logged classification loss is then that of equal
    probabilities); or the reader alone, on the fits of the frozen SIREN of `init_from` (the paper's table 7)."""
    init_from: str | None = None
    """A run directory whose SIREN and learned rates this run begins with (its `last` checkpoint)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: Literal["auto", "always", "never"] = "auto"
    """torch.compile of the training step. auto: where a compiler is at hand and the run is long enough to pay."""
    threads: int | None = None
    """CPU threads; null leaves it to torch."""
    log_every: int = 50
    """Optimizer steps between two lines of metrics.jsonl; the device is read only then."""
    monitor_every: int = 1
    """Epochs between two evaluations of the monitored split."""
    monitor_limit: int | None = None
    """Evaluate only so many samples of it while training, random but the same each time; all after the last step."""
    on_nonfinite: Literal["raise", "skip"] = "raise"
    """A step whose loss or gradient is not finite leaves parameters and moments as they are and is written to
    RUN/nonfinite. raise: training then stops. skip: it goes on, up to max_skipped such steps. fp16: this is about
    losses; gradients that overflow are part of loss scaling."""
    max_skipped: int = 10
    """Steps of a whole run that on_nonfinite: skip may skip; one more stops it."""
    checkpoint_minutes: float = 5.0
    """A checkpoint is written at the end of every epoch and after so many minutes within one."""
    eval_batch_size: int = 256
    trackers: tuple[str, ...] = ()
    """Further trackers of accelerate, of TRACKERS. metrics.jsonl is always written."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "trackers", tuple(self.trackers))  # YAML brings a list
        unknown = set(self.trackers) - set(TRACKERS)
        require(not unknown, f"run.trackers: {', '.join(unknown)} not known; there are {', '.join(TRACKERS)}.")
        require(
            self.stage != "classifier" or self.init_from is not None,
            "run.stage=classifier trains a reader on the fits of a SIREN that is there: name its run directory with "
            "run.init_from (run.stage=reconstruction makes one).",
        )
        require(self.threads is None or self.threads >= 1, "run.threads must be at least 1, or null.")
        require(self.checkpoint_minutes > 0, "run.checkpoint_minutes must be positive.")
        require(self.monitor_limit is None or self.monitor_limit >= 1, "run.monitor_limit must be at least 1, or null.")
        for name in ("log_every", "monitor_every", "eval_batch_size", "max_skipped"):
            require(getattr(self, name) >= 1, f"run.{name} is {getattr(self, name)}; it must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig:
    """Everything that `train.classify` takes."""

    variant: str = "MWT"
    """One of VARIANTS."""
    siren: SirenConfig = field(default_factory=SirenConfig)
    inner_loop: InnerLoopConfig = field(default_factory=InnerLoopConfig)
    reader: ReaderConfig = field(default_factory=ReaderConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    field: AdaptedFieldConfig = field(default_factory=AdaptedFieldConfig)  # last: it takes the name of `field()`

    def __post_init__(self) -> None:
        if self.field.on_samples and self.data.augment == "coords":
            raise NotDefinedError(
                f"data.augment=coords moves the pixels, and field.name={self.field.name} is defined on the regular "
                "grid alone: choose data.augment=none, or one that changes the images (crop)."
            )


DEBUG = (
    "data.limit=16", "data.batch_size=8", "optim.epochs=1", "inner_loop.points=16", "inner_loop.steps=2",
    "reader.blocks=1", "siren.hidden_layers=1", "run.device=cpu", "run.precision=fp32", "run.compile=never",
    "run.log_every=1", "data.workers=0",
)  # fmt: skip
"""What `--debug` adds: a run of seconds on any data, that goes through everything."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What it takes to build a model again: stored as `config.json` beside its weights."""

    siren: SirenConfig
    inner_loop: InnerLoopConfig
    reader: ReaderConfig
    loss: LossConfig
    signal: SignalFacts
    field: AdaptedFieldConfig = AdaptedFieldConfig()  # noqa: RUF009  # frozen

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """The inverse of `dataclasses.asdict`, for what JSON brings."""
        blocks = {"siren": SirenConfig, "inner_loop": InnerLoopConfig, "reader": ReaderConfig, "loss": LossConfig}
        signal = SignalFacts(**{**values["signal"], "classes": tuple(values["signal"]["classes"])})
        chosen = dict(values.get("field", {}))  # models of earlier versions have the SIREN
        if "adapted" in chosen:
            chosen["adapted"] = tuple(chosen["adapted"])
        found = {name: block(**values[name]) for name, block in blocks.items()}
        return cls(signal=signal, field=AdaptedFieldConfig(**chosen), **found)


def model_config(config: ClassifyConfig, signal: SignalFacts) -> ModelConfig:
    """The part of a run's configuration that makes the model, with the facts of its data."""
    return ModelConfig(
        siren=config.siren,
        inner_loop=config.inner_loop,
        reader=config.reader,
        loss=config.loss,
        signal=signal,
        field=config.field,
    )
