"""train.fit through everything, and the fits themselves: one or several, any optimizer, interrupted or not."""

from __future__ import annotations

import errno
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mwt.config_files import load_config
from mwt.errors import InputError, NotDefinedError, TrainingError
from mwt.fields import FieldConfig, build_field, evaluate, load_field, save_field
from mwt.fields.activations import make_activation
from mwt.fields.config import ActivationConfig, EncodingConfig, InterpolatedGridConfig, MLPConfig
from mwt.fields.layers import Initializer
from mwt.fit_config import FitConfig, FitOptimConfig, MuonConfig
from mwt.fit_groups import GroupedFit
from mwt.fit_report import Film
from mwt.fitting import SignalFit, evaluation_steps, fields_for, make_fit_optimizer, rate_factor
from mwt.signals import TASKS, Sampler, signal_paths
from mwt.signals.image import ImageTask
from mwt.signals.pictures import read_picture
from train.fit import CONFIGS, main

CPU = torch.device("cpu")
SMALL = FieldConfig(mlp=MLPConfig(width=24, hidden_layers=2))


def picture(seed: int, height: int = 20, width: int = 24, channels: int = 3) -> np.ndarray:
    """Smooth colours."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = [0.5 + 0.5 * np.sin((2 + c + seed) * x + (c + 1) * y * 3) for c in range(channels)]
    return np.round(255 * np.stack(waves, -1)).astype(np.uint8).squeeze()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(3):
        Image.fromarray(picture(i)).save(tmp_path / f"{i}.png")
    return tmp_path


def image_task(paths: list[Path]) -> ImageTask:
    return ImageTask(paths, ImageTask.Options(), CPU)


def fitted(task: ImageTask, optim: FitOptimConfig, seed: int = 3) -> SignalFit:
    fit = SignalFit(task, fields_for(SMALL, task, seed=seed), optim, seed, evaluations=3)
    fit.run(lambda: False, lambda _: None, lambda: None)
    return fit


@pytest.mark.parametrize("name", ["adam", "muon"])
def test_several_signals_at_once_are_fitted_as_each_alone(folder: Path, name: str) -> None:
    optim = FitOptimConfig(name=name, steps=12, points=100)
    paths = signal_paths(str(folder), ImageTask)
    together = fitted(image_task(paths), optim)
    for i, path in enumerate(paths):
        alone = fitted(image_task([path]), optim)
        for key, value in alone.fields.state_dict().items():
            torch.testing.assert_close(together.fields.state_dict()[key][i], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "exponential", "constant"])
def test_plain_gradient_descent_by_adam_is_torchs(folder: Path, schedule: str) -> None:
    """The whole loop against ten lines of torch: the same points, losses, schedule and Adam."""
    task = image_task([folder / "0.png"])
    moments = {} if schedule == "cosine" else {"betas": (0.7, 0.95), "eps": 1e-3}
    optim = FitOptimConfig(steps=10, points=64, lr=2e-3, schedule=schedule, lr_min=1e-4, **moments)
    ours = fitted(task, optim)
    field = fields_for(SMALL, task, seed=3)
    adam = torch.optim.Adam(field.parameters(), lr=2e-3, **moments)
    falling = {
        "cosine": torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=10, eta_min=1e-4),
        "exponential": torch.optim.lr_scheduler.ExponentialLR(adam, gamma=(1e-4 / 2e-3) ** (1 / 10)),
        "constant": torch.optim.lr_scheduler.ConstantLR(adam, factor=1.0),
    }[schedule]
    sampler = Sampler(task.points, 64, 3, CPU)
    truth = torch.from_numpy(picture(0)).float().div(127.5).sub(1).reshape(-1, 3)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 20), torch.linspace(-1, 1, 24), indexing="ij")
    coords = torch.stack([y, x], -1).reshape(-1, 2)
    for step in range(10):
        index = sampler.index(step)
        adam.zero_grad()
        ((field(coords[index]) - truth[index]) ** 2).mean().backward()
        adam.step()
        assert ours.rates[0] * rate_factor(optim, step) == pytest.approx(falling.get_last_lr()[0], rel=1e-12)
        falling.step()
    assert schedule == "constant" or falling.get_last_lr()[0] == pytest.approx(1e-4)  # after exactly the steps run
    for a, b in zip(ours.fields.parameters(), field.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_the_moments_beside_muon_are_as_configured(folder: Path) -> None:
    task = image_task([folder / "0.png"])
    optim = load_config(FitConfig, None, ["optim.name=muon", "optim.betas=[0.5, 0.6]", "optim.eps=0.1"]).optim
    groups = make_fit_optimizer(fields_for(SMALL, task, seed=3), optim).param_groups
    assert [(group["betas"], group["eps"]) for group in groups if not group["use_muon"]] == [((0.5, 0.6), 0.1)]
    assert all("betas" not in group and group["eps"] == 1e-7 for group in groups if group["use_muon"])


@pytest.mark.parametrize("compare", [True, False])
def test_baselines_can_be_left_out(folder: Path, compare: bool) -> None:
    arguments = ["--debug", "task=denoising", f"signal.path={folder}/0.png", f"run.dir={folder}/run"]
    assert main([*arguments, f"run.baselines={str(compare).lower()}"]) == 0
    found = json.loads((folder / "run" / "result.json").read_text())["baselines"]
    assert sorted(found) == (["noisy", "total variation"] if compare else [])


def test_muon_s_own_settings_reach_it(folder: Path) -> None:
    task = image_task([folder / "0.png"])
    field = fields_for(FieldConfig(mlp=MLPConfig(width=16, hidden_layers=3)), task, seed=0)
    settings = {
        "momentum": 0.8,
        "nesterov": False,
        "ns_steps": 3,
        "ns_dtype": "bf16",
        "eps": 1e-5,
        "adjust": "spectral",
    }
    muon = MuonConfig(first=True, exclude=("hidden.1.*",), **settings)
    groups = make_fit_optimizer(field, FitOptimConfig(name="muon", lr_muon=0.01, muon=muon)).param_groups
    [own] = [group for group in groups if group["use_muon"]]
    assert {name: own[name] for name in settings} == settings
    assert own["param_names"] == ["first.weight", "hidden.0.weight", "hidden.2.weight"]


SHARES = [
    ("relu", "identity", 0.09),
    ("relu", "nerf", 0.03),
    ("sine", "identity", 0.03),
    ("gaussian", "identity", 0.03 * 6**0.5 / 30),
]


def test_muon_s_share_is_that_of_the_gaussian_that_an_activation_is() -> None:
    """Of the same function, and of others of the same slope or curvature at 0, or period."""

    def share(name: str, **settings: float) -> float:
        kind = ActivationConfig(name=name, **settings)
        config = FieldConfig(mlp=MLPConfig(width=8, hidden_layers=1, activation=kind))
        return build_field(config, coordinate_dims=2, channels=1, seed=0).relative_lr

    z = torch.linspace(-0.1, 0.1, 41)
    same = [{"name": "gaussian", "scale": 30.0}]
    same += [{"name": "super_gaussian", "a": (b / 2) ** 0.5 / 30, "b": b} for b in (1.0, 4.0)]
    for settings in same:
        function = make_activation(ActivationConfig(**settings), Initializer(0))
        torch.testing.assert_close(function(z), torch.exp(-900 * z**2))
    found = [share(**settings) for settings in same]
    assert found == pytest.approx([0.03 * 6**0.5 / 30] * 3)
    for name, a in (("laplacian", 1 / 30), ("quadratic", 30.0), ("multi_quadratic", 30.0), ("expsin", 30.0)):
        assert share(name, a=a) == pytest.approx(found[0]), name
        assert share(name) == 0.03, name  # of width 1


@pytest.mark.parametrize(("activation", "encoding", "share"), SHARES)
def test_muon_begins_with_a_share_of_the_spectral_norm(
    folder: Path, activation: str, encoding: str, share: float
) -> None:
    kind = ActivationConfig(name=activation, scale=30.0 if activation == "gaussian" else None)
    config = MLPConfig(width=24, hidden_layers=1, activation=kind, encoding=EncodingConfig(name=encoding))
    field = fields_for(FieldConfig(mlp=config), image_task([folder / "0.png"]), seed=0)
    groups = make_fit_optimizer(field, FitOptimConfig(name="muon")).param_groups
    matrix = dict(field.named_parameters())["hidden.0.weight"].detach()
    [rate] = [group["lr"] for group in groups if group["use_muon"]]
    assert rate == pytest.approx(share * float(np.linalg.svd(matrix.numpy(), compute_uv=False)[0]), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "exponential"}, "optim.schedule=exponential never reaches zero: set optim.lr_min"),
        ({"betas": (0.9, 1.0)}, r"optim.betas are \(0.9, 1.0\); they must lie in \[0, 1\)"),
        ({"eps": 0.0}, "optim.eps is 0.0; it must be positive"),
        ({"name": "lbfgs", "eps": 1e-15}, "leave out optim.betas and optim.eps"),
        ({"name": "lbfgs", "points": 64}, "optim.points=null"),
        (
            {"lr_muon": 0.1},
            "optim.name is adam, but optim.lr_muon or optim.muon is set: say optim.name=muon, or leave it out",
        ),
        ({"name": "lbfgs", "schedule": "constant"}, "leave out optim.schedule and optim.lr_min"),
        ({"name": "muon", "muon": MuonConfig(adjust="spectral")}, "give optim.lr_muon with it"),
        ({"muon": MuonConfig(ns_steps=3)}, "optim.name is adam, but optim.lr_muon or optim.muon is set"),
    ],
)
def test_settings_of_the_optimizer_that_will_not_do(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FitOptimConfig(**options)


@pytest.mark.parametrize("name", ["adam", "muon", "lbfgs"])
def test_an_interrupted_fit_goes_on_bit_for_bit(folder: Path, name: str) -> None:
    optim = FitOptimConfig(name=name, steps=8, points=None if name == "lbfgs" else 100)
    task = image_task([folder / "0.png"])
    whole = fitted(task, optim)
    first = SignalFit(task, fields_for(SMALL, task, seed=3), optim, 3, evaluations=3)
    first.run(lambda: first.step == 5, lambda _: None, lambda: None)
    GroupedFit({"": first}).save(folder / "checkpoint.safetensors")
    second = SignalFit(task, fields_for(SMALL, task, seed=99), optim, 3, evaluations=3)
    GroupedFit({"": second}).restore(folder / "checkpoint.safetensors")
    second.run(lambda: False, lambda _: None, lambda: None)
    for a, b in zip(whole.fields.parameters(), second.fields.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [row["step"] for row in second.curve] == evaluation_steps(8, 3)


def test_files_that_are_no_checkpoint_are_refused(folder: Path) -> None:
    fit = GroupedFit({"": fitted(image_task([folder / "0.png"]), FitOptimConfig(steps=2))})
    path = folder / "checkpoint.safetensors"
    fit.save(path)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        [content] = json.loads(file.metadata()["fits"])
    less = {name: value for name, value in tensors.items() if name != "0.optimizer.0.exp_avg"}
    assert len(less) < len(tensors)
    for saved, metadata in ((tensors, None), (less, content), (tensors, {**content, "curve": 0, "moments": []})):
        save_file(saved, path, metadata=metadata and {"fits": json.dumps([metadata])})
        with pytest.raises(InputError, match="is damaged, or of another fit"):
            fit.restore(path)


def test_every_point_comes_once_before_any_comes_again() -> None:
    sampler = Sampler(10, 3, 0, CPU)
    seen = torch.cat([sampler.index(step) for step in range(3)])
    assert len(seen.unique()) == 9
    assert not torch.equal(sampler.index(3), sampler.index(0))
    assert Sampler(10, 10, 0, CPU).index(0) is None


def test_a_loss_that_is_not_finite_names_step_and_signal(folder: Path) -> None:
    with pytest.raises(TrainingError, match=r"0.png was not finite at step"):
        fitted(image_task([folder / "0.png"]), FitOptimConfig(steps=30, lr=1e30))


def test_a_last_step_that_spoils_the_weights_is_seen(folder: Path) -> None:
    """Its loss, of before the step, is as it should be."""
    task = image_task([folder / "0.png", folder / "1.png"])
    fit = SignalFit(task, fields_for(SMALL, task, seed=3), FitOptimConfig(steps=1), 3, evaluations=1)
    fit.fields.last.weight.register_hook(lambda gradient: torch.stack([gradient[0], gradient[1] * float("nan")]))
    with pytest.raises(TrainingError, match=r"1.png was not finite at step 1.*0\.001"):
        fit.run(lambda: False, lambda _: None, lambda: None)


@pytest.mark.parametrize("mode", ["grey", "16 bits", "dark, 16 bits", "jpeg", "float array", "colours as grey"])
def test_pictures_of_all_kinds(tmp_path: Path, mode: str) -> None:
    grey = picture(0, channels=1)
    if mode == "grey":
        Image.fromarray(grey).save(path := tmp_path / "a.png")
    elif mode == "16 bits":
        Image.fromarray(grey.astype(np.uint16) * 257).save(path := tmp_path / "a.tiff")
    elif mode == "dark, 16 bits":
        grey = grey / 257
        Image.fromarray(np.round(grey * 257).astype(np.uint16)).save(path := tmp_path / "a.tiff")
    elif mode == "jpeg":
        Image.fromarray(grey).save(path := tmp_path / "a.jpg", quality=100)
    elif mode == "float array":
        np.save(path := tmp_path / "a.npy", grey / 255)
    else:
        np.save(path := tmp_path / "a.npy", np.stack([grey] * 3, -1))
    found = read_picture(path, grey=mode == "colours as grey")
    assert found.shape == (20, 24, 1)
    np.testing.assert_allclose(found[..., 0].numpy(), grey / 255, atol=0.02 if mode == "jpeg" else 1e-6)


def test_pictures_of_an_unknown_range_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", picture(0).astype(np.int64))
    with pytest.raises(InputError, match="holds int64; save uint8, uint16, or floats"):
        read_picture(tmp_path / "a.npy")
    Image.fromarray(picture(0, channels=1).astype(np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(InputError, match=r"a.tiff holds numbers outside \[0, 1\]"):
        read_picture(tmp_path / "a.tiff")


def test_a_turned_camera(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    Image.fromarray(picture(0)).save(tmp_path / "a.png", exif=exif)
    expected = np.rot90(picture(0), -1) / 255
    np.testing.assert_allclose(read_picture(tmp_path / "a.png").numpy(), expected, atol=1e-6)


def run(*arguments: str) -> int:
    return main(["--debug", "field.mlp.hidden_layers=1", *arguments])


def test_the_program_leaves_everything(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "run"
    assert run("optim.name=muon", f"signal.path={folder}/*.png", f"run.dir={out}") == 0
    found = json.loads((out / "result.json").read_text())
    assert set(found["final"]) == {"psnr", "ssim"}
    assert set(found["signals"]) == {"0.png", "1.png", "2.png"}
    assert found["steps"] == 4
    for name in ("curves.png", "ranks.png", "progress.gif", "reconstruction/2.png", "reconstruction/2.error.png"):
        assert (out / name).stat().st_size > 100
    assert not (out / "checkpoint.safetensors").exists()
    assert [row["step"] for row in json.loads((out / "ranks.json").read_text())] == [0, 1, 4]  # one hidden matrix
    field, frame = load_field(out / "field")
    values = frame.to_data(evaluate(field, frame.grid())).clamp(0, 1)
    shown = np.asarray(Image.open(out / "reconstruction/1.png"))
    np.testing.assert_array_equal((values[1].view(20, 24, 3) * 255).round().numpy(), shown)
    for i, own in enumerate(found["signals"].values()):
        error = np.square(values[i].double().numpy() - picture(i).reshape(-1, 3) / 255).mean()
        assert own["psnr"] == pytest.approx(-10 * np.log10(error), abs=1e-3)
    with Image.open(out / "progress.gif") as film:
        assert film.n_frames == 2
    assert "best" in capsys.readouterr().out
    assert main(["--resume", f"run.dir={out}"]) == 0
    assert "finished" in capsys.readouterr().out


def test_a_fit_whose_files_could_not_be_written_is_not_lost(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the last step: before field/, then before best_field/. No step is made again; the outcome is the same."""
    whole, out, failures = folder / "whole", folder / "run", [OSError(errno.ENOSPC, "full"), None, KeyboardInterrupt()]
    arguments = [f"signal.path={folder}/0.png", "run.film=false", "run.curves=false", "run.ranks=false"]
    assert run(*arguments, f"run.dir={whole}") == 0

    def fail(*given: Any) -> None:
        failure = failures.pop(0)
        if failure is not None:
            raise failure
        save_field(*given)

    monkeypatch.setattr("train.fit.save_field", fail)
    with pytest.raises(OSError, match="full"):
        run(*arguments, f"run.dir={out}")
    monkeypatch.delattr(SignalFit, "make_step")
    with pytest.raises(KeyboardInterrupt):
        main(["--resume", f"run.dir={out}"])
    assert not failures
    assert not (out / "result.json").exists()
    monkeypatch.setattr("train.fit.save_field", save_field)
    assert main(["--resume", f"run.dir={out}"]) == 0
    assert not (out / "checkpoint.safetensors").exists()
    found, expected = (json.loads((path / "result.json").read_text()) for path in (out, whole))
    assert found["signals"] == expected["signals"]
    for name in ("field", "best_field"):
        fields = (load_field(path / name)[0].state_dict() for path in (out, whole))
        for a, b in zip(*(state.values() for state in fields), strict=True):
            assert torch.equal(a, b)


