"""Ranks and norms of weight matrices against NumPy and closed forms; the tracker; the figure."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mwt import rank
from mwt.errors import InputError
from mwt.muon_groups import split_parameters
from mwt.plots import figure_png
from mwt.runtime import write_json


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def by_numpy(matrix: Tensor) -> dict[str, float]:
    values = np.linalg.svd(matrix.detach().double().numpy(), compute_uv=False)
    shares = values**2 / (values**2).sum()
    plain = values / values.sum()
    return {
        "stable_rank": np.linalg.norm(matrix.detach().double().numpy()) ** 2 / values[0] ** 2,
        "effective_rank": float(np.exp(-(shares * np.log(shares)).sum())),
        "plain_effective_rank": float(np.exp(-(plain * np.log(plain)).sum())),
        "spectral_norm": values[0],
        "frobenius_norm": float(np.sqrt((values**2).sum())),
        "condition_number": values[0] / values[-1],
    }


@pytest.mark.parametrize("scale", [1.0, 1e-25])
@pytest.mark.parametrize("shape", [(40, 40), (30, 50), (50, 30), (2, 3, 20, 10)])
def test_against_numpy(shape: tuple[int, ...], scale: float) -> None:
    matrices = scale * torch.randn(shape)
    singles = matrices.reshape(-1, *shape[-2:])
    ours = {name: getattr(rank, name)(matrices) for name in rank.QUANTITIES}
    if scale < 1:  # whose squares underflow, which a sum of squares may show and a ratio may not
        del ours["frobenius_norm"]
    ours["plain_effective_rank"] = rank.effective_rank(matrices, squared=False)
    for name, numbers in ours.items():
        expected = [by_numpy(matrix)[name] for matrix in singles]
        assert numbers.shape == shape[:-2]
        np.testing.assert_allclose(numbers.flatten().numpy(), expected, rtol=2e-4, err_msg=name)


def test_closed_forms() -> None:
    one = torch.outer(torch.randn(6), torch.randn(9)).double()
    orthogonal = 3 * torch.linalg.qr(torch.randn(8, 5).double()).Q
    for measure in (rank.stable_rank, rank.effective_rank):
        assert measure(one).item() == pytest.approx(1)
        assert measure(orthogonal).item() == pytest.approx(5)
    assert rank.condition_number(orthogonal).item() == pytest.approx(1)
    assert rank.condition_number(torch.diag(torch.tensor([2.0, 0.0]))).item() == float("inf")
    assert rank.stable_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0]))).item() == pytest.approx(1.5)
    assert rank.stable_rank(torch.randn(256, 256)).item() == pytest.approx(64, rel=0.1)  # n/4
    assert rank.effective_rank(torch.diag(torch.tensor([2.0, 1.0]))).item() == pytest.approx(5 / 4**0.8)
    assert rank.effective_rank(torch.diag(torch.tensor([2.0, 1.0])), squared=False).item() == pytest.approx(
        3 / 4 ** (1 / 3)
    )


def test_half_precision_is_widened() -> None:
    matrix = torch.randn(20, 20).bfloat16()
    assert rank.stable_rank(matrix).item() == pytest.approx(by_numpy(matrix)["stable_rank"], rel=1e-4)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 12), nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 1))


def test_a_tracker_sees_the_weights_as_they_are_at_each_step() -> None:
    net = network()
    tracker = rank.RankTracker(net)
    for step in (0, 100):
        expected = {name: by_numpy(net.get_parameter(name)) for name in ("1.weight", "2.weight")}
        rows = tracker.record(step)
        assert [(row.step, row.layer) for row in rows] == [(step, "1.weight"), (step, "2.weight")]
        for row in rows:
            for name in rank.QUANTITIES:
                assert getattr(row, name) == pytest.approx(expected[row.layer][name], rel=1e-3), name
        with torch.no_grad():
            net.get_parameter("1.weight").add_(torch.ones(12, 12))
    assert len(tracker.rows) == 4
    assert tracker.rows[2].stable_rank < tracker.rows[0].stable_rank - 0.5  # the ones are of rank one
    assert json.loads(json.dumps(tracker.as_json(), allow_nan=False)) == tracker.as_json()


def test_named_layers_and_matrices_without_a_rank() -> None:
    net = network()
    nn.init.zeros_(net[0].weight)
    [row] = rank.RankTracker(net, names=["0.weight"]).record(0)
    assert (row.stable_rank, row.condition_number, row.spectral_norm) == (None, None, 0.0)
    json.dumps(rank.dataclasses.asdict(row), allow_nan=False)
    for name in ("0.bias", "9.weight"):
        with pytest.raises(InputError, match=f"{name} is no matrix of Sequential"):
            rank.RankTracker(net, names=[name])


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 10, 8))

    def muon_parameters(self) -> list[tuple[str, nn.Parameter, str]]:
        return [("weight", self.weight, "in_out")]


def test_of_stacked_networks_the_mean_is_recorded() -> None:
    net = Stack()
    assert len(split_parameters(net).muon) == 1
    [row] = rank.RankTracker(net).record(3)
    mean = np.mean([by_numpy(matrix)["stable_rank"] for matrix in net.weight])
    assert row.stable_rank == pytest.approx(mean, rel=1e-4)


def rows_of(scale: float) -> list[rank.RankRow]:
    net = network()
    tracker = rank.RankTracker(net)
    for step in range(3):
        tracker.record(step)
        with torch.no_grad():
            net.get_parameter("1.weight").mul_(scale)
    return tracker.rows


def test_the_figure_holds_the_rows() -> None:
    runs = {"Adam": rows_of(0.5), "Muon": rows_of(2.0)}
    figure = rank.rank_figure(runs, quantities=["spectral_norm"])
    assert [axes.get_title() for axes in figure.axes] == ["1.weight: spectral norm", "2.weight: spectral norm"]
    for axes, layer in zip(figure.axes, ("1.weight", "2.weight"), strict=True):
        assert [line.get_label() for line in axes.lines] == ["Adam", "Muon"]
        for line, rows in zip(axes.lines, runs.values(), strict=True):
            own = [row for row in rows if row.layer == layer]
            assert list(line.get_xdata()) == [0, 1, 2]
            assert list(line.get_ydata()) == [row.spectral_norm for row in own]
    assert figure_png(figure).startswith(b"\x89PNG")


def test_all_quantities_of_a_finished_fit_are_shown(tmp_path: Path) -> None:
    rows = rows_of(0.5)
    write_json(tmp_path / "ranks.json", [asdict(row) for row in rows])
    figure = rank.rank_figure({"a": rank.read_ranks(tmp_path)})
    names = ("stable rank", "effective rank", "spectral norm", "condition number")
    assert [axes.get_title() for axes in figure.axes] == [f"{n}.weight: {name}" for name in names for n in (1, 2)]
    assert [axes.get_yscale() for axes in figure.axes] == ["linear"] * 6 + ["log"] * 2
    own = [row.condition_number for row in rows if row.layer == "2.weight"]
    assert list(figure.axes[-1].lines[0].get_ydata()) == own
    with pytest.raises(InputError, match=r"ranks\.json is missing"):
        rank.read_ranks(tmp_path / "none")


def test_figures_that_cannot_be_drawn() -> None:
    rows = rows_of(1.0)
    with pytest.raises(InputError, match="quantity is 'rank'; there are stable_rank"):
        rank.rank_figure({"a": rows}, quantities=["stable_rank", "rank"])
    with pytest.raises(InputError, match="one to three runs, not 4"):
        rank.rank_figure(dict.fromkeys("abcd", rows))
    with pytest.raises(InputError, match="not the same layers"):
        rank.rank_figure({"a": rows, "b": rows[:1]})
    with pytest.raises(InputError, match="no rows"):
        rank.rank_figure({"a": []})
