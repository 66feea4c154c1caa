"""Film strips: how a SIREN is fitted to an image, inner step by inner step.

    python -m eval.reconstruct --run RUN                    8 images of the test split
    python -m eval.reconstruct --run RUN --count 3 --scale 8

Each strip shows the original, the base (the learned SIREN before any step, the same for all images), the
reconstruction after each inner step with its PSNR, and last the fitted field drawn at SCALE times the resolution: a
field has no pixels. Writes to RUN/figures/: strip_POSITION.png and scaled_POSITION.png for each image, and all strips
together in strips.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data_pipes.read import open_configured
from mwt.errors import InputError, NotDefinedError
from mwt.inspection import TrainedRun, check_data_fits, open_trained, render, select, trajectory
from mwt.plots import film_strip, frame_zoom, png_bytes, sheet, to_pixels
from mwt.runtime import keep_freed_memory, run_program
from mwt.structs import Batch


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(prog="eval.reconstruct", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", required=True, help="run directory that train.classify has made")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last")
    parser.add_argument(
        "--weights", choices=("ema", "raw"), help="of a run with optim.ema; by default its average, ema"
    )
    parser.add_argument("--split", help="by default the data.test_split of the run")
    parser.add_argument("--count", type=int, default=8, help="images, drawn from all over the split")
    parser.add_argument("--scale", type=int, default=4, help="resolution of the last frame, in times the image's")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="data.* and run.* only")
    arguments = parser.parse_intermixed_args(argv)
    for name in ("count", "scale"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name} is {getattr(arguments, name)}; it must be at least 1.")
    return arguments


def strip(run: TrainedRun, sample: Batch, scale: int) -> tuple[Tensor, Tensor, list[float]]:
    """The film strip [3, H, W] of one image, the field at `scale` times its resolution, and the PSNR of each stage."""
    offsets, quality = trajectory(run.model, sample, run.config.run.precision)
    assert sample.images is not None  # trajectory refuses anything else
    height, width = sample.images.shape[-2:]
    stages = to_pixels(render(run.model, offsets[:, 0], height, width))
    scaled = to_pixels(render(run.model, offsets[-1], height * scale, width * scale))[0]
    decibels = quality[0].tolist()
    name = run.model.config.signal.classes[int(sample.labels[0])]
    captions = [f"original\n{name[:14]}", f"base\n{decibels[0]:.2f} dB"]
    captions += [f"step {step}\n{value:.2f} dB" for step, value in enumerate(decibels) if step]
    captions.append(f"x {scale}\n{width * scale} x {height * scale}")
    frames = [sample.images[0].cpu(), *stages, scaled]
    zoom = frame_zoom(height, width)
    if zoom > 1:  # a multiple of the scale: then every pixel of the last frame is a square as well
        zoom = -(-zoom // scale) * scale
    return film_strip(frames, captions, zoom=zoom), scaled, decibels


def main(argv: list[str] | None = None) -> int:
    """Draw; see the module's text."""
    arguments = parse(argv)
    keep_freed_memory()
    run = open_trained(
        arguments.run, checkpoint=arguments.checkpoint, weights=arguments.weights, overrides=arguments.overrides
    )
    data, signal = run.config.data, run.model.config.signal
    if signal.kind != "image":
        raise InputError(f"Pictures are for images; the model of {run.path} fits {signal.kind}, which have no pixels.")
    if run.model.config.field.on_samples and arguments.scale != 1:
        raise NotDefinedError(
            f"The field of {run.path} (field.name={run.model.config.field.name}) is defined on the pixels alone, not "
            "between them: add --scale 1."
        )
    split = open_configured(data, arguments.split or data.test_split, run.device)
    check_data_fits(run.model, split.facts, data.path)
    count = min(arguments.count, len(split))
    # Shuffled, for a split is often sorted by class; always the same ones.
    batch = next(split.batches(batch_size=count, shuffle=True))
    folder = run.path / "figures"
    folder.mkdir(exist_ok=True)
    strips, rows = [], []
    for row in tqdm(range(count), unit="image", dynamic_ncols=True, leave=False, disable=None):
        picture, scaled, decibels = strip(run, select(batch, torch.tensor([row])), arguments.scale)
        position = int(batch.positions[row])
        (folder / f"strip_{position:06d}.png").write_bytes(png_bytes(picture))
        (folder / f"scaled_{position:06d}.png").write_bytes(png_bytes(scaled))
        strips.append(picture)
        rows.append((position, signal.classes[int(batch.labels[row])], decibels))
    (folder / "strips.png").write_bytes(png_bytes(sheet(strips)))
    show(rows, split.name, folder)
    return 0


def show(rows: list[tuple[int, str, list[float]]], split: str, folder: Path) -> None:
    """PSNR of each image at each stage, as a table."""
    width = max(5, *(len(name) for _, name, _ in rows))
    steps = range(1, len(rows[0][2]))
    print(f"PSNR in dB, split {split!r}\n")
    print(f"{'image':>6} {'class':<{width}} {'base':>7}" + "".join(f" {f'step {step}':>7}" for step in steps))
    for position, name, decibels in rows:
        print(f"{position:>6} {name:<{width}}" + "".join(f" {value:>7.2f}" for value in decibels))
    mean = torch.tensor([decibels for _, _, decibels in rows]).mean(0).tolist()
    print(f"{'mean':>6} {'':<{width}}" + "".join(f" {value:>7.2f}" for value in mean))
    print(f"\nWritten: {folder / 'strips.png'} and two pictures of each image beside it")


if __name__ == "__main__":
    run_program(main)
