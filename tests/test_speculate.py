"""Speculation: answers are those of plain decoding, to the bit, and drafts come from where they should."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from llmfast.bundle import ModelBundle
from llmfast.cli import app
from llmfast.errors import InputError, OptionError, UnsupportedError
from llmfast.export.stage import export
from llmfast.graph.model import OnnxModel
from llmfast.graph.verify import ROWS, add_verification
from llmfast.infer.decoder import Decoder
from llmfast.infer.engine import Engine
from llmfast.infer.generate import finish, generate
from llmfast.infer.opening import open_decoder, open_speculating
from llmfast.infer.sampling import Sampling
from llmfast.infer.speculate import Draft, DraftModel, PromptLookup, Speculation
from llmfast.infer.stage import infer, spell_speed
from llmfast.quantize.options import QuantizeOptions
from llmfast.quantize.stage import quantize
from llmfast.tokenizer import Tokenizer
from tests.kernels import rows_are_independent

# Packed and separate queries, keys and values, sliding windows, one head of keys, soft caps, no rotary.
ARCHITECTURES = ["llama-one-kv-head", "mistral-sliding", "qwen3", "gemma2", "gpt2", "smollm3", "phi3"]
PROMPT = "def f(ab, cd): return ab + cd; def f(ab, cd): return"


@pytest.fixture(scope="module")
def bundle_of(checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that makes a bundle once: `(architecture)` in fp32, `(architecture, scheme)` quantized."""
    folder = tmp_path_factory.mktemp("speculate")

    def make(name: str, scheme: str = "", **settings: str) -> Path:
        output = folder / f"{name}{scheme}{''.join(settings.values())}"
        if output.exists():
            return output
        if not scheme:
            return export(str(checkpoints(name)), output).path
        return quantize(make(name), output, QuantizeOptions(scheme, settings=settings, measure=False)).path

    return make


class Oracle:
    """Drafts the right answer, wrong every so often."""

    is_free = False

    def __init__(self, answer: list[int], every: int) -> None:
        self.answer = answer
        self.every = every

    def begin(self) -> None:
        """Nothing to forget."""

    def propose(self, tokens: list[int], count: int) -> Draft:
        start = len(tokens)
        draft = [token if index % self.every else token ^ 1 for index, token in enumerate(self.answer)]
        return Draft(draft[start : start + count])


def _open(path: Path, **settings: int) -> Engine:
    engine = open_decoder(ModelBundle.open(path), threads=1, verify=True, **settings)
    assert isinstance(engine, Engine)
    return engine


def _greedy(engine: Decoder, prompt: np.ndarray, count: int) -> tuple[list[int], list[np.ndarray]]:
    engine.reset()
    logits = [engine.prefill(prompt)]
    tokens = [int(logits[0].argmax())]
    while len(tokens) < count:
        logits.append(engine.decode(tokens[-1]).copy())
        tokens.append(int(logits[-1].argmax()))
    return tokens, logits


@pytest.mark.parametrize(
    ("name", "scheme"),
    [(name, "") for name in ARCHITECTURES]
    + [(name, scheme) for name in ("llama", "gemma2") for scheme in ("int8", "int4", "w8")],
)
def test_verified_rows_have_the_bits_of_single_steps(name: str, scheme: str, bundle_of: Callable[..., Path]) -> None:
    path = bundle_of(name, scheme)
    plain, engine = Engine(ModelBundle.open(path), threads=1), _open(path)
    ids = np.random.default_rng(0).integers(3, 250, 90)
    for past in (1, 21, 70):  # 70 is beyond the sliding windows
        plain.reset()
        plain.prefill(ids[:past])
        expected = np.array([plain.decode(int(token)).copy() for token in ids[past : past + max(ROWS)]])
        for rows in engine.verify_rows:
            engine.reset()
            engine.prefill(ids[:past])
            verified = engine.verify(ids[past : past + rows])
            if scheme == "int4" and not rows_are_independent():
                assert np.linalg.norm(verified - expected[:rows]) < 0.05 * np.linalg.norm(expected[:rows])
                continue
            np.testing.assert_array_equal(verified, expected[:rows])
            engine.rollback(past + 1)
            np.testing.assert_array_equal(engine.decode(int(ids[past + 1])), expected[1])