def test_frames_of_a_film_are_small_on_disk_already(tmp_path: Path) -> None:
    """Of 1,000 x 500 points, black above and white below; a small one stays as it is."""
    film = Film(tmp_path / "film")
    large = torch.zeros(1, 500, 1000, dtype=torch.uint8)
    large[:, 250:] = 255
    for step in (3, 20):
        film.add(step, large)
    with Image.open(tmp_path / "film/00000020.png") as frame:
        assert frame.size == (384, 192)
        np.testing.assert_array_equal(np.asarray(frame)[[0, 95, 96, 191], 7], [0, 0, 255, 255])
    film.write(tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.size, gif.n_frames) == ((384, 192), 1)  # equal frames are one
    film.remove()
    assert not (tmp_path / "film").exists()
    small = Film(tmp_path / "small")
    small.add(1, torch.full((3, 5, 7), 9, dtype=torch.uint8))
    with Image.open(tmp_path / "small/00000001.png") as frame:
        np.testing.assert_array_equal(np.asarray(frame), np.full((5, 7, 3), 9))


def test_files_of_one_name_do_not_overwrite_each_other(folder: Path) -> None:
    Image.fromarray(picture(1)).save(folder / "0.bmp")
    assert run(f"signal.path={folder}/0.*", f"run.dir={folder / 'run'}") == 0
    assert set(json.loads((folder / "run/result.json").read_text())["signals"]) == {"000-0.bmp", "001-0.png"}
    truths = [np.asarray(Image.open(folder / f"run/reconstruction/{stem}.truth.png")) for stem in ("000-0", "001-0")]
    np.testing.assert_array_equal(truths, [picture(1), picture(0)])


