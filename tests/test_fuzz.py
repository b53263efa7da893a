"""Random files, command lines and values: nothing but refusals, and the laws that packing and paths keep.

`scripts/fuzz.sh` does the same for longer; files that it found are in `tests/findings`, and are read again here.
"""

import os
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.main import get_command
from typer.testing import CliRunner

from llmfast import registry
from llmfast.cli import app
from llmfast.errors import InputError, UnsafeInputError
from llmfast.files import locate
from llmfast.graph.packed import Grid, pack
from llmfast.tokenizer_file import is_explosive
from tests import tiny_decoder
from tests.fuzz_targets import TARGETS

EXAMPLES = int(os.environ.get("LLMFAST_FUZZ_EXAMPLES", "60"))
FINDINGS = Path(__file__).parent / "findings"
_QUICK = settings(
    max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True
)


def _mutate(content: bytes, rng: random.Random) -> bytes:
    """Change, remove, repeat and insert a few bytes, most often near the beginning, where headers are."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = min(rng.randrange(len(data) + 1), rng.randrange(len(data) + 1))
        kind = rng.randrange(5)
        if kind == 0 and at < len(data):
            data[at] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        elif kind == 1:
            del data[at : at + rng.choice((1, 2, 8, 64))]
        elif kind == 2:
            data[at:at] = data[at : at + rng.choice((1, 8, 64))]
        elif kind == 3:
            data[at:at] = rng.randbytes(rng.choice((1, 4, 8)))
        else:
            data[at : at + 8] = rng.choice((2**31, 2**63, 2**64 - 1, 0)).to_bytes(8, "little")
    return bytes(data)


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "template"])
def test_mutated_files_are_read_or_refused(target: str, tmp_path: Path) -> None:
    rng = random.Random(0)
    (tmp_path / "seeds").mkdir()
    (tmp_path / "place").mkdir()
    seeds = TARGETS[target].seeds(tmp_path / "seeds")
    for _ in range(150):
        TARGETS[target].survives(_mutate(rng.choice(seeds), rng), tmp_path / "place")


@pytest.mark.parametrize("path", sorted(FINDINGS.glob("*-*")), ids=lambda path: path.name)
def test_findings_stay_fixed(path: Path, tmp_path: Path) -> None:
    TARGETS[path.name.partition("-")[0]].survives(path.read_bytes(), tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_decoder.write_bundle(tmp_path_factory.mktemp("model"))


# All but serve, which a command line without a mistake would never end.
_COMMANDS = {name: command for name, command in get_command(app).commands.items() if name != "serve"}
_NUMBERS = ("0", "-1", "1", "2", "1e9", "nan", "inf", "1MB")
_NAMES = ("json", "text", "int4", "int8", "rtn", "gptq", "cpu", "kld=1", "block_size=1", "a=b")
_ODD = ("", "-", "--", "=", "(", "x", "é", "[red]", "\ud800", "{model}", "{tmp}/new", "{tmp}/none")
_VALUES = st.sampled_from((*_NUMBERS, *_NAMES, *_ODD))


@st.composite
def _command_lines(draw: st.DrawFn) -> list[str]:
    name = draw(st.sampled_from(sorted(_COMMANDS)))
    options = [option for parameter in _COMMANDS[name].params for option in parameter.opts if option.startswith("-")]
    words = [name]
    if draw(st.integers(0, 3)):
        words.append("{model}")
    for _ in range(draw(st.integers(0, 5))):
        words.append(draw(st.one_of(st.sampled_from(options), _VALUES)))
        if draw(st.booleans()):
            words.append(draw(_VALUES))
    return words


@_QUICK
@given(_command_lines())
def test_random_command_lines_end_in_words(
    model: Path, tmp_path_factory: pytest.TempPathFactory, words: list[str]
) -> None:
    place = tmp_path_factory.mktemp("place")
    arguments = [word.replace("{model}", str(model)).replace("{tmp}", str(place)) for word in words]
    result = CliRunner().invoke(app, [*arguments], input="")
    assert result.exit_code in (0, 2, 3, 4, 5, 6, 7, 8), (arguments, result.output, result.exc_info)
    assert "Traceback" not in result.output


_PARTS = st.sampled_from(["a", "b", "..", ".", "", "link", "loop", "out", "a\\b", "C:", "\0", "é", "x" * 300])


@_QUICK
@given(st.lists(_PARTS, min_size=1, max_size=4))
def test_located_files_lie_below_their_folder(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    root = tmp_path_factory.mktemp("root")
    folder = root / "model"
    (folder / "a").mkdir(parents=True)
    for name in ("b", "a/b", "é"):
        (folder / name).write_text("inside")
    (root / "secret").write_text("outside")
    (folder / "link").symlink_to("a")
    (folder / "out").symlink_to("../secret")
    (folder / "loop").symlink_to("loop")
    try:
        found = locate(folder, "/".join(parts), "tensor")
    except (InputError, UnsafeInputError):
        return
    assert found.read_text() == "inside"
    assert found.is_relative_to(folder.resolve())


@_QUICK
@given(
    bits=st.sampled_from([2, 4, 8]),
    block_size=st.sampled_from([16, 32, 64]),
    symmetric=st.booleans(),
    rows=st.integers(1, 5),
    columns=st.integers(1, 130),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-30, 1e-4, 1.0, 3e4]),
)
def test_rounded_weights_are_within_a_step(
    bits: int, block_size: int, symmetric: bool, rows: int, columns: int, seed: int, scale: float
) -> None:
    weight = (np.random.default_rng(seed).standard_normal((rows, columns)) * scale).astype(np.float32)
    rtn = registry.load("quantize.rounding", "rtn")
    grid = Grid(bits=bits, block_size=block_size, symmetric=symmetric)
    quantized = rtn.quantize_weight(weight, grid, rtn.Options())
    assert np.isfinite(quantized.scales).all()
    assert (quantized.scales > 0).all()
    padded = np.pad(weight, ((0, 0), (0, -columns % block_size))).reshape(quantized.codes.shape)
    found = np.pad(quantized.dequantize(), ((0, 0), (0, -columns % block_size))).reshape(padded.shape)
    steps = np.abs(padded.astype(np.float64) - found) / quantized.scales[..., None]
    is_cut = (quantized.codes == 0) | (quantized.codes == grid.largest)  # what lies beyond the grid
    assert (is_cut | (steps <= 1)).all()


@_QUICK
@given(
    bits=st.sampled_from([2, 4, 8]),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 9)),
    seed=st.integers(0, 2**31),
)
def test_packed_codes_are_the_codes(bits: int, shape: tuple[int, int], seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, shape).astype(np.uint8)
    spread = np.unpackbits(pack(codes, bits)[..., None], axis=-1, bitorder="little").reshape(shape[0], -1, bits)
    unpacked = np.packbits(spread, axis=-1, bitorder="little")[..., 0]
    np.testing.assert_array_equal(unpacked[:, : shape[1]], codes)
    assert not unpacked[:, shape[1] :].any()


@_QUICK
@given(st.text(st.sampled_from("ab*+?{},|1^$"), max_size=24))
def test_repeated_repetitions_are_found_in_any_regular_expression(pattern: str) -> None:
    assert is_explosive(f"({pattern}a+)+")
    assert is_explosive(f"(?:{pattern}b{{2,}}c)*")
    assert not is_explosive(f"({pattern}a+)?")
