"""Audio files as log-mel spectrograms, the input of Whisper: what preprocessor_config.json says, done with NumPy.

Source: `WhisperFeatureExtractor` of transformers, and https://arxiv.org/abs/2212.04356
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from llmfast.audio import read_wav
from llmfast.errors import InputError
from llmfast.preprocessor import read_sound_settings

_KIND = "WhisperFeatureExtractor"
_DEFAULTS = {"feature_size": 80, "sampling_rate": 16000, "hop_length": 160, "chunk_length": 30, "n_fft": 400}
# Names, what follows from the fields above, and what padding with zeros never needs.
_WITHOUT_EFFECT = (
    "feature_extractor_type",
    "mel_filters",
    "n_samples",
    "nb_max_frames",
    "padding_side",
    "processor_class",
    "return_attention_mask",
)
_SMALLEST_POWER = 1e-10
_DYNAMIC_RANGE = 8.0  # in powers of ten, below the loudest
# Slaney's scale: mels are linear below 1000 Hz and logarithmic above.
_LINEAR_HZ, _LINEAR_MELS, _MELS_PER_E = 1000.0, 15.0, 27 / np.log(6.4)


@dataclass(frozen=True)
class SpectrogramProcessor:
    """The steps from a file to a model's input.

    Attributes:
        mel_bins: bands of the spectrogram.
        sampling_rate: samples a second that the model takes.
        hop_length: samples from one frame to the next.
        chunk_length: seconds that every recording is filled up to.
        n_fft: samples of a frame.
    """

    mel_bins: int
    sampling_rate: int
    hop_length: int
    chunk_length: int
    n_fft: int

    @classmethod
    def load(cls, folder: Path) -> "SpectrogramProcessor":
        """Read preprocessor_config.json.

        Raises:
            InputError: missing or malformed.
            UnsupportedError: another processor, or a field that is not understood.
        """
        path, settings = read_sound_settings(folder, _KIND, _DEFAULTS, _WITHOUT_EFFECT)
        for key, value in settings.items():
            if type(value) is not int or value < 1:
                raise InputError(f"malformed `{path}`: `{key}` {value!r}")
        return cls(settings.pop("feature_size"), **settings)

    @property
    def frames(self) -> int:
        """Frames of every spectrogram."""
        return self.chunk_length * self.sampling_rate // self.hop_length

    def read(self, path: Path) -> np.ndarray:
        """Read a WAV file of 16-bit PCM, float32 [mel_bins, frames]; several channels become their mean.

        Raises:
            InputError: missing, no such file, empty, samples of another width, recorded at another rate, or longer
                than the model hears.
        """
        samples = read_wav(path, self.sampling_rate)
        if len(samples) > self.chunk_length * self.sampling_rate:
            seconds = len(samples) / self.sampling_rate
            raise InputError(
                f"`{path}` is {seconds:.1f} seconds long, the model hears {self.chunk_length}",
                f"cut it first: ffmpeg -i IN -f segment -segment_time {self.chunk_length} OUT%03d.wav",
            )
        return self.transform(samples)

    def transform(self, samples: np.ndarray) -> np.ndarray:
        """Return the spectrogram of samples, float32 [samples], filled up with silence: float32 [mel_bins, frames]."""
        filled = np.zeros(self.chunk_length * self.sampling_rate)
        filled[: len(samples)] = samples
        padded = np.pad(filled, self.n_fft // 2, mode="reflect")
        frames = np.lib.stride_tricks.sliding_window_view(padded, self.n_fft)[:: self.hop_length][: self.frames]
        window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(self.n_fft) / self.n_fft)  # Hann's, periodic
        power = np.abs(np.fft.rfft(frames * window, axis=-1)) ** 2
        levels = np.log10(np.maximum(self._filters @ power.T, _SMALLEST_POWER))
        levels = np.maximum(levels, levels.max() - _DYNAMIC_RANGE)
        spectrogram: np.ndarray = ((levels + 4) / 4).astype(np.float32)
        return spectrogram

    @cached_property
    def _filters(self) -> np.ndarray:
        """Triangles of equal area over the frequencies, float64 [mel_bins, n_fft // 2 + 1]."""
        highest = self.sampling_rate / 2
        frequencies = np.linspace(0, highest, self.n_fft // 2 + 1)
        corners = _to_hertz(np.linspace(0, _to_mels(highest), self.mel_bins + 2))
        low, middle, high = corners[:-2, None], corners[1:-1, None], corners[2:, None]
        rising, falling = (frequencies - low) / (middle - low), (high - frequencies) / (high - middle)
        filters: np.ndarray = np.maximum(0, np.minimum(rising, falling)) * 2 / (high - low)
        return filters


def _to_mels(hertz: float) -> float:
    if hertz < _LINEAR_HZ:
        return hertz * _LINEAR_MELS / _LINEAR_HZ
    return float(_LINEAR_MELS + np.log(hertz / _LINEAR_HZ) * _MELS_PER_E)


def _to_hertz(mels: np.ndarray) -> np.ndarray:
    curved = _LINEAR_HZ * np.exp((mels - _LINEAR_MELS) / _MELS_PER_E)
    hertz: np.ndarray = np.where(mels < _LINEAR_MELS, mels * _LINEAR_HZ / _LINEAR_MELS, curved)
    return hertz
