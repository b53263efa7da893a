import dataclasses
import json
import random

import numpy as np
import onnx
import pytest
import tokenizers
from onnx import TensorProto, helper, numpy_helper
from tokenizers import decoders, models, pre_tokenizers

from llmfast.bundle import Manifest, ModelBundle, write_manifest
from llmfast.errors import InputError, OptionError, UnsupportedError
from llmfast.infer.engine import Engine
from llmfast.infer.generate import Generation, StopFilter, encode_prompt, finish, generate
from llmfast.infer.sampling import Sampling
from llmfast.infer.stage import answer, infer, spell_speed
from llmfast.tasks import feature_extraction, text_classification
from llmfast.tokenizer import Tokenizer

# 256 bytes and 3 special tokens; the rows above them are padding, as in many real models.
TOKENS, VOCAB = 259, 264
HIDDEN, HEADS, KV_HEADS, HEAD_SIZE, CONTEXT = 16, 2, 1, 16, 96
BOS, EOS = 256, 257


def _weights():
    rng = np.random.default_rng(0)
    shapes = {
        "embedding": (VOCAB, HIDDEN),
        "qkv": (HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_SIZE),
        "output": (HEADS * HEAD_SIZE, HIDDEN),
        "head": (HIDDEN, VOCAB),
    }
    weights = {name: rng.normal(0, 0.6, shape).astype(np.float32) for name, shape in shapes.items()}
    angles = np.arange(CONTEXT)[:, None] * 100.0 ** (-np.arange(0, HEAD_SIZE, 2) / HEAD_SIZE)
    return weights | {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}


