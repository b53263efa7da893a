import dataclasses
import random

import numpy as np
import pytest

from llmfast.bundle import ModelBundle, write_manifest
from llmfast.errors import InputError, OptionError, UnsupportedError
from llmfast.infer.answer import StopFilter
from llmfast.infer.engine import Engine
from llmfast.infer.generate import Generation, encode_prompt, finish, generate
from llmfast.infer.sampling import Sampling
from llmfast.infer.stage import answer, infer, spell_speed
from llmfast.runtime import placement
from llmfast.tasks import feature_extraction, text_classification
from llmfast.tokenizer import Tokenizer
from tests.tiny_decoder import BOS, CONTEXT, EOS, TOKENS, VOCAB, make_weights, reference_logits, write_bundle


@pytest.fixture(scope="module")
def weights():
    return make_weights()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return ModelBundle.open(write_bundle(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def tokenizer(bundle):
    return Tokenizer.load(bundle.path)


@pytest.fixture
def engine(bundle):
    return Engine(bundle, threads=1, chunk_tokens=16)


def _greedy(weights, prompt_ids, count):
    ids = list(prompt_ids)
    for _ in range(count):
        ids.append(int(reference_logits(weights, ids)[-1, :TOKENS].argmax()))
    return ids[len(prompt_ids) :]


def _generate(engine, tokenizer, prompt="ab c", max_tokens=30, sampling=None, **settings):
    prompt_ids = np.array(tokenizer.encode(prompt), np.int64)
    pieces = []
    generation = finish(
        generate(engine, tokenizer, prompt_ids, max_tokens, sampling or Sampling(), **settings), pieces.append
    )
    assert "".join(pieces) == generation.text
    assert generation.prompt_tokens == len(prompt_ids)
    assert generation.ttft_s > 0
    return generation


def test_greedy_answer_is_that_of_the_reference(engine, tokenizer, weights):
    generation = _generate(engine, tokenizer)
    expected = tokenizer.decode(_greedy(weights, tokenizer.encode("ab c"), 30))
    # What never became a character is not shown.
    assert generation.text == expected.rstrip("\ufffd")
    assert (generation.generated_tokens, generation.finish_reason) == (30, "length")
    assert generation.decode_tokens_per_s > 0


def test_answer_does_not_depend_on_what_came_before(engine, tokenizer):
    first = _generate(engine, tokenizer)
    _generate(engine, tokenizer, "something else")
    assert _generate(engine, tokenizer).text == first.text


def test_end_token_ends_the_answer(engine, tokenizer, weights):
    tokens = _greedy(weights, tokenizer.encode("ab c"), 30)
    last = tokens[10]
    generation = _generate(engine, tokenizer, eos_ids=(last, EOS))
    assert generation.finish_reason == "eos"
    assert generation.generated_tokens == tokens.index(last)


def test_end_token_at_once_gives_no_text(engine, tokenizer, weights):
    first = _greedy(weights, tokenizer.encode("ab c"), 1)[0]
    generation = _generate(engine, tokenizer, eos_ids=[first])
    assert (generation.text, generation.generated_tokens, generation.finish_reason) == ("", 0, "eos")
    assert generation.decode_tokens_per_s is None


def test_one_token(engine, tokenizer):
    generation = _generate(engine, tokenizer, max_tokens=1)
    assert (generation.generated_tokens, generation.decode_tokens_per_s) == (1, None)


def test_stop_string_ends_the_answer_and_is_not_shown(engine, tokenizer):
    whole = _generate(engine, tokenizer).text
    stop = whole[5:8]
    generation = _generate(engine, tokenizer, stop=["never there", stop])
    assert generation.text == whole[: whole.index(stop)]
    assert generation.finish_reason == "stop"
    assert generation.generated_tokens < 30


def test_answer_ends_with_the_context(engine, tokenizer):
    generation = _generate(engine, tokenizer, "a" * 90, max_tokens=10**9)
    assert (generation.generated_tokens, generation.finish_reason) == (CONTEXT - 90, "length")
    with pytest.raises(InputError, match=f"{CONTEXT} tokens, the context holds {CONTEXT} with the answer; 1 too many"):
        _generate(engine, tokenizer, "a" * CONTEXT)


def test_padding_of_the_vocabulary_is_never_chosen(bundle, engine, tokenizer, monkeypatch):
    prefer_padding = np.zeros(VOCAB, np.float32)
    prefer_padding[TOKENS:] = 100
    monkeypatch.setattr(engine, "prefill", lambda ids: prefer_padding)
    monkeypatch.setattr(engine, "decode", lambda token: prefer_padding)
    drawn = []
    original = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: drawn.extend(ids) or original(ids))
    for sampling in (Sampling(), Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=300)):
        _generate(engine, tokenizer, sampling=sampling)
    assert drawn
    assert max(drawn) < TOKENS


