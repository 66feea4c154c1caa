"""A set of the networks that the built-in model fits to the digits, for tests of what reads such sets."""

from __future__ import annotations

from pathlib import Path

import torch

from data_pipes.read import open_split
from data_pipes.weight_manifest import Description
from data_pipes.weight_write import WeightSetWriter
from mwt import MetaWeightTransformer
from mwt.metrics import decibel
from mwt.observe import observe


@torch.no_grad()
def write_digits(out: Path, counts: dict[str, int], *, copies: int = 0, moved: float = 0.0) -> Path:
    """The first so many networks of each split; `copies` more of each training signal, disturbed a little.

    Args:
        moved: what the first bias of the base that the fits begin with is larger by.
    """
    model = MetaWeightTransformer.from_pretrained("builtin:digits")
    model.siren.layers[0].bias[0] += moved
    inner = model.config.inner_loop
    nought = model.siren.init_offsets(1)
    description = Description(
        name="digits", signal=model.config.signal, layout=model.siren.layout, values="delta", has_base=True,
        steps=inner.steps, source={"path": "builtin:digits"}, fit={}, copies=copies,
    )  # fmt: skip
    base = model.siren.network_weights(nought, "phi")
    with WeightSetWriter(out, description, counts, base=base) as writer:
        for task in writer.missing():
            split = open_split("builtin:digits", task.split, device=torch.device("cpu"), limit=counts[task.split])
            with writer.shard(task) as shard:
                for batch in split.batches(batch_size=128):
                    fitted = model.fit(observe(batch, inner, seed=0))
                    for copy in range(task.copies + 1):
                        noise = 1e-4 * copy * torch.randn_like(fitted.offsets)
                        shard.add(
                            model.siren.network_weights(fitted.offsets + noise), labels=batch.labels,
                            index=batch.positions, psnr=decibel(fitted.losses[:, -1] / 4), losses=fitted.losses,
                            copy=copy,
                        )  # fmt: skip
        writer.finish()
    return out
