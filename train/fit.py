"""Fit one signal, or many of one shape, with any field and optimizer, and leave what people can see and hear.

python -m train.fit --config configs/fit/image.yaml signal.path=photo.png field.mlp.activation.name=finer
python -m train.fit --config configs/fit/image.yaml signal.path='pictures/*.png' optim.name=muon
python -m train.fit --list                                        what configs there are
python -m train.fit --config F.yaml --print-config                the resolved configuration, no fit
python -m train.fit --config F.yaml --debug                       seconds on the CPU, through everything
python -m train.fit --resume run.dir=runs/NAME                    go on where an interrupted fit stopped

Writes RUN/result.json, metrics.jsonl, field/ (`mwt.fields.load_field`), reconstruction/, curves.png, ranks.png and
progress.gif. The signals of a folder or a glob have one shape and are fitted as one batch, each as if alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import closing
from pathlib import Path

import torch
from tqdm import tqdm

from mwt import runtime
from mwt.config_files import config_yaml, list_configs, load_config, read_options
from mwt.errors import InputError
from mwt.fields import save_field
from mwt.fit_config import FIT_DEBUG, FitConfig
from mwt.fit_report import Film, curve_figure, result, result_table
from mwt.fitting import SignalFit, fields_for
from mwt.plots import figure_png
from mwt.rank import RankTracker, rank_figure
from mwt.run_directory import open_run_directory
from mwt.runtime import StopRequested, keep_freed_memory, run_program, write_json
from mwt.signals import TASKS, Evaluation, Task, signal_paths
from mwt.tracking import MetricsLog

CONFIGS = Path(__file__).parents[1] / "configs" / "fit"
MAY_CHANGE = {"run": {"dir", "device", "threads", "checkpoint_minutes"}}
"""What a resumed fit may set otherwise."""


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
    if arguments.debug and not any(item.startswith("run.dir=") for item in overrides):
        overrides = ["run.dir=runs/debug", *overrides]
    path = arguments.config
    if arguments.resume and path is None:  # the run knows its configuration
        path = Path(load_config(FitConfig, None, overrides).run.dir) / "config.yaml"
    config = load_config(FitConfig, path, overrides)
    if not arguments.debug:
        return arguments, config
    whole = config.optim.name == "lbfgs" or (config.task in TASKS and not TASKS[config.task].subsets)
    added = [item for item in FIT_DEBUG if not (whole and item.startswith("optim.points="))]
    return arguments, load_config(FitConfig, path, [*added, *overrides])


def make_task(config: FitConfig, device: torch.device) -> Task:
    """The signals as the task reads them."""
    if config.task not in TASKS:
        raise InputError(f"task is {config.task!r}; there are {', '.join(TASKS)}.")
    kind = TASKS[config.task]
    options = dict(config.signal)
    path = options.pop("path", None)
    if not path:
        raise InputError("signal.path is missing: the file, folder or glob of the signal to fit.")
    paths = signal_paths(str(path), kind)
    if len(paths) > 1 and not kind.several:
        raise InputError(f"task={config.task} fits one signal at a time; {path} holds {len(paths)}.")
    return kind(paths, read_options(kind.Options, options, f"signal of task={config.task}"), device)


def describe(config: FitConfig, task: Task, going: SignalFit) -> None:
    """What is about to happen, in a few lines."""
    size = " x ".join(map(str, task.frame.size or ())) or f"{task.points:,} points"
    several = f"{task.count} signals at once, " if task.count > 1 else ""
    print(f"signal    {task.names[0]}{', …' * (task.count > 1)}: {several}{config.task}, {size}")
    points = (
        f"{min(config.optim.points, task.points):,} of {task.points:,}"
        if config.optim.points
        else f"all {task.points:,}"
    )
    detail = f"; {going.fields.detail}" if going.fields.detail else ""
    print(f"field     {config.field.name}: {going.fields.num_parameters:,} parameters{detail}")
    rates = ", ".join(f"{rate:.3g}" for rate in going.rates)
    print(f"fit       {config.optim.steps:,} steps of {config.optim.name} (rates {rates}), {points} points a step")
    for name, metrics in going.baselines.items():
        print(f"baseline  {name}: " + ", ".join(f"{key} {value:.4g}" for key, value in metrics.items()))
    print(f"run       {config.run.dir}" + (f", going on at step {going.step}" if going.step else ""), flush=True)


def fit(going: SignalFit, config: FitConfig, *, stop: StopRequested) -> bool:
    """Fit under a progress bar, with the running metric; saves now and then, and when stopped. Whether it is done."""
    run, metric = Path(config.run.dir), going.task.metric
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
            row = going.curve[-1]
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
    if not going.finished:
        going.save(checkpoint)
        print(
            f"\nStopped at step {going.step} of {config.optim.steps}; saved. Go on with:\n"
            f"    python -m train.fit --resume run.dir={run}",
            file=sys.stderr,
        )
    return going.finished


def conclude(going: SignalFit, config: FitConfig) -> None:
    """Write everything that a fit leaves, and say what came of it."""
    run, task, fields = Path(config.run.dir), going.task, going.fields
    save_field(fields, task.frame, run / "field")
    folder = run / "reconstruction"
    folder.mkdir(exist_ok=True)
    files = task.write(fields, folder)
    (run / "curves.png").write_bytes(figure_png(curve_figure(going.curve, task.metric)))
    if going.ranks is not None:
        (run / "ranks.png").write_bytes(figure_png(rank_figure({config.optim.name: going.ranks.rows})))
        write_json(run / "ranks.json", going.ranks.as_json())
    if config.run.film:
        Film(run / "film").write(run / "progress.gif")
    write_json(run / "result.json", result(going, config))
    (run / "checkpoint.safetensors").unlink(missing_ok=True)
    print(f"\n{result_table(going)}\n")
    print(f"Written: {run}/result.json, field/, curves.png and {', '.join(str(f.relative_to(run)) for f in files[:4])}"
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
    with StopRequested() as stop:
        task = make_task(config, device)
        fields = fields_for(config.field, task, seed=config.run.seed).to(device)
        ranks = RankTracker(fields) if config.run.ranks and fields.muon_parameters() else None
        going = SignalFit(task, fields, config.optim, config.run.seed, config.run.evaluations, ranks)
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
        describe(config, task, going)
        if not fit(going, config, stop=stop):
            return stop.exit_status
    conclude(going, config)
    return 0


if __name__ == "__main__":
    run_program(main)
