"""Train a classifier that reads nothing but the weights of SIRENs.

accelerate launch -m train.classify --config configs/classify/cifar10_mwt.yaml key=value ...
python -m train.classify --config configs/classify/digits.yaml
python -m train.classify --list                                   what configs there are
python -m train.classify --config F.yaml --print-config           the resolved configuration, no training
python -m train.classify --config F.yaml --debug                  seconds on the CPU, through everything
python -m train.classify --resume run.dir=runs/NAME               go on where an interrupted run stopped
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from data_pipes.augment import augment
from data_pipes.processes import available_cores
from data_pipes.read import Split, open_configured
from data_pipes.schema import DatasetInfo, read_info
from mwt import memory, runtime
from mwt.checkpoint import check_run_directory, has_checkpoint
from mwt.config import DEBUG, ClassifyConfig, model_config
from mwt.config_files import config_yaml, flat, list_configs, load_config
from mwt.errors import InputError
from mwt.memory import MemoryEstimate
from mwt.model import MetaWeightTransformer
from mwt.muon_groups import split_parameters
from mwt.observe import asked_ahead, observe
from mwt.outer_loop import OuterLoop
from mwt.rng import derived_seed
from mwt.run_directory import open_run_directory
from mwt.runtime import StopRequested, keep_freed_memory, run_program
from mwt.stages import LEARNS, begin_stage, load_field, rest_unread
from mwt.structs import Batch
from mwt.tracking import MetricsLog, last_training_table
from mwt.training_state import TrainingState

CONFIGS = Path(__file__).parents[1] / "configs" / "classify"


# ---- arguments ---------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, ClassifyConfig]:
    """Arguments and the resolved configuration."""
    parser = argparse.ArgumentParser(prog="train.classify", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, help="YAML file; --list shows those that come with the project")
    parser.add_argument("--list", action="store_true", help="list the configs and leave")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and leave")
    parser.add_argument("--debug", action="store_true", help="two small steps on the CPU through the whole program")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in run.dir, or begin if there is none"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override any value of the configuration")
    arguments = parser.parse_intermixed_args(argv)
    overrides = list(arguments.overrides)
    if arguments.debug:
        own_dir = any(item.startswith("run.dir=") for item in overrides)
        overrides = [*DEBUG, *([] if own_dir else ["run.dir=runs/debug"]), *overrides]
    path = arguments.config
    if arguments.resume and path is None:  # the run knows its configuration
        run = Path(load_config(ClassifyConfig, None, overrides).run.dir)
        check_run_directory(run)
        path = run / "config.yaml"
    return arguments, load_config(ClassifyConfig, path, overrides)


# ---- what a run is made of ---------------------------------------------------------------------------------------


def open_data(config: ClassifyConfig, info: DatasetInfo, accelerator: Accelerator) -> tuple[Split, Split | None]:
    """The training split and the monitored one, if any."""
    data, world = config.data, accelerator.num_processes
    if data.batch_size % (world * config.optim.accumulate):
        raise InputError(
            f"data.batch_size is {data.batch_size}, which {world} process(es) times {config.optim.accumulate} micro "
            "batches (optim.accumulate) cannot share evenly; choose a multiple."
        )
    train = open_configured(data, data.train_split, accelerator.device)
    if train.steps(data.batch_size // world, drop_last=True, world=world) == 0:
        raise InputError(
            f"The split {train.name!r} has {len(train)} samples, fewer than one batch of {data.batch_size}; "
            "choose a smaller data.batch_size."
        )
    monitored = data.monitor_split or ("val" if "val" in info.splits else None)
    return train, open_configured(data, monitored, accelerator.device) if monitored else None


def prepare_batch(batch: Batch, config: ClassifyConfig, epoch: int) -> Batch:
    """The batch as training sees it: augmented; distances to surfaces are asked for."""
    seed = config.run.seed
    batch = augment(batch, config.data.augment, seed=seed, epoch=epoch, padding=config.data.crop_padding)
    return asked_ahead(batch, config.inner_loop, seed=seed, epoch=epoch) if batch.is_surface else batch


def has_core_to_spare(device: torch.device) -> bool:
    """Whether something can be made beside a step at no cost to it. A GPU would do both in turn; on a CPU whose cores
    all work on the step, torch's waiting threads slow both (RESULTS.md, Reading)."""
    return device.type == "cpu" and torch.get_num_threads() < available_cores()


