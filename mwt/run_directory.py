"""The beginning of a run directory: made once, refused if it is there, recognised when a run is resumed."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mwt.checkpoint import SAME_RESULT, check_run_directory
from mwt.config_files import config_yaml, load_config
from mwt.errors import InputError
from mwt.runtime import environment, sync, write_json, write_text

MAY_CHANGE = {
    "variant": {""},
    "run": {"dir", "device", "precision", "compile", "threads", "log_every", "monitor_every", "monitor_limit",
            "checkpoint_minutes", "eval_batch_size", "trackers", "on_nonfinite", "max_skipped"},
    "optim": {"accumulate"},
    "data": {"path", "test_split", "monitor_split", "resident_mb", "workers", "on_bad_sample", "max_bad", "schemes",
             "images"},
    **SAME_RESULT,
}  # fmt: skip
"""What a resumed run may set otherwise; everything else would make it another run."""

BEGINNING = ("overrides.txt", "env.json", ".env.json.", ".debug", ".config.yaml.")
"""What a process that is killed while it makes a run directory may leave in it."""


def check_same_run(stored: Any, config: Any, run: Path, may_change: Mapping[str, set[str]] = MAY_CHANGE) -> None:
    """Refuse to continue a run with settings that would make it another one."""
    before, now = dataclasses.asdict(stored), dataclasses.asdict(config)
    for block, values in now.items():
        rows = values if isinstance(values, dict) else {"": values}
        earlier = before[block] if isinstance(values, dict) else {"": before[block]}
        for key in {**earlier, **rows}:
            was, is_ = earlier.get(key), rows.get(key)
            if was != is_ and key not in may_change.get(block, ()):
                name = f"{block}.{key}" if key else block
                raise InputError(
                    f"{run} was started with {name}={was}, not {is_}; a run is resumed as it was. Leave the key out, "
                    "or begin a new run in another run.dir."
                )


def open_run_directory(
    config: Any,
    overrides: list[str],
    *,
    resuming: bool,
    debug: bool,
    program: str = "train.classify",
    may_change: Mapping[str, set[str]] = MAY_CHANGE,
) -> None:
    """Make run.dir and write what the run is; or, resuming, check that it is this very run.

    Args:
        config: of any program whose runs have a directory, `config.run.dir`.
        overrides: what was given on the command line, for the record.
        debug: a debug run replaces an earlier debug run.
        program: the program that goes on with such a run, for messages.
        may_change: what a resumed run may set otherwise, by block.

    Raises:
        InputError: run.dir exists, cannot be written, or (resuming) was started with other settings.
    """
    run = Path(config.run.dir)
    if resuming:
        check_run_directory(run)
        check_same_run(load_config(type(config), run / "config.yaml"), config, run, may_change)
        return
    if debug and (run / ".debug").is_file():
        shutil.rmtree(run)
    if run.exists() and (not run.is_dir() or not all(path.name.startswith(BEGINNING) for path in run.iterdir())):
        raise InputError(
            f"The run directory {run} exists already. Choose another run.dir, remove it, or continue it with "
            f"`python -m {program} --resume run.dir={run}`."
        )
    try:
        run.mkdir(parents=True, exist_ok=True)
        (run / "overrides.txt").write_text("".join(f"{item}\n" for item in overrides))
        write_json(run / "env.json", environment())
        if debug:
            (run / ".debug").touch()
        write_text(run / "config.yaml", config_yaml(config))  # last: with it, it is a run directory
        sync(run)
    except OSError as error:
        raise InputError(f"The run directory {run} cannot be written: {error.strerror}.") from error
