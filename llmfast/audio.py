"""Audio files as a model's inputs: what preprocessor_config.json says, done with the standard library and NumPy.

Source: `Wav2Vec2FeatureExtractor` of transformers.
"""

import wave
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmfast.errors import InputError
from llmfast.preprocessor import read_sound_settings

_KIND = "Wav2Vec2FeatureExtractor"
# Of padding, which one recording at a time never has, and names.
_WITHOUT_EFFECT = (
    "feature_extractor_type",
    "padding_side",
    "padding_value",
    "processor_class",
    "return_attention_mask",
)
_SAMPLE_BYTES = 2
_FULL_SCALE = 2**15


@dataclass(frozen=True)
class AudioProcessor:
    """The steps from a file to a model's input.

    Attributes:
        sampling_rate: samples a second that the model takes.
        normalize: give every recording a mean of 0 and a variance of 1.
    """

    sampling_rate: int
    normalize: bool

    @classmethod
    def load(cls, folder: Path) -> "AudioProcessor":
        """Read preprocessor_config.json.

        Raises:
            InputError: missing or malformed.
            UnsupportedError: another processor, or a field that is not understood.
        """
        defaults = {"feature_size": 1, "sampling_rate": 16000, "do_normalize": True}
        path, settings = read_sound_settings(folder, _KIND, defaults, _WITHOUT_EFFECT)
        rate = settings["sampling_rate"]
        if settings["feature_size"] != 1 or not isinstance(rate, int) or rate < 1:
            raise InputError(
                f"malformed `{path}`: `feature_size` {settings['feature_size']!r}, `sampling_rate` {rate!r}"
            )
        return cls(rate, bool(settings["do_normalize"]))

    def read(self, path: Path) -> np.ndarray:
        """Read a WAV file of 16-bit PCM, float32 [samples]; several channels become their mean.

        Raises:
            InputError: missing, no such file, empty, samples of another width, or recorded at another rate than the
                model's.
        """
        values = read_wav(path, self.sampling_rate)
        if self.normalize:
            values = (values - values.mean()) / np.sqrt(values.var() + 1e-7)
        return values


def read_wav(path: Path, sampling_rate: int) -> np.ndarray:
    """Read a WAV file of 16-bit PCM, float32 [samples] between -1 and 1; several channels become their mean.

    Args:
        path: the file.
        sampling_rate: samples a second that there must be.

    Raises:
        InputError: missing, no such file, empty, samples of another width, or recorded at another rate.
    """
    if not path.is_file():
        raise InputError(f"not found: `{path}`", "--audio takes a WAV file")
    try:
        with wave.open(str(path), "rb") as file:
            rate, channels, width = file.getframerate(), file.getnchannels(), file.getsampwidth()
            data = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        reason = str(error) or "it ends too early"
        raise InputError(f"not a WAV file of PCM samples: `{path}`: {reason}", _convert(sampling_rate)) from error
    if width != _SAMPLE_BYTES:
        raise InputError(f"`{path}` has samples of {8 * width} bits, not 16", _convert(sampling_rate))
    if rate != sampling_rate:
        raise InputError(
            f"`{path}` has {rate} samples a second, the model takes {sampling_rate}",
            _convert(sampling_rate),
        )
    frame = channels * _SAMPLE_BYTES
    samples = np.frombuffer(data[: len(data) // frame * frame], "<i2").reshape(-1, channels)
    if len(samples) == 0:
        raise InputError(f"no sound in `{path}`", "the recording is empty")
    values: np.ndarray = samples.astype(np.float32).mean(1) / np.float32(_FULL_SCALE)
    return values


def _convert(rate: int) -> str:
    return f"convert it first: ffmpeg -i IN -ar {rate} -ac 1 -c:a pcm_s16le OUT.wav"