def test_a_config_can_be_run_as_its_header_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that stands in it, word for word, on a small picture; what all configs say: test_configs_fit.py."""
    path = CONFIGS / "denoising.yaml"
    [line] = [line for line in path.read_text().splitlines() if "python -m train.fit" in line]
    _, python, flag, program, *arguments = shlex.split(line)
    assert (python, flag, program) == ("python", "-m", "train.fit")
    monkeypatch.chdir(folder)
    (folder / "configs/fit").mkdir(parents=True)
    shutil.copy(path, folder / "configs/fit")
    Image.fromarray(picture(0)).save("photo.png")
    assert main(["--debug", *arguments, "signal.crop=16", "run.film=false", "run.curves=false"]) == 0
    found = json.loads((folder / "runs/debug/result.json").read_text())
    assert (found["task"], list(found["signals"])) == ("denoising", ["photo.png"])
    assert set(found["baselines"]) == {"noisy", "total variation"}


def test_macs_and_parameters_are_those_of_the_layers(folder: Path) -> None:
    run(f"signal.path={folder}/0.png", f"run.dir={folder / 'run'}")
    found = json.loads((folder / "run/result.json").read_text())
    assert found["macs_per_point"] == 2 * 16 + 16 * 16 + 16 * 3
    assert found["parameters"] == 3 * 16 + 17 * 16 + 17 * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["signal.path=/no/such.png"], "There is no file /no/such.png"),
        ([], "signal.path is missing: .*such as signal.path=photo.png"),
        (["signal.path=[a.png,b.png]"], "it is one file, a folder or a glob"),
        (["signal={folder}/0.png"], "is no setting; the signal to fit is given as signal.path=.*0.png"),
        (["{folder}/0.png"], "is no setting; the signal to fit is given as signal.path=.*0.png"),
        (["signal.path=https://a.b/c.png"], "fetch it first"),
        (["signal.path={folder}/*.gif"], "There is no file that matches .*gif"),
        (["optim.speed=3"], "Key 'speed' not in 'FitOptimConfig'; there are name, lr, "),
        (["signal.path={folder}/0.png", "signal.hight=3"], "Did you mean: 'high'"),
        (["signal.path={folder}/0.png", "task=imgae"], "task is 'imgae'; there are image"),
        (["signal.path={folder}/text.png"], "not an image that can be read"),
        (["signal.path={folder}/empty"], "holds no file that ends in .*npy.$"),
        (["signal.path={folder}/outer"], r"holds no file .* are signal.path='.*outer/\*\*/\*.png'"),
        (["signal.path={folder}/0.png", "signal.glitter=3"], "not in 'Options'; there are grey, crop, "),
        (["signal.path={folder}/0.png", "signal.crop=400"], "is 400; .*0.png is 20 x 24, of which 1 to 20 can"),
        (["signal.path={folder}/0.png", "task=poisson", "field.mlp.activation.name=relu", "signal.given=laplacian"],
         "derivatives of order 2"),
        (["signal.path={folder}/0.png", "task=super_resolution", "optim.points=3"], "leave out optim.points"),
        (["signal.path={folder}/0.png", "task=inpainting"], "some known and some missing"),
        (["signal.path={folder}/0.png", "task=inpainting", "signal.mask={folder}/10.png"], "mask .* is 9 x 9"),
        (["signal.path={folder}/0.png", "task=inpainting", "signal.box=[0,0,90,2]"], "does not lie within"),
        (["signal.path={folder}/0.png", "task=video"], "has one frame"),
        (["signal.path={folder}/0.png", "task=video", "signal.frames=0"], "signal.frames is 0"),
        (["signal.path={folder}/0.png", "signal.scale=0"], "signal.scale is 0"),
        (["signal.path={folder}/0.png", "signal.crop=1", "task=poisson"], "at least 2 pixels"),
        (["signal.path={folder}/[12].png", "optim.name=lbfgs"], "one signal at a time"),
    ],
)  # fmt: skip
def test_bad_input_gets_a_sentence(folder: Path, arguments: list[str], message: str) -> None:
    (folder / "text.png").write_text("no picture")
    (folder / "empty").mkdir()
    (folder / "outer/inner").mkdir(parents=True)
    Image.fromarray(picture(0)).save(folder / "outer/inner/0.png")
    Image.fromarray(picture(0, 9, 9)).save(folder / "10.png")
    with pytest.raises(InputError, match=message):
        run(*(item.format(folder=folder) for item in arguments), f"run.dir={folder / 'run'}")


def test_a_fit_that_is_not_there_cannot_be_resumed(folder: Path) -> None:
    with pytest.raises(InputError, match=r"is not a run directory .*train.fit make"):
        main(["--resume", f"run.dir={folder / 'run'}"])


def test_every_task_goes_through_the_program(folder: Path) -> None:
    options = {
        "inpainting": ["signal.keep=0.5", "signal.text=ab", "optim.points=50"],
        "super_resolution": ["signal.factor=2"],
        "poisson": ["signal.given=laplacian", "optim.points=50"],
    }
    for task in ("image", "denoising", "inpainting", "super_resolution", "poisson"):
        out = folder / task
        assert run(f"task={task}", f"signal.path={folder}/0.png", f"run.dir={out}", *options.get(task, [])) == 0
        assert np.isfinite(json.loads((out / "result.json").read_text())["final"][TASKS[task].metric])
    frames = folder / "frames"
    frames.mkdir()
    for i in range(3):
        Image.fromarray(picture(i)).save(frames / f"{i}.png")
    assert run("task=video", f"signal.path={frames}", f"run.dir={folder / 'video'}") == 0
    assert (folder / "video/reconstruction/video.gif").is_file()


# ---- total variation ---------------------------------------------------------------------------------------------


def test_total_variation_is_added_to_the_loss_of_a_grid(folder: Path) -> None:
    """The gradient of one step, beside that of the sum written out; two signals at once as each alone."""
    config = FieldConfig(name="grid", grid=InterpolatedGridConfig(size=(6, 5)))
    optim = FitOptimConfig(steps=5, total_variation=0.7)
    found = []
    for paths in ([folder / "0.png"], [folder / "1.png"], [folder / "0.png", folder / "1.png"]):
        task = image_task(paths)
        fields = fields_for(config, task, seed=0)
        with torch.no_grad():
            fields.vertices += torch.linspace(-1, 1, 6 * 5 * 3).reshape(6, 5, 3).sin()
        values = fields.vertices.detach().clone().requires_grad_()
        fit = SignalFit(task, fields, optim, seed=0, evaluations=1)
        plain = task.loss(fields, None, torch.Generator()).detach()
        torch.testing.assert_close(fit.make_step(), plain)  # what is reported is without it
        found.append(fields.vertices.grad)
        if len(paths) == 1:
            down, right = values[1:, :-1] - values[:-1, :-1], values[:-1, 1:] - values[:-1, :-1]
            variation = (down**2 + right**2 + 1e-12).sqrt().mean()
            with torch.no_grad():
                fields.vertices.copy_(values)
            fields.zero_grad()
            task.loss(fields, None, torch.Generator()).sum().backward()
            (own,) = torch.autograd.grad(0.7 * variation, values)
            torch.testing.assert_close(found[-1], fields.vertices.grad + own)
    torch.testing.assert_close(found[2], torch.stack(found[:2]))


def test_total_variation_is_of_grids_alone(folder: Path) -> None:
    task = image_task([folder / "0.png"])
    fit = SignalFit(task, fields_for(SMALL, task, seed=0), FitOptimConfig(total_variation=1.0), 0, evaluations=1)
    with pytest.raises(NotDefinedError, match=r"optim.total_variation is for grids.*not field.name=mlp"):
        fit.make_step()
    with pytest.raises(InputError, match="cannot be negative"):
        FitOptimConfig(total_variation=-1.0)
