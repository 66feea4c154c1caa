"""Weight-space classifiers: the weights of fitted networks in, class logits out. One file each, one interface."""

from __future__ import annotations

from mwt.config import ReaderConfig
from mwt.errors import InputError
from mwt.readers.dws import DWSReader
from mwt.readers.inr2array import Inr2ArrayReader
from mwt.readers.inr2vec import Inr2VecReader
from mwt.readers.interface import Reader, Standardise
from mwt.readers.knn import KNNReader
from mwt.readers.linear import LinearReader
from mwt.readers.mlp import MLPReader
from mwt.readers.nfn import HNPReader, NPReader
from mwt.readers.ng_gnn import NgGnnReader
from mwt.readers.ng_t import NgTReader
from mwt.readers.pixel_cnn import PixelCNN
from mwt.readers.saved import load_reader
from mwt.readers.scalegmn import ScaleGmnBReader, ScaleGmnReader
from mwt.readers.transformer import TokenReader, TransformerReader
from mwt.weight_space import Layout

READERS: dict[str, type[Reader]] = {
    "transformer": TransformerReader,
    "wt": TransformerReader,  # the paper's name of it, where it learns from networks that are fitted already
    "linear": LinearReader,
    "mlp": MLPReader,
    "knn": KNNReader,
    "inr2vec": Inr2VecReader,
    "inr2array": Inr2ArrayReader,
    "pixel_cnn": PixelCNN,
    "ng_gnn": NgGnnReader,
    "ng_t": NgTReader,
    "scalegmn": ScaleGmnReader,
    "scalegmn_b": ScaleGmnBReader,
    "dws": DWSReader,
    "nfn_np": NPReader,
    "nfn_hnp": HNPReader,
}


def list_readers() -> list[str]:
    """Names that `reader.name` accepts."""
    return list(READERS)


def make_reader(config: ReaderConfig, *, layout: Layout, classes: int) -> Reader:
    """The reader that `config` names, for networks of `layout`.

    Raises:
        InputError: no such reader, an option that it does not have, or a layout that it cannot take.
    """
    if config.name not in READERS:
        raise InputError(f"reader.name is {config.name!r}; there are {', '.join(READERS)}.")
    try:
        return READERS[config.name](config, layout=layout, classes=classes)
    except InputError:
        raise
    except (ValueError, ArithmeticError, RuntimeError, AssertionError) as error:  # heads=0, width=-1, …
        raise InputError(
            f"reader.name={config.name} cannot be made with reader.options={config.options}: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error


__all__ = [
    "READERS",
    "Reader",
    "Standardise",
    "TokenReader",
    "TransformerReader",
    "list_readers",
    "load_reader",
    "make_reader",
]