def build(
    config: ClassifyConfig, info: DatasetInfo, accelerator: Accelerator, *, resuming: bool
) -> tuple[OuterLoop, Split, Batch]:
    """Data, model, optimizer and schedule, everything at its beginning; the split to train on, and one signal of it."""
    device = accelerator.device
    train, monitored = open_data(config, info, accelerator)
    example = prepare_batch(next(train.batches(batch_size=1)), config, epoch=0)
    observe(example, config.inner_loop, seed=0)  # refuses signals that the sampling cannot take
    torch.manual_seed(derived_seed(config.run.seed, "initialisation"))
    model = MetaWeightTransformer(model_config(config, info.facts)).to(device)
    begin_stage(model, config.run.stage)
    rest_unread(model)
    if config.run.init_from and not (resuming and has_checkpoint(Path(config.run.dir))):  # a checkpoint has it already
        load_field(model, config.run.init_from)
    world = accelerator.num_processes
    steps_per_epoch = train.steps(config.data.batch_size // world, drop_last=True, world=world)
    state = TrainingState.begin(model, config, steps_per_epoch=steps_per_epoch, scaler=accelerator.scaler)
    state.locate = train.locate
    loop = OuterLoop(
        config=config,
        accelerator=accelerator,
        train=train,
        prepare=lambda batch, epoch: prepare_batch(batch, config, epoch),
        prepare_ahead=example.is_surface and has_core_to_spare(device),
        monitored=monitored,
        may_choose=monitored is not None and monitored.name == "val" != config.data.test_split,
        model=model,
        forward=model,
        optimizer=state.optimizer,
        state=state,
    )
    return loop, train, example


def train(run: OuterLoop, stop: StopRequested) -> int:
    """Train to the end, or until stopped, under a progress bar. Returns the exit status."""
    batch_size, main_process = run.config.data.batch_size, run.accelerator.is_main_process
    with tqdm(
        total=run.total_steps * batch_size,
        initial=run.state.step * batch_size,
        unit="image",
        unit_scale=True,
        disable=not main_process,
        dynamic_ncols=True,
        smoothing=0.05,
        mininterval=0.5,
    ) as bar:

        def on_step(numbers: dict[str, float] | None) -> None:
            bar.update(batch_size)
            if numbers:
                bar.set_postfix(loss=f"{numbers['classification_loss']:.3f}", accuracy=f"{numbers['accuracy']:.3f}")

        finished = run.run(stop, on_step)
    if finished:
        return 0
    if main_process:
        print(
            f"\nStopped at step {run.state.step} of {run.total_steps}; saved. Go on with:\n"
            f"    python -m train.classify --resume run.dir={run.directory}",
            file=sys.stderr,
        )
    return stop.exit_status


# ---- what the program says ---------------------------------------------------------------------------------------


def estimate_memory(run: OuterLoop, example: Batch) -> MemoryEstimate | None:
    """What a step will need in this process."""
    config = run.config
    return memory.estimate(
        run.model.config,
        example,
        batch_size=config.data.batch_size // run.accelerator.num_processes // config.optim.accumulate,
        precision=config.run.precision,
        device=run.accelerator.device,
        stage=config.run.stage,
    )


def describe(run: OuterLoop, split: Split, need: MemoryEstimate | None, *, compiled: bool) -> None:
    """What is about to happen, in a few lines."""
    config = run.config
    counts = {name: sum(p.numel() for p in params) for name, params in run.model.parameter_groups().items()}
    kept = {"resident": "kept on the device", "indexed": "read as needed", "stream": "streamed"}[split.reader]
    classes = len(split.facts.classes)
    print(f"data      {config.data.path}: {len(split)} signals in {split.name!r}, {classes} classes, {kept}")
    world = run.accelerator.num_processes
    if left := split.dropped(config.data.batch_size // world, world):
        print(f"          {left} of them, others each time, fill no batch and are left out of an epoch")
    field = "SIREN" if config.field.name == "siren" else config.field.name
    print(
        f"model     {config.variant}: {counts['siren'] + counts['alpha']:,} parameters in {field} and alpha, "
        f"{counts['reader']:,} in the reader"
    )
    print(
        f"training  {config.optim.epochs} epochs, {run.total_steps:,} steps of {config.data.batch_size} on "
        f"{run.accelerator.device}, {config.run.precision}{', compiled' if compiled else ''}"
    )
    if config.optim.name == "muon":
        print("          " + " and ".join(split_parameters(run.model).summary()))
    if config.run.stage != "joint" or config.run.init_from:
        begun = f", begun with the SIREN and alpha of {config.run.init_from}" if config.run.init_from else ""
        print(f"stage     {config.run.stage}: {' and '.join(LEARNS[config.run.stage])} learn{begun}")
    if run.monitored is None:
        print("          no validation split: nothing is evaluated while training, and no `best` is chosen")
    device = run.accelerator.device
    room = memory.available(device, processes=world)
    print(f"memory    {need.describe(room) if need else 'not known beforehand'}")
    if need and (warning := need.warning(room)):
        print(f"warning: {warning}", file=sys.stderr)
    print(f"run       {run.directory}" + (f", going on at step {run.state.step}" if run.state.step else ""), flush=True)


def conclude(run: OuterLoop) -> None:
    """What came of it, and what to do next."""
    if table := last_training_table(run.directory / "metrics.jsonl"):
        print(f"\n{table}")
    print(f"\nEvaluate with:  python -m eval.classify --run {run.directory}")


def main(argv: list[str] | None = None) -> int:
    """Train; see the module's text. Returns the exit status."""
    arguments, config = parse(argv)
    if arguments.list:
        for name, summary in list_configs(CONFIGS):
            print(f"{name:<32} {summary}")
        return 0
    if arguments.print_config:
        print(config_yaml(config), end="")
        return 0

    keep_freed_memory()
    runtime.end_with_launcher()
    runtime.check_launcher(config.run.precision)
    runtime.check_trackers(config.run.trackers)
    device = runtime.choose_device(config.run.device)
    if config.run.precision == "fp16" and device.type == "cpu":
        raise InputError("run.precision=fp16 needs a CUDA device; use bf16 or fp32 on the CPU.")
    if config.run.threads:
        torch.set_num_threads(config.run.threads)

    info = read_info(config.data.path, schemes=config.data.schemes)
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=runtime.ACCELERATE_PRECISION[config.run.precision],
        log_with=list(config.run.trackers) or None,
        project_dir=config.run.dir,
    )
    run, split, example = build(config, info, accelerator, resuming=arguments.resume)
    with ExitStack() as stack:
        if accelerator.is_main_process:
            open_run_directory(config, arguments.overrides, resuming=arguments.resume, debug=arguments.debug)
            run.state.log = stack.enter_context(closing(MetricsLog(run.directory / "metrics.jsonl")))
        accelerator.wait_for_everyone()
        if arguments.resume:
            run.state.restore()
        need = estimate_memory(run, example)
        kept = need.activations * config.optim.accumulate if need else 0
        compiled = runtime.compile_pays(config.run.compile, device, run.total_steps, kept)
        if compiled:
            run.model.compile_parts()
        run.forward, run.optimizer = accelerator.prepare(run.model, run.optimizer)
        if config.run.trackers:
            accelerator.init_trackers("meta-weight-transformer", config=flat(config))
        if accelerator.is_main_process:
            describe(run, split, need, compiled=compiled)
        status = train(run, stack.enter_context(StopRequested()))
    for part in (run.train, run.monitored):
        if part is not None:
            part.bad.gather()
            if accelerator.is_main_process and (skipped := part.bad.report()):
                print(f"warning: {skipped}", file=sys.stderr)
    if config.run.trackers:
        accelerator.end_training()
    if status == 0 and accelerator.is_main_process:
        conclude(run)
    return status


if __name__ == "__main__":
    run_program(main)
