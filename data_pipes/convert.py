"""Convert sets of fitted networks between ours and the formats of other code bases (docs/weight_sets.md).

python -m data_pipes.convert --src SET --out DIR --format nfn          a weight set for somebody else's loader
python -m data_pipes.convert --from nfn --src DIR --out SET            somebody else's tree as a weight set
python -m data_pipes.convert --relocate DIR                            its splits.json with absolute paths
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_pipes.foreign import FORMATS, OMEGA, TREE_PREFIX, check_tree_place
from data_pipes.foreign_files import SPLITS_FILE
from data_pipes.foreign_plan import Plan, plan
from data_pipes.foreign_read import describe_tree, list_tree, write_tree
from data_pipes.foreign_write import ABOUT_FILE, ForeignWriter
from data_pipes.processes import available_cores
from data_pipes.weight_manifest import DTYPES
from data_pipes.weight_write import WeightSetWriter
from mwt.errors import InputError
from mwt.memory import readable
from mwt.runtime import run_program, write_json

_ENOUGH, _MAX_WORKERS = 5000, 16
"""Networks from which on processes are worth their start."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(prog="python -m data_pipes.convert", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--src", type=Path, metavar="DIR", help="what is to be converted")
    parser.add_argument("--out", type=Path, metavar="DIR", help="new folder")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--format", choices=list(FORMATS), help="of OUT; SRC is a weight set")
    what.add_argument(
        "--from", dest="origin", choices=("nfn", "dws"),
        help="what the networks of the tree SRC draw: nfn (row, column) and [-1, 1]; dws, neural-graphs and ScaleGMN "
        "(column, row) and [0, 1] with + 0.5. OUT becomes a weight set",
    )  # fmt: skip
    what.add_argument("--relocate", type=Path, metavar="DIR", help="write absolute paths into DIR/splits.json")
    out = parser.add_argument_group("with --format")
    out.add_argument("--values", choices=("phi", "delta"), default="phi", help="weights, or differences from the base")
    out.add_argument("--convention", choices=("nfn", "dws"), help="what networks draw, if other than usual in FORMAT")
    out.add_argument("--val", type=int, default=0, metavar="N", help="make the last N training networks the val split")
    out.add_argument("--workers", type=int, metavar="N", help="processes (default: the cores, for large sets)")
    into = parser.add_argument_group("with --from")
    into.add_argument("--omega", type=float, default=OMEGA, help="frequency of all sine layers (default %(default)g)")
    into.add_argument("--splits", type=Path, metavar="FILE", help="the list of splits, if not SRC/splits.json")
    into.add_argument(
        "--split-points", type=int, nargs=2, metavar=("VAL", "TEST"),
        help="numbers of the first networks of val and test in PREFIX_LABELs/netNUMBER.pth; no list is needed then",
    )  # fmt: skip
    into.add_argument("--prefix", default=TREE_PREFIX, help="of the folders of labels (default %(default)s)")
    into.add_argument("--classes", default="", metavar="A,B,…", help="names of the labels (default: their numbers)")
    into.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    arguments = parser.parse_args(argv)
    if arguments.relocate is None and (arguments.src is None or arguments.out is None):
        raise InputError("Name what is to be converted with --src DIR, and the new folder with --out DIR.")
    if arguments.workers is not None and arguments.workers < 0:
        raise InputError(f"--workers is {arguments.workers}; it cannot be negative.")
    if not arguments.omega > 0:
        raise InputError(f"--omega is {arguments.omega}; it must be positive.")
    return arguments


# ---- out ---------------------------------------------------------------------------------------------------------


def convert(plans: list[Plan], workers: int | None = None) -> None:
    """Write sets in another format, and say what is done."""
    for planned in plans:
        with ForeignWriter(planned) as writer:
            announce(writer)
            missing = sum(len(piece.places) for piece in writer.missing())
            chosen = workers
            if chosen is None:
                chosen = min(available_cores(), _MAX_WORKERS) if missing >= _ENOUGH else 0
            with tqdm(total=missing, unit="network", dynamic_ncols=True, disable=None) as bar:
                for count in writer.write(workers=chosen):
                    bar.update(count)
            writer.finish()
    print("\nWritten: " + ", ".join(str(planned.out) for planned in plans))
    if FORMATS[plans[0].format].tree:
        for planned in plans:
            print(f"Paths in splits.json begin there; absolute: python -m data_pipes.convert --relocate {planned.out}")
    if plans[0].format != "npz" and not plans[0].parts["val"].places:
        print("There is no val split, which loaders may ask for: --val N makes one of the last training networks.")


