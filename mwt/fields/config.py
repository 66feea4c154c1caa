"""Settings of fields. `FieldConfig.name` chooses the architecture, and the block of the same name describes it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from mwt.config_checks import require
from mwt.errors import InputError
from mwt.fields.config_asmr import ASMRConfig
from mwt.fields.config_harmonized import HarmonizedConfig
from mwt.fields.config_kan import KANConfig
from mwt.fields.config_tiled import ExpertsConfig, TiledConfig

T = TypeVar("T")


def choose(table: Mapping[str, T], name: str, key: str) -> T:
    """The entry `name` of a registry.

    Raises:
        InputError: there is none; names `key`, the nearest entry and all there are.
    """
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? There are" if near else "there are"
        raise InputError(f"{key} is {name!r}, which is not known; {hint} {', '.join(table)}.")
    return table[name]


@dataclass(frozen=True, kw_only=True)
class ActivationConfig:
    """The nonlinearity between layers. What is null has the default of `mwt.fields.activations`, where the table is."""

    name: str = "sine"
    """One of `mwt.fields.list_activations()`."""
    omega: float | None = None
    """Frequency of sine, finer, spder, hosc, incode, wire and wire_real."""
    first_omega: float | None = None
    """Frequency of the first layer; null: omega."""
    scale: float | None = None
    """Sharpness s of gaussian, wire and wire_real."""
    a: float | None = None
    """Width or frequency of super_gaussian, laplacian, quadratic, multi_quadratic and expsin."""
    b: float | None = None
    """Exponent of super_gaussian."""
    beta: float | None = None
    """Sharpness of softplus and hosc."""
    detach_scale: bool = True
    """finer: keep the factor |z| + 1 out of the gradient, as released. Derivatives with respect to coordinates are then
    not those of the function: tasks that need them ask for false."""
    trainable: bool = False
    """Let the settings above be learned, separately in each layer (always so in prelu and incode)."""


@dataclass(frozen=True, kw_only=True)
class EncodingConfig:
    """What is done to coordinates before the first layer; see `mwt.fields.encoding`."""

    name: str = "identity"
    """One of `mwt.fields.list_encodings()`."""
    frequencies: int | None = None
    """nerf: L; null: 4 in one and two dimensions, 10 in three. fourier: m, null: 128. fourier_kan: K, null: 270."""
    samples: int | None = None
    """nerf: choose L from the number of samples along the shortest axis (Nyquist) instead."""
    sigma: float | None = None
    """fourier: standard deviation of the random frequencies, in periods per unit of coordinate; null: 10."""
    outputs: int | None = None
    """fourier_kan: number of features; null: 128."""

    def __post_init__(self) -> None:
        require(
            self.frequencies is None or self.samples is None, "encoding: give frequencies or samples, and not both."
        )
        require(self.frequencies is None or self.frequencies >= 1, "encoding.frequencies must be at least 1, or null.")
        require(self.samples is None or self.samples >= 8, "encoding.samples must be at least 8, or null.")
        require(self.sigma is None or self.sigma > 0, f"encoding.sigma is {self.sigma}; it must be positive.")
        require(
            self.outputs is None or self.outputs >= 2, f"encoding.outputs is {self.outputs}; it must be at least 2."
        )


WeightRule = Literal[
    "auto", "torch", "kaiming_normal", "xavier_normal", "xavier_uniform", "lecun_normal", "elu_normal", "siren"
]


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """A coordinate network: encoding, first layer, `hidden_layers` hidden-to-hidden layers, linear head."""

    width: int = 256
    """H. Complex activations (wire) have H / sqrt 2 complex units, so that the numbers of parameters are comparable."""
    hidden_layers: int = 4
    """L: hidden-to-hidden matrices. There are L + 1 activations and L + 2 linear layers."""
    activation: ActivationConfig = field(default_factory=ActivationConfig)
    encoding: EncodingConfig = field(default_factory=EncodingConfig)
    weight_init: WeightRule = "auto"
    """A rule of `mwt.fields.layers.weight_spread`; auto: what the activation's authors do."""
    bias: bool = True
    bias_init: Literal["torch", "zero"] = "torch"
    """torch: U(+-1/sqrt(inputs)), which all reference codes leave in place."""
    first_bias_scale: float | None = None
    """k: biases of the first layer from U(+-k) (finer)."""
    batch_norm: bool = False
    """Normalise before every activation, by statistics over the points."""
    output: Literal["none", "sigmoid", "tanh", "clamp"] = "none"
    """Range of the values: sigmoid 0 to 1, tanh -1 to 1. clamp acts when evaluating only: in training, values beyond
    the range would have no gradient."""
    clamp: tuple[float, float] = (-1.0, 1.0)
    """Lowest and highest value of output=clamp."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "clamp", tuple(self.clamp))  # YAML brings a list
        require(self.width >= 2, f"mlp.width is {self.width}; it must be at least 2.")
        require(self.hidden_layers >= 0, f"mlp.hidden_layers is {self.hidden_layers}; it cannot be negative.")
        require(self.first_bias_scale is None or self.first_bias_scale > 0, "mlp.first_bias_scale must be positive.")
        require(self.first_bias_scale is None or self.bias, "mlp.first_bias_scale is set, but mlp.bias is false.")
        require(self.clamp[0] < self.clamp[1], "mlp.clamp must be two numbers, the lower one first.")


@dataclass(frozen=True, kw_only=True)
class MFNConfig:
    """Multiplicative filter network (Fathony et al. 2021); defaults of their code."""

    filter: Literal["fourier", "gabor"] = "gabor"
    width: int = 256
    hidden_layers: int = 3
    """L: hidden-to-hidden matrices. There are L + 1 filters."""
    input_scale: float = 256.0
    """Spread of the filters' frequencies, for coordinates in [-1, 1]; each has this over sqrt(L + 1)."""
    weight_scale: float = 1.0
    """Hidden weights from U(+-sqrt(weight_scale / H))."""
    alpha: float = 6.0
    beta: float = 1.0
    """gabor: the envelopes' precisions come from Gamma(alpha / (L + 1), beta)."""

    def __post_init__(self) -> None:
        require(self.width >= 1, f"mfn.width is {self.width}; it must be at least 1.")
        require(self.hidden_layers >= 1, f"mfn.hidden_layers is {self.hidden_layers}; it must be at least 1.")
        for name in ("input_scale", "weight_scale", "alpha", "beta"):
            require(getattr(self, name) > 0, f"mfn.{name} is {getattr(self, name)}; it must be positive.")


