"""Fit an independent SIREN to every image of a data set, and write them as a weight set.

python -m train.fit_set --config configs/fit_set/digits.yaml                      key=value ...
accelerate launch --multi_gpu --num_processes 4 -m train.fit_set --config …       the same set, each its own shards
python -m train.fit_set --list                                                    what configs there are
python -m train.fit_set --config F.yaml --print-config                            the resolved configuration
python -m train.fit_set --config F.yaml --debug                                   seconds on the CPU

This is how the weight-space literature makes its data (Navon et al. 2023, Zhou et al. 2023); `eval.export` writes the
fits of a meta-learned SIREN instead. What becomes of a network depends on the configuration and its image alone. Killed
in any way, the same command goes on with the shards that are missing. The format: docs/weight_sets.md.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from data_pipes.schema import DatasetInfo, read_info
from data_pipes.weight_make import Fitted, Progress, make_set, patient_accelerator
from data_pipes.weight_manifest import Description, Manifest, describe_source
from data_pipes.weight_write import WeightSetWriter
from data_pipes.weights import load_weight_set
from mwt import runtime
from mwt.config_files import config_yaml, list_configs, load_config
from mwt.errors import InputError
from mwt.fit_many import fit_many, initial_weights, slots_for, squared_errors
from mwt.fit_set_config import DEBUG, FitSetConfig, NetworkConfig
from mwt.observe import grid, pixels
from mwt.rng import derived_seed
from mwt.runtime import keep_freed_memory, run_program
from mwt.structs import Batch
from mwt.weight_space import Layout, Weights

CONFIGS = Path(__file__).parents[1] / "configs" / "fit_set"
DEBUG_OUT = "runs/debug_set"
SINE_SAVES = 4e-9
"""Seconds that compiling saves for each sine of a step, about, on a CPU."""


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, FitSetConfig]:
    """Arguments and the resolved configuration."""
    parser = argparse.ArgumentParser(prog="train.fit_set", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, help="YAML file; --list shows those that come with the project")
    parser.add_argument("--list", action="store_true", help="list the configs and leave")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and leave")
    parser.add_argument("--debug", action="store_true", help="a few short fits on the CPU through the whole program")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override any value of the configuration")
    arguments = parser.parse_intermixed_args(argv)
    overrides = list(arguments.overrides)
    if arguments.debug:
        overrides = [*DEBUG, f"run.out={DEBUG_OUT}", *overrides]
    return arguments, load_config(FitSetConfig, arguments.config, overrides)


# ---- what is made ------------------------------------------------------------------------------------------------


def splits_to_fit(info: DatasetInfo, config: FitSetConfig) -> dict[str, int]:
    """Splits and how many of their signals.

    Raises:
        InputError: signals that are no images, no such split, one without signals, or copies that would be alike.
    """
    if info.signal != "image":
        raise InputError(f"train.fit_set fits images; the signals of {config.data.path} are {info.signal}.")
    if config.data.augment in ("coords", "points"):
        raise InputError(
            f"data.augment={config.data.augment} moves points, which all networks share here; use crop, crop_flip or "
            "affine_flip."
        )
    if config.run.copies and config.data.augment == "none" and config.network.init == "shared":
        raise InputError(
            "run.copies of the same image from the same weights would all be alike; set data.augment or "
            "network.init=random."
        )
    names = config.run.splits or [name for name, split in info.splits.items() if split.count]
    counts = {name: min(info.split(name).count, config.data.limit or sys.maxsize) for name in names}
    if not counts or min(counts.values()) < 1:
        raise InputError(f"There is nothing to fit: {config.data.path} has no samples in {', '.join(names)}.")
    return counts


def describe(config: FitSetConfig, info: DatasetInfo) -> Description:
    """The set as it is to be."""
    network, run, data = config.network, config.run, config.data
    return Description(
        name=info.name,
        signal=info.facts,
        layout=Layout(
            sizes=(2, *network.hidden, info.channels),
            omegas=(network.omega,) * len(network.hidden),
            shared_output=False,
        ),
        values="phi",
        has_base=network.init == "shared",
        steps=1,
        source=describe_source(info, data),
        fit={"method": "independent", "seed": run.seed, "network": asdict(network), **asdict(config.fit)},
        train_split=data.train_split,
        copies=run.copies,
        augment={"kind": data.augment, "padding": data.crop_padding, "seed": derived_seed(run.seed, "fit_set")},
        config=asdict(config),
    )


def begin(config: FitSetConfig, layout: Layout, split: str, positions: Tensor, copy: int) -> Tensor:
    """The weights [B, W] that fits begin with, in the network's own convention."""
    network, seed = config.network, config.run.seed
    scheme = "dws" if network.convention == "dws" else "sitzmann"
    if network.init == "shared":
        one = initial_weights(layout, torch.zeros_like(positions[:1]), seed=seed, scheme=scheme)
        return one.expand(len(positions), -1)
    own = derived_seed(seed, f"networks of {split}")
    return initial_weights(layout, positions, seed=own, copy=copy, scheme=scheme)


def to_native(network: NetworkConfig, weights: Weights) -> Weights:
    """The same functions as networks that say values in [-1, 1] at (y, x); exact."""
    if network.convention == "nfn":
        return weights
    return Weights(
        (weights.weights[0].flip(-1), *weights.weights[1:-1], 2 * weights.weights[-1]),
        (*weights.biases[:-1], 2 * weights.biases[-1]),
    )


