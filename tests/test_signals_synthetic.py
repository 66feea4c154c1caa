"""Made signals: their spectra by NumPy, how much of them is filled, and what a fit of them sees."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mwt.errors import InputError
from mwt.fields import FieldConfig, build_field
from mwt.fields.config import InterpolatedGridConfig, MLPConfig
from mwt.signals.synthetic import SampledTask, bandlimited_noise, sierpinski, sines, spheres, star

CPU = torch.device("cpu")


def test_sines_have_their_frequencies_and_no_others() -> None:
    values = sines(64, [3, 7, 20], seed=1).double().numpy()
    amplitude = np.abs(np.fft.rfft(values - 0.5))
    loud = amplitude[[3, 7, 20]]
    np.testing.assert_allclose(loud, loud[0], rtol=1e-5)
    assert np.delete(amplitude, [3, 7, 20]).max() < 1e-4 * loud[0]
    assert np.abs(values - 0.5).max() == pytest.approx(0.5, abs=1e-6)
    assert not torch.equal(sines(64, [3, 7], seed=1), sines(64, [3, 7], seed=2))
    for wrong in ([], [0], [32]):
        with pytest.raises(InputError, match="1 to 31 periods"):
            sines(64, wrong, seed=0)


@pytest.mark.parametrize("size", [(64,), (24, 30), (8, 9, 10)])
def test_noise_has_nothing_beyond_its_band(size: tuple[int, ...]) -> None:
    values = bandlimited_noise(size, 0.5, seed=3).double().numpy()
    assert (values.min(), values.max()) == (0, 1)
    power = np.abs(np.fft.fftn(values)) ** 2
    lines = np.meshgrid(*(np.fft.fftfreq(count) for count in size), indexing="ij")
    beyond = np.sqrt(sum(line**2 for line in lines)) > 0.5 / math.sqrt(2)
    assert beyond.any()
    assert power[beyond].sum() < 1e-10 * power.sum()
    assert (power[~beyond] > 0).all()
    with pytest.raises(InputError, match="cutoff"):
        bandlimited_noise(size, 0.001, seed=0)


def test_shapes_fill_what_they_should() -> None:
    for depth in range(5):
        assert float(sierpinski(32, depth).mean()) == pytest.approx(0.75**depth)
    balls = spheres((40, 30), 0.1, seed=2)
    one = math.pi * 4**2 / 1200
    assert 0.1 <= float(balls.mean()) < 0.1 + one + 0.02
    assert set(balls.unique().tolist()) == {0.0, 1.0}
    with pytest.raises(InputError, match=r"at least 0\.0125"):
        spheres((40, 30), 1e-6, seed=2)
    shown = star(201)
    angle = np.linspace(0, 2 * np.pi, 4000, endpoint=False) + 1e-4
    y, x = (100.5 + 80 * np.sin(angle)).astype(int), (100.5 + 80 * np.cos(angle)).astype(int)
    ring = shown.numpy()[y, x]
    edges = int((ring != np.roll(ring, 1)).sum())
    assert abs(edges - 40) <= 8  # pixels are steps, and a few edges are crossed twice or not at all
    assert float(shown[0].max()) == 0


def test_a_task_with_samples_held_out(tmp_path: Path) -> None:
    task = SampledTask(torch.rand(32, 1), "noise", CPU, keep=0.75, seed=4)
    assert (task.points, len(task.held_out)) == (24, 8)
    assert sorted([*task.seen.tolist(), *task.held_out.tolist()]) == list(range(32))
    step = float(task.coords[1] - task.coords[0])
    assert (float(task.coords[0]), step) == (-1, pytest.approx(2 / 32))
    field = build_field(FieldConfig(mlp=MLPConfig(width=8)), coordinate_dims=1, channels=1, seed=0)
    shown = field(task.coords)[:, 0]
    wanted = (shown - (2 * task.truth[0, :, 0] - 1)).square()
    generator = torch.Generator()
    torch.testing.assert_close(task.loss(field, None, generator)[0], wanted[task.seen].mean())
    some = torch.tensor([0, 5])
    torch.testing.assert_close(task.loss(field, some, generator)[0], wanted[task.seen[some]].mean())
    found = task.evaluate(field).metrics
    error = (((shown + 1) / 2).clamp(0, 1) - task.truth[0, :, 0]).detach().square()
    assert float(found["psnr"]) == pytest.approx(-10 * math.log10(float(error.mean())), abs=1e-3)
    assert float(found["psnr_held_out"]) == pytest.approx(
        -10 * math.log10(float(error[task.held_out].mean())), abs=1e-3
    )
    (path,) = task.write(field, tmp_path)
    np.testing.assert_allclose(np.load(path)[:, 0], ((shown + 1) / 2).detach().numpy(), atol=1e-6)
    with pytest.raises(InputError, match="keep"):
        SampledTask(torch.rand(32, 1), "noise", CPU, keep=0.01)


def test_volumes_are_shown_by_their_middle() -> None:
    task = SampledTask(torch.rand(4, 5, 6, 1), "volume", CPU)
    grid = FieldConfig(name="grid", grid=InterpolatedGridConfig(size=(3,)))
    field = build_field(grid, coordinate_dims=3, channels=1, seed=0)
    assert task.evaluate(field).picture.shape == (1, 5, 6)
    assert "psnr_held_out" not in task.evaluate(field).metrics
