"""Sound: a field over time, from WAV, FLAC, MP3 or other files, with one channel or all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from matplotlib import colormaps
from torch import Tensor

from mwt.errors import InputError
from mwt.fields import Field, Frame
from mwt.signals.pictures import psnr, write_picture
from mwt.signals.task import Evaluation, Task, predict, show, signal_names

LSD_WINDOW = 2048
LARGEST = 2**22
"""Samples that float32 coordinates in [-1, 1] tell apart, with an eighth of a step to spare."""


def soundfile() -> Any:
    """The library that reads and writes sound.

    Raises:
        InputError: it is not installed.
    """
    try:
        import soundfile as library
    except ImportError as error:
        raise InputError(
            "task=audio reads sound through soundfile: pip install 'meta-weight-transformer[audio]'."
        ) from error
    return library


@dataclass(frozen=True, kw_only=True)
class AudioOptions:
    """How sound is read."""

    start: float = 0.0
    """Seconds from the beginning that are left out."""
    seconds: float | None = None
    """Length; null: to the end."""
    channel: str = "mono"
    """mono: the mean of all channels. all: every channel, as a channel of the field. 0, 1, ...: this one."""
    rate: int | None = None
    """Resample to so many samples a second."""
    extent: float = 1.0
    """Time runs from -extent to extent. SIREN's audio (100 with omega 30, or 1 with first_omega 3000) wants a small
    rate: Adam moves a first weight by lr, and so the phase by lr times 3000. NeRF's encoding on 1 takes any."""


def read_sound(path: Path, options: AudioOptions) -> tuple[Float[Tensor, "T C"], int]:
    """Amplitudes as the file has them (full scale is 1), and samples a second.

    Raises:
        InputError: not a sound, a channel or a time that it has not, or silence.
    """
    library = soundfile()
    if not path.is_file():
        raise InputError(f"There is no file {path}.")
    try:
        with library.SoundFile(path) as file:
            rate, length, channels = file.samplerate, file.frames, file.channels
            if length < 2:
                raise InputError(f"{path} has {length} sample{'s' * (length != 1)}; a sound has two or more.")
            first = round(options.start * rate)
            count = length - first if options.seconds is None else round(options.seconds * rate)
            if first < 0 or count < 2 or first + count > length:
                raise InputError(
                    f"{path} lasts {length / rate:.2f} s; signal.start={options.start:g} and "
                    f"signal.seconds={options.seconds} do not lie within."
                )
            file.seek(first)
            sound = file.read(count, dtype="float32", always_2d=True)
    except library.SoundFileError as error:
        raise InputError(f"{path} is not a sound that can be read ({error}).") from error
    sound = choose_channels(sound, options.channel, f"{path} has {channels} channel{'s' * (channels > 1)}")
    if options.rate is not None and options.rate != rate:
        sound, rate = resample(sound, rate, options.rate), options.rate
    if not np.isfinite(sound).all() or not np.abs(sound).max() > 0:
        raise InputError(f"{path} is silent, or holds numbers that are not finite; there is nothing to fit.")
    return torch.from_numpy(np.ascontiguousarray(sound, dtype=np.float32)), rate


def choose_channels(sound: Float[np.ndarray, "T C"], channel: str, what: str) -> Float[np.ndarray, "T c"]:
    """The mean, all, or one of the channels.

    Raises:
        InputError: there is none of this number; `what` says which there are.
    """
    if channel == "mono":
        return sound.mean(1, keepdims=True)
    if channel == "all":
        return sound
    if not channel.isdecimal() or int(channel) >= sound.shape[1]:
        raise InputError(f"signal.channel is {channel!r}; {what}: choose mono, all, or a number from 0.")
    number = int(channel)
    return sound[:, number : number + 1]


