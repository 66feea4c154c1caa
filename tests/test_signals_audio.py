"""Sound: reading, metrics against torchmetrics' and NumPy's formulas, and fits of known sounds."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from mwt.errors import InputError
from mwt.fields import Field, FieldConfig, evaluate, load_field
from mwt.fields.config import ActivationConfig, MLPConfig
from mwt.fit_config import FitOptimConfig
from mwt.fitting import SignalFit, fields_for
from mwt.signals import audio, signal_paths
from mwt.signals.audio import AudioTask, log_spectral_distance, read_sound, sound_metrics, spectrogram
from train.fit import main

CPU = torch.device("cpu")
RATE = 8000


def sound(seed: int = 0, seconds: float = 0.5, channels: int = 1) -> np.ndarray:
    """A chord that dies away, at half of full scale."""
    t = np.arange(round(seconds * RATE)) / RATE
    tones = [np.sin(2 * np.pi * (220 * (k + 1) + 30 * seed) * t) / (k + 1) for k in range(3)]
    one = np.exp(-3 * t) * sum(tones)
    both = np.stack([one, np.roll(one, 40) * 0.7], -1)[:, :channels]
    return 0.5 * both / np.abs(both).max()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(2):
        soundfile.write(tmp_path / f"{i}.wav", sound(i), RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "stereo.wav", sound(0, channels=2), RATE, subtype="FLOAT")
    return tmp_path


def read(path: Path, **options: object) -> np.ndarray:
    return read_sound(path, AudioTask.Options(**options))[0].numpy()


@pytest.mark.parametrize("ending", ["wav", "flac", "mp3"])
def test_sound_of_all_kinds(tmp_path: Path, ending: str) -> None:
    whole = sound(seconds=1.0)
    soundfile.write(path := tmp_path / f"a.{ending}", whole, RATE)
    found = read(path)
    assert found.shape == whole.shape
    tolerance = 0.05 if ending == "mp3" else 2**-15
    np.testing.assert_allclose(found, whole, atol=tolerance)


def test_a_part_and_channels(folder: Path) -> None:
    both = sound(channels=2).astype(np.float32)
    path = folder / "stereo.wav"
    np.testing.assert_array_equal(read(path, channel="all"), both)
    np.testing.assert_array_equal(read(path, channel="1"), both[:, 1:])
    np.testing.assert_allclose(read(path), both.mean(1, keepdims=True), atol=1e-7)
    np.testing.assert_array_equal(read(path, channel="0", start=0.1, seconds=0.2), both[800:2400, :1])


def test_resampling_keeps_a_tone(tmp_path: Path) -> None:
    """The tone itself, drawn at the new rate (away from the ends, where there is nothing to filter)."""
    tone = np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE) / 2
    soundfile.write(tmp_path / "a.wav", tone, RATE, subtype="FLOAT")
    found, rate = read_sound(tmp_path / "a.wav", AudioTask.Options(rate=11025))
    assert (len(found), rate) == (11025, 11025)
    expected = np.sin(2 * np.pi * 440 * np.arange(11025) / 11025) / 2
    np.testing.assert_allclose(found[500:-500, 0].numpy(), expected[500:-500], atol=2e-3)


def test_metrics_against_their_formulas() -> None:
    rng = np.random.default_rng(0)
    truth = sound(seconds=0.6, channels=2).T  # two signals of one channel
    shown = 0.9 * truth + 0.02 * rng.standard_normal(truth.shape)
    found = sound_metrics(torch.from_numpy(shown)[..., None].float(), torch.from_numpy(truth)[..., None].float())
    snr = 10 * np.log10((truth**2).sum(1) / ((shown - truth) ** 2).sum(1))
    np.testing.assert_allclose(found["snr"].numpy(), snr, atol=1e-3)
    psnr = 10 * np.log10(2**2 / ((shown - truth) ** 2).mean(1))  # of a range of 2
    np.testing.assert_allclose(found["psnr"].numpy(), psnr, atol=1e-3)
    a, b = shown - shown.mean(1, keepdims=True), truth - truth.mean(1, keepdims=True)
    part = (a * b).sum(1, keepdims=True) / (b * b).sum(1, keepdims=True) * b
    np.testing.assert_allclose(
        found["si_snr"].numpy(), 10 * np.log10((part**2).sum(1) / ((a - part) ** 2).sum(1)), atol=1e-3
    )
    np.testing.assert_allclose(found["lsd"].numpy(), [lsd(*pair) for pair in zip(shown, truth, strict=True)], rtol=1e-4)


def test_a_silent_channel_does_not_count(tmp_path: Path) -> None:
    """The metrics are those of the channel that sounds, as if it were alone."""
    both = sound(seconds=0.6, channels=2)
    both[:, 1] = 0
    soundfile.write(tmp_path / "half.wav", both, RATE, subtype="FLOAT")
    task = AudioTask([tmp_path / "half.wav"], AudioTask.Options(channel="all"), CPU)
    shown = task.truth + 0.01 * torch.randn(task.truth.shape, generator=torch.Generator().manual_seed(0))
    found, alone = sound_metrics(shown, task.truth), sound_metrics(shown[..., :1], task.truth[..., :1])
    for name in ("snr", "si_snr", "lsd"):  # the PSNR is defined of silence too
        torch.testing.assert_close(found[name], alone[name])
    assert 20 < float(found["snr"]) < 60


@pytest.mark.parametrize("ending", ["au", "aiff", "caf", "w64"])
def test_folders_hold_what_the_library_reads(tmp_path: Path, ending: str) -> None:
    soundfile.write(tmp_path / f"blues.00000.{ending}", sound(), RATE)
    (tmp_path / "notes.txt").write_text("not a sound")
    (tmp_path / "camera.raw").write_bytes(b"1234")  # libsndfile's headerless format, which says nothing of itself
    [path] = signal_paths(str(tmp_path), AudioTask)
    np.testing.assert_allclose(read(path), sound(), atol=2**-15)


def lsd(shown: np.ndarray, truth: np.ndarray) -> float:
    """Frame by frame, by NumPy's FFT."""
    spectra = []
    for part in (shown, truth):
        padded = np.pad(part, 1024, mode="reflect")
        frames = [np.fft.rfft(padded[i : i + 2048]) for i in range(0, len(padded) - 2047, 512)]
        spectra.append(np.log10(np.abs(np.array(frames)) ** 2 + 1e-8))
    return float(np.sqrt(((spectra[0] - spectra[1]) ** 2).mean(0)).mean())


