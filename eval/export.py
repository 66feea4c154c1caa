"""Export fitted SIRENs: a set of networks on disk, one for every signal of a run's data, with labels and statistics.

    python -m eval.export --run RUN --out DIR                          all splits, offsets from the base, fp32
    python -m eval.export --run RUN --out DIR --values phi --dtype fp16
    python -m eval.export --run RUN --out DIR --copies 4               and four augmented copies of each training image
    python -m eval.export --run RUN --out DIR --format nfn --val 5000  and the same as a tree for nfn's own loader
    python -m eval.export --run builtin:digits --out DIR               a model that comes with the package, or a folder
    accelerate launch --multi_gpu --num_processes 4 -m eval.export …   the same set, each process its own shards

The format and how to read it: docs/weight_sets.md. Deterministic: subsets of points depend on a signal's position
alone, copies on (run.seed, number of the copy, position). Killed in any way, the same command goes on with the shards
that are missing; DIR is there when all is.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from data_pipes.convert import convert
from data_pipes.foreign import FORMATS, check_format
from data_pipes.foreign_plan import check_val, plan
from data_pipes.schema import DatasetInfo, read_info
from data_pipes.weight_make import Fit, Fitted, Progress, make_set, patient_accelerator
from data_pipes.weight_manifest import DTYPES, Description, Manifest, Values, describe_source
from data_pipes.weight_write import SHARD_BYTES, WeightSetWriter
from mwt import runtime
from mwt.checkpoint import load_model
from mwt.config import ClassifyConfig, DataConfig
from mwt.config_files import load_config
from mwt.errors import InputError
from mwt.evaluation import autocast
from mwt.inspection import TrainedRun, check_data_fits, open_trained
from mwt.memory import readable
from mwt.model import BUILTIN, MetaWeightTransformer
from mwt.observe import observe
from mwt.rng import derived_seed
from mwt.runtime import keep_freed_memory, run_program
from mwt.siren import Siren
from mwt.structs import Batch

AUGMENTATIONS = ("crop", "crop_flip", "affine_flip", "coords", "points")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(prog="eval.export", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", required=True, help="run directory, model folder, or builtin:NAME")
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder")
    parser.add_argument("--split", default="all", help="all, or one split of the data")
    parser.add_argument(
        "--values", choices=("phi", "delta"),
        help="what is stored: weights, or differences from the base (readers convert either); by default differences, "
        "and weights in another --format",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--copies", type=int, default=0, metavar="N", help="augmented fits of each training signal")
    parser.add_argument("--augment", choices=AUGMENTATIONS, help="of the copies; by default the run's data.augment")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last")
    parser.add_argument(
        "--weights", choices=("ema", "raw"), help="of a run with optim.ema; by default its average, ema"
    )
    parser.add_argument(
        "--format", choices=("native", *FORMATS), default="native",
        help="of DIR; another than native is made of a weight set that stays in --native DIR",
    )  # fmt: skip
    parser.add_argument("--native", metavar="DIR", help="with --format: where that set lies (default: OUT-native)")
    parser.add_argument(
        "--val", type=int, default=0, metavar="N",
        help="with --format: make the last N training networks the val split of DIR",
    )  # fmt: skip
    parser.add_argument("--shard-mib", type=float, default=SHARD_BYTES / 2**20, help="size of a shard, about")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="data.* and run.* only")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.copies < 0:
        raise InputError(f"--copies is {arguments.copies}; it cannot be negative.")
    if arguments.augment and not arguments.copies:
        raise InputError("--augment is for copies, and there are none; add --copies N.")
    if arguments.native and arguments.format == "native":
        raise InputError("--native is for another --format; the weight set itself is written to --out.")
    if arguments.val and arguments.format == "native":
        raise InputError("--val is for another --format; train.weights holds networks out itself (data.holdout).")
    if arguments.shard_mib <= 0:
        raise InputError(f"--shard-mib is {arguments.shard_mib}; it must be positive.")
    return arguments


# ---- what is exported --------------------------------------------------------------------------------------------


def open_run(arguments: argparse.Namespace) -> TrainedRun:
    """The model and its configuration: of a run directory, of a model folder, or one that comes with the package.

    Raises:
        InputError: there is none of that name, or an override that would change the model.
    """
    path = Path(arguments.run)
    if not arguments.run.startswith(BUILTIN) and not (
        (path / "config.json").is_file() and not (path / "config.yaml").is_file()
    ):
        return open_trained(
            path, checkpoint=arguments.checkpoint, weights=arguments.weights, overrides=arguments.overrides
        )
    for item in arguments.overrides:
        if "=" in item and not item.startswith(("data.", "run.")):
            raise InputError(f"{item.split('=')[0]} cannot be changed here: only data.* and run.* can be overridden.")
    config = load_config(ClassifyConfig, None, arguments.overrides)
    device = runtime.choose_device(config.run.device)
    if arguments.run.startswith(BUILTIN):
        model = MetaWeightTransformer.from_pretrained(arguments.run).to(device)
    else:
        model = load_model(path, device, weights=arguments.weights)
    return TrainedRun(path=path, checkpoint="last", step=0, config=config, model=model, device=device)


def splits_to_export(info: DatasetInfo, wanted: str, data: DataConfig) -> dict[str, int]:
    """Splits and how many of their signals.

    Raises:
        InputError: no such split, or one without signals.
    """
    names = [name for name, split in info.splits.items() if split.count] if wanted == "all" else [wanted]
    counts = {name: min(info.split(name).count, data.limit or sys.maxsize) for name in names}
    if not counts or min(counts.values()) < 1:
        raise InputError(f"There is nothing to export: {info.folder} has no samples in {wanted!r}.")
    return counts


def describe(run: TrainedRun, info: DatasetInfo, arguments: argparse.Namespace, counts: dict[str, int]) -> Description:
    """The set as it is to be.

    Raises:
        InputError: copies of nothing, or copies that would all be alike.
    """
    data, inner = run.config.data, run.model.config.inner_loop.for_evaluation()
    model = asdict(run.model.config)
    kind = arguments.augment or data.augment
    if arguments.copies and data.train_split not in counts:
        raise InputError(
            f"--copies is for the training split {data.train_split!r}, which --split {arguments.split} leaves out."
        )
    if arguments.copies and kind == "none":
        raise InputError(
            "--copies fits augmented images, but the run trained without augmentation: name one with --augment "
            f"({', '.join(AUGMENTATIONS)})."
        )
    changes = {"kind": kind, "padding": data.crop_padding, "seed": derived_seed(run.config.run.seed, "export")}
    return Description(
        name=info.name,
        signal=info.facts,
        layout=networks_of(run).layout,
        values=arguments.values or "delta",
        dtype=arguments.dtype,
        has_base=True,
        steps=inner.steps,
        source=describe_source(info, data),
        fit={
            "method": "meta-learned", "inner_steps": inner.steps, "fraction": inner.fraction, "points": inner.points,
            "precision": run.config.run.precision, "run": arguments.run, "checkpoint": run.checkpoint,
            "step": run.step, "weights": run.weights, "model_sha256": model_digest(run.model),
        },
        train_split=data.train_split,
        copies=arguments.copies,
        augment=changes if arguments.copies else {"kind": "none"},
        config=asdict(run.config) | {name: model[name] for name in ("siren", "inner_loop", "reader", "loss")},
    )  # fmt: skip


def networks_of(run: TrainedRun) -> Siren:
    """The SIREN of a run.

    Raises:
        InputError: it fits another field.
    """
    if not isinstance(run.model.siren, Siren):
        raise InputError(
            f"{run.path} fits field.name={run.model.config.field.name}; sets of weights, in all their formats, hold "
            "the layers of SIRENs: export a run with field.name=siren."
        )
    return run.model.siren


def model_digest(model: MetaWeightTransformer) -> str:
    """SHA-256 of all that a fit depends on: SIREN and learned rates."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(("siren.", "alpha.")):
            digest.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