def test_sampled_answers_follow_the_seed(engine, tokenizer):
    texts = [_generate(engine, tokenizer, sampling=Sampling(temperature=2.0, seed=seed)).text for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_repetition_penalty_avoids_what_was_said(engine, tokenizer):
    plain = _generate(engine, tokenizer, max_tokens=40)
    varied = _generate(engine, tokenizer, max_tokens=40, sampling=Sampling(repetition_penalty=10.0))
    assert len(set(varied.text)) > len(set(plain.text))


@pytest.mark.parametrize("settings", [{"max_tokens": 0}, {"max_tokens": -1}, {"stop": [""]}])
def test_impossible_limits_are_refused(engine, tokenizer, settings):
    with pytest.raises(OptionError):
        _generate(engine, tokenizer, **settings)


def _first_complete(text, stops):
    """Return the text before the stop string that is complete first, by trying every length."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


def test_stop_strings_over_random_splits():
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(rng.choices("abc", k=rng.randint(0, 12)))
        stops = ["".join(rng.choices("abc", k=rng.randint(1, 4))) for _ in range(rng.randint(0, 3))]
        expected, is_found = _first_complete(text, stops)
        filtered = StopFilter(stops)
        shown = ""
        rest = text
        while rest and not filtered.found:
            cut = rng.randint(1, len(rest))
            shown += filtered.push(rest[:cut])
            rest = rest[cut:]
            assert expected.startswith(shown)
        assert (shown + filtered.flush(), filtered.found) == (expected, is_found)


def test_text_that_cannot_be_a_stop_string_is_shown_at_once():
    filtered = StopFilter(["</answer>"])
    assert [filtered.push(piece) for piece in ("a <", "/b", " </ans", "wer", ">x")] == ["a ", "</b", " ", "", ""]
    assert filtered.found


def test_prompt_goes_through_the_chat_template(tokenizer, tmp_path, bundle):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((bundle.path / name).read_bytes())
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    chat = Tokenizer.load(tmp_path)
    rendered = chat.encode("<s>[system]be brief[user]hello")
    assert rendered[0] == BOS
    assert encode_prompt(chat, "hello", "be brief").tolist() == rendered
    assert encode_prompt(chat, "hello", raw=True).tolist() == chat.encode("hello")
    assert encode_prompt(tokenizer, "hello").tolist() == chat.encode("hello")
    for one, raw in ((chat, True), (tokenizer, False)):
        with pytest.raises(OptionError, match="--system needs a chat template"):
            encode_prompt(one, "hello", "be brief", raw)


def test_infer_streams_an_answer(bundle, engine, tokenizer):
    pieces = []
    generation = infer(bundle.path, "ab c", emit=pieces.append, max_tokens=30, threads=1)
    assert "".join(pieces) == generation.text == _generate(engine, tokenizer).text
    assert len(pieces) > 1


def test_infer_refuses_what_it_cannot_do(bundle, tmp_path):
    with pytest.raises(OptionError, match="--max-tokens 0"):
        infer(tmp_path / "absent", "hello", emit=print, max_tokens=0)
    with pytest.raises(OptionError, match="--stop"):
        infer(tmp_path / "absent", "hello", emit=print, stop=[""])
    with pytest.raises(InputError, match="not found"):
        infer(tmp_path / "absent", "hello", emit=print)
    with pytest.raises(InputError, match="empty prompt"):
        infer(bundle.path, "", emit=print)
    (tmp_path / "model.onnx").write_bytes(bundle.model.read_bytes())
    with pytest.raises(InputError, match="no tokenizer"):
        infer(tmp_path, "hello", emit=print)


def test_infer_refuses_a_model_of_another_task(bundle, tmp_path):
    (tmp_path / "model.onnx").write_bytes(bundle.model.read_bytes())
    write_manifest(tmp_path, dataclasses.replace(bundle.manifest, task="feature-extraction", files={}))
    with pytest.raises(OptionError, match="its task is feature-extraction"):
        infer(tmp_path, "hello", emit=print)


def test_answers_of_several_texts(bundle, engine, tokenizer):
    answers = answer(bundle.path, ["ab c", "hello"], threads=1, max_tokens=8)
    assert [one["text"] for one in answers] == ["ab c", "hello"]
    assert answers[0]["answer"] == _generate(engine, tokenizer, max_tokens=8).text
    assert answers[0]["finish_reason"] == "length"
    (nodes,) = {tuple(one["placement"].items()) for one in answers}
    assert nodes == tuple(placement(*engine.sessions).items())


def test_answer_needs_to_know_the_task(tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"graph")
    with pytest.raises(UnsupportedError, match="does not say its task"):
        answer(tmp_path / "net.onnx", ["hello"])


def test_answers_are_spelled_for_people():
    scores = {"bad": 0.25, "good": 0.75}
    assert text_classification.spell({"text": "x", "label": "good", "score": 0.75, "scores": scores}) == "good 0.7500"
    assert feature_extraction.spell({"text": "x", "embedding": [0.5, -1.0]}) == "0.500000 -1.000000"
    generation = Generation("yes", 5, 9, 0.25, 12.34, "eos")
    assert "5 prompt tokens" in spell_speed(generation)
    assert "9 tokens, 12.3 tokens/s; ended by eos" in spell_speed(generation)
    assert "tokens/s" not in spell_speed(dataclasses.replace(generation, decode_tokens_per_s=None))
