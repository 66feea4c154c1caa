"""What is measured: published configurations, on random data of the sizes that their data sets have."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.measure import parse_list
from data_pipes.schema import read_info
from mwt.config import ClassifyConfig, ModelConfig, model_config
from mwt.config_files import load_config
from mwt.errors import InputError
from mwt.structs import Batch, SignalFacts

CONFIGS = Path(__file__).parents[1] / "configs" / "classify"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A configuration and the size of its signals."""

    config: ClassifyConfig
    facts: SignalFacts
    points: int | None = None
    """N, how many points the data stores of a signal, where it is not an image."""

    @property
    def batch_size(self) -> int:
        """Signals per step."""
        return self.config.data.batch_size

    @property
    def model(self) -> ModelConfig:
        """What the model is built from."""
        return model_config(self.config, self.facts)

    def with_batch_size(self, batch_size: int) -> Case:
        """The same with another batch size."""
        return replace(self, config=replace(self.config, data=replace(self.config.data, batch_size=batch_size)))

    def with_recomputation(self) -> Case:
        """The same, computing again in the backward pass what would otherwise be kept."""
        config = self.config
        inner_loop = replace(config.inner_loop, checkpoint=True)
        reader = replace(config.reader, checkpoint=True)
        return replace(self, config=replace(config, inner_loop=inner_loop, reader=reader))

    def random_batch(self, device: torch.device, seed: int = 0) -> Batch:
        """Noise of the right shapes: for time and memory the contents do not matter."""
        generator = torch.Generator().manual_seed(seed)
        size, facts = self.batch_size, self.facts
        labels = torch.randint(len(facts.classes), (size,), generator=generator)
        positions = torch.arange(size)
        if facts.kind == "image":
            assert facts.height is not None, "a case has a size"
            assert facts.width is not None, "a case has a size"
            shape = (size, facts.channels, facts.height, facts.width)
            images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
            return Batch(labels=labels, positions=positions, images=images).to(device)
        assert self.points is not None, "a case of point sets has a number of points"
        coords = 2 * torch.rand(size, self.points, facts.coordinate_dims, generator=generator) - 1
        values = torch.rand(size, self.points, facts.channels, generator=generator)
        return Batch(labels=labels, positions=positions, coords=coords, values=values).to(device)


@dataclass(frozen=True, kw_only=True)
class Published:
    """A case by the file of its configuration, what is changed in it, and its signals' size."""

    file: str
    signal: str
    """As in --signal."""
    overrides: tuple[str, ...] = ()

    def case(self) -> Case:
        """The case itself."""
        config = load_config(ClassifyConfig, CONFIGS / self.file, self.overrides)
        facts, points = parse_signal(self.signal)
        return Case(config=config, facts=facts, points=points)


CASES = {
    "cifar_s1": Published(file="cifar10_mwt.yaml", signal="3x32x32x10"),
    "cifar_s01": Published(file="cifar10_mwt.yaml", signal="3x32x32x10", overrides=("inner_loop.fraction=0.1",)),
    "mwt_l": Published(file="cifar10_mwt_l.yaml", signal="3x32x32x10", overrides=("data.batch_size=8",)),
    "imagenette": Published(file="imagenette_mwt_s005.yaml", signal="3x320x320x10", overrides=("data.batch_size=4",)),
    "points": Published(file="modelnet40_mwt_l_s001.yaml", signal="1x32768x40", overrides=("data.batch_size=8",)),
    "digits": Published(file="digits.yaml", signal="1x8x8x10"),
}
"""Batches of 16, as the paper has them, but where the baseline's memory in fp32 asks for less; digits has 32."""


def case_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """--cases, --config, --signal and --batch."""
    parser.add_argument("--cases", help=f"of {','.join(CASES)}; by default {default}, or none beside --config")
    parser.add_argument("--config", type=Path, nargs="+", default=[], help="measure these configurations' models")
    parser.add_argument("--signal", help="size of --config's signals: 3x32x32x10, or 1x32768x40 for point sets")
    parser.add_argument("--batch", type=int, help="another batch size for all cases")
    parser.set_defaults(default_cases=default)


def chosen_cases(arguments: argparse.Namespace) -> dict[str, Case]:
    """The cases that the arguments name.

    Raises:
        InputError: a case, batch size or configuration that cannot be measured.
    """
    if arguments.batch is not None and arguments.batch < 1:
        raise InputError(f"--batch is {arguments.batch}; it must be at least 1.")
    names = arguments.cases or ("" if arguments.config else arguments.default_cases)
    cases = {name: CASES[name].case() for name in parse_list(names, list(CASES), "--cases")} if names else {}
    cases |= {path.stem: read_case(path, arguments.signal) for path in arguments.config}
    if arguments.batch:
        cases = {name: case.with_batch_size(arguments.batch) for name, case in cases.items()}
    return cases


def parse_signal(text: str) -> tuple[SignalFacts, int | None]:
    """Facts and, for point sets, the number of points, from CHANNELSxHEIGHTxWIDTHxCLASSES or CHANNELSxPOINTSxCLASSES.

    Raises:
        InputError: it is neither.
    """
    numbers = [int(part) if part.isdecimal() else 0 for part in text.split("x")]
    if len(numbers) not in (3, 4) or min(numbers) < 1:
        raise InputError(
            f"--signal is {text!r}; write CHANNELSxHEIGHTxWIDTHxCLASSES for images (3x32x32x10), "
            "CHANNELSxPOINTSxCLASSES for point sets (1x32768x40)."
        )
    classes = tuple(map(str, range(numbers[-1])))
    if len(numbers) == 3:
        facts = SignalFacts(kind="points", channels=numbers[0], height=None, width=None, classes=classes)
        return facts, numbers[1]
    return SignalFacts(kind="image", channels=numbers[0], height=numbers[1], width=numbers[2], classes=classes), None


def read_case(path: Path, signal: str | None) -> Case:
    """The case of a configuration file; the signals' size from its data set, or from `signal` if given.

    Raises:
        InputError: the data set is not there, or does not say how large its signals are, and `signal` is None.
    """
    config = load_config(ClassifyConfig, path)
    if signal is not None:
        facts, points = parse_signal(signal)
        return Case(config=config, facts=facts, points=points)
    try:
        facts = read_info(config.data.path).facts
    except InputError as error:
        raise InputError(f"{error} Or say how large the signals are: --signal 3x32x32x10.") from error
    if facts.height is None or facts.width is None:
        raise InputError(
            f"The data of {path} does not say how large a signal is; say it by --signal "
            "(3x320x320x10 for images, 1x32768x40 for point sets)."
        )
    return Case(config=config, facts=facts)
