"""Classify image files: class, probabilities, and how well the fitted SIREN, all that the classifier sees, shows each.

    python -m eval.predict --run RUN IMAGE...             a run directory
    python -m eval.predict --run builtin:digits IMAGE...  a model that comes with the package
    python -m eval.predict --run DIR IMAGE... --json      a model folder (save_pretrained); one JSON list on stdout

Images of any size and colour are converted to what the model was trained on. A file that cannot be used is named on
stderr, the others are still predicted, and the exit status is 2.

In full precision, whatever the run was trained in: a borderline image may fall otherwise than in eval.classify, which
evaluates in the precision of the run.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from data_pipes.decode import load_image
from mwt.checkpoint import Weights, find_checkpoint, load_model
from mwt.errors import InputError
from mwt.model import BUILTIN, MetaWeightTransformer
from mwt.runtime import choose_device, keep_freed_memory, run_program


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(prog="eval.predict", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", required=True, help="run directory, model folder, or builtin:NAME")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last", help="of a run directory")
    parser.add_argument(
        "--weights", choices=("ema", "raw"), help="of a run with optim.ema; by default its average, ema"
    )
    parser.add_argument("--top", type=int, metavar="K", help="show the K most probable classes (table: 3, JSON: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON list and nothing else")
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    return parser.parse_intermixed_args(argv)


def open_model(name: str, checkpoint: str, weights: Weights | None) -> MetaWeightTransformer:
    """The model of a run directory, of a model folder, or one that comes with the package.

    Raises:
        InputError: there is none of that name.
    """
    device = choose_device("auto")
    if name.startswith(BUILTIN):
        model = MetaWeightTransformer.from_pretrained(name).to(device)
    elif (Path(name) / "config.json").is_file() and not (Path(name) / "config.yaml").is_file():
        model = load_model(Path(name), device, weights=weights)
    else:
        model = load_model(find_checkpoint(Path(name), checkpoint), device, weights=weights)
    return model


def predict(model: MetaWeightTransformer, file: str, top: int | None) -> dict[str, Any]:
    """What the model says of one file. Each goes alone, so that no image's result depends on its companions.

    Raises:
        InputError: the file cannot be used.
    """
    image = load_image(file, model.config.signal)
    try:
        (found,) = model.predict(image)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    ranked = sorted(found.probabilities.items(), key=lambda item: -item[1])[:top]
    return {
        "image": file, "class": found.label, "probability": found.probabilities[found.label],
        "probabilities": dict(ranked), "psnr": found.psnr,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Predict; see the module's text."""
    arguments = parse(argv)
    keep_freed_memory()
    if arguments.top is not None and arguments.top < 1:
        raise InputError(f"--top is {arguments.top}; it must be at least 1.")
    model = open_model(arguments.run, arguments.checkpoint, arguments.weights)
    top = arguments.top if arguments.top or arguments.json else 3
    rows, failed = [], 0
    for file in arguments.images:
        try:
            rows.append(predict(model, file, top))
        except InputError as error:
            failed += 1
            print(f"error: {error}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    elif rows:
        width = max(5, *(len(row["image"]) for row in rows))
        print(f"{'image':<{width}}  {'PSNR':>8}  classes, the most probable first")
        for row in rows:
            classes = ",  ".join(f"{name} {share:.1%}" for name, share in row["probabilities"].items())
            print(f"{row['image']:<{width}}  {row['psnr']:>5.1f} dB  {classes}")
    return 2 if failed else 0


if __name__ == "__main__":
    run_program(main)
