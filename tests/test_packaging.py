"""What is shipped and what importing does: the wheel, the citation, the files in git, the process."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PACKAGES = ("mwt", "data_pipes")
PROGRAMS = ("train", "eval", "benchmarks")
MEBIBYTE = 2**20


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def files_in_git() -> list[Path]:
    """Tracked files, and those that the next commit would add."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names of the files in the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        check=True, capture_output=True,
    )  # fmt: skip
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def test_the_wheel_holds_the_two_libraries_whole(wheel: list[str]) -> None:
    ignored = {"__pycache__"}
    expected = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and not ignored & set(path.parts) and ".partial" not in path.name
    }
    shipped = {name for name in wheel if ".dist-info/" not in name}
    assert shipped == expected
    assert {"mwt/py.typed", "data_pipes/py.typed"} <= shipped


def test_the_wheel_holds_no_program_and_no_test(wheel: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel}
    assert tops == {*PACKAGES, f"meta_weight_transformer-{project()['version']}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in wheel)


def test_importing_changes_nothing_in_the_process() -> None:
    """Threads, signals, environment, warnings, logging, random state, default type: as before, for every module."""
    program = """
import importlib, logging, os, pkgutil, signal, sys, warnings
import accelerate, higher, huggingface_hub, matplotlib, omegaconf, timm, torch, torchmetrics, torchvision, webdataset

def state():
    return {
        "threads": torch.get_num_threads(),
        "signals": [signal.getsignal(number) for number in signal.valid_signals()],
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "path": list(sys.path),
        "warnings": list(warnings.filters),
        "logging": (logging.root.level, list(logging.root.handlers)),
        "hook": sys.excepthook,
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "random": torch.random.get_rng_state().tolist(),
    }

before = state()
names = []
for package in ("mwt", "data_pipes"):
    module = importlib.import_module(package)
    for info in pkgutil.walk_packages(module.__path__, package + "."):
        if not info.name.endswith("__main__"):
            importlib.import_module(info.name)
            names.append(info.name)
after = state()
changed = [key for key in before if before[key] != after[key]]
print(len(names), "modules; changed:", ", ".join(changed) or "nothing")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [said] = done.stdout.splitlines()
    assert said.endswith("changed: nothing"), said
    assert int(said.split()[0]) > 10


def test_the_citation_names_five_works() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["title"] == project()["name"]
    assert str(citation["version"]) == project()["version"]
    assert citation["license"] == project()["license"] == "MIT"
    works = {(work["authors"][0]["family-names"], work["year"]) for work in citation["references"]}
    assert works == {("Gielisse", 2025), ("McGinnis", 2025), ("Li", 2025), ("Li", 2024), ("Jordan", 2024)}
    assert len(citation["references"]) == 5
    assert all({"type", "title", "authors"} <= set(work) for work in citation["references"])


def test_versions_have_lower_bounds_and_no_upper_ones() -> None:
    extras = project()["optional-dependencies"]
    requirements = project()["dependencies"] + [line for lines in extras.values() for line in lines]
    wrong = [line for line in requirements if not re.fullmatch(r"[\w-]+>=[\d.]+", line)]
    assert wrong == []
    assert project()["requires-python"] == ">=3.11"
    others = {"audio", "digits", "hdf5", "medical", "nfn", "shapes", "tensorboard", "trackio", "wandb"}
    assert set(extras) == {"dev", *others}


def test_the_changelog_knows_the_version() -> None:
    assert f"## [{project()['version']}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_no_file_in_git_is_large() -> None:
    large = {str(path.relative_to(ROOT)): path.stat().st_size for path in files_in_git()}
    assert len(large) > 20
    assert {name: size for name, size in large.items() if size > 4 * MEBIBYTE} == {}


def test_no_file_in_git_names_a_place_on_one_machine() -> None:
    places = re.compile(r"(?<![\w.~-])/(?:home|root|Users|work|mnt|tmp)/\w|\b[A-Z]:\\\\?Users\b")
    found = []
    for path in files_in_git():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # weights, shards, pictures
            continue
        found += [f"{path.relative_to(ROOT)}:{text[: hit.start()].count(chr(10)) + 1}" for hit in places.finditer(text)]
    assert found == []


def test_no_file_has_the_name_of_a_drawer() -> None:
    drawers = {"utils.py", "helpers.py", "common.py", "misc.py"}
    found = [str(path.relative_to(ROOT)) for path in files_in_git() if path.name in drawers]
    assert found == []


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_test_without_an_assertion_is_refused(tmp_path: Path, workers: str) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_two.py").write_text("def test_silent():\n    print()\n\ndef test_loud():\n    assert True\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", workers, str(tmp_path)],
        cwd=tmp_path, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    assert "test_silent asserts nothing" in done.stdout
    assert "1 passed" in done.stdout