def _decoder() -> MLPConfig:
    relu = ActivationConfig(name="relu")
    return MLPConfig(width=64, hidden_layers=1, activation=relu, weight_init="xavier_uniform")


@dataclass(frozen=True, kw_only=True)
class HashGridConfig:
    """Multi-resolution hash grid (Mueller et al. 2022, Instant-NGP), and the MLP that reads its features."""

    levels: int = 16
    features: int = 2
    """F, per level."""
    log2_table: int = 16
    """A level has at most 2**log2_table entries; with more vertices than that, they share entries by a hash."""
    base_resolution: tuple[int, ...] = (16,)
    """Cells of the coarsest level: one number for all axes, or one per axis."""
    finest_resolution: tuple[int, ...] = (512,)
    """Cells of the finest level, likewise."""
    interpolation: Literal["linear", "smoothstep"] = "linear"
    """smoothstep: continuous first derivatives, and so a second one of use."""
    coordinate_range: tuple[float, float] = (-1.0, 1.0)
    """The coordinates that the grid spans; beyond it the field is constant."""
    decoder: MLPConfig = field(default_factory=_decoder)

    def __post_init__(self) -> None:
        for name in ("base_resolution", "finest_resolution", "coordinate_range"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("levels", "features"):
            require(getattr(self, name) >= 1, f"hash_grid.{name} is {getattr(self, name)}; it must be at least 1.")
        require(1 <= self.log2_table <= 30, f"hash_grid.log2_table is {self.log2_table}; it must lie in 1 to 30.")
        require(min(self.base_resolution) >= 1, "hash_grid.base_resolution must be at least 1 along each axis.")
        require(self.coordinate_range[0] < self.coordinate_range[1], "hash_grid.coordinate_range must rise.")


@dataclass(frozen=True, kw_only=True)
class InterpolatedGridConfig:
    """A plain grid of values, interpolated: the baseline that every comparison needs."""

    size: tuple[int, ...] = (64,)
    """Vertices: one number for all axes, or one per axis."""
    interpolation: Literal["linear", "smoothstep", "cubic"] = "linear"
    """cubic: Keys' kernel with -0.75, PyTorch's bicubic."""
    init: float = 0.1
    """Every value at the start."""
    coordinate_range: tuple[float, float] = (-1.0, 1.0)
    """The coordinates of the first and the last vertex; beyond them the field is constant."""

    def __post_init__(self) -> None:
        for name in ("size", "coordinate_range"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        require(min(self.size) >= 1, "grid.size must be at least 1 along each axis.")
        require(self.coordinate_range[0] < self.coordinate_range[1], "grid.coordinate_range must rise.")


@dataclass(frozen=True, kw_only=True)
class FieldConfig:
    """A field: the block that `name` names counts, the others are not looked at."""

    name: str = "mlp"
    """One of `mwt.fields.list_fields()`."""
    mlp: MLPConfig = field(default_factory=MLPConfig)
    mfn: MFNConfig = field(default_factory=MFNConfig)
    kan: KANConfig = field(default_factory=KANConfig)
    hash_grid: HashGridConfig = field(default_factory=HashGridConfig)
    grid: InterpolatedGridConfig = field(default_factory=InterpolatedGridConfig)
    tiled: TiledConfig = field(default_factory=TiledConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    asmr: ASMRConfig = field(default_factory=ASMRConfig)
    harmonized: HarmonizedConfig = field(default_factory=HarmonizedConfig)


def per_axis(values: tuple[T, ...], dims: int, key: str) -> list[T]:
    """One value for each axis, from one for all or one each.

    Raises:
        InputError: another number of values.
    """
    require(len(values) in (1, dims), f"{key} has {len(values)} numbers; give 1, or {dims} (one per axis).")
    return list(values) * (dims // len(values))
