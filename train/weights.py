"""Train a classifier on a set of fitted networks: the second of two stages, without any fitting.

python -m train.weights --config configs/weights/digits.yaml data.path=SET key=value ...
python -m train.weights --config F.yaml reader.name=mlp           another reader of mwt.readers
python -m train.weights --list                                    what configs there are
python -m train.weights --config F.yaml --print-config            the resolved configuration, no training
python -m train.weights --config F.yaml --debug                   seconds on the CPU, through everything
python -m train.weights --resume run.dir=runs/NAME                go on where an interrupted run stopped
python -m train.weights --evaluate run.dir=runs/NAME data.test_split=val

At the end, and with --evaluate, the test split is read with the checkpoint `best`, or `last` where nothing is held out
to choose it on: RUN/eval/classify.json (of another split, set or data.limit than the run's: classify_SPLIT.json).
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from data_pipes.weight_examples import Part, choose_networks
from data_pipes.weights import WeightSet
from mwt import runtime
from mwt.checkpoint import check_run_directory
from mwt.config_files import config_yaml, list_configs, load_config
from mwt.errors import InputError
from mwt.evaluation import Classification
from mwt.metrics import confusion_matrix
from mwt.observe import grid
from mwt.peak_memory import PeakMemory
from mwt.reader_training import ReaderTraining, Sample, evaluate_reader
from mwt.readers import Reader, load_reader, make_reader
from mwt.readers.saved import checkpoint_folder
from mwt.rng import derived_seed, uniform
from mwt.run_directory import open_run_directory
from mwt.runtime import StopRequested, keep_freed_memory, run_program, write_json
from mwt.symmetry import WeightAugmentation, augment, permute_neurons, random_permutations
from mwt.tracking import MetricsLog
from mwt.weight_space import Weights
from mwt.weights_config import DEBUG, WeightsAugmentConfig, WeightsConfig

CONFIGS = Path(__file__).parents[1] / "configs" / "weights"


# ---- arguments ---------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, WeightsConfig]:
    """Arguments and the resolved configuration."""
    parser = argparse.ArgumentParser(prog="train.weights", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, help="YAML file; --list shows those that come with the project")
    parser.add_argument("--list", action="store_true", help="list the configs and leave")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and leave")
    parser.add_argument("--debug", action="store_true", help="two small steps on the CPU through the whole program")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in run.dir")
    parser.add_argument("--evaluate", action="store_true", help="evaluate the reader in run.dir, train nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override any value of the configuration")
    arguments = parser.parse_intermixed_args(argv)
    overrides = list(arguments.overrides)
    if arguments.debug:
        own_dir = any(item.startswith("run.dir=") for item in overrides)
        overrides = [*DEBUG, *([] if own_dir else ["run.dir=runs/debug"]), *overrides]
    path = arguments.config
    if (arguments.resume or arguments.evaluate) and path is None:  # the run knows its configuration
        run = Path(load_config(WeightsConfig, None, overrides).run.dir)
        check_run_directory(run)
        path = run / "config.yaml"
        if arguments.evaluate:
            overrides = ["run.device=auto", *overrides]
    return arguments, load_config(WeightsConfig, path, overrides)


# ---- what a run is made of ---------------------------------------------------------------------------------------


def make_augmentation(options: WeightsAugmentConfig, part: Part, seed: int) -> Any:
    """The function that changes networks at a step, or None where nothing is on.

    Raises:
        InputError: something that these networks cannot take.
    """
    if not options.any:
        return None
    if part.images is not None:
        raise InputError("augment changes networks; this reader reads images. Leave it out.")
    if options.permute and part.set.values == "delta":
        raise InputError("augment.permute is for whole networks; set data.values=phi, or leave it out.")
    nothing = {"translation": 0.0, "rotation": 0.0, "scaling": 0.0, "noise": 0.0, "dropout": 0.0}
    given = {name: value for name, value in asdict(options).items() if name != "permute"}
    disturb = {name: given[name] for name in ("noise", "dropout")}
    move = WeightAugmentation(**{**given, "noise": 0.0, "dropout": 0.0})
    change = WeightAugmentation(**{**nothing, **disturb})

    def changed(sample: Sample, step: int) -> Sample:
        assert isinstance(sample.inputs, Weights)
        generator = torch.Generator().manual_seed(derived_seed(seed, "augment", step))
        phi = augment(part.phi(sample.inputs), generator, move)
        if options.permute:
            orders = random_permutations(part.set.layout, generator, len(sample.labels))
            phi = permute_neurons(phi, tuple(order.to(part.device) for order in orders))
        return Sample(augment(part.delta(phi), generator, change), sample.labels, phi)

    return changed


def make_coords(config: WeightsConfig, part: Part) -> Any:
    """Where the first phase compares fields at a step: the pixels, or random places where there are too many."""
    signal, most = part.set.manifest.signal, config.optim.pretrain_points
    if signal.height and signal.width and signal.height * signal.width <= most:
        all_pixels = grid(signal.height, signal.width, device=part.device)
        return lambda step: all_pixels
    dims, positions = part.set.layout.coordinate_dims, torch.arange(most, device=part.device)
    return lambda step: uniform(positions, dims, seed=config.run.seed, purpose="coords", epoch=step) * 2 - 1


def build(config: WeightsConfig, device: torch.device) -> ReaderTraining:
    """Networks, reader, optimizer and schedule, everything at its beginning."""
    data, images = config.data, config.reader.name == "pixel_cnn"
    part = Part(config, data.train_split, device, images=images)
    part.set.manifest.split(data.test_split)  # after the training it would be too late
    if images:
        Part(config, data.test_split, device, images=True)
    torch.manual_seed(derived_seed(config.run.seed, "initialisation"))
    reader = make_reader(config.reader, layout=part.set.layout, classes=len(part.set.classes)).to(device)
    if config.optim.pretrain_epochs and not reader.pretrains:
        raise InputError(f"reader.name={config.reader.name} has no first phase; set optim.pretrain_epochs=0.")
    if data.batch_size == 1 and any(isinstance(module, nn.BatchNorm1d) for module in reader.modules()):
        raise InputError(f"reader.name={config.reader.name} has batch norm; data.batch_size must be 2 or more.")
    if part.set.values == "delta" and getattr(reader.options, "probes", None):
        raise InputError(
            "reader.options.probes asks the networks for their values, and offsets draw nothing; set data.values=phi, "
            "or reader.options.probes=0."
        )
    places, held = choose_networks(config, part)
    if reader.standardise is not None:
        reader.learn_statistics(*part.statistics(places))
    reader.facts = {
        "data": str(data.path), "values": part.set.values, "classes": list(part.set.classes),
        "set": part.set.manifest.fingerprint,
    }  # fmt: skip
    if part.set.values == "delta":
        reader.facts["base"] = part.set.base_checksum
    monitored = part.examples(held, name="val") if len(held) else None
    if data.val_split is not None and data.val_split == data.test_split:
        raise InputError(
            f"data.val_split and data.test_split are both {data.test_split!r}: `best` would be chosen on what it is "
            "tested on. Set data.holdout instead of data.val_split."
        )
    there = "val" in part.set.manifest.splits and data.test_split != "val" and not data.holdout
    name = data.val_split or ("val" if there else None)
    if name:
        val = Part(config, name, device, images=images)
        monitored = val.examples(torch.arange(len(val.set))[: data.limit], name=name)
    return ReaderTraining(
        config=config,
        reader=reader,
        train=part.examples(places, name=data.train_split, whole=bool(config.optim.pretrain_epochs)),
        monitored=monitored,
        classes=part.set.classes,
        augment=make_augmentation(config.augment, part, config.run.seed),
        coords=make_coords(config, part) if config.optim.pretrain_epochs else None,
    )


def train(run: ReaderTraining, stop: StopRequested) -> int:
    """Train to the end, or until stopped, under a progress bar. Returns the exit status."""
    size = run.config.data.batch_size
    with tqdm(
        total=run.total_steps * size, initial=run.step * size, unit="network", unit_scale=True, dynamic_ncols=True,
        smoothing=0.05, mininterval=0.5,
    ) as bar:  # fmt: skip

        def on_step(numbers: dict[str, float] | None) -> None:
            bar.update(size)
            if numbers:
                shown = {key: f"{numbers[key]:.3f}" for key in numbers if key.endswith("loss") or key == "accuracy"}
                bar.set_postfix(shown)

        finished = run.run(stop, on_step)
    if finished:
        return 0
    print(
        f"\nStopped at step {run.step} of {run.total_steps}; saved. Go on with:\n"
        f"    python -m train.weights --resume run.dir={run.directory}",
        file=sys.stderr,
    )
    return stop.exit_status


# ---- what came of it ---------------------------------------------------------------------------------------------


def check_fits(reader: Reader, networks: WeightSet) -> None:
    """Refuse networks that the reader was not trained for.

    Raises:
        InputError: another layout, other classes, weights where offsets were read, or offsets from another base.
    """
    for what, theirs, ours in (
        ("layout", f"{networks.layout}, omegas {networks.layout.omegas}",
         f"{reader.layout}, omegas {reader.layout.omegas}"),
        ("values", networks.values, reader.facts["values"]),
        ("classes", list(networks.classes), reader.facts["classes"]),
    ):  # fmt: skip
        if theirs != ours:
            raise InputError(f"The networks of {networks.path} do not fit the reader: {what} {theirs}, trained {ours}.")
    same = reader.facts["set"] == networks.manifest.fingerprint
    if networks.values == "delta" and not same and reader.facts.get("base") != networks.base_checksum:
        raise InputError(
            f"The offsets of {networks.path} are from another base than those that the reader was trained on, so they "
            "mean other networks to it. Export both sets with one model, or train on whole networks (data.values=phi)."
        )


def evaluate(config: WeightsConfig, device: torch.device, trained: WeightsConfig, memory: PeakMemory) -> dict[str, Any]:
    """Read the test split with the best checkpoint, and write what came of it.

    Args:
        trained: the configuration of the run; `config` may name another split or set.
        memory: of the whole program.
    """
    run = Path(config.run.dir)
    folder = checkpoint_folder(run)
    reader = load_reader(folder, device)
    config = replace(config, reader=reader.config, data=replace(config.data, values=reader.facts["values"]))
    part = Part(config, config.data.test_split, device, images=reader.reads_images)
    check_fits(reader, part.set)
    places = torch.arange(len(part.set))[: config.data.limit]
    began = time.perf_counter()
    result = evaluate_reader(
        reader, part.examples(places, name=config.data.test_split), part.set.classes,
        batch_size=config.run.eval_batch_size, precision=config.run.precision,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    document = {
        **result.summary(), "per_class": result.per_class(), "split": config.data.test_split,
        "reader": reader.config.name, "parameters": sum(p.numel() for p in reader.parameters()),
        "seconds": seconds, "networks_per_second": len(places) / seconds, "data": config.data.path,
        "values": reader.facts["values"], "step": int(folder.name.rpartition("-")[2]), "classes": list(result.classes),
        "confusion": confusion(result), "precision": config.run.precision, "device": str(device),
        "peak_memory_gb": memory.read() / 1e9,
    }  # fmt: skip
    differs = any(getattr(config.data, key) != getattr(trained.data, key) for key in ("test_split", "path", "limit"))
    name = f"classify_{config.data.test_split}.json" if differs else "classify.json"
    (run / "eval").mkdir(exist_ok=True)
    write_json(run / "eval" / name, document)
    return {**document, "file": str(run / "eval" / name)}


def confusion(result: Classification) -> list[list[int]]:
    """Counts; rows are true classes, columns predicted ones."""
    return confusion_matrix(result.predicted, result.labels, len(result.classes)).tolist()


def describe(run: ReaderTraining) -> None:
    """What is about to happen, in a few lines."""
    config, reader = run.config, run.reader
    held = f"{len(run.monitored)} in {run.monitored.name!r} to choose `best` on" if run.monitored else "none held out"
    print(f"data      {config.data.path}: {len(run.train)} networks {reader.layout} in {run.train.name!r}, {held}")
    print(f"reader    {config.reader.name}: {sum(p.numel() for p in reader.parameters()):,} parameters, reads "
          f"{'images' if reader.reads_images else reader.facts['values']}, input {config.reader.input}")  # fmt: skip
    if warning := scale_warning(reader):
        print(f"warning: {warning}", file=sys.stderr)
    first = f"{config.optim.pretrain_epochs} epochs on the fields, then " if config.optim.pretrain_epochs else ""
    print(f"training  {first}{config.optim.epochs} epochs, {run.total_steps:,} steps of {config.data.batch_size}")
    print(f"memory    {run.train.held}")
    print(f"run       {run.directory}" + (f", going on at step {run.step}" if run.step else ""), flush=True)


def scale_warning(reader: Reader) -> str | None:
    """A sentence where the factor that is meant for small offsets multiplies whole networks, and something learns."""
    factor, learns = reader.config.token_scale, any(True for _ in reader.parameters())
    if reader.facts["values"] != "phi" or reader.config.input != "scale" or not factor or not learns:
        return None
    if reader.reads_images:
        return None
    return (
        f"reader.input=scale multiplies what is read by {factor:g}, which suits offsets; these are whole networks "
        "(phi), whose weights are far larger. Set reader.input=standardise, or data.values=delta where the set has a "
        "base."
    )


def show(document: dict[str, Any]) -> None:
    """The numbers as a table for people."""
    width = max(5, *(len(name) for name in document["classes"]))
    print(f"\n{'class':<{width}} {'count':>7} {'accuracy':>9} {'precision':>10}")
    for name, row in document["per_class"].items():
        numbers = ["-" if row[key] is None else f"{row[key]:.2%}" for key in ("accuracy", "precision")]
        print(f"{name:<{width}} {row['count']:>7} {numbers[0]:>9} {numbers[1]:>10}")
    print(
        f"\n{document['reader']} on {document['split']!r}: accuracy {document['accuracy']:.2%}, calibration error "
        f"{document['ece']:.4f}, {document['count']} networks, {document['parameters']:,} parameters (step "
        f"{document['step']})\nWritten: {document['file']}"
    )


def main(argv: list[str] | None = None) -> int:
    """Train; see the module's text. Returns the exit status."""
    arguments, config = parse(argv)
    if arguments.list:
        for name, summary in list_configs(CONFIGS):
            print(f"{name:<16} {summary}")
        return 0
    if arguments.print_config:
        print(config_yaml(config), end="")
        return 0

    keep_freed_memory()
    device = runtime.choose_device(config.run.device)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    memory = PeakMemory(device)
    if arguments.evaluate:
        stored = load_config(WeightsConfig, Path(config.run.dir) / "config.yaml")
        show(evaluate(config, device, stored, memory))
        return 0
    run = build(config, device)
    open_run_directory(
        config, arguments.overrides, resuming=arguments.resume, debug=arguments.debug, program="train.weights"
    )
    with closing(MetricsLog(run.directory / "metrics.jsonl")) as log, StopRequested() as stop:
        run.log = log
        if arguments.resume:
            run.restore()
        describe(run)
        status = train(run, stop)
    if status == 0:
        show(evaluate(config, device, config, memory))
    return status


if __name__ == "__main__":
    run_program(main)
