"""One HTML page about a trained classifier that needs nothing else: numbers, curves, film strips, mistakes, weights.

    python -m eval.report --run RUN

Writes RUN/report.html, which loads nothing from anywhere. Evaluates the test split first where that has not been done.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data_pipes.read import Split, open_configured
from mwt import inspection, plots
from mwt.config_files import config_yaml
from mwt.page import STYLE, chart, charts, folded, frame, percent, pixels, section, table
from mwt.runtime import keep_freed_memory, run_program
from mwt.structs import Batch
from mwt.tracking import read_metrics

STRIPS, MISTAKES, FRAMES, MAP_SAMPLES = 4, 12, 8, 2000


@dataclass(frozen=True, kw_only=True)
class Material:
    """What the sections are made of: the run, its test split, its evaluation in numbers and for each sample."""

    run: inspection.TrainedRun
    split: Split
    numbers: dict[str, Any]
    labels: Tensor
    probabilities: Tensor
    columns: dict[str, np.ndarray]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.run.model.config.signal.classes

    @property
    def pictures(self) -> bool:
        """Whether the signals can be shown."""
        return self.run.model.config.signal.kind == "image"

    def batches(self, what: str, shuffle: bool = False) -> Iterator[Batch]:
        """The split in its order, or in a random but fixed one, with a progress bar."""
        with tqdm(total=len(self.split), unit="image", desc=what, dynamic_ncols=True, leave=False, disable=None) as bar:
            for batch in self.split.batches(batch_size=self.run.config.run.eval_batch_size, shuffle=shuffle):
                yield batch
                bar.update(len(batch))


# ---- sections --------------------------------------------------------------------------------------------------------


def headline(m: Material, metrics: list[dict[str, Any]]) -> str:
    """The numbers that people ask for first."""
    counts = {name: sum(p.numel() for p in group) for name, group in m.run.model.parameter_groups().items()}
    cards = [("accuracy", percent(m.numbers["accuracy"]))]
    if "psnr" in m.numbers:
        cards.append(("PSNR of the fits", f"{m.numbers['psnr']:.1f} dB"))
    cards.append(("calibration error", f"{m.numbers['ece']:.3f}"))
    cards.append(("parameters, SIREN + learned rates", f"{counts['siren'] + counts['alpha']:,}"))
    cards.append(("parameters, reader", f"{counts['reader']:,}"))
    seconds = max((row.get("seconds", 0.0) for row in metrics), default=0.0)
    if seconds:
        cards.append(("training", f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"))
    peak = max((row.get("peak_memory_gb", 0.0) for row in metrics), default=0.0)
    if peak:
        cards.append(("peak memory in training", f"{peak:.1f} GB"))
    return '<div class="numbers">' + "".join(f"<div><b>{v}</b><span>{k}</span></div>" for k, v in cards) + "</div>"


def training(m: Material, metrics: list[dict[str, Any]]) -> str:
    """Curves of metrics.jsonl."""
    data = m.run.config.data

    def line(name: str, training: bool, key: str, decibel: bool = False) -> list[plots.Line]:
        rows = [row for row in metrics if (row["split"] == data.train_split) == training and key in row]
        # values lie in [-1, 1]: their peak is 2, and PSNR = 10 log10(4 / mse)
        y = [10 * math.log10(4 / max(row[key], 4e-10)) if decibel else row[key] for row in rows]
        return [(name, [row["epoch"] for row in rows], y)] if rows else []

    lines = [
        ("cross-entropy", line("training", True, "classification_loss") + line("monitored", False, "cross_entropy")),
        ("accuracy", line("training", True, "accuracy") + line("monitored", False, "accuracy")),
        ("PSNR (dB)", line("training", True, "reconstruction_loss", True) + line("monitored", False, "psnr")),
    ]
    lines = [(title, curves) for title, curves in lines if curves]
    if not lines:
        return section("Training", "This run has no metrics.jsonl, so there are no curves.")
    text = (
        "How classification and reconstruction came along. Training values are means over the batches between two "
        "log lines, taken while the model changes; PSNR (higher is better) is that of the mean error."
    )
    return section("Training", text, charts(lines, xlabel="epoch"))


def inner_steps(m: Material) -> str:
    """Accuracy and PSNR after each inner step."""
    curve = m.numbers["curve"]
    steps = [row["steps"] for row in curve]
    panels: list[tuple[str, list[plots.Line]]] = [
        ("accuracy", [("accuracy", steps, [row["accuracy"] for row in curve])])
    ]
    if "psnr" in curve[0]:
        panels.append(("PSNR (dB)", [("PSNR", steps, [row["psnr"] for row in curve])]))
    text = (
        "Every signal is fitted by a few gradient steps from the same learned start. What the classifier knows, and "
        f"how well the field shows the signal, if fitting ends earlier ({curve[0]['count']:,} test samples)."
    )
    return section("After each inner step", text, charts(panels, xlabel="inner steps", whole_numbers=True))


def classes(m: Material) -> str:
    """Confusion matrix and per-class table."""
    matrix = torch.tensor(m.numbers["confusion"])
    errors = matrix.clone().fill_diagonal_(0).flatten()
    top = [(int(n), *divmod(int(i), len(m.classes))) for n, i in zip(*errors.topk(min(5, len(errors))), strict=True)]
    listed = "; ".join(f"{m.classes[i]} taken for {m.classes[j]} ({n} times)" for n, i, j in top if n)
    text = "Rows are the true classes, columns what the model said; a perfect classifier fills the diagonal only. "
    text += f"Most frequent confusions: {listed}." if listed else "There are no confusions."
    rows = [
        (name, f"{row['count']:,}", percent(row["accuracy"]), percent(row["precision"]))
        for name, row in m.numbers["per_class"].items()
    ]
    listing = table(("class", "samples", "accuracy", "precision"), rows)
    if len(rows) > 20:
        listing = folded(f"all {len(rows)} classes", listing)
    note = "Accuracy: the share of a class's samples that are recognised. Precision: the share of the samples given to "
    matrix_chart = chart(plots.confusion_figure(matrix, m.classes), "confusion matrix")
    return section("Confusion matrix", text, matrix_chart) + section(
        "Classes", note + "a class that belong to it.", listing
    )


def calibration(m: Material) -> str:
    """Reliability diagram."""
    text = (
        "Among predictions made with 80 % confidence, 80 % should be right: bars above the dashed line mean that the "
        f"model is too modest, bars below it that it is too sure. The mean distance is {m.numbers['ece']:.3f} "
        "(expected calibration error, 15 bins)."
    )
    return section(
        "Calibration", text, chart(plots.reliability_figure(m.probabilities, m.labels), "reliability diagram")
    )


def film_strips(m: Material) -> str:
    """How some images are fitted."""
    batch = next(m.split.batches(batch_size=min(STRIPS, len(m.split)), shuffle=True))
    offsets, quality = inspection.trajectory(m.run.model, batch, m.run.config.run.precision)
    assert batch.images is not None  # trajectory refuses anything else
    height, width = batch.images.shape[-2:]
    finer = not m.run.model.config.field.on_samples
    strips = []
    for i, image in enumerate(batch.images.cpu()):
        stages = plots.to_pixels(inspection.render(m.run.model, offsets[:, i], height, width))
        names = ["base", *(f"step {step}" for step in range(1, len(stages)))]
        frames = [frame(image, "original", m.classes[int(batch.labels[i])])]
        frames += [frame(s, name, f"{q:.1f} dB") for s, name, q in zip(stages, names, quality[i].tolist(), strict=True)]
        if finer:
            large = plots.to_pixels(inspection.render(m.run.model, offsets[-1, i : i + 1], 4 * height, 4 * width))[0]
            frames.append(frame(large, "4 x finer", f"{4 * width} x {4 * height}"))
        strips.append(f'<div class="strip">{"".join(frames)}</div>')
    text = (
        "A SIREN is a small network that maps a coordinate to a colour. The base is what all images start from; each "
        "inner step changes its weights a little towards the image. The classifier sees these changes and no pixel."
    )
    if finer:
        text += " The last frame asks the fitted network for four times the resolution: a field has no pixels."
    return section("Film strips", text, *strips)


def mistakes(m: Material) -> str:
    """The most confident wrong predictions."""
    confidence, predicted = m.probabilities.max(-1)
    wrong = (predicted != m.labels).nonzero()[:, 0]
    worst = wrong[confidence[wrong].argsort(descending=True, stable=True)][:MISTAKES]
    text = f"{len(wrong):,} of {len(m.labels):,} test images are classified wrongly; here the most confident. "
    if not len(wrong):
        return section("Worst mistakes", "No test image is classified wrongly.")
    figures = []
    samples = inspection.samples_at(m.batches("mistakes"), m.columns["position"][worst.numpy()].tolist())
    for row, sample in zip(worst.tolist(), samples, strict=True):
        offsets, quality = inspection.trajectory(m.run.model, sample, m.run.config.run.precision)
        assert sample.images is not None  # trajectory refuses anything else
        shown = plots.to_pixels(inspection.render(m.run.model, offsets[-1], *sample.images.shape[-2:]))[0]
        true, said = int(m.labels[row]), int(predicted[row])
        lines = (
            f"true: {m.classes[true]} ({percent(float(m.probabilities[row, true]))})",
            f"predicted: {m.classes[said]} ({percent(float(m.probabilities[row, said]))})",
            f"test image {int(sample.positions[0])}, {float(quality[0, -1]):.1f} dB",
        )
        pair = pixels(sample.images[0].cpu(), "image") + pixels(shown, "reconstruction")
        figures.append(
            f'<figure><div class="pair">{pair}</div><figcaption>{"<br>".join(map(escape, lines))}</figcaption></figure>'
        )
    text += "Left the image, right the fitted field: all that the classifier could know."
    return section("Worst mistakes", text, f'<div class="grid">{"".join(figures)}</div>')


def weight_map(m: Material) -> str:
    """PCA of the offsets."""
    batches = m.batches("offsets", shuffle=True)  # a split is often sorted by class
    count, precision = min(MAP_SAMPLES, len(m.split)), m.run.config.run.precision
    vectors, labels, _ = inspection.collect_offsets(m.run.model, batches, count=count, precision=precision)
    if len(vectors) < 3:
        return section("The space of weights", "Too few test samples for a map.")
    points, explained = inspection.principal_components(vectors)
    text = (
        f"Each dot is one test sample: the {vectors.shape[1]:,} weight offsets of its fitted SIREN, projected onto the "
        f"two directions in which the offsets of {len(vectors):,} samples vary most (principal component analysis). "
        f"These explain {float(explained.sum()):.1%} of the variance. Classes that lie apart here are easy; the "
        "classifier uses all directions."
    )
    figure = plots.scatter_figure(points, labels, m.classes, explained)
    return section("The space of weights", text, chart(figure, "principal components of the offsets"))


def interpolation(m: Material) -> str:
    """From one image to another of a different class along a straight line in weight space."""
    title = "Between two images"
    confidence, predicted = m.probabilities.max(-1)
    right = (predicted == m.labels).nonzero()[:, 0]
    ranked = right[confidence[right].argsort(descending=True, stable=True)].tolist()
    other = next((row for row in ranked if m.labels[row] != m.labels[ranked[0]]), None)
    if other is None:
        return section(title, "This needs two classes with a correctly classified test image each.")
    positions = m.columns["position"][[ranked[0], other]].tolist()
    first, second = inspection.samples_at(m.batches("interpolation"), positions)
    ends = [inspection.trajectory(m.run.model, s, m.run.config.run.precision)[0][-1, 0] for s in (first, second)]
    offsets, shares = inspection.interpolate(m.run.model, torch.stack(ends), FRAMES)
    assert first.images is not None  # trajectory refuses anything else
    images = plots.to_pixels(inspection.render(m.run.model, offsets, *first.images.shape[-2:]))
    frames = []
    for i, image in enumerate(images):
        best = int(shares[i].argmax())
        said = f"{m.classes[best]} ({percent(float(shares[i, best]))})"
        frames.append(frame(image, f"{i / (FRAMES - 1):.0%}", said))
    text = (
        f"The weights of two fitted test images ({positions[0]} and {positions[1]}) mixed linearly, from the first to "
        "the second. Below each field the share of the second, and what the classifier says of exactly these weights."
    )
    return section(title, text, f'<div class="strip">{"".join(frames)}</div>')


def settings(m: Material) -> str:
    """Resolved configuration, environment, and the commands that make all this again."""
    folder = m.run.path
    overrides = folder / "overrides.txt"
    given = overrides.read_text().splitlines() if overrides.is_file() else ["--config", str(folder / "config.yaml")]
    commands = [
        shlex.join(["python", "-m", "train.classify", *given]),
        *(
            shlex.join(["python", "-m", f"eval.{name}", "--run", str(folder)])
            for name in ("classify", "reconstruct", "report")
        ),
    ]
    environment = folder / "env.json"
    try:
        facts = json.loads(environment.read_text())
        rows = [(key, value if isinstance(value, str) else json.dumps(value)) for key, value in facts.items()]
        body = table(("environment of the training", ""), rows)
    except (OSError, ValueError, AttributeError):
        body = "<p>env.json is missing or damaged: the environment of the training is not known.</p>"
    config = f"<pre>{escape(config_yaml(m.run.config))}</pre>"
    return section(
        "To make this again",
        "The commands, the settings with all defaults filled in, and what the training ran on.",
        f"<pre>{escape(chr(10).join(commands))}</pre>",
        folded("settings (config.yaml, with what this report overrides)", config),
        folded("environment (env.json)", body),
    )


def page(m: Material) -> str:
    """The whole page."""
    metrics = read_metrics(m.run.path / "metrics.jsonl")
    name = m.run.path.resolve().name
    numbers = m.numbers
    about = (
        f"{m.run.config.variant} on {numbers['data']}: {numbers['count']:,} samples of the split {numbers['split']!r}, "
        f"{len(m.classes)} classes. Checkpoint {numbers['checkpoint']!r} after {numbers['step']:,} training steps, "
        f"{numbers['inner_steps']} inner steps, {numbers['precision']}."
    )
    what = (
        "This model classifies signals by the weights of neural networks: it fits a small network (a SIREN) to each "
        "signal in a few gradient steps, and a Transformer reads nothing but the change of that network's weights."
    )
    sections = [training(m, metrics), inner_steps(m), classes(m), calibration(m)]
    if m.pictures:
        sections += [film_strips(m), mistakes(m)]
    sections.append(weight_map(m))
    if m.pictures:
        sections.append(interpolation(m))
    sections.append(settings(m))
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # a browser then loads nothing at all
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}: report</title><style>{STYLE}</style></head><body>"
        f'<h1>{escape(name)}</h1><p>{escape(about)}</p><p class="soft">{escape(what)}</p>'
        + headline(m, metrics) + "\n".join(sections) + "</body></html>\n"
    )  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(prog="eval.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", required=True, help="run directory that train.classify has made")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last")
    parser.add_argument(
        "--weights", choices=("ema", "raw"), help="of a run with optim.ema; by default its average, ema"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="data.* and run.* only")
    return parser.parse_intermixed_args(argv)


def gather(run: inspection.TrainedRun) -> Material:
    """The run's test split with its evaluation: the stored one if it is of this checkpoint, else a new one."""
    data = run.config.data
    split = open_configured(data, data.test_split, run.device)
    inspection.check_data_fits(run.model, split.facts, data.path)
    stored = inspection.load_evaluation(run, split.name, len(split) - len(split.bad))
    if stored is None:
        empty = torch.zeros(0)
        blank = Material(run=run, split=split, numbers={}, labels=empty, probabilities=empty, columns={})
        inspection.save_evaluation(run, *inspection.evaluate_run(run, split.name, blank.batches))
        stored = inspection.load_evaluation(run, split.name, len(split) - len(split.bad))
    assert stored is not None  # it was written a moment ago
    numbers, columns = stored
    labels, probabilities = (torch.from_numpy(columns[name]) for name in ("label", "probabilities"))
    return Material(run=run, split=split, numbers=numbers, labels=labels, probabilities=probabilities, columns=columns)


def main(argv: list[str] | None = None) -> int:
    """Write the page; see the module's text."""
    arguments = parse(argv)
    keep_freed_memory()
    run = inspection.open_trained(
        arguments.run, checkpoint=arguments.checkpoint, weights=arguments.weights, overrides=arguments.overrides
    )
    text = page(gather(run))
    target = run.path / "report.html"
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"Report: {target.resolve()} ({len(text) / 2**20:.1f} MiB); open it in a browser.")
    return 0


if __name__ == "__main__":
    run_program(main)