def resample(sound: Float[np.ndarray, "T C"], rate: int, wanted: int) -> Float[np.ndarray, "t C"]:
    """By scipy's polyphase filter.

    Raises:
        InputError: a rate that is not positive.
    """
    from scipy.signal import resample_poly

    if wanted < 1:
        raise InputError(f"signal.rate is {wanted}; it must be at least 1.")
    common = math.gcd(rate, wanted)
    resampled: np.ndarray = resample_poly(sound, wanted // common, rate // common, axis=0)
    return resampled


def read_sounds(paths: Sequence[Path], options: AudioOptions) -> tuple[list[Float[Tensor, "T C"]], int]:
    """Several sounds of one rate and number of channels.

    Raises:
        InputError: as of `read_sound`, or they differ; names the file and what to set.
    """
    found = [read_sound(path, options) for path in paths]
    sound, rate = found[0]
    for path, (other, other_rate) in zip(paths, found, strict=True):
        if other.shape[1] != sound.shape[1]:
            raise InputError(
                f"{path} has {other.shape[1]} channels and {paths[0]} has {sound.shape[1]}: a mix of mono and stereo. "
                "Sounds of one run have equally many; signal.channel=mono makes one of all."
            )
        if other_rate != rate:
            raise InputError(
                f"{path} has {other_rate} samples a second and {paths[0]} has {rate}; set signal.rate for all."
            )
    return [sound for sound, _ in found], rate


def write_sound(path: Path, sound: Float[Tensor, "T C"], rate: int) -> Path:
    """Write a WAV file of 16 bits; beyond full scale is cut off.

    Raises:
        OSError: disk full, no permission; names the file. (libsndfile does not say why it could not write a file.)
    """
    content = BytesIO()
    soundfile().write(content, sound.numpy(), rate, subtype="PCM_16", format="WAV")
    try:
        path.write_bytes(content.getbuffer())
    except OSError as error:
        error.filename = str(path)
        raise
    return path


# ---- how good a sound is ---------------------------------------------------------------------------------------------


def log_spectral_distance(shown: Float[Tensor, "*B T"], truth: Float[Tensor, "*B T"]) -> Float[Tensor, "*B"]:
    """Distance of log-spectra, at most 10, as in NeAF's code: for amplitudes divided by the largest.

    S = log10(|STFT|^2 + 1e-8) with 2,048 samples every 512 and no window; the root of the mean square over time, then
    the mean over frequencies. (The usual definition is the other way round: root over frequencies, mean over time.)
    """
    window = torch.ones(LSD_WINDOW, device=truth.device, dtype=truth.dtype)

    def spectrum(sound: Tensor) -> Tensor:
        found = torch.stft(sound.reshape(-1, sound.shape[-1]), LSD_WINDOW, window=window, return_complex=True)
        return (found.abs().square() + 1e-8).log10()

    distance = (spectrum(shown) - spectrum(truth)).square().mean(-1).sqrt().mean(-1)
    return distance.clamp(max=10).view(truth.shape[:-1])


def sound_metrics(shown: Float[Tensor, "N T C"], truth: Float[Tensor, "N T C"]) -> dict[str, Float[Tensor, " N"]]:
    """SNR and SI-SNR in dB (torchmetrics; SI-SNR after removing means), of 2,048 samples or more the LSD, and the PSNR.

    The first three are means over those channels that are not silent: nothing is a share of silence. The PSNR is that
    of amplitudes in [-1, 1], a range of 2; what is shown is clamped to it.
    """
    from torchmetrics.functional.audio import scale_invariant_signal_noise_ratio, signal_noise_ratio

    pair = (shown.mT.double(), truth.mT.double())
    each = {"snr": signal_noise_ratio(*pair), "si_snr": scale_invariant_signal_noise_ratio(*pair)}
    if truth.shape[1] >= LSD_WINDOW:
        each["lsd"] = log_spectral_distance(*pair)
    sounding = (truth != 0).any(1)  # [N, C]
    means = {name: torch.where(sounding, values, 0.0).sum(-1) / sounding.sum(-1) for name, values in each.items()}
    return {name: mean.float() for name, mean in means.items()} | {"psnr": psnr((pair[0] + 1) / 2, (pair[1] + 1) / 2)}


BINS = 512


def spectrogram(sound: Float[Tensor, " T"], loudest: float) -> UInt8[Tensor, "3 f t"]:
    """Frequencies upwards, time to the right, about 480 columns; from `loudest` (a magnitude) down to -80 dB."""
    level = 1 + (_magnitudes(sound).flip(0) / loudest).clamp_min(1e-8).log10() / 4
    colours = colormaps["magma"](level.clamp(0, 1).numpy(), bytes=True)[..., :3]
    return torch.from_numpy(np.ascontiguousarray(colours)).permute(2, 0, 1)


def loudest(sound: Float[Tensor, " T"]) -> float:
    """The largest magnitude of a sound's spectrogram."""
    return max(float(_magnitudes(sound).max()), 1e-8)


def _magnitudes(sound: Float[Tensor, " T"]) -> Float[Tensor, "f t"]:
    own, step = sound.detach().float().cpu(), max(1, len(sound) // 480)
    found: Tensor = torch.stft(
        own, BINS, step, window=torch.hann_window(BINS), pad_mode="constant", return_complex=True
    ).abs()
    return found


# ---- the task --------------------------------------------------------------------------------------------------------


class AudioTask(Task):
    """Mean squared error at samples. Each sound is divided by its largest absolute amplitude, and so fitted."""

    metric = "snr"
    endings = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif", ".au")

    @dataclass(frozen=True, kw_only=True)
    class Options(AudioOptions):
        """Those of all sounds."""

    @classmethod
    def takes(cls, path: Path) -> bool:
        """Also what else soundfile's library reads, but for RAW, which does not say how it is to be read."""
        if super().takes(path):
            return True
        try:
            return path.suffix[1:].upper() in soundfile().available_formats().keys() - {"RAW"}
        except InputError:  # it is not installed: whoever reads a sound says so
            return False

    @classmethod
    def shapes(cls, paths: Sequence[Path], options: Any) -> list[tuple[int, ...]]:
        """Samples and channels. Rates and channels are one for all: a mix is more often a mistake than meant."""
        return [tuple(sound.shape) for sound in read_sounds(paths, options)[0]]

    def __init__(self, paths: Sequence[Path], options: AudioOptions, device: torch.device) -> None:
        if options.extent <= 0:
            raise InputError(f"signal.extent is {options.extent}; it must be positive.")
        found, self.rate = read_sounds(paths, options)
        for path, sound in zip(paths, found, strict=True):
            if len(sound) != len(found[0]):
                raise InputError(
                    f"{path} has {len(sound)} samples and {paths[0]} has {len(found[0])}; sounds of one batch are "
                    "equally long: set signal.seconds."
                )
        sounds = torch.stack(found)
        samples, self.channels = sounds.shape[1:]
        if samples > LARGEST:
            raise InputError(
                f"{paths[0]} has {samples:,} samples, more than the {LARGEST:,} that coordinates in float32 tell "
                "apart: take a part (signal.start, signal.seconds), or a lower signal.rate."
            )
        self.names = signal_names(paths)
        self.peaks = sounds.abs().flatten(1).amax(1)
        """Largest absolute amplitudes [N]: what is written is multiplied by them again."""
        self.truth = (sounds / self.peaks[:, None, None]).to(device)
        peak = float(self.peaks[0]) if self.count == 1 else 1.0  # a frame has one range for all its signals
        self.frame = Frame(
            kind="audio",
            axes=("t",),
            coordinate_range=((-options.extent, options.extent),),
            size=(samples,),
            value_range=(-1.0, 1.0),
            data_range=(-peak, peak),
            meta={"rate": self.rate, "peaks": self.peaks.tolist()},
        )
        self.coords = self.frame.grid(device=device)

    @property
    def points(self) -> int:
        """Samples."""
        return len(self.coords)

    def loss(self, fields: Field, index: Int[Tensor, " P"] | None, generator: torch.Generator) -> Float[Tensor, " N"]:
        """Mean squared error over samples and channels."""
        coords, values = self.coords, self.truth
        if index is not None:
            coords, values = coords[index], values[:, index]
        return (predict(fields, coords) - values).square().mean((-2, -1))

    def residual(self, fields: Field) -> Float[Tensor, "N T C"]:
        """At all samples."""
        return show(fields, self.coords) - self.truth

    def evaluate(self, fields: Field) -> Evaluation:
        """Metrics, and the spectrogram of the first sound."""
        shown = show(fields, self.coords)
        picture = spectrogram(shown[0].mean(-1), loudest(self.truth[0].mean(-1)))
        return Evaluation(metrics=sound_metrics(shown, self.truth), picture=picture)

    def write(self, fields: Field, folder: Path) -> list[Path]:
        """NAME.wav, NAME.truth.wav (16 bits, beyond full scale cut off), NAME.png and NAME.error.png.

        The pictures are spectrograms: the truth above the field, and their difference on the same scale.
        """
        files = []
        shown = show(fields, self.coords).cpu()
        for name, own, truth, peak in zip(self.names, shown, self.truth.cpu(), self.peaks, strict=True):
            stem = Path(name).stem
            for ending, sound in ((".wav", own), (".truth.wav", truth)):
                path = folder / f"{stem}{ending}"
                files.append(write_sound(path, sound * peak, self.rate))
            scale = loudest(truth.mean(-1))
            above, below, error = (spectrogram(part.mean(-1), scale) for part in (truth, own, own - truth))
            line = torch.full_like(above[:, :3], 255)
            files.append(write_picture(folder / f"{stem}.png", torch.cat([above, line, below], dim=1)))
            files.append(write_picture(folder / f"{stem}.error.png", error))
        return files

    def facts(self) -> dict[str, Any]:
        """Also the rate and the amplitudes that ±1 stands for."""
        return {**super().facts(), "rate": self.rate, "peaks": [round(float(peak), 6) for peak in self.peaks]}