def test_the_distance_of_spectra_has_a_ceiling() -> None:
    quiet = torch.zeros(1, 4096)
    assert float(log_spectral_distance(quiet, quiet)) == 0
    assert float(log_spectral_distance(1e9 * torch.randn(1, 4096), quiet)) == 10


def test_a_tone_stands_at_its_frequency() -> None:
    tone = torch.sin(2 * torch.pi * 1000 * torch.arange(RATE) / RATE)
    shown = spectrogram(tone, loudest=128.0).float().sum(0)
    assert abs(256 - int(shown.mean(1).argmax()) - 1000 / RATE * 512) < 1.5


class Exact(Field):
    """The sound itself."""

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__(coordinate_dims=1, channels=values.shape[-1], copies=None, derivatives=0)
        self.table = values

    def values(self, coords: torch.Tensor) -> torch.Tensor:
        return self.table[((coords[:, 0] / 100 + 1) / 2 * (len(self.table) - 1)).round().long()]


def test_an_exact_field_is_written_as_the_file_was(folder: Path) -> None:
    task = AudioTask([folder / "stereo.wav"], AudioTask.Options(channel="all", extent=100.0), CPU)
    exact = Exact(torch.from_numpy(sound(channels=2)).float() * 2)  # divided by the peak, 0.5
    assert float(task.evaluate(exact).metrics["snr"]) > 80
    assert float(task.loss(exact, torch.tensor([0, 7, 3999]), torch.Generator())) < 1e-12
    task.write(exact, folder)
    with Image.open(folder / "stereo.png") as pair, Image.open(folder / "stereo.error.png") as error:
        assert np.asarray(pair)[:257].max() > 200
        assert np.asarray(error).max() < 60  # no louder than the black of -80 dB
    back, rate = soundfile.read(folder / "stereo.wav", always_2d=True)
    assert rate == RATE
    np.testing.assert_allclose(back, sound(channels=2), atol=2**-15)


def test_a_full_disk_is_named_with_the_file(folder: Path) -> None:
    task = AudioTask([folder / "0.wav"], AudioTask.Options(extent=100.0), CPU)
    (folder / "out").mkdir()
    (folder / "out/0.wav").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught:
        task.write(Exact(task.truth[0]), folder / "out")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(folder / "out/0.wav"))


def test_several_sounds_are_fitted_as_each_alone(folder: Path) -> None:
    config = FieldConfig(mlp=MLPConfig(width=16, hidden_layers=1, activation=ActivationConfig(first_omega=300.0)))

    def fitted(paths: list[Path]) -> SignalFit:
        task = AudioTask(paths, AudioTask.Options(), CPU)
        fit = SignalFit(task, fields_for(config, task, seed=1), FitOptimConfig(steps=10, points=200), 1, 2)
        fit.run(lambda: False, lambda _: None, lambda: None)
        return fit

    paths = [folder / "0.wav", folder / "1.wav"]
    together = fitted(paths)
    for i, path in enumerate(paths):
        for key, value in fitted([path]).fields.state_dict().items():
            torch.testing.assert_close(together.fields.state_dict()[key][i], value, rtol=1e-4, atol=1e-6)


