"""How long the files and functions are: a long one is asking for a better cut.

    python -m benchmarks.size_report                  the packages of the project
    python -m benchmarks.size_report FOLDER ...       others

Wanted: files of at most 300 lines, functions of at most 60 (a program's `main`: 150). What lies above is listed.
Refused (exit status 1): files over 400 lines, functions over 80, a `main` over 150. Tests do not count.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).parents[1]
PACKAGES = ("mwt", "data_pipes", "train", "eval", "benchmarks")
FILE_WANTED, FILE_LIMIT = 300, 400
FUNCTION_WANTED, FUNCTION_LIMIT = 60, 80
MAIN_LIMIT = 150


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A file or a function: where it is, its lines, what is wanted of it and what is refused."""

    where: str
    lines: int
    wanted: int
    limit: int


def function_pieces(tree: ast.Module, where: str) -> Iterator[Piece]:
    """All functions and methods, nested ones too, from `def` to their last line."""
    top_level = set(tree.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            is_main = node.name == "main" and node in top_level
            wanted, limit = (MAIN_LIMIT, MAIN_LIMIT) if is_main else (FUNCTION_WANTED, FUNCTION_LIMIT)
            yield Piece(where=f"{where}:{node.lineno} {node.name}", lines=lines, wanted=wanted, limit=limit)


def measure(folders: list[Path]) -> tuple[list[Piece], list[Piece]]:
    """Files and functions of all Python files below `folders`."""
    files: list[Piece] = []
    functions: list[Piece] = []
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            where = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
            files.append(Piece(where=where, lines=len(text.splitlines()), wanted=FILE_WANTED, limit=FILE_LIMIT))
            functions.extend(function_pieces(ast.parse(text, filename=str(path)), where))
    return files, functions


def summary(name: str, pieces: list[Piece]) -> str:
    """One row of the table: count, median, nine tenths, longest, total."""
    lines = [piece.lines for piece in pieces]
    if not lines:
        return f"{name:<10} {0:>6}"
    p90 = quantiles(lines, n=10, method="inclusive")[-1] if len(lines) > 1 else lines[0]
    return f"{name:<10} {len(lines):>6} {median(lines):>7.0f} {p90:>6.0f} {max(lines):>8} {sum(lines):>7}"


def main(argv: list[str] | None = None) -> int:
    """Print the report; 1 where something is refused."""
    parser = argparse.ArgumentParser(prog="benchmarks.size_report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, help="folders to look through; by default the packages")
    arguments = parser.parse_args(argv)
    folders = arguments.folders or [ROOT / name for name in PACKAGES]
    missing = [str(folder) for folder in folders if not folder.is_dir()]
    if missing:
        print(f"No folder {', '.join(missing)}.", file=sys.stderr)
        return 2
    files, functions = measure(folders)
    print(f"{'':<10} {'count':>6} {'median':>7} {'p90':>6} {'longest':>8} {'lines':>7}")
    print(summary("files", files))
    print(summary("functions", functions))
    long = [piece for piece in files + functions if piece.lines > piece.wanted]
    for piece in sorted(long, key=lambda piece: -piece.lines):
        verdict = f"over the limit of {piece.limit}" if piece.lines > piece.limit else f"wanted: {piece.wanted}"
        print(f"  {piece.lines:>4} lines  {piece.where}  ({verdict})")
    return int(any(piece.lines > piece.limit for piece in long))


if __name__ == "__main__":
    sys.exit(main())