# ---- fitting -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def fit_signals(model: MetaWeightTransformer, batch: Batch, precision: str, copy: int) -> tuple[Tensor, Tensor]:
    """Offsets [B, W] and losses [B, S + 1] in fp32, as `mwt.evaluation.evaluate` fits; each copy sees other points."""
    with autocast(batch.labels.device, precision):
        inner = model.config.inner_loop.for_evaluation()
        fitted = model.fit(observe(batch, inner, seed=0, epoch=copy, purpose="evaluate"))
    return fitted.offsets.float(), fitted.losses.float()


def fitter(run: TrainedRun, values: Values) -> Fit:
    """What fits a batch of signals, as phi or as offsets."""

    @torch.no_grad()
    def fit(batch: Batch, split: str, copy: int, progress: Progress) -> Fitted:
        offsets, losses = fit_signals(run.model, batch, run.config.run.precision, copy)
        progress.add(len(batch))
        return Fitted(weights=networks_of(run).network_weights(offsets, values), losses=losses)

    return fit


# ---- the program -------------------------------------------------------------------------------------------------


def announce(run: TrainedRun, writer: WeightSetWriter, counts: dict[str, int], world: int) -> None:
    """What is about to happen, in a few lines."""
    description = writer.description
    inner = run.model.config.inner_loop.for_evaluation()
    networks = sum(task.count for task in writer.tasks)
    left = len(writer.missing())
    print(f"run       {run.path}, checkpoint {run.checkpoint!r} (step {run.step:,}), {inner.steps} inner steps")
    print(f"data      {run.config.data.path}: " + ", ".join(f"{count:,} in {name!r}" for name, count in counts.items()))
    copies = f" with {description.copies} copies ({description.augment['kind']})" if description.copies else ""
    print(f"networks  {networks:,}{copies} of {description.layout}: {description.layout.count:,} numbers each, "
          f"{description.values} in {description.dtype}")  # fmt: skip
    if writer.complete:
        print(f"out       {writer.out} is complete already; nothing to do")
        return
    print(f"disk      {writer.room}")
    begun = f"; {len(writer.tasks) - left} are there already" if left < len(writer.tasks) else ""
    many = f", by {world} processes" if world > 1 else ""
    print(f"out       {writer.out}: {len(writer.tasks)} shards{many}{begun}", flush=True)


