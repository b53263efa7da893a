"""The cache of a prompt in a file: answers are those without it, and no other model's is taken."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from typer.testing import CliRunner

from llmfast.bundle import ModelBundle
from llmfast.cli import app
from llmfast.errors import InputError, LlmfastError, OptionError, ResourceError, UnsafeInputError, UnsupportedError
from llmfast.infer.engine import Engine
from llmfast.infer.growing import GrowingEngine
from llmfast.infer.prompt_cache import PromptCache
from llmfast.quantize.calibrate import Calibration
from llmfast.quantize.options import QuantizeOptions
from llmfast.quantize.stage import quantize

PROMPT = np.random.default_rng(3).integers(3, 259, 100)
OTHER = np.concatenate([PROMPT[:70], np.random.default_rng(4).integers(3, 259, 30)])


@pytest.fixture(scope="module")
def bundles(fp32_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelBundle]:
    folder, calibration = tmp_path_factory.mktemp("bundles"), Calibration(num_samples=2, seq_len=64)
    shared = {"measure": False, "calibration": calibration}
    options = {
        "int8": QuantizeOptions("int8", **shared),
        "int4": QuantizeOptions("int4", **shared),
        "hybrid": QuantizeOptions("int4", prefill="int8", **shared),
        "kv": QuantizeOptions("int8", kv="int8", **shared),
    }
    made = {name: quantize(fp32_bundle, folder / name, one) for name, one in options.items()}
    return made | {"fp32": ModelBundle.open(fp32_bundle)}


def _logits(engine: Engine, prompt: np.ndarray, cache: PromptCache | None = None) -> tuple[int, list[np.ndarray]]:
    """Return how many positions came from the file, and the logits of prompt and greedy answer."""
    engine.reset()
    reused = cache.load(engine, prompt) if cache else 0
    steps = [engine.prefill(prompt[reused:])]
    for _ in range(8):
        steps.append(engine.decode(int(steps[-1].argmax())).copy())
    return reused, steps


@pytest.mark.parametrize("name", ["fp32", "int8", "int4", "hybrid", "kv"])
@pytest.mark.parametrize("chunk_tokens", [32, 256])
def test_answers_are_those_without_it(
    name: str, chunk_tokens: int, bundles: dict[str, ModelBundle], tmp_path: Path
) -> None:
    bundle, path = bundles[name], tmp_path / "cache"
    engine = Engine(bundle, threads=1, max_length=160, chunk_tokens=chunk_tokens)
    cache = PromptCache(path, bundle)
    assert _logits(engine, PROMPT, cache)[0] == 0
    assert cache.save(engine, PROMPT)
    for prompt, shared in ((PROMPT, 96), (OTHER, 64), (PROMPT[:40], 32), (OTHER[::-1], 0)):
        fresh = Engine(bundle, threads=1, max_length=160, chunk_tokens=chunk_tokens)
        expected = _logits(fresh, prompt)[1]
        reused, actual = _logits(engine, prompt, PromptCache(path, bundle))
        assert reused == shared
        np.testing.assert_array_equal(actual, expected)


def test_it_is_written_where_it_held_too_little(bundles: dict[str, ModelBundle], tmp_path: Path) -> None:
    bundle, path = bundles["int8"], tmp_path / "cache"
    engine = Engine(bundle, threads=1, max_length=160)
    for prompt, is_written in ((PROMPT, True), (PROMPT, False), (PROMPT[:90], False), (OTHER, True), (PROMPT, True)):
        cache = PromptCache(path, bundle)
        _logits(engine, prompt, cache)
        assert cache.save(engine, prompt) is is_written
        assert [file.name for file in tmp_path.iterdir()] == ["cache"]
    with safe_open(path, framework="numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("tokens"), PROMPT)
        assert file.metadata()["model"] == bundle.digest
    assert path.stat().st_mode & 0o777 == 0o600


def _fill(path: Path, bundle: ModelBundle) -> None:
    engine = Engine(bundle, threads=1, max_length=160)
    engine.prefill(PROMPT)
    PromptCache(path, bundle).save(engine, PROMPT)


def test_the_cache_of_another_model_is_refused(bundles: dict[str, ModelBundle], tmp_path: Path) -> None:
    path = tmp_path / "cache"
    _fill(path, bundles["int8"])
    before = path.read_bytes()
    for name, fields in (("int4", ["model"]), ("kv", ["model", "kv"])):
        bundle = bundles[name]
        with pytest.raises(InputError, match="prompt cache of another model") as caught:
            PromptCache(path, bundle).load(Engine(bundle, threads=1, max_length=160), PROMPT)
        assert [field for field in ("model", "kv") if f"`{field}` is " in caught.value.message] == fields
        assert f"not `{name}`" in caught.value.message
    assert "`kv` is float32, not int8" in caught.value.message
    assert path.read_bytes() == before


def test_bad_files_are_refused(bundles: dict[str, ModelBundle], tmp_path: Path) -> None:
    bundle, path = bundles["int8"], tmp_path / "cache"
    _fill(path, bundle)
    content = path.read_bytes()
    with safe_open(path, framework="numpy") as file:
        arrays, facts = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    engine = Engine(bundle, threads=1, max_length=160)

    def refused(kind: type[LlmfastError] = InputError) -> str:
        with pytest.raises(kind) as caught:
            PromptCache(path, bundle).load(engine, PROMPT)
        assert engine.length == 0
        return caught.value.message

    for length in (0, 5, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        assert "truncated or corrupt" in refused()
    path.write_text("a text")
    assert "truncated or corrupt" in refused()
    save_file(arrays, path)
    assert "no prompt cache" in refused()
    layer = next(name for name in arrays if name.endswith(".key"))
    for changed in (
        {**arrays, "tokens": arrays["tokens"][:-1]},
        {**arrays, "tokens": arrays["tokens"].astype(np.int32)},
        {**arrays, layer: arrays[layer][:, :1]},
        {**arrays, layer: arrays[layer].astype(np.float16)},
        {name: array for name, array in arrays.items() if name != layer},
        {name: array for name, array in arrays.items() if name != "tokens"},
        {**arrays, "more": arrays["tokens"]},
    ):
        save_file(changed, path, metadata=facts)
        assert "malformed prompt cache" in refused()
    path.unlink()
    path.mkdir()
    assert "directory" in refused()
    path.rmdir()
    path.symlink_to("/dev/zero")
    refused(UnsafeInputError)


def test_a_full_disk_leaves_what_was_there(
    bundles: dict[str, ModelBundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, path = bundles["int8"], tmp_path / "cache"
    _fill(path, bundle)
    before = path.read_bytes()
    engine = Engine(bundle, threads=1, max_length=160)
    cache = PromptCache(path, bundle)
    _logits(engine, OTHER, cache)

    def fail(*args: object, **kwargs: object) -> None:
        Path(str(args[1])).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", fail)
    with pytest.raises(ResourceError, match="No space left"):
        cache.save(engine, OTHER)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]


def test_what_has_no_slab_is_refused(bundles: dict[str, ModelBundle], tmp_path: Path) -> None:
    engine = GrowingEngine.__new__(GrowingEngine)
    with pytest.raises(UnsupportedError, match="cache that grows"):
        PromptCache(tmp_path / "cache", bundles["int8"]).load(engine, PROMPT)
    lone = ModelBundle.open(bundles["int8"].model)
    with pytest.raises(UnsupportedError, match="no bundle of llmfast's"):
        PromptCache(tmp_path / "cache", lone)
    with pytest.raises(OptionError, match="no such folder"):
        PromptCache(tmp_path / "absent" / "cache", bundles["int8"])


def test_the_command(bundles: dict[str, ModelBundle], tmp_path: Path) -> None:
    run, cache = CliRunner().invoke, tmp_path / "cache"
    prompt = "a text that is long enough to be worth it, and " * 3
    base = ["infer", str(bundles["int8"].path), "--threads", "1", "--max-tokens", "8", "--format", "json"]
    plain = json.loads(run(app, [*base, "-p", prompt]).stdout)
    assert plain["cached_tokens"] == 0
    for reused in (False, True):
        result = run(app, [*base, "-p", prompt, "--prompt-cache", str(cache)])
        assert result.exit_code == 0, result.output
        answer = json.loads(result.stdout)
        assert answer["answer"] == plain["answer"]
        assert (answer["cached_tokens"] > 100) is reused
        assert f"{answer['cached_tokens']} of {answer['prompt_tokens']} prompt tokens were in" in result.stderr
        assert ("it holds this prompt now" in result.stderr) is not reused
    other = ["infer", str(bundles["int4"].path), "-p", prompt, "--prompt-cache", str(cache)]
    assert run(app, other).exit_code == 3
    assert run(app, [*base, "-p", prompt, "-p", prompt, "--prompt-cache", str(cache)]).exit_code == 2
    lines = tmp_path / "in.jsonl"
    lines.write_text('{"prompt": "a"}\n')
    result = run(app, [*base, "--input", str(lines), "-o", str(tmp_path / "out.jsonl"), "--prompt-cache", str(cache)])
    assert result.exit_code == 2
    assert "--prompt-cache is for one prompt, not for a file of them" in result.stderr
