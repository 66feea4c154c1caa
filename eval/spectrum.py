"""Tangent kernels of fields, what they learn at which frequency, and whether the one says the other.

    python -m eval.spectrum --models sine,relu,gaussian --encodings identity,nerf --out runs/spectrum
    python -m eval.spectrum --models sine kan:fourier hash_grid "mlp.activation.name=finer mlp.width=96" --out DIR
    python -m eval.spectrum --models sine,relu --out DIR signal.name=skimage:camera signal.size=32 optim.steps=600
    python -m eval.spectrum --response --models sine,nerf+relu --out DIR               no kernels: any size of signal
    python -m eval.spectrum --run runs/fit/image runs/fit/audio --out DIR              fields of train.fit's runs
    python -m eval.spectrum --grid runs/grids/NAME_SCALE --metric psnr --out DIR       the fields of a grid

Every model is fitted to one small signal (`signal.*`; sines of equal amplitude by default) with the same `optim.*`. Its
empirical kernel is computed at the beginning, on the way and in the end: eigenvalues, effective rank, and where the
residual's energy lies; and at each frequency of the signal the error along the fit. Spearman's and Pearson's
correlation over the models says whether the spectrum before the fit predicts the metric after it; with --grid, against
the metric of finished fits, task by task. `signal.keep` holds samples out, and so frequencies.

Writes OUT/spectrum.html (one page that loads nothing) and OUT/result.json.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mwt import runtime
from mwt.config_files import config_yaml, load_config
from mwt.errors import InputError, NotDefinedError, TrainingError
from mwt.fit_run import FitRun, read_fit_run
from mwt.page import chart, charts, section, table
from mwt.plots import Line
from mwt.runtime import StopRequested, keep_freed_memory, run_program, write_json, write_text
from mwt.spectra.config import SpectrumConfig
from mwt.spectra.models import grid_models, label, models, run_looks
from mwt.spectra.page import (
    TITLES,
    as_text,
    correlation_section,
    correlation_table,
    eigenvalue_figure,
    kernel_figure,
    number,
    page,
    study_table,
)
from mwt.spectra.study import Look, Study, correlations, first_look, held_out_from, make_task, study


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(prog="eval.spectrum", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--models", nargs="+", default=[], help="activations, ENCODING+ACTIVATION, kan:BASIS, fields, …"
    )
    parser.add_argument("--encodings", default="", help="each activation of --models with each of these")
    parser.add_argument("--run", type=Path, nargs="+", default=[], help="finished runs of train.fit")
    parser.add_argument("--grid", type=Path, help="the folder of a grid of train.fit")
    parser.add_argument("--metric", help="of --models or --grid; by default the task's own")
    parser.add_argument("--response", action="store_true", help="errors by frequency alone: no kernels")
    parser.add_argument("--config", type=Path, help="a YAML file with signal, field, optim, run")
    parser.add_argument("--out", type=Path, required=True, help="the folder for the page and the numbers")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="signal.*, field.*, optim.*, run.*")
    arguments = parser.parse_intermixed_args(argv)
    if not (arguments.models or arguments.run or arguments.grid):
        raise InputError("Give --models, --run or --grid: there is nothing to look at.")
    if arguments.response and not arguments.models:
        raise InputError("--response is of --models, which are fitted here.")
    if arguments.response:
        arguments.overrides.append("run.looks=0")
    if arguments.models:  # --models sine, key=value and overrides of the program look alike to a list of words
        own = [text for text in arguments.models if text.startswith(("signal.", "field.", "optim.", "run."))]
        arguments.models = [text for text in arguments.models if text not in own]
        arguments.overrides = [*own, *arguments.overrides]
    return arguments


def fit_models(
    configs: dict[str, SpectrumConfig], config: SpectrumConfig, metric: str, device: torch.device, stop: StopRequested
) -> tuple[list[Study], float]:
    """A study of each model, and the frequency from which on they are held out.

    Raises:
        InputError: a metric that fits do not have, as soon as the first has ended.
    """
    task = make_task(config.signal, config.run.seed, device)
    total = len(configs) * config.optim.steps
    studies = []
    with tqdm(total=total, unit="step", dynamic_ncols=True, mininterval=0.5, disable=None) as bar:
        for i, (name, own) in enumerate(configs.items()):
            bar.set_postfix_str(name)
            studies.append(
                study(
                    name, own.field, task, own.optim, own.run, stop=lambda: stop.signal is not None, on_step=bar.update
                )
            )
            bar.update((i + 1) * config.optim.steps - bar.n)
            if (final := studies[-1].final) and metric not in final:
                raise InputError(f"--metric {metric}: there is none of this name; there are {', '.join(final)}.")
            if stop.signal is not None:
                break
    return studies, held_out_from(task)


def model_links(studies: list[Study], metric: str) -> tuple[list[str], dict[str, Any]]:
    """The correlation over the models that were fitted here, as a section and as numbers."""
    whole = [item for item in studies if item.looks and item.final]
    if not whole:
        return [], {}
    values = [item.final[metric] for item in whole]
    rows = correlations([item.looks[0].summary for item in whole], values)
    print(f"\nThe spectrum before the fit and {metric} after it, over {len(whole)} models\n")
    print(as_text(correlation_table(rows)))
    title = f"Does the spectrum say how good the fit will be? ({metric})"
    body = correlation_section(title, [item.name for item in whole], [item.looks[0] for item in whole], values, rows)
    return [body], {metric: rows}


def grid_links(arguments: argparse.Namespace, config: SpectrumConfig) -> tuple[list[str], dict[str, Any]]:
    """The same for the fields of a grid, task by task."""
    found, unfinished, left_out = grid_models(arguments.grid, arguments.metric)
    if unfinished:
        print(f"warning: {unfinished} runs of {arguments.grid} have no result; they are left out.")
    sections, numbers = [], {}
    looks: dict[int, Look] = {}
    for i, model in enumerate(tqdm(found, unit="kernel", dynamic_ncols=True, disable=None)):
        try:
            looks[i] = first_look(model.config, model.frame, model.channels, config.run, seed=model.seed)
        except (InputError, TrainingError) as error:
            left_out[f"{model.task}: {model.name}"] = str(error)
    for task in dict.fromkeys(model.task for model in found):
        chosen = [i for i, model in enumerate(found) if model.task == task and i in looks]
        if not chosen:
            continue
        names, values = [found[i].name for i in chosen], [found[i].metric for i in chosen]
        rows = correlations([looks[i].summary for i in chosen], values)
        print(f"\n{task}: the spectrum before the fit and the metric after it, over {len(chosen)} models\n")
        print(as_text(correlation_table(rows)))
        sections.append(correlation_section(f"Grid, {task}", names, [looks[i] for i in chosen], values, rows))
        own = [{"name": found[i].name, "metric": found[i].metric, **looks[i].summary} for i in chosen]
        numbers[task] = {"correlations": rows, "models": own}
    for name, why in left_out.items():
        print(f"left out: {name}: {why}")
    if left_out:
        why = table(["field", "why"], list(left_out.items()))
        sections.append(section("Left out", "Fields of the grid without a kernel.", why))
    return sections, {"grid": numbers, "left_out": left_out, "unfinished": unfinished}


def run_section(run: FitRun, config: SpectrumConfig, device: torch.device) -> tuple[str, dict[str, Any]]:
    """A run of `train.fit`: its kernel at the beginning and in the end, or why there is none."""
    name = f"{run.config.task}: {label(run.config.field)}"
    try:
        looks, energy = run_looks(run, config.run, device)
    except (NotDefinedError, TrainingError) as error:
        problem = f"not {'defined' if isinstance(error, NotDefinedError) else 'finite'}: {error}"
        print(f"\n{run.folder} ({name}): {problem}")
        return section(name, f"{run.folder}: {problem}"), {"run": str(run.folder), "problem": problem}
    names = {"at the beginning": looks[0], "in the end": looks[1]}
    keys = list(looks[0].summary)
    rows = [[when, *(number(found.summary[key]) for key in keys)] for when, found in names.items()]
    print(f"\n{run.folder} ({name})\n")
    print(as_text((["kernel", *(TITLES[key] for key in keys)], rows)))
    text = f"{run.folder}, kernels at a coarse grid of {len(looks[0].relative)} points of the signal's frame."
    body = table(["kernel", *(TITLES[key] for key in keys)], rows)
    body += chart(eigenvalue_figure(names), "eigenvalues") + chart(kernel_figure(looks), "kernels")
    if energy:
        lines: list[Line] = [
            (f"step {step:,}", list(range(len(share))), share.clamp_min(1e-12).log10().tolist())
            for step, share in energy.items()
        ]
        body += charts([("log10 of the share of the residual's energy", lines)], xlabel="periods over the signal")
    content: dict[str, Any] = {
        "run": str(run.folder),
        "kernels": {when: {**look.summary, "relative": look.relative.tolist()} for when, look in names.items()},
        "residual_energy_by_frequency": {str(step): share.tolist() for step, share in energy.items()},
    }
    return section(name, text, body), content


def exit_status(studies: list[Study]) -> int:
    """0 if anything has come of a model, or none was asked for; else as `mwt.runtime.run_program` has it: 3 where no
    model is defined, 4 where all have diverged, 1 for some of each."""
    ends = {item.outcome for item in studies}
    if not ends or "" in ends:
        return 0
    return {"not defined": 3, "not finite": 4}.get(ends.pop(), 1) if len(ends) == 1 else 1


def main(argv: list[str] | None = None) -> int:
    """Compute, print and write; see the module's text. Returns the exit status."""
    arguments = parse(argv)
    config = load_config(SpectrumConfig, arguments.config, arguments.overrides)
    encodings = [name for name in arguments.encodings.split(",") if name]
    configs = models(arguments.models, encodings, arguments.config, arguments.overrides)
    keep_freed_memory()
    device = runtime.choose_device(config.run.device)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    content: dict[str, Any] = {"config": dataclasses.asdict(config)}
    studies: list[Study] = []
    sections: list[str] = []
    metric = arguments.metric or "psnr"
    limit, about = float("inf"), ""
    if configs:
        with StopRequested() as stop:
            studies, limit = fit_models(configs, config, metric, device, stop)
            if stop.signal is not None:
                return stop.exit_status
        about = f"{len(studies)} models, {config.optim.steps:,} steps of {config.optim.name} on {config.signal.name}."
        if without := sum(bool(item.problem) for item in studies):
            about += f" {without} of them came to nothing: the last column of the table says what, their sections why."
        print(as_text(study_table(studies)))
        for item in studies:
            if item.problem:
                print(f"{item.name}: {item.problem}")
        sections, content["correlations"] = model_links(studies, metric)
        content["models"] = [item.as_json() for item in studies]
        content["held_out_from"] = None if limit == float("inf") else limit
        first = studies[0]  # what a grid of single models reads
        content["final"] = first.final
        content["first_kernel"] = first.looks[0].summary if first.looks else None
    if arguments.run:
        found = [run_section(read_fit_run(folder), config, device) for folder in arguments.run]
        sections += [body for body, _ in found]
        content["runs"] = [numbers for _, numbers in found]
    if arguments.grid:
        added, numbers = grid_links(arguments, config)
        sections += added
        content |= numbers
    arguments.out.mkdir(parents=True, exist_ok=True)
    html = page("Spectra of fields", about, studies, limit, sections, config_yaml(config))
    write_text(arguments.out / "spectrum.html", html)
    write_json(arguments.out / "result.json", content)
    print(f"\nWritten: {arguments.out}/spectrum.html ({len(html) / 2**20:.1f} MiB; open it in a browser), result.json")
    return exit_status(studies)


if __name__ == "__main__":
    run_program(main)
