"""Fit one signal, or many, with any field and optimizer, and leave what people can see and hear.

python -m train.fit --config configs/fit/image.yaml signal.path=photo.png field.mlp.activation.name=finer
python -m train.fit --config configs/fit/image.yaml signal.path='pictures/*.png' optim.name=muon
python -m train.fit --list                                        what configs there are
python -m train.fit --config F.yaml --print-config                the resolved configuration, no fit
python -m train.fit --config F.yaml --debug                       seconds on the CPU, through everything
python -m train.fit --resume run.dir=runs/NAME                    go on where an interrupted fit stopped

Writes RUN/result.json, metrics.jsonl, field/ and best_field/ (`mwt.fields.load_field`; as the fit ended, and as each
signal was at its best), reconstruction/ of the former, curves.png, ranks.png and progress.gif.

The signals of a folder or a glob are fitted as one batch, each as if alone. Those of several shapes, such as portrait
and landscape, are one batch a shape, step by step together; their fields lie in field/SHAPE and best_field/SHAPE.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from textwrap import indent

import torch
from tqdm import tqdm

from mwt import runtime
from mwt.checkpoint import check_run_directory
from mwt.config_files import config_yaml, list_configs, load_config, read_options
from mwt.errors import InputError
from mwt.fields import save_field
from mwt.fit_config import FIT_DEBUG, FitConfig
from mwt.fit_groups import GroupedFit
from mwt.fit_report import Film, curve_figure, result, result_table, shape_folder
from mwt.fitting import SignalFit, fields_for
from mwt.muon_groups import split_parameters
from mwt.peak_memory import PeakMemory
from mwt.plots import figure_png
from mwt.rank import RankTracker, rank_figure
from mwt.run_directory import open_run_directory
from mwt.runtime import StopRequested, keep_freed_memory, run_program, write_json
from mwt.signals import TASKS, Evaluation, Task, make_tasks, signal_paths
from mwt.tracking import MetricsLog

CONFIGS = Path(__file__).parents[1] / "configs" / "fit"
MAY_CHANGE = {"run": {"dir", "device", "threads", "checkpoint_minutes", "baselines"}}
"""What a resumed fit may set otherwise."""
SHAPES = 6
"""Shapes of signals that are named before a fit."""


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, FitConfig]:
    """Arguments and the resolved configuration."""
    parser = argparse.ArgumentParser(prog="train.fit", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, help="YAML file; --list shows those that come with the project")
    parser.add_argument("--list", action="store_true", help="list the configs and leave")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and leave")
    parser.add_argument("--debug", action="store_true", help="a few small steps on the CPU through the whole program")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in run.dir")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override any value of the configuration")
    arguments = parser.parse_intermixed_args(argv)
    overrides = list(arguments.overrides)
    for item in overrides:
        given = item.removeprefix("signal=")
        if "=" not in given and "{" not in given and (given != item or Path(item).exists()):
            raise InputError(f"{item!r} is no setting; the signal to fit is given as signal.path={given}")
    if arguments.debug and not any(item.startswith("run.dir=") for item in overrides):
        overrides = ["run.dir=runs/debug", *overrides]
    path = arguments.config
    if arguments.resume and path is None:  # the run knows its configuration
        run = Path(load_config(FitConfig, None, overrides).run.dir)
        check_run_directory(run)
        path = run / "config.yaml"
    config = load_config(FitConfig, path, overrides)
    if not arguments.debug:
        return arguments, config
    whole = config.optim.name == "lbfgs" or (config.task in TASKS and not TASKS[config.task].subsets)
    added = [item for item in FIT_DEBUG if not (whole and item.startswith("optim.points="))]
    return arguments, load_config(FitConfig, path, [*added, *overrides])


def read_tasks(config: FitConfig, device: torch.device) -> dict[str, Task]:
    """The signals as the task reads them, by their shapes."""
    if config.task not in TASKS:
        raise InputError(f"task is {config.task!r}; there are {', '.join(TASKS)}.")
    kind = TASKS[config.task]
    options = dict(config.signal)
    path = options.pop("path", None)
    if not path:
        raise InputError(
            "signal.path is missing: the file, folder or glob of the signal to fit, such as signal.path=photo.png. "
            "Configs with a signal of their own: --list."
        )
    if isinstance(path, (list, dict)):
        raise InputError(f"signal.path is {path}; it is one file, a folder or a glob, such as 'photos/*.png'.")
    paths = signal_paths(str(path), kind)
    if len(paths) > 1 and not kind.several:
        raise InputError(f"task={config.task} fits one signal at a time; {path} holds {len(paths)}.")
    read = read_options(kind.Options, options, f"signal of task={config.task}, beside path")
    return make_tasks(kind, paths, read, device)


def make_fits(config: FitConfig, device: torch.device) -> GroupedFit:
    """Signals and their fields, at the first step."""
    fits = {}
    for shape, task in read_tasks(config, device).items():
        fields = fields_for(config.field, task, seed=config.run.seed).to(device)
        ranks = RankTracker(fields) if config.run.ranks and fields.muon_parameters() else None
        fits[shape] = SignalFit(
            task, fields, config.optim, config.run.seed, config.run.evaluations, ranks, config.run.baselines
        )
    return GroupedFit(fits)


def describe(config: FitConfig, going: GroupedFit) -> None:
    """What is about to happen, in a few lines."""
    first, several = going.first, len(going.names) > 1
    sizes = [
        (f"{fit.task.count} of " if len(going.fits) > 1 else "")
        + (" x ".join(map(str, fit.task.frame.size or ())) or f"{fit.task.points:,} points")
        for fit in going.fits.values()
    ]
    shown = f"{', '.join(sizes[:SHAPES])}{f' and {len(sizes) - SHAPES} more shapes' * (len(sizes) > SHAPES)}"
    many = f"{len(going.names)} signals at once, " if several else ""
    print(f"signal    {going.names[0]}{', …' * several}: {many}{config.task}, {shown}")
    fields, total = first.fields, first.task.points
    if len(going.fits) > 1:
        points = f"{config.optim.points:,}" if config.optim.points else "all"
    else:
        points = f"{min(config.optim.points, total):,} of {total:,}" if config.optim.points else f"all {total:,}"
    cost = f"{fields.num_parameters:,} parameters, {fields.macs_per_point():,.0f} multiply-adds a point"
    print(f"field     {config.field.name}: {cost}{f'; {fields.detail}' if fields.detail else ''}")
    rates = ", ".join(f"{rate:.3g}" for rate in first.rates)
    print(f"fit       {config.optim.steps:,} steps of {config.optim.name} (rates {rates}), {points} points a step")
    if config.optim.name == "muon":
        own = config.optim.muon
        print(indent(split_parameters(fields, muon_first=own.first, exclude=own.exclude).report(), " " * 10))
    print(f"run       {config.run.dir}" + (f", going on at step {going.step}" if going.step else ""), flush=True)
    for name, metrics in going.baselines.items():
        print(f"baseline  {name}: " + ", ".join(f"{key} {value:.4g}" for key, value in metrics.items()), flush=True)


def fit(going: GroupedFit, config: FitConfig, *, stop: StopRequested) -> bool:
    """Fit under a progress bar, with the running metric. Whether it is done.

    Saves now and then, when stopped, and after the last step.
    """
    run, metric = Path(config.run.dir), going.metric
    checkpoint, film = run / "checkpoint.safetensors", Film(run / "film") if config.run.film else None
    saved = time.monotonic()
    with (
        closing(MetricsLog(run / "metrics.jsonl")) as log,
        tqdm(total=config.optim.steps, initial=going.step, unit="step", dynamic_ncols=True, mininterval=0.5) as bar,
    ):
        log.truncate(0)
        for row in going.curve:  # what an interrupted fit wrote after its last checkpoint is made again
            log.write(epoch=0.0, split="signal", **row)

        def on_evaluation(found: Evaluation) -> None:
            row = going.row(-1)
            log.write(epoch=0.0, split="signal", **row)
            bar.set_postfix({metric: f"{row[metric]:.2f}", "best": f"{going.best[metric]:.2f}"})
            if film:
                film.add(going.step, found.picture)

        def on_step() -> None:
            nonlocal saved
            bar.update()
            if time.monotonic() - saved > 60 * config.run.checkpoint_minutes:
                going.save(checkpoint)
                saved = time.monotonic()

        going.run(lambda: stop.signal is not None, on_evaluation, on_step)
    going.save(checkpoint)  # also of the last step: what `conclude` writes may fail, and can then be written again
    if not going.finished:
        print(
            f"\nStopped at step {going.step} of {config.optim.steps}; saved. Go on with:\n"
            f"    python -m train.fit --resume run.dir={run}",
            file=sys.stderr,
        )
    return going.finished


def conclude(going: GroupedFit, config: FitConfig, peak_memory: int) -> None:
    """Write everything that a fit leaves, and say what came of it.

    The checkpoint goes when all is written: until then `--resume` comes back to here.
    """
    run, files = Path(config.run.dir), []
    folder = run / "reconstruction"
    folder.mkdir(exist_ok=True)
    for shape, own in going.fits.items():
        save_field(own.fields, own.task.frame, shape_folder(run / "field", shape))
        files += own.task.write(own.fields, folder)
    if config.run.curves:
        (run / "curves.png").write_bytes(figure_png(curve_figure(going.curve, going.metric)))
    if going.ranks:
        (run / "ranks.png").write_bytes(figure_png(rank_figure({config.optim.name: going.ranks})))
        write_json(run / "ranks.json", [asdict(row) for row in going.ranks])
    film = Film(run / "film") if config.run.film else None
    if film:
        film.write(run / "progress.gif")
    for shape, own in going.fits.items():  # last: from here on the fields are those of the best evaluations
        own.fields.load_state_dict(own.best.weights)
        save_field(own.fields, own.task.frame, shape_folder(run / "best_field", shape))
    cpu_seconds = round(time.process_time(), 2)
    write_json(run / "result.json", {**result(going, config), "peak_memory": peak_memory, "cpu_seconds": cpu_seconds})
    (run / "checkpoint.safetensors").unlink(missing_ok=True)
    if film:
        film.remove()
    print(f"\n{result_table(going)}\n")
    for name, shapes in going.partial().items():
        print(
            f"warning: {name} is not defined for signals of {', '.join(shapes)}: there is no mean of it.",
            file=sys.stderr,
        )
    print(f"Written: {run}/result.json, field/, best_field/ and {', '.join(str(f.relative_to(run)) for f in files[:4])}"
          + (", …" if len(files) > 4 else ""))  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Fit; see the module's text. Returns the exit status."""
    arguments, config = parse(argv)
    if arguments.list:
        for name, summary in list_configs(CONFIGS):
            print(f"{name:<32} {summary}")
        return 0
    if arguments.print_config:
        print(config_yaml(config), end="")
        return 0
    keep_freed_memory()
    device = runtime.choose_device(config.run.device)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    memory = PeakMemory(device)
    with StopRequested() as stop:
        going = make_fits(config, device)
        open_run_directory(
            config, arguments.overrides, resuming=arguments.resume, debug=arguments.debug, program="train.fit",
            may_change=MAY_CHANGE,
        )  # fmt: skip
        checkpoint = Path(config.run.dir) / "checkpoint.safetensors"
        if arguments.resume and checkpoint.is_file():
            going.restore(checkpoint)
        elif arguments.resume and (Path(config.run.dir) / "result.json").is_file():
            print(f"{config.run.dir} is finished.")
            return 0
        describe(config, going)
        if not fit(going, config, stop=stop):
            return stop.exit_status
    conclude(going, config, memory.read())
    return 0


if __name__ == "__main__":
    run_program(main)
