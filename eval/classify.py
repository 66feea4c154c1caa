"""Evaluate a trained classifier on a split of its data.

    python -m eval.classify --run RUN                                 the test split, the last checkpoint
    python -m eval.classify --run RUN --checkpoint best --split val
    python -m eval.classify --run RUN --steps 8                       other than the trained number of inner steps
    python -m eval.classify --run RUN data.path=DIR run.device=cpu    data and machine can be changed, the model not

Writes RUN/eval/classify.json and RUN/eval/predictions.npz (of another split than the run's test split:
classify_SPLIT.json and predictions_SPLIT.npz). Deterministic: subsets depend on a sample's position alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from data_pipes.read import open_configured
from mwt.inspection import CURVE_SAMPLES, check_data_fits, evaluate_run, open_trained, save_evaluation
from mwt.runtime import keep_freed_memory, run_program
from mwt.structs import Batch


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(prog="eval.classify", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", required=True, help="run directory that train.classify has made")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last")
    parser.add_argument(
        "--weights", choices=("ema", "raw"), help="of a run with optim.ema; by default its average, ema"
    )
    parser.add_argument("--split", help="by default the data.test_split of the run")
    parser.add_argument("--steps", type=int, help="inner steps, if other than trained; more need shared rates")
    parser.add_argument("--no-curve", action="store_true", help="leave out the curve over inner steps")
    parser.add_argument(
        "--full-curve", action="store_true", help=f"measure it on all samples, not on {CURVE_SAMPLES:,} at most"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="data.* and run.* only")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Evaluate; see the module's text."""
    arguments = parse(argv)
    keep_freed_memory()
    run = open_trained(
        arguments.run, checkpoint=arguments.checkpoint, weights=arguments.weights, overrides=arguments.overrides
    )
    data = run.config.data
    split = open_configured(data, arguments.split or data.test_split, run.device)
    check_data_fits(run.model, split.facts, data.path)

    def batches(what: str) -> Iterator[Batch]:
        with tqdm(total=len(split), unit="image", desc=what, dynamic_ncols=True, leave=False, disable=None) as bar:
            for batch in split.batches(batch_size=run.config.run.eval_batch_size):
                yield batch
                bar.update(len(batch))

    curve = 0 if arguments.no_curve else None if arguments.full_curve else CURVE_SAMPLES
    document, result = evaluate_run(run, split.name, batches, steps=arguments.steps, curve=curve)
    files = save_evaluation(run, document, result)
    show(document, str(run.path))
    if skipped := split.bad.report():
        print(f"\nwarning: {skipped}")
    print(f"\nWritten: {files[0]} and {files[1].name}")
    return 0


def show(document: dict[str, Any], run: str) -> None:
    """The numbers as tables for people."""
    print(f"run          {run}, checkpoint {document['checkpoint']!r} (step {document['step']:,})")
    print(f"data         {document['data']}, split {document['split']!r}: {document['count']:,} samples")
    print(f"inner steps  {document['inner_steps']}, {document['precision']} on {document['device']}, "
          f"{document['images_per_second']:,.0f} images/s\n")  # fmt: skip
    names = {
        "accuracy": ("accuracy", "{:.2%}"),
        "cross_entropy": ("cross-entropy", "{:.4f}"),
        "ece": ("calibration error (ECE, 15 bins)", "{:.4f}"),
        "psnr": ("PSNR, mean over images", "{:.2f} dB"),
        "psnr_pooled": ("PSNR of the mean error", "{:.2f} dB"),
        "psnr_subset": ("PSNR over the points of the last step", "{:.2f} dB"),
        "mse": ("squared error on [-1, 1]", "{:.6f}"),
    }
    for key, (name, form) in names.items():
        if key in document:
            print(f"{name:<40} {form.format(document[key]):>12}")

    width = max(5, *(len(name) for name in document["classes"]))
    print(f"\n{'class':<{width}} {'count':>7} {'accuracy':>9} {'precision':>10}")
    for name, row in document["per_class"].items():
        print(f"{name:<{width}} {row['count']:>7} {percent(row['accuracy']):>9} {percent(row['precision']):>10}")

    if document["curve"]:
        print(f"\nAfter each inner step ({document['curve'][0]['count']:,} samples)")
        print(f"{'step':>4} {'accuracy':>9}" + (f" {'PSNR':>9}" if "psnr" in document else ""))
        for row in document["curve"]:
            print(f"{row['steps']:>4} {row['accuracy']:>9.2%}" + (f" {row['psnr']:>6.2f} dB" if "psnr" in row else ""))


def percent(share: float | None) -> str:
    """A share in percent; a dash where there is nothing to measure."""
    return "-" if share is None else f"{share:.2%}"


if __name__ == "__main__":
    run_program(main)