def announce(writer: ForeignWriter) -> None:
    """What is about to happen, in a few lines."""
    planned = writer.plan
    counts = ", ".join(f"{len(part.places):,} {name}" for name, part in planned.parts.items())
    drawn = {
        "nfn": "(row, column) -> [-1, 1]", "dws": "(column, row) -> [0, 1], 0.5 being added to the output"
    }[planned.convention]  # fmt: skip
    print(f"\nnetworks    {planned.count:,} of {planned.layout}: {counts}; split points {planned.split_points}")
    print(f"format      {planned.format}: sin(30 (W h + b)), {planned.values}, float32")
    print(
        f"convention  {planned.convention}: {drawn}" if planned.layout.coordinate_dims == 2 else "convention  (x, y, z)"
    )
    if writer.complete:
        print(f"out         {planned.out} is complete already; nothing to do")
        return
    begun = "; some are there already" if len(writer.missing()) < len(planned.pieces) else ""
    free = shutil.disk_usage(planned.out.parent).free
    print(f"disk        {readable(writer.need.bytes)} needed in {writer.need.files:,} files, {readable(free)} free")
    print(f"out         {planned.out}{begun}", flush=True)


def relocate(root: Path) -> int:
    """Write into `root`/splits.json where its files lie now, absolutely; how many there are.

    Raises:
        InputError: no list, a file that is missing, a folder that loaders would take for a label.
    """
    root = root.expanduser().resolve()
    try:
        content = json.loads((root / SPLITS_FILE).read_text(encoding="utf-8"))
        about = json.loads((root / ABOUT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{root} is no tree that data_pipes.convert made ({error}).") from error
    check_tree_place(about["format"], root)

    def moved(paths: list[str]) -> list[str]:
        places = [root / Path(*Path(path).parts[-2:]) for path in paths]
        if lost := next((place for place in places if not place.is_file()), None):
            raise InputError(f"{lost}, listed in {root / SPLITS_FILE}, is missing; copy the tree again.")
        return [str(place) for place in places]

    changed: dict[str, Any] = {
        split: moved(entry) if isinstance(entry, list) else {**entry, "path": moved(entry["path"])}
        for split, entry in content.items()
    }
    write_json(root / SPLITS_FILE, changed)
    return sum(len(entry if isinstance(entry, list) else entry["path"]) for entry in changed.values())


# ---- in ----------------------------------------------------------------------------------------------------------


def take_in(arguments: argparse.Namespace) -> None:
    """Make a weight set of a tree."""
    points = None if arguments.split_points is None else (arguments.split_points[0], arguments.split_points[1])
    root = arguments.src.expanduser()
    tree = list_tree(root, splits=arguments.splits, prefix=arguments.prefix, split_points=points)
    classes = [name.strip() for name in arguments.classes.split(",") if name.strip()]
    description = describe_tree(
        tree, convention=arguments.origin, omega=arguments.omega, classes=classes, dtype=arguments.dtype
    )
    counts = {split: len(listed) for split, listed in tree.splits.items()}
    with WeightSetWriter(arguments.out, description, counts, base=None, batch=256) as writer:
        names = ", ".join(f"{count:,} {split}" for split, count in counts.items())
        print(
            f"networks  {sum(counts.values()):,} of {description.layout}: {names}; {len(description.classes)} classes"
        )
        if writer.complete:
            print(f"out       {writer.out} is complete already; nothing to do")
        else:
            print(f"disk      {readable(writer.bytes_needed)} needed")
        missing = sum(task.count for task in writer.missing())
        with tqdm(total=missing, unit="network", dynamic_ncols=True, disable=None) as bar:
            write_tree(tree, writer, arguments.origin, bar.update)
        if said := writer.finish().left_out:
            print(f"warning: {said}", file=sys.stderr)
        print(f"\nWritten: {writer.out}\nCheck it with:  python -m data_pipes.verify {writer.out}")


# ---- the program -------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Convert; see the module's text."""
    arguments = parse(argv)
    if arguments.relocate is not None:
        count = relocate(arguments.relocate)
        print(f"{arguments.relocate / SPLITS_FILE} has the absolute paths of {count:,} networks.")
    elif arguments.origin is not None:
        take_in(arguments)
    else:
        plans = plan(
            arguments.src, arguments.format, arguments.out, values=arguments.values, convention=arguments.convention,
            val=arguments.val,
        )  # fmt: skip
        convert(plans, arguments.workers)
    return 0


if __name__ == "__main__":
    run_program(main)