# ---- fitting -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Fitter:
    """What fits a batch of signals."""

    config: FitSetConfig
    layout: Layout
    compiled: bool

    def __call__(self, batch: Batch, split: str, copy: int, progress: Progress) -> Fitted:
        """Networks in the native convention, and losses [B, 2] on values in [-1, 1] before and after."""
        assert batch.images is not None
        config, network = self.config, self.config.network
        coords, values, peak = grid(*batch.images.shape[-2:], device=batch.images.device), pixels(batch.images), 2.0
        if network.convention == "dws":
            coords, values, peak = coords.flip(-1), values / 2, 1.0
        start = begin(config, self.layout, split, batch.positions, copy)
        fits = fit_many(
            self.layout, start, coords, values, config.fit, keys=batch.positions * (1 + config.run.copies) + copy,
            seed=derived_seed(config.run.seed, f"points of {split}"), peak=peak, slots=config.run.slots,
            compiled=self.compiled, on_done=progress.add,
        )  # fmt: skip
        before = squared_errors(self.layout, Weights.unflatten(start, self.layout), coords, values)
        losses = torch.stack([before, fits.error], dim=1) * (2 / peak) ** 2
        return Fitted(weights=to_native(network, fits.weights), losses=losses, steps=fits.steps)


# ---- the program -------------------------------------------------------------------------------------------------


def pays(config: FitSetConfig, info: DatasetInfo, writer: WeightSetWriter, device: torch.device) -> bool:
    """Whether steps are compiled: for the whole set, as compiled steps round otherwise.

    So neither the number of processes nor what is left after an interruption changes what becomes of a network.
    """
    points = config.fit.points or (info.height or 28) * (info.width or 28)
    slots = config.run.slots or slots_for(points, device)
    steps = sum(task.count for task in writer.tasks) * config.fit.steps // slots
    saved = slots * points * sum(config.network.hidden) * SINE_SAVES  # a step
    return runtime.compile_pays(config.run.compile, device, steps, int(saved / runtime.COMPILING_SAVES))


def announce(config: FitSetConfig, writer: WeightSetWriter, counts: dict[str, int], device: torch.device) -> None:
    """What is about to happen, in a few lines."""
    fit, network, layout = config.fit, config.network, writer.description.layout
    copies = f", {config.run.copies} copies more of each of {config.data.train_split!r}" if config.run.copies else ""
    print(f"data      {config.data.path}: " + ", ".join(f"{n:,} in {name!r}" for name, n in counts.items()) + copies)
    print(f"networks  {layout}: {layout.count:,} numbers each, omega {network.omega:g}, {network.init} "
          f"initialisation, convention of {network.convention}")  # fmt: skip
    until = f"until {fit.target_psnr:g} dB, at most {fit.steps:,} steps" if fit.target_psnr else f"{fit.steps:,} steps"
    print(f"fitting   {fit.optimizer}, rate {fit.lr:g}, {fit.schedule}; {until}; on {device}")
    if not writer.complete:
        print(f"disk      {writer.room}")
    done = len(writer.tasks) - len(writer.missing())
    begun = f"; {done} are there already" if done and not writer.complete else ""
    state = "complete already" if writer.complete else f"{len(writer.tasks)} shards{begun}"
    print(f"out       {writer.out}: {state}", flush=True)


def show(manifest: Manifest, target: float | None) -> None:
    """What has been written, as a table."""
    print(f"\n{'split':<8} {'networks':>9} {'PSNR':>9} {'least':>9} {'reached':>8} {'steps':>7}")
    for name in manifest.splits:
        networks = load_weight_set(manifest.folder, name, check=False)
        psnr, steps = networks.column("psnr"), networks.column("steps")
        reached = "-" if target is None else f"{float((psnr >= target).float().mean()):.1%}"
        print(f"{name:<8} {len(networks):>9,} {float(psnr.mean()):>6.2f} dB {float(psnr.min()):>6.2f} dB {reached:>8} "
              f"{float(steps.float().mean()):>7.0f}")  # fmt: skip
    if manifest.left_out:
        print(f"warning: {manifest.left_out}", file=sys.stderr)
    print(f"\nWritten: {manifest.folder}\nCheck it with:  python -m data_pipes.verify {manifest.folder}")


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
    runtime.end_with_launcher()
    runtime.check_launcher("fp32")
    device = runtime.choose_device(config.run.device)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    accelerator = patient_accelerator(cpu=device.type == "cpu")
    if arguments.debug and config.run.out == DEBUG_OUT and accelerator.is_main_process:
        shutil.rmtree(DEBUG_OUT, ignore_errors=True)
    info = read_info(config.data.path, schemes=config.data.schemes)
    counts = splits_to_fit(info, config)
    description = describe(config, info)
    base = None
    if description.has_base:
        begun = begin(config, description.layout, config.data.train_split, torch.zeros(1, dtype=torch.int64), 0)
        base = to_native(config.network, Weights.unflatten(begun, description.layout))
    networks = config.run.shard_networks
    writer = WeightSetWriter(
        config.run.out, description, counts, base=base, batch=min(networks, 1024) // (1 + config.run.copies) or 1,
        shard_bytes=networks * description.network_bytes, main=accelerator.is_main_process,
    )  # fmt: skip
    device, compiled = accelerator.device, pays(config, info, writer, accelerator.device)
    fitter = Fitter(config=config, layout=writer.description.layout, compiled=compiled)
    manifest = make_set(writer, config.data, fitter, accelerator, lambda: announce(config, writer, counts, device))
    if manifest is not None:
        show(manifest, config.fit.target_psnr)
    return 0


if __name__ == "__main__":
    run_program(main)
