import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from llmfast.bundle import ModelBundle
from llmfast.errors import InputError, OptionError, UnsupportedError
from llmfast.infer.engine import Engine
from tests.tiny_decoder import CONTEXT, TOKENS, VOCAB, make_weights, reference_logits, write_bundle


@pytest.fixture(scope="module")
def weights():
    return make_weights()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return ModelBundle.open(write_bundle(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def engine(bundle):
    return Engine(bundle, threads=1, chunk_tokens=16)


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(1).integers(0, TOKENS, 40)


@pytest.fixture(scope="module")
def expected(weights, ids):
    return reference_logits(weights, ids)


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
    engine.reset()
    engine.prefill(ids[:16])
    engine.decode(0)
    session = engine.session
    monkeypatch.setattr(type(session), "io_binding", lambda self: pytest.fail("bound again"))
    addresses = {engine.decode(0).ctypes.data for _ in range(5)}
    engine.reset()
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
    with pytest.raises(InputError, match=f"{CONTEXT + 2} tokens, the context holds {CONTEXT}; 2 too many") as caught:
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


def test_context_of_a_lone_graph_comes_from_its_rotary_table_and_config(bundle, tmp_path):
    (tmp_path / "model.onnx").write_bytes(bundle.model.read_bytes())
    assert Engine(ModelBundle.open(tmp_path)).capacity == CONTEXT
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 32}')
    assert Engine(ModelBundle.open(tmp_path)).capacity == 32