def show(manifest: Manifest) -> None:
    """What has been written, as a table."""
    print(f"\n{'split':<8} {'networks':>9} {'shards':>7} {'size':>10} {'PSNR':>10}")
    for name, split in manifest.splits.items():
        taken = readable(sum(shard.bytes for shard in split.shards))
        quality = manifest.psnr[name]
        decibels = "-" if quality is None else f"{quality:.2f} dB"
        print(f"{name:<8} {split.count:>9,} {len(split.shards):>7} {taken:>10} {decibels:>10}")
    if manifest.left_out:
        print(f"warning: {manifest.left_out}", file=sys.stderr)
    print(f"\nWritten: {manifest.folder}\nCheck it with:  python -m data_pipes.verify {manifest.folder}")


def main(argv: list[str] | None = None) -> int:
    """Export; see the module's text."""
    arguments = parse(argv)
    keep_freed_memory()
    runtime.end_with_launcher()
    on_cpu = not torch.cuda.is_available() or "run.device=cpu" in arguments.overrides
    accelerator = patient_accelerator(cpu=on_cpu)  # first of all: it chooses this process's GPU
    run = replace(open_run(arguments), device=accelerator.device)
    run.model.to(accelerator.device)
    runtime.check_launcher(run.config.run.precision)
    data = run.config.data
    info = read_info(data.path, schemes=data.schemes)
    check_data_fits(run.model, info.facts, data.path)
    counts = splits_to_export(info, arguments.split, data)
    foreign, out = arguments.format != "native", Path(arguments.out).expanduser().absolute()
    native = arguments.native or out.with_name(f"{out.name}-native") if foreign else out
    if foreign:
        check_format(arguments.format, out, len(info.classes))  # before hours of fitting, not after
        check_val(arguments.val, counts, data.train_split)
    siren = networks_of(run)
    with torch.no_grad():
        base = siren.network_weights(siren.init_offsets(1), "phi")
    writer = WeightSetWriter(
        native, describe(run, info, arguments, counts), counts, base=base, batch=run.config.run.eval_batch_size,
        shard_bytes=int(arguments.shard_mib * 2**20), main=accelerator.is_main_process,
    )  # fmt: skip
    world = accelerator.num_processes
    manifest = make_set(
        writer, data, fitter(run, writer.description.values), accelerator,
        lambda: announce(run, writer, counts, world),
    )  # fmt: skip
    if manifest is not None:
        show(manifest)
        if foreign:
            convert(plan(native, arguments.format, out, values=arguments.values or "phi", val=arguments.val))
    return 0


if __name__ == "__main__":
    run_program(main)
