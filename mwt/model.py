"""MetaWeightTransformer: a meta-learned SIREN, its learned rates, and a reader of the fitted offsets."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from huggingface_hub.errors import HFValidationError
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from mwt.config import InnerLoopConfig, ModelConfig
from mwt.errors import InputError
from mwt.inner_loop import fit
from mwt.losses import scale_gradient
from mwt.meta_sgd import MetaSGD
from mwt.metrics import psnr
from mwt.model_field import ModelField, field_tokens, make_field
from mwt.observe import grid, observe, whole
from mwt.readers import Reader, TokenReader, make_reader
from mwt.siren import Siren
from mwt.structs import Batch, Fit, Observations, Output

BUILTIN = "builtin:"

CARD = """---
{{ card_data }}
---
# A classifier that reads the weights of SIRENs

A SIREN is fitted to every signal in a few learned gradient steps; a Transformer classifies the change of its weights.
It never sees a pixel. Method: Gielisse and van Gemert, "End-to-End Implicit Neural Representations for
Classification", CVPR 2025.

{{ facts }}

```python
from mwt import MetaWeightTransformer
from data_pipes import load_image

model = MetaWeightTransformer.from_pretrained("THIS_FOLDER_OR_REPOSITORY")
[prediction] = model.predict(load_image("image.png", model.config.signal))
print(prediction.label, prediction.probabilities, prediction.psnr)
```
"""
"""The template of a model card; `facts` is filled in by `MetaWeightTransformer.generate_model_card`."""


def list_builtin_models() -> list[str]:
    """Names of the trained models that come with the package, for `from_pretrained`."""
    folder = files("mwt") / "builtin"
    return sorted(BUILTIN + entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a model says of one image."""

    label: str
    probabilities: dict[str, float]
    psnr: float
    """How well the fitted SIREN, which is all that the classifier saw, shows the image; dB."""