def test_a_short_chord_is_learned(folder: Path) -> None:
    """Through the program: 25 dB within seconds, and the saved field gives the amplitudes of the file."""
    out = folder / "run"
    arguments = ["task=audio", f"signal.path={folder}/0.wav", f"run.dir={out}", "field.mlp.width=64", "optim.steps=250",
                 "field.mlp.hidden_layers=2", "field.mlp.encoding.name=nerf", "field.mlp.encoding.frequencies=10",
                 "run.device=cpu", "run.film=false", "run.evaluations=2", "optim.points=1000"]  # fmt: skip
    assert main(arguments) == 0
    assert json.loads((out / "result.json").read_text())["final"]["snr"] > 25
    field, frame = load_field(out / "field")
    values = frame.to_data(evaluate(field, frame.grid()))
    back, _ = soundfile.read(out / "reconstruction/0.wav", always_2d=True)
    np.testing.assert_allclose(values.numpy(), back, atol=2**-14)


def test_the_program_leaves_sounds_and_pictures(folder: Path) -> None:
    out = folder / "run"
    assert main(["--debug", "task=audio", f"signal.path={folder}/[01].wav", f"run.dir={out}"]) == 0
    found = json.loads((out / "result.json").read_text())
    assert set(found["final"]) == {"snr", "si_snr", "psnr", "lsd"}
    assert found["signal"]["rate"] == RATE
    assert found["signal"]["peaks"] == [0.5, 0.5]
    for i in range(2):
        assert soundfile.info(out / f"reconstruction/{i}.wav").frames == RATE // 2
        np.testing.assert_allclose(
            soundfile.read(out / f"reconstruction/{i}.truth.wav")[0], sound(i)[:, 0], atol=2**-15
        )
    with Image.open(out / "reconstruction/0.png") as picture:
        assert picture.size[1] == 2 * 257 + 3
    with Image.open(out / "reconstruction/0.error.png") as picture:
        assert picture.size[1] == 257


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["signal.path={folder}/*o.wav", "signal.channel=7"], "'7'; .*stereo.wav has 2 channels: choose mono, all"),
        (["signal.path={folder}/[0s]*.wav", "signal.channel=all"], "stereo.wav has 2 channels .* a mix of mono and"),
        (["signal.path={folder}/nothing*"], "There is no file"),
        (["signal.path={folder}/0.wav", "signal.seconds=9"], "lasts 0.50 s; signal.start=0 and signal.seconds=9.0"),
        (["signal.path={folder}/*.flac", "signal.rate=0"], "signal.rate is 0"),
        (["signal.path={folder}/r*.ogg"], "16000 samples a second and .* has 8000; set signal.rate"),
        (["signal.path={folder}/silence.aiff"], "is silent"),
        (["signal.path={folder}/text.mp3"], "text.mp3 is not a sound that can be read"),
        (["signal.path={folder}/tiny1.wav"], "tiny1.wav has 1 sample; a sound has two or more"),
        (["signal.path={folder}/tiny0.wav"], "tiny0.wav has 0 samples; a sound has two or more"),
        (["signal.path={folder}/0.wav", "signal.extent=0"], "signal.extent is 0.0"),
    ],
)
def test_bad_sound_gets_a_sentence(folder: Path, arguments: list[str], message: str) -> None:
    (folder / "text.mp3").write_text("no sound")
    soundfile.write(folder / "a.flac", sound(), RATE)
    soundfile.write(folder / "b.flac", sound(seconds=0.2), RATE)
    for rate in (8000, 16000):
        soundfile.write(folder / f"r{rate:05d}.ogg", sound(), rate)
    soundfile.write(folder / "silence.aiff", np.zeros(100), RATE)
    for length in (0, 1):
        soundfile.write(folder / f"tiny{length}.wav", np.ones(length), RATE)
    with pytest.raises(InputError, match=message):
        main(["--debug", "task=audio", *(a.format(folder=folder) for a in arguments), f"run.dir={folder / 'run'}"])


def test_without_the_library_there_is_a_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    with pytest.raises(InputError, match=r"pip install 'meta-weight-transformer\[audio\]'"):
        AudioTask([folder / "0.wav"], audio.AudioOptions(), CPU)