@pytest.mark.parametrize("every", [2, 3, 7, 10**6])
@pytest.mark.parametrize("scheme", ["", "int8", "int4"])
def test_tokens_are_those_of_plain_decoding(scheme: str, every: int, bundle_of: Callable[..., Path]) -> None:
    path = bundle_of("llama", scheme)
    prompt = np.random.default_rng(1).integers(3, 250, 30)
    expected, _ = _greedy(Engine(ModelBundle.open(path), threads=1), prompt, 60)
    engine = _open(path)
    answer = [*prompt.tolist(), *expected, *[0] * 20]
    speculation = Speculation(engine, Oracle(answer, every))
    engine.reset()
    tokens = [*prompt.tolist(), int(engine.prefill(prompt).argmax())]
    while len(tokens) < 90:
        tokens += speculation.step(tokens, lambda logits: int(logits.argmax()))
        assert engine.length == len(tokens) - 1
    assert tokens[:90] == answer[:90]
    assert speculation.is_exact == (scheme != "int4" or rows_are_independent())
    assert speculation.drafted > 0
    assert speculation.accepted <= speculation.drafted
    if every > 90 and speculation.is_exact:
        assert speculation.accepted > 30


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.5, 20, seed=4), Sampling(repetition_penalty=1.4)])
def test_answers_are_those_without_speculation(sampling: Sampling, bundle_of: Callable[..., Path]) -> None:
    path = bundle_of("llama", "int8")
    tokenizer = Tokenizer.load(path)
    prompt = np.array(tokenizer.encode(PROMPT))
    plain = finish(generate(Engine(ModelBundle.open(path), threads=1), tokenizer, prompt, 80, sampling))
    engine = _open(path)
    tokens = [*prompt.tolist(), *_tokens_of(path, prompt, sampling)]
    speculation = Speculation(engine, Oracle([*tokens, *[5] * 9], every=4))
    for _ in range(2):  # the second answer finds the counters at zero again
        generation = finish(generate(engine, tokenizer, prompt, 80, sampling, speculation=speculation))
        assert generation.text == plain.text
        assert generation.generated_tokens == plain.generated_tokens
        assert 0 < generation.accepted_tokens < generation.drafted_tokens < 200
    assert f"{generation.accepted_tokens} of {generation.drafted_tokens} drafted" in spell_speed(generation)


def _tokens_of(path: Path, prompt: np.ndarray, sampling: Sampling) -> list[int]:
    from llmfast.infer.sampling import sample

    engine, rng, seen = (
        Engine(ModelBundle.open(path), threads=1),
        np.random.default_rng(sampling.seed),
        set(prompt.tolist()),
    )
    logits, tokens = engine.prefill(prompt), []
    for _ in range(80):
        tokens.append(sample(logits[: Tokenizer.load(path).vocab_size], sampling, rng, seen))
        seen.add(tokens[-1])
        logits = engine.decode(tokens[-1])
    return tokens


def test_prompt_lookup_continues_the_latest_and_longest_match() -> None:
    lookup = PromptLookup()
    assert lookup.propose([1, 2, 3], 4).tokens == []
    lookup.begin()
    tokens = [1, 2, 3, 4, 9, 9, 2, 3, 5, 6, 7, 1, 2, 3]
    draft = lookup.propose(tokens, 3)
    assert (draft.tokens, draft.kind) == ([4, 9, 9], 3)
    tokens += [8, 2, 3]
    draft = lookup.propose(tokens, 2)
    assert (draft.tokens, draft.kind) == ([8, 2], 2)  # the latest of three places
    lookup.begin()
    assert lookup.propose([7, 8, 7, 8, 7, 8], 5).tokens == [7, 8, 7, 8, 7]  # a repetition goes on


