"""Meta Weight Transformer: fit a meta-learned SIREN to every signal and classify the fitted weights.

from mwt import MetaWeightTransformer
from data_pipes import load_image

model = MetaWeightTransformer.from_pretrained("builtin:digits")
[prediction] = model.predict(load_image("digit.png", model.config.signal))
print(prediction.label, prediction.psnr)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mwt.config import ClassifyConfig, ModelConfig, list_variants
    from mwt.config_files import load_config
    from mwt.errors import InputError, TrainingError
    from mwt.model import MetaWeightTransformer, Prediction, list_builtin_models
    from mwt.readers import list_readers
    from mwt.structs import Batch, Fit, Losses, Observations, Output, SignalFacts

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "ClassifyConfig",
    "Fit",
    "InputError",
    "Losses",
    "MetaWeightTransformer",
    "ModelConfig",
    "Observations",
    "Output",
    "Prediction",
    "SignalFacts",
    "TrainingError",
    "list_builtin_models",
    "list_readers",
    "list_variants",
    "load_config",
]

_HOME = {
    "mwt.config": ("ClassifyConfig", "ModelConfig", "list_variants"),
    "mwt.config_files": ("load_config",),
    "mwt.errors": ("InputError", "TrainingError"),
    "mwt.model": ("MetaWeightTransformer", "Prediction", "list_builtin_models"),
    "mwt.readers": ("list_readers",),
    "mwt.structs": ("Batch", "Fit", "Losses", "Observations", "Output", "SignalFacts"),
}


def __getattr__(name: str) -> Any:
    # Imported when first asked for: programs that only read data need neither the model nor timm, which take seconds.
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