def _write_decoder(path, weights):
    node, value = helper.make_node, helper.make_tensor_value_info
    past = ["past_key_values.0.key", "past_key_values.0.value"]
    present = ["present.0.key", "present.0.value"]
    nodes = [
        node("Gather", ["embedding", "input_ids"], ["embedded"]),
        node("MatMul", ["embedded", "qkv"], ["packed"]),
        node(
            "GroupQueryAttention",
            ["packed", "", "", *past, "seqlens_k", "total_sequence_length", "cos", "sin"],
            ["attention", *present],
            domain="com.microsoft",
            num_heads=HEADS,
            kv_num_heads=KV_HEADS,
            do_rotary=1,
        ),
        node("MatMul", ["attention", "output"], ["projected"]),
        node("Add", ["embedded", "projected"], ["hidden"]),
        node("Neg", ["num_logits"], ["start"]),
        node("Slice", ["hidden", "start", "end", "axis"], ["last"]),
        node("MatMul", ["last", "head"], ["logits"]),
    ]
    constants = weights | {"end": np.array([np.iinfo(np.int64).max]), "axis": np.array([1])}
    cache = ["batch", KV_HEADS, "past_capacity", HEAD_SIZE]
    graph = helper.make_graph(
        nodes,
        "decoder",
        [
            value("input_ids", TensorProto.INT64, ["batch", "seq"]),
            value("seqlens_k", TensorProto.INT32, ["batch"]),
            value("total_sequence_length", TensorProto.INT32, []),
            value("num_logits", TensorProto.INT64, [1]),
            *[value(name, TensorProto.FLOAT, cache) for name in past],
        ],
        [
            value("logits", TensorProto.FLOAT, ["batch", "num_logits", VOCAB]),
            *[value(name, TensorProto.FLOAT, cache) for name in present],
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


def _reference_logits(weights, ids):
    """Return the decoder's logits at every position, in float64 and without a cache: [n, VOCAB]."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    embedded = w["embedding"][ids]
    packed = (embedded @ w["qkv"]).reshape(len(ids), HEADS + 2 * KV_HEADS, HEAD_SIZE)
    left, right = np.split(packed[:, : HEADS + KV_HEADS], 2, axis=-1)
    cos, sin = w["cos"][: len(ids), None], w["sin"][: len(ids), None]
    rotated = np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    queries, keys, values = rotated[:, :HEADS], rotated[:, HEADS], packed[:, HEADS + KV_HEADS]
    scores = np.einsum("qhd,kd->hqk", queries, keys) / np.sqrt(HEAD_SIZE)
    scores[:, np.triu(np.ones((len(ids), len(ids)), bool), 1)] = -np.inf
    attention = np.exp(scores - scores.max(-1, keepdims=True))
    attention /= attention.sum(-1, keepdims=True)
    mixed = np.einsum("hqk,kd->qhd", attention, values).reshape(len(ids), -1)
    return (embedded + mixed @ w["output"]) @ w["head"]


def _save_tokenizer(folder):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<pad>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))


@pytest.fixture(scope="module")
def weights():
    return _weights()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, weights):
    folder = tmp_path_factory.mktemp("tiny")
    _write_decoder(folder / "model.onnx", weights)
    _save_tokenizer(folder)
    architecture = {"context_length": CONTEXT, "vocab_size": VOCAB}
    graphs = {"model": {"file": "model.onnx", "inputs": [], "outputs": []}}
    write_manifest(folder, Manifest("text-generation", architecture=architecture, graphs=graphs))
    return ModelBundle.open(folder)


@pytest.fixture(scope="module")
def tokenizer(bundle):
    return Tokenizer.load(bundle.path)


@pytest.fixture
def engine(bundle):
    return Engine(bundle, threads=1, chunk_tokens=16)


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(1).integers(0, TOKENS, 40)


@pytest.fixture(scope="module")
def expected(weights, ids):
    return _reference_logits(weights, ids)


def _close(actual, wanted):
    return actual.dtype == np.float32 and np.abs(actual - wanted).max() < 1e-4


def test_score_gives_logits_at_every_position(engine, ids, expected):
    assert _close(engine.score(ids), expected)
    assert engine.length == len(ids)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 16, 40, 128])
def test_prefill_in_chunks_of_any_size(bundle, ids, expected, chunk_tokens):
    engine = Engine(bundle, threads=1, chunk_tokens=chunk_tokens)
    assert _close(engine.prefill(ids), expected[-1])


def test_decode_over_the_cache_equals_the_whole_prompt(engine, ids, expected):
    assert _close(engine.prefill(ids[:20]), expected[19])
    for position in range(20, len(ids)):
        assert _close(engine.decode(int(ids[position])), expected[position])
    assert engine.length == len(ids)


def test_prefill_goes_on_after_decode(engine, ids, expected):
    engine.prefill(ids[:5])
    engine.decode(int(ids[5]))
    assert _close(engine.prefill(ids[6:30]), expected[29])


def test_prefilled_logits_outlive_the_next_call(engine, ids, expected):
    logits = engine.prefill(ids[:20])
    engine.decode(int(ids[20]))
    assert _close(logits, expected[19])


def test_rollback_forgets(engine, ids, expected):
    engine.prefill(ids[:20])
    engine.prefill(np.zeros(9, np.int64))
    engine.rollback(20)
    assert _close(engine.decode(int(ids[20])), expected[20])
    with pytest.raises(ValueError, match="roll back"):
        engine.rollback(22)


def test_reset_forgets_everything(engine, ids, expected):
    engine.prefill(ids[::-1])
    engine.reset()
    assert _close(engine.prefill(ids), expected[-1])


def test_two_engines_agree_to_the_bit(bundle, ids):
    scores = [Engine(bundle, threads=1).score(ids) for _ in range(2)]
    assert np.array_equal(*scores)


def test_decode_binds_once(engine, ids, monkeypatch):
    engine.prefill(ids[:16])
    engine.decode(0)
    session = engine.session
    monkeypatch.setattr(type(session), "io_binding", lambda self: pytest.fail("bound again"))
    addresses = {engine.decode(0).ctypes.data for _ in range(5)}
    engine.prefill(ids[:16])
    assert len(addresses) == 1


def test_cache_holds_what_was_asked_for_in_whole_chunks(bundle):
    assert Engine(bundle, max_length=17, chunk_tokens=16).capacity == 32
    assert Engine(bundle, max_length=32, chunk_tokens=16).capacity == 32
    assert Engine(bundle, max_length=10**9).capacity == CONTEXT
    assert Engine(bundle).capacity == CONTEXT


def test_prompt_over_the_context_is_refused(engine):
    engine.prefill(np.zeros(CONTEXT, np.int64))
    with pytest.raises(InputError, match=f"{CONTEXT + 1} tokens, the context holds {CONTEXT}"):
        engine.decode(0)
    with pytest.raises(InputError, match=f"{CONTEXT + 2} tokens, the context holds {CONTEXT}") as caught:
        engine.prefill(np.zeros(2, np.int64))
    assert caught.value.exit_code == 3
    assert engine.length == CONTEXT


@pytest.mark.parametrize(("ids", "message"), [([], "empty"), ([0, VOCAB], f"token {VOCAB}"), ([-1], "token -1")])
def test_impossible_tokens_are_refused(engine, ids, message):
    with pytest.raises(InputError, match=message):
        engine.prefill(np.array(ids, np.int64))
    with pytest.raises(InputError, match=message):
        engine.score(np.array(ids, np.int64))


@pytest.mark.parametrize("settings", [{"chunk_tokens": 0}, {"max_length": 0}])
def test_impossible_sizes_are_refused(bundle, settings):
    with pytest.raises(OptionError):
        Engine(bundle, **settings)


def test_graph_of_another_kind_is_unsupported(tmp_path):
    value = helper.make_tensor_value_info
    names = ("input_ids", "attention_mask")
    graph = helper.make_graph(
        [helper.make_node("Add", names, ["logits"])],
        "encoder",
        [value(name, TensorProto.INT64, ["batch", "seq"]) for name in names],
        [value("logits", TensorProto.INT64, ["batch", "seq"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(UnsupportedError, match="lacks `seqlens_k`"):
        Engine(ModelBundle.open(tmp_path))


def test_context_of_a_lone_graph_comes_from_its_config(bundle, tmp_path):
    (tmp_path / "model.onnx").write_bytes(bundle.model.read_bytes())
    with pytest.raises(InputError, match="how long its context is"):
        Engine(ModelBundle.open(tmp_path))
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 32}')
    assert Engine(ModelBundle.open(tmp_path)).capacity == 32


def _greedy(weights, prompt_ids, count):
    ids = list(prompt_ids)
    for _ in range(count):
        ids.append(int(_reference_logits(weights, ids)[-1, :TOKENS].argmax()))
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
    with pytest.raises(InputError, match=f"{CONTEXT} tokens, the context holds {CONTEXT}"):
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


def test_answer_needs_to_know_the_task(bundle):
    with pytest.raises(UnsupportedError, match="does not say its task"):
        answer(bundle.model, ["hello"])


def test_answers_are_spelled_for_people():
    scores = {"bad": 0.25, "good": 0.75}
    assert text_classification.spell({"text": "x", "label": "good", "score": 0.75, "scores": scores}) == "good 0.7500"
    assert feature_extraction.spell({"text": "x", "embedding": [0.5, -1.0]}) == "0.500000 -1.000000"
    generation = Generation("yes", 5, 9, 0.25, 12.34, "eos")
    assert "5 prompt tokens" in spell_speed(generation)
    assert "9 tokens, 12.3 tokens/s; ended by eos" in spell_speed(generation)
    assert "tokens/s" not in spell_speed(dataclasses.replace(generation, decode_tokens_per_s=None))
