"""What holds in every test: no network, no display, one thread, fixed seeds, and at least one assertion."""

from __future__ import annotations

import os

# One thread per process, in programs that tests start too: two workers then fill two cores, and sums are added in
# the same order however the tests are run. Before torch is imported, or it has no effect.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["MPLBACKEND"] = "Agg"

import ast
import importlib
import random
import signal
import socket
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

ASSERTING = ("assert_", "check_", "gradcheck", "gradgradcheck")
"""Calls that begin with one of these assert something: torch.testing.assert_close, a helper of the test file, …"""
PYTEST_ASSERTING = {"raises", "warns", "fail", "RaisesGroup"}


def asserts(function: ast.AST) -> bool:
    """Whether an assertion stands anywhere in the function."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in PYTEST_ASSERTING or name.startswith(ASSERTING):
                return True
    return False


@cache
def silent_tests(path: Path) -> frozenset[str]:
    """Names of the test functions in a file that assert nothing."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test")]
    return frozenset(function.name for function in functions if not asserts(function))


LIBRARIES = (
    "torch._dynamo", "torchvision", "timm.models.vision_transformer", "accelerate", "torchmetrics.functional.image",
    "matplotlib.figure", "huggingface_hub", "omegaconf", "webdataset", "scipy.spatial", "scipy.interpolate",
)  # fmt: skip


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Import the large libraries before ours, which halves the time in which tests are collected.

    While one of our modules is imported, the hook that checks shapes (jaxtyping) looks for the bytecode of whatever
    that imports under a name of its own, and compiles all of torch._dynamo, sympy and timm because it finds none. Only
    where tests are collected: not in the process that hands them out to xdist's workers.
    """
    if isinstance(collector, pytest.Session):
        for name in LIBRARIES:
            importlib.import_module(name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Refuse a test that cannot fail. (Raised at collection, the message would be lost among xdist's workers.)"""
    if isinstance(item, pytest.Function) and item.originalname in silent_tests(item.path):
        pytest.fail(f"{item.originalname} asserts nothing, so it cannot fail.", pytrace=False)


def _no_network(self: socket.socket, address: Any) -> None:
    local = self.family == socket.AF_UNIX or str(address[0]) in ("localhost", "127.0.0.1", "::1")
    if not local:
        raise OSError(f"Tests do not use the network; this one asked for {address}.")
    _connect(self, address)


_connect = socket.socket.connect


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Connections leave this machine in no test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", _no_network)
        yield


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Starts programs in processes of their own, without the seconds that importing takes."""
    from tests.fork_server import Server

    made = Server(tmp_path_factory.mktemp("server"))
    yield made
    made.close()


@pytest.fixture(autouse=True)
def same_every_time() -> Iterator[None]:
    """Every test starts with the same seeds and one thread, and leaves nothing that a program set in the process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    for number, handler in handlers.items():
        signal.signal(number, handler)
