"""Configuration of `train.fit_set`: independent SIRENs, one for each image of a data set."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mwt.config import DataConfig
from mwt.config_checks import require


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How one network is fitted to one signal."""

    optimizer: Literal["adam", "muon"] = "adam"
    """muon: for the matrices between hidden layers (Jordan et al. 2024), Adam for the rest."""
    lr: float = 5e-4
    """Adam's rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    muon_lr: float | None = None
    """Null: 0.03 times the spectral norm that hidden matrices of SIREN begin with (`mwt.fit_many.muon_lr`)."""
    momentum: float = 0.95
    """Muon's, with Nesterov."""
    schedule: Literal["constant", "cosine"] | None = None
    """cosine: both rates fall from full to 0 over `steps`. Null: cosine with muon, which needs it; else constant."""
    steps: int = 1000
    target_psnr: float | None = None
    """dB over all points at which a network stops; null: all take `steps` steps."""
    check_every: int = 10
    """Steps between two comparisons with the target."""
    points: int | None = None
    """Random points that each step sees, other ones for each network and step; null: all."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))  # YAML brings a list
        if self.schedule is None:
            object.__setattr__(self, "schedule", "cosine" if self.optimizer == "muon" else "constant")
        for name in ("lr", "muon_lr", "eps"):
            value = getattr(self, name)
            require(value is None or value > 0, f"fit.{name} is {value}; it must be positive.")
        for name in ("steps", "check_every"):
            require(getattr(self, name) >= 1, f"fit.{name} is {getattr(self, name)}; it must be at least 1.")
        for value in (*self.betas, self.momentum):
            require(0 <= value < 1, f"fit.betas and fit.momentum must lie in [0, 1), not {value}.")
        require(self.points is None or self.points >= 1, "fit.points must be at least 1, or null.")


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The SIREN that is fitted to each image: sine layers sin(omega (W x + b)), then a linear one."""

    hidden: tuple[int, ...] = (32, 32)
    """Widths of the sine layers."""
    omega: float = 30.0
    """Frequency of every one of them."""
    init: Literal["random", "shared"] = "random"
    """random: each fit begins with weights of its own. shared: all begin with the same."""
    convention: Literal["nfn", "dws"] = "nfn"
    """nfn: the network says values in [-1, 1] at (y, x), begins as Sitzmann et al. (2020) do. dws: it says values in
    [0, 1] less 0.5 at (x, y), begins with zero biases and sqrt(6 / in) / omega in the first layer too (Navon et al.
    2023). What is stored says values in [-1, 1] at (y, x) in either case: two columns swapped, the output doubled."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        require(bool(self.hidden) and min(self.hidden) >= 1, f"network.hidden is {self.hidden}; it needs widths.")
        require(self.omega > 0, f"network.omega is {self.omega}; it must be positive.")


@dataclass(frozen=True, kw_only=True)
class FitSetRunConfig:
    """How and where the set is made."""

    out: str = "sets/fit_set"
    """New folder of the weight set."""
    splits: tuple[str, ...] = ()
    """Splits of the data; empty: all."""
    copies: int = 0
    """Further fits of each training image, to images changed as `data.augment` says and from other random weights."""
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: Literal["auto", "always", "never"] = "auto"
    """torch.compile of the steps. auto: where a compiler is at hand and there is enough to do to pay."""
    threads: int | None = None
    """CPU threads; null leaves it to torch."""
    slots: int | None = None
    """Networks in work at a time; null: as many as the cache holds, or as fill a GPU."""
    shard_networks: int = 1024
    """Networks in a shard, about: what a killed run loses at most. Other numbers are other sets."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "splits", tuple(self.splits))
        require(self.copies >= 0, f"run.copies is {self.copies}; it cannot be negative.")
        for name in ("threads", "slots", "shard_networks"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"run.{name} is {value}; it must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class FitSetConfig:
    """Everything that `train.fit_set` takes."""

    data: DataConfig = field(default_factory=DataConfig)
    """Of this only how images are read, and `augment` for the copies."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    run: FitSetRunConfig = field(default_factory=FitSetRunConfig)


DEBUG = (
    "data.limit=8", "fit.steps=20", "run.device=cpu", "run.compile=never", "run.shard_networks=8", "data.workers=0",
)  # fmt: skip
"""What `--debug` adds: seconds on any data, through everything."""
