"""Weight-space classifiers: tokens or weights of a fitted field in, class logits out."""

from __future__ import annotations

from mwt.readers.transformer import TransformerReader

READERS = {"transformer": TransformerReader}


def list_readers() -> list[str]:
    """Names that `reader.name` accepts."""
    return list(READERS)


__all__ = ["READERS", "TransformerReader", "list_readers"]