def test_a_drafter_that_is_never_right_is_dropped(
    bundle_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = _open(bundle_of("llama"))
    prompt = np.arange(10, 40)
    expected, _ = _greedy(engine, prompt, 100)
    wrong = Oracle([token ^ 1 for token in [*prompt.tolist(), *expected]], every=10**6)
    speculation = Speculation(engine, wrong)
    monkeypatch.setattr(speculation, "_note_time", lambda rows, seconds: None)  # costs as expected, busy machine or not
    engine.reset()
    tokens = [*prompt.tolist(), int(engine.prefill(prompt).argmax())]
    while len(tokens) < 130:
        tokens += speculation.step(tokens, lambda logits: int(logits.argmax()))
    assert tokens[30:130] == expected
    assert speculation.accepted == 0
    assert speculation.drafted < 40


def test_a_free_drafter_is_judged_before_it_is_trusted(bundle_of: Callable[..., Path]) -> None:
    engine = _open(bundle_of("llama"))
    speculation = Speculation(engine, PromptLookup())
    engine.reset()
    tokens = np.random.default_rng(3).permutation(np.arange(3, 120)).tolist()  # nothing to copy
    engine.prefill(np.array(tokens[:-1]))
    speculation.step(tokens, lambda logits: int(logits.argmax()))
    assert speculation.drafted == 0


def test_rows_that_depend_on_each_other_stop_speculation(
    bundle_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = _open(bundle_of("llama"))
    prompt = np.arange(10, 40)
    expected, _ = _greedy(engine, prompt, 40)
    original = engine.verify
    monkeypatch.setattr(engine, "verify", lambda ids: original(ids) + np.float32(1e-6))
    for asked in (False, True):
        speculation = Speculation(engine, Oracle([*prompt.tolist(), *expected, *[5] * 9], 10**6), even_if_inexact=asked)
        engine.reset()
        tokens = [*prompt.tolist(), int(engine.prefill(prompt).argmax())]
        while len(tokens) < 60:
            tokens += speculation.step(tokens, lambda logits: int(logits.argmax()))
        assert not speculation.is_exact
        assert (speculation.drafted > max(ROWS)) == asked
        assert tokens[30:60] == expected[:30]


def test_speculation_ends_with_the_cache(bundle_of: Callable[..., Path]) -> None:
    engine = _open(bundle_of("llama"), max_length=40, chunk_tokens=8)
    prompt = np.arange(10, 40)
    expected, _ = _greedy(Engine(ModelBundle.open(bundle_of("llama")), threads=1), prompt, 11)
    speculation = Speculation(engine, Oracle([*prompt.tolist(), *expected, *[5] * 9], 10**6))
    engine.reset()
    tokens = [*prompt.tolist(), int(engine.prefill(prompt).argmax())]
    while engine.length < engine.capacity:
        tokens += speculation.step(tokens, lambda logits: int(logits.argmax()))
    assert tokens[30:41] == expected


def test_a_draft_model_follows_what_was_accepted(bundle_of: Callable[..., Path]) -> None:
    decoder, reference = (Engine(ModelBundle.open(bundle_of("llama")), threads=1) for _ in range(2))
    drafter = DraftModel(decoder, decoder.vocab_size)
    rng, tokens = np.random.default_rng(0), np.random.default_rng(5).integers(3, 250, 12).tolist()
    for turn in range(8):
        draft = drafter.propose(tokens, 4).tokens
        expected, _ = _greedy(reference, np.array(tokens), 4)
        assert draft == expected
        kept = turn % 4  # as many of the draft's tokens were accepted
        tokens += [*draft[:kept], int(rng.integers(3, 250))]
    assert drafter.propose([5] * (decoder.capacity + 1), 3).tokens == []


def test_a_draft_model_changes_nothing_but_the_speed(bundle_of: Callable[..., Path]) -> None:
    path = bundle_of("llama")
    plain = infer(path, PROMPT, emit=lambda piece: None, threads=1, max_tokens=60, speculate=False)
    for draft in (bundle_of("llama", "int8"), bundle_of("llama-tied")):
        generation = infer(path, PROMPT, emit=lambda piece: None, threads=1, max_tokens=60, draft=draft)
        assert generation.text == plain.text
        assert generation.drafted_tokens > 0
    assert plain.drafted_tokens == 0


def test_drafts_that_do_not_fit_are_refused(bundle_of: Callable[..., Path], tmp_path: Path) -> None:
    path = bundle_of("llama")
    with pytest.raises(OptionError, match="--no-speculate exclude"):
        infer(path, PROMPT, emit=print, threads=1, draft=path, speculate=False)
    with pytest.raises(InputError, match="absent"):
        infer(path, PROMPT, emit=print, threads=1, draft=tmp_path / "absent")
    other = shutil.copytree(path, tmp_path / "other", ignore=shutil.ignore_patterns("llmfast.json"))
    text = (path / "tokenizer.json").read_text(encoding="utf-8")
    (other / "tokenizer.json").write_text(text.replace("</s>", "</z>"), encoding="utf-8")
    with pytest.raises(InputError, match="tokenizers differ"):
        infer(path, PROMPT, emit=print, threads=1, draft=other)


def test_what_cannot_verify_is_refused_only_when_asked(bundle_of: Callable[..., Path], tmp_path: Path) -> None:
    path = shutil.copytree(bundle_of("llama"), tmp_path / "odd", ignore=shutil.ignore_patterns("llmfast.json"))
    model = onnx.load(path / "model.onnx")
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            node.output.append(f"{node.name}.scores")
            node.attribute.append(onnx.helper.make_attribute("qk_output", 1))
    onnx.save(model, path / "model.onnx")
    assert add_verification(OnnxModel.load(path / "model.onnx")) is None
    long = PROMPT * 3
    generation = infer(path, long, emit=lambda piece: None, threads=1, max_tokens=40)
    assert generation.drafted_tokens == 0
    with pytest.raises(UnsupportedError, match="can't verify drafts"):
        infer(path, long, emit=print, threads=1, speculate=True)


def test_short_prompts_are_answered_without(bundle_of: Callable[..., Path]) -> None:
    bundle = ModelBundle.open(bundle_of("llama"))
    tokenizer = Tokenizer.load(bundle.path)
    assert open_speculating(bundle, tokenizer, 10, 100, threads=1)[1] is None
    assert open_speculating(bundle, tokenizer, 100, 10, threads=1)[1] is None
    assert open_speculating(bundle, tokenizer, 100, 100, threads=1, speculate=False)[1] is None
    assert open_speculating(bundle, tokenizer, 100, 100, threads=1)[1] is not None
    assert open_speculating(bundle, tokenizer, 10, 10, threads=1, speculate=True)[1] is not None


def test_the_command_speculates_for_one_prompt_and_several(bundle_of: Callable[..., Path]) -> None:
    path = str(bundle_of("llama", "int4"))
    texts = []
    for option in ("--speculate", "--no-speculate"):
        arguments = ["infer", path, "--prompt", PROMPT, "--max-tokens", "50", "--threads", "1", option]
        result = CliRunner().invoke(app, [*arguments, "--format", "json"])
        assert result.exit_code == 0, result.output
        several = CliRunner().invoke(app, [*arguments, "--prompt", "ab" * 9])
        assert several.exit_code == 0, several.output
        texts.append((result.stdout.split('"prompt_tokens"')[0], several.stdout))
    assert texts[0] == texts[1]