class MetaWeightTransformer(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="meta-weight-transformer",
    license="mit",
    tags=["implicit-neural-representation", "weight-space-learning", "siren", "meta-learning"],
    model_card_template=CARD,
):
    """Fits a SIREN to every signal and classifies the fitted weights; trained end to end.

    Gielisse and van Gemert, "End-to-End Implicit Neural Representations for Classification", CVPR 2025.
    Only offsets reach the reader: it never sees a pixel.
    """

    def __init__(self, config: ModelConfig | dict[str, Any]) -> None:
        """A fresh model; `config` as a dict is what `config.json` holds."""
        super().__init__()
        if isinstance(config, dict):
            config = ModelConfig.from_dict(config)
        self.config = config
        field, classes = make_field(config), len(config.signal.classes)
        self.siren: ModelField = field  # any field; what is on disk calls it so
        self.alpha = MetaSGD(config.inner_loop, field.adapted_size)
        self.stage = "joint"  # set by `mwt.stages.begin_stage`
        self.reader: Reader | TokenReader
        if isinstance(field, Siren):
            self.reader = make_reader(config.reader, layout=field.layout, classes=classes)
        else:
            count, features = field_tokens(field, config.field, field.init_offsets(1)).shape[1:]
            width = config.siren.hidden
            self.reader = TokenReader(config.reader, tokens=count, features=features, width=width, classes=classes)

    def forward(self, observations: Observations, steps: int | None = None) -> Output:
        """`fit_and_read`; what a training step calls, through wrappers for compilation and several processes.

        In the stage `reconstruction` nothing is read: the logits are zeros, which say nothing.
        """
        if self.stage == "reconstruction":
            fitted = self.fit(observations, steps)
            return Output(
                fit=fitted, logits=fitted.losses.new_zeros(len(fitted.losses), len(self.config.signal.classes))
            )
        return self.fit_and_read(observations, steps)

    def fit_and_read(self, observations: Observations, steps: int | None = None) -> Output:
        """Fit and read a batch. The gradient that the reader sends into the fit is scaled by w_cls.

        Arguments and errors as of `fit`.
        """
        fitted = self.fit(observations, steps)
        offsets = scale_gradient(fitted.offsets, self.config.loss.classification_weight)
        return Output(fit=fitted, logits=self.read(offsets))

    def read(self, offsets: Float[Tensor, "B W"]) -> Float[Tensor, "B K"]:
        """Class logits of fitted fields."""
        field = self.siren
        if isinstance(field, Siren):
            return self.reader(field.network_weights(offsets))
        return self.reader(field_tokens(field, self.config.field, offsets))

    def fit(self, observations: Observations, steps: int | None = None) -> Fit:
        """Fit the SIREN to a batch; without a graph in the stage `classifier`, where no gradient goes into the fit.

        Args:
            steps: inner steps, if other than trained: fewer, or, where the rates are shared, more.

        Raises:
            InputError: signals with other channels or coordinates than the model's.
        """
        signal = self.config.signal
        dims, channels = observations.coords.shape[-1], observations.values.shape[-1]
        if (dims, channels) != (signal.coordinate_dims, signal.channels):
            raise InputError(
                f"The model takes signals of {signal.channels} channel(s) over {signal.coordinate_dims} coordinates; "
                f"these have {channels} over {dims}."
            )
        steps = self.config.inner_loop.steps if steps is None else steps
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.stage != "classifier"):
            return fit(self.siren, self.alpha, observations, steps=steps, options=self.fit_options)

    @property
    def fit_options(self) -> InnerLoopConfig:
        """The inner loop's settings, with an engine that can fit this field."""
        inner = self.config.inner_loop
        generic = inner.engine == "analytic" and not isinstance(self.siren, Siren)
        return replace(inner, engine="func") if generic else inner

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.siren.parameters()).device

    @torch.no_grad()
    def predict(self, images: UInt8[Tensor, "B C h w"] | UInt8[Tensor, "C h w"]) -> list[Prediction]:
        """Classify images through their fitted SIRENs. Deterministic, also where each step sees a random subset.

        Args:
            images: grey levels 0 to 255, with the channels that the model was trained on (`config.signal`); one
                image or a batch. `data_pipes.load_image` makes them from files.

        Raises:
            InputError: other channels than the model's.
        """
        device = self.device
        if images.ndim == 3:
            images = images[None]
        nought = torch.zeros(len(images), dtype=torch.int64, device=device)  # no image's result depends on its place
        batch = Batch(images=images.to(device), labels=nought, positions=nought)
        output = self.fit_and_read(observe(batch, self.config.inner_loop.for_evaluation(), seed=0, purpose="evaluate"))
        everything = whole(batch)
        quality = psnr(self.siren(output.fit.offsets, everything.coords), everything.values)
        names = self.config.signal.classes
        return [
            Prediction(
                label=names[int(p.argmax())], probabilities=dict(zip(names, p.tolist(), strict=True)), psnr=float(q)
            )
            for p, q in zip(output.logits.softmax(-1), quality, strict=True)
        ]

    def reconstruct(self, offsets: Float[Tensor, "B W"], height: int, width: int) -> Float[Tensor, "B C h w"]:
        """Images of fitted fields at any resolution, in [-1, 1] (not clamped)."""
        values = self.siren(offsets, grid(height, width, device=offsets.device, dtype=offsets.dtype))
        return values.mT.reshape(len(offsets), -1, height, width)

    def compile_parts(self) -> None:
        """Send training through torch.compile: the sweeps of the inner loop and one block of the reader.

        Parts instead of the whole, because every inner step and every block is the same code: it compiles in a
        fraction of the time and loses no speed. Evaluation, whose batches vary in size, stays as it is.
        """
        if isinstance(self.siren, Siren):
            self.siren.compiled = True
        self.reader.compiled = True

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The model card of this very model: what it was made for and how large it is."""
        signal, inner = self.config.signal, self.config.inner_loop
        size = f"{signal.height} x {signal.width}, " if signal.height else ""
        counts = {name: sum(p.numel() for p in params) for name, params in self.parameter_groups().items()}
        name = self.config.field.name
        rows = {
            **({} if name == "siren" else {"field": f"{name}, {self.siren.adapted_size} adapted numbers"}),
            "signals": f"{signal.kind}, {size}{signal.channels} channel(s)",
            "classes": f"{len(signal.classes)}: {', '.join(signal.classes[:20])}{', …' * (len(signal.classes) > 20)}",
            "SIREN": f"{self.config.siren.hidden} wide, {self.config.siren.hidden_layers} hidden layers, "
            f"omega {self.config.siren.omega:g}",
            "inner loop": f"{inner.steps} steps"
            + (f", {inner.points or inner.fraction} points" if inner.points or inner.fraction < 1 else ""),
            "parameters": ", ".join(f"{name} {count:,}" for name, count in counts.items()),
        }
        facts = "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items())])
        return super().generate_model_card(*args, facts=facts, **kwargs)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The three groups that are optimised and clipped apart: siren, alpha, reader."""
        return {name: list(getattr(self, name).parameters()) for name in ("siren", "alpha", "reader")}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> MetaWeightTransformer:
        """A trained model from a folder, a run's checkpoint, the Hugging Face hub, or `builtin:NAME`.

        Raises:
            InputError: no such model.
        """
        name = str(pretrained_model_name_or_path)
        if name.startswith(BUILTIN):
            if name not in list_builtin_models():
                raise InputError(f"There is no model {name!r}; there are {', '.join(list_builtin_models()) or 'none'}.")
            name = str(files("mwt") / "builtin" / name.removeprefix(BUILTIN))
        elif not Path(name).is_dir() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
            raise InputError(f"There is no folder {name}, and it is not a name USER/MODEL of the Hugging Face hub.")
        try:
            with redirect_stdout(io.StringIO()):  # the mixin prints where programs write JSON
                model: MetaWeightTransformer = super().from_pretrained(name, **{"strict": True, **kwargs})
        except (OSError, HFValidationError) as error:  # the hub's errors are OSErrors
            if Path(name).is_dir():
                raise
            raise InputError(f"There is no folder {name}, and the hub did not give it: {error}") from error
        return model.eval()
