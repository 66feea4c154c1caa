"""Where downloads lie, and what to say when there are none."""

from __future__ import annotations

import os
from pathlib import Path

from mwt.errors import InputError


def cache_folder(name: str) -> Path:
    """Folder for the original files of data set `name`: below XDG_CACHE_HOME, by default ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "meta-weight-transformer" / name


def download_failed(name: str, files: str, error: Exception) -> InputError:
    """The one sentence for a download that did not work; `files` says what to get by other means."""
    reason = " ".join(str(error).split())[:200].rstrip(". ")
    return InputError(
        f"{name} could not be downloaded ({reason}). Get {files} by other means and give their folder: "
        f"python -m data_pipes.prepare {name} --src FOLDER --out DIR"
    )
