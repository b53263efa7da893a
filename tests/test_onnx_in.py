"""Decoders of other exporters: adopted or run as they are, and compared with PyTorch."""

import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from transformers import AutoModelForCausalLM

from llmfast.bench.options import BenchOptions
from llmfast.bench.stage import bench
from llmfast.bundle import ModelBundle
from llmfast.errors import InputError, LlmfastError, UnsupportedError
from llmfast.graph.adapt import adapt
from llmfast.graph.model import OnnxModel
from llmfast.graph.skeleton import read_skeleton
from llmfast.infer.batch import Batch, Request
from llmfast.infer.engine import Engine
from llmfast.infer.growing import GrowingEngine
from llmfast.infer.many import answer_file
from llmfast.infer.opening import open_decoder
from llmfast.infer.rows import OneRow
from llmfast.infer.stage import infer
from llmfast.quantize.stage import QuantizeOptions, quantize
from llmfast.serve.model import ServedModel
from llmfast.tokenizer import Tokenizer
from tests.exporters import export_growing, merge, rounded, write_genai, write_unmasked
from tests.tiny_prompts import write_lines

GENAI = {"fp32": {}, "position_ids": {"positions": True}, "int4": {"bits": 4}, "fp16": {"bits": 16}}
GROWING = ("growing", "merged")
TOLERANCE = {"fp16": 3e-2}


@pytest.fixture(scope="module")
def checkpoint(checkpoints):
    return checkpoints("llama-tied")


@pytest.fixture(scope="module")
def growing(checkpoint):
    return export_growing(checkpoint)


@pytest.fixture(scope="module")
def cacheless(checkpoint):
    return export_growing(checkpoint, with_past=False)


@pytest.fixture(scope="module")
def folders(checkpoint, growing, cacheless, tmp_path_factory):
    """Return a function that gives the folder of a form; do not change it."""
    root, made = tmp_path_factory.mktemp("foreign"), {}

    def get(form):
        if form in made:
            return made[form]
        made[form] = folder = root / form
        if form in GENAI:
            return write_genai(checkpoint, folder, **GENAI[form])
        folder.mkdir()
        for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(checkpoint / name, folder / name)
        if form == "growing":
            onnx.save(growing, folder / "model.onnx")
        else:
            onnx.save(merge(growing, cacheless), folder / "decoder_model_merged.onnx")
        return folder

    return get


@pytest.fixture(scope="module")
def references(checkpoint):
    """Return a function that gives PyTorch's model of a form."""
    plain = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    coarse = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    table = coarse.model.embed_tokens.weight.detach().clone()
    with torch.no_grad():
        for layer in coarse.model.layers:
            for linear in layer.modules():
                if isinstance(linear, torch.nn.Linear):
                    linear.weight.copy_(torch.from_numpy(rounded(linear.weight.numpy())))
        coarse.lm_head.weight = torch.nn.Parameter(torch.from_numpy(rounded(table.numpy())))
        coarse.model.embed_tokens.weight = torch.nn.Parameter(table)
    return lambda form: coarse if form == "int4" else plain


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(1).integers(3, 300, 40)


@pytest.mark.parametrize("form", [*GENAI, *GROWING])
def test_logits_are_pytorchs(folders, references, ids, form):
    with torch.inference_mode():
        expected = references(form)(torch.from_numpy(ids)[None]).logits[0].numpy()
    engine = open_decoder(ModelBundle.open(folders(form)), threads=1, max_length=64, chunk_tokens=16)
    assert type(engine) is (Engine if form in GENAI else GrowingEngine)

    def close(actual, wanted):
        assert actual.dtype == np.float32
        return np.abs(actual - wanted).max() < TOLERANCE.get(form, 1e-4)

    assert close(engine.score(ids), expected)
    engine.reset()
    assert close(engine.prefill(ids), expected[-1])
    engine.reset()
    assert close(engine.prefill(ids[:20]), expected[19])
    engine.prefill(np.full(5, 7))
    engine.rollback(20)
    assert close(engine.decode(int(ids[20])), expected[20])
    assert close(engine.prefill(ids[21:]), expected[-1])
    assert engine.length == len(ids)
    engine.rollback(30)
    for position in range(30, 40):
        assert close(engine.decode(int(ids[position])), expected[position])


@pytest.fixture
def passes(monkeypatch):
    """Return the tokens of every pass of a growing engine."""
    found = []
    append = GrowingEngine._append

    def follow(self, ids):
        found.append(len(ids))
        return append(self, ids)

    monkeypatch.setattr(GrowingEngine, "_append", follow)
    return found


def test_rows_over_a_growing_cache_copy_nothing_at_a_step(folders, ids, monkeypatch):
    engine = open_decoder(ModelBundle.open(folders("growing")), threads=1, max_length=64)
    rows = OneRow(engine)
    rows.prefill(0, ids[:20])
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_forget", lambda length: pytest.fail("the cache is copied"))
        for position in range(20, 24):
            logits = rows.decode([int(ids[position])], [position])[0]
    assert np.abs(logits - rows.prefill(0, ids[:24])).max() < 1e-4


def test_prompts_go_through_rows_in_the_passes_of_the_engine(folders, ids, passes):
    engine = open_decoder(ModelBundle.open(folders("growing")), threads=1, max_length=64, chunk_tokens=16)
    passes.clear()
    alone = engine.prefill(ids)
    assert passes == [16, 16, 8]
    assert np.array_equal(OneRow(engine).prefill(0, ids), alone)
    assert passes == [16, 16, 8] * 2
    OneRow(engine).prefill(0, ids, 20)
    assert passes[6:] == [12, 8]  # cut at whole chunks from 0 all the same


def test_a_graph_that_takes_several_tokens_only_at_the_start_reads_whole_prompts(folders, ids, passes, monkeypatch):
    monkeypatch.setattr(GrowingEngine, "_probe", lambda self, *_: (self.capacity, 1))
    bundle = ModelBundle.open(folders("growing"))
    batch = Batch(OneRow(open_decoder(bundle, threads=1, max_length=64)), Tokenizer.load(bundle.path))
    for name in range(2):
        batch.submit(Request(name, ids, max_tokens=1))
        batch.step()
    assert passes == [len(ids)] * 2
    assert batch.counts.shared_tokens == 0


@pytest.mark.parametrize("form", ["fp32", *GROWING])
def test_greedy_tokens_are_those_of_generate(folders, references, ids, form):
    prompt = ids[:5]
    with torch.inference_mode():
        generated = references(form).generate(torch.from_numpy(prompt)[None], max_new_tokens=12, do_sample=False)
    expected = generated[0, len(prompt) :].tolist()
    engine = open_decoder(ModelBundle.open(folders(form)), threads=1)
    chosen = [int(engine.prefill(prompt).argmax())]
    while len(chosen) < len(expected):
        chosen.append(int(engine.decode(chosen[-1]).argmax()))
    assert len(expected) > 3
    assert chosen == expected


def test_infer_answers_alike_whoever_exported(folders, fp32_bundle, capsys):
    answers = {
        form: infer(folder, "ab c", emit=lambda piece: None, max_tokens=12, threads=1).text
        for form, folder in {"ours": fp32_bundle, "fp32": folders("fp32"), "growing": folders("growing")}.items()
    }
    assert len(set(answers.values())) == 1
    assert answers["ours"]
    assert capsys.readouterr().err.count("copies the whole KV cache") == 1


def test_only_the_last_positions_reach_the_head(folders):
    adapted = adapt(OnnxModel.load(folders("fp32") / "model.onnx")).proto.graph
    inputs = {value.name for value in adapted.input}
    assert "attention_mask" not in inputs
    assert {"seqlens_k", "total_sequence_length", "num_logits"} < inputs
    nodes = {output: node for node in adapted.node for output in node.output}
    assert nodes[nodes["logits"].input[0]].op_type == "Slice"
    assert not {"ReduceSum", "Sub", "Shape"} & {node.op_type for node in adapted.node}


@pytest.mark.parametrize(
    ("ops", "before"), [(("Div", "Tanh", "Mul"), "MatMul"), (("Neg", "Neg"), "Identity")], ids=["softcap", "unknown"]
)
def test_what_follows_the_head_stays(folders, ids, tmp_path, ops, before):
    folder = shutil.copytree(folders("fp32"), tmp_path / "model")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    graph = model.graph
    graph.initializer.append(onnx.numpy_helper.from_array(np.float32(5), "cap"))
    graph.node[-1].output[0] = value = "lm_head/output_0"
    for index, op in enumerate(ops):
        inputs = [value, "cap"] if op in ("Div", "Mul") else [value]
        value = "logits" if index == len(ops) - 1 else f"after.{index}"
        graph.node.append(helper.make_node(op, inputs, [value]))
    onnx.save(model, folder / "model.onnx")
    adapted = adapt(OnnxModel.load(folder / "model.onnx")).proto.graph
    assert [node.op_type for node in adapted.node if "llmfast.last" in node.input] == [before]
    plain = open_decoder(ModelBundle.open(folders("fp32")), threads=1).score(ids)
    expected = np.tanh(plain / 5) * 5 if "Tanh" in ops else plain
    engine = open_decoder(ModelBundle.open(folder), threads=1)
    assert np.abs(engine.score(ids) - expected).max() < 1e-4
    engine.reset()
    assert np.abs(engine.prefill(ids) - expected[-1]).max() < 1e-4


def test_context_is_no_longer_than_the_rotary_table(folders, tmp_path):
    folder = shutil.copytree(folders("fp32"), tmp_path / "model")
    (folder / "genai_config.json").write_text('{"model": {"context_length": 1000000000}}')
    assert open_decoder(ModelBundle.open(folder)).capacity == 512
    (folder / "genai_config.json").write_text('{"model": {"context_length": 100}}')
    assert open_decoder(ModelBundle.open(folder)).capacity == 100
    (folder / "genai_config.json").unlink()
    assert open_decoder(ModelBundle.open(folder)).capacity == 512


@pytest.mark.parametrize("config", ['{"model": {"context_length": 1000000000}}', "{}"])
def test_files_and_the_server_go_by_the_limits_of_the_graph(folders, tmp_path, config):
    folder = shutil.copytree(folders("fp32"), tmp_path / "model")
    (folder / "genai_config.json").write_text(config)
    source = write_lines(tmp_path / "p.jsonl", {"prompt": "ab c"}, {"prompt": "a " * 600})
    summary = answer_file(folder, source, tmp_path / "a.jsonl", threads=1, max_tokens=3)
    assert summary.answered == 1
    assert [one["line"] for one in summary.errors] == [2]
    assert "the context holds 512" in summary.errors[0]["error"]
    assert ServedModel(folder, "cpu", 1, None, None).describe().capacity == 512
    assert ModelBundle.open(folder).manifest.architecture["vocab_size"] == 320


@pytest.mark.parametrize(
    "settings", ['{"model": {"context_length": "long"}}', '{"model": {"context_length": -1}}', "[]"]
)
def test_impossible_settings_are_refused(folders, tmp_path, settings):
    folder = shutil.copytree(folders("fp32"), tmp_path / "model")
    (folder / "genai_config.json").write_text(settings)
    with pytest.raises(InputError, match=r"context holds|malformed"):
        ModelBundle.open(folder)


def test_end_tokens_come_from_genai_config(folders, tmp_path):
    folder = shutil.copytree(folders("fp32"), tmp_path / "model")
    (folder / "genai_config.json").write_text('{"model": {"context_length": 64, "eos_token_id": [5, 6]}}')
    assert Tokenizer.load(folder).eos_ids == (5, 6)
    quantized = quantize(folder, tmp_path / "int8", QuantizeOptions("int8"))
    assert Tokenizer.load(quantized.path).eos_ids == (5, 6)


def test_quantized_genai_follows_the_contract(folders, ids, tmp_path):
    quantized = quantize(folders("fp32"), tmp_path / "int8", QuantizeOptions("int8"))
    manifest = quantized.manifest
    assert manifest.task == "text-generation"
    assert [step.stage for step in manifest.lineage] == ["import", "quantize"]
    assert manifest.architecture["context_length"] == 512
    assert "seqlens_k" in manifest.graphs["model"]["inputs"]
    roles = {row["role"] for row in manifest.measured["quantize"]["layers"]}
    assert roles == {"embedding", "qkv_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}  # head and table are one
    table = OnnxModel.load(quantized.model).initializers
    assert not [name for name, tensor in table.items() if list(tensor.dims) == [64, 320]]
    expected = open_decoder(ModelBundle.open(folders("fp32")), threads=1).score(ids)
    engine = open_decoder(quantized, threads=1)
    assert type(engine) is Engine
    assert np.corrcoef(engine.score(ids).ravel(), expected.ravel())[0, 1] > 0.995


def test_calibrated_methods_run_on_both_kinds(folders, ids, tmp_path):
    from llmfast.quantize.calibrate import Calibration

    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    for form in ("fp32", "growing"):
        options = QuantizeOptions("int8", "smoothquant,gptq", calibration=Calibration(text, 4, 64))
        engine = open_decoder(quantize(folders(form), tmp_path / form, options), threads=1, max_length=64)
        assert type(engine) is (Engine if form == "fp32" else GrowingEngine)
        expected = open_decoder(ModelBundle.open(folders(form)), threads=1).score(ids)
        assert np.corrcoef(engine.score(ids).ravel(), expected.ravel())[0, 1] > 0.99


def test_what_was_quantized_elsewhere_is_not_quantized_again(folders, tmp_path):
    with pytest.raises(UnsupportedError, match="already quantized"):
        quantize(folders("int4"), tmp_path / "int8", QuantizeOptions("int8"))
    with pytest.raises(UnsupportedError, match="nothing to quantize") as caught:
        quantize(folders("merged"), tmp_path / "int8", QuantizeOptions("int8"))
    assert "merging" in caught.value.hint


def test_bench_compares_theirs_with_ours(folders, fp32_bundle, tmp_path, capfd):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    options = BenchOptions(prompt_tokens=8, output_tokens=4, rounds=1, warmup=0, data=text, num_samples=2, seq_len=64)
    document = bench([fp32_bundle, folders("fp32"), folders("growing")], options).document()
    for row in document["rows"][1:]:
        assert row["kld"] < 1e-6
        assert row["top1_agreement"] == 1
        assert row["decode_tokens_per_s"] > 0
    notes = [line for line in capfd.readouterr().err.splitlines() if "copies the whole KV cache" in line]
    assert len(notes) == 1
    assert "`growing`" in notes[0]


def test_graph_without_a_causal_mask_gets_one_token_at_a_time(tmp_path):
    weights = write_unmasked(tmp_path / "model.onnx")
    (tmp_path / "config.json").write_text('{"n_positions": 32}')
    engine = open_decoder(ModelBundle.open(tmp_path), threads=1)
    ids = np.random.default_rng(0).integers(0, 32, 12)
    embedded = weights["embedding"][ids].astype(np.float64)
    queries, keys, values = (embedded @ weights[part] for part in ("query", "key", "value"))
    scores = np.where(np.tri(12, dtype=bool), np.exp(queries @ keys.T), 0)
    expected = (scores / scores.sum(-1, keepdims=True)) @ values @ weights["head"]
    assert np.abs(engine.score(ids) - expected).max() < 1e-4
    engine.reset()
    assert np.abs(engine.prefill(ids) - expected[-1]).max() < 1e-4


def test_caches_of_other_names_are_paired_by_order(growing, folders, ids, tmp_path):
    model = onnx.ModelProto()
    model.CopyFrom(growing)
    names = {value.name: f"cache_out_{index}" for index, value in enumerate(model.graph.output) if index}
    names |= {value.name: value.name.replace(".", "_") for value in model.graph.input[2:]}
    _rename(model, names)
    shutil.copyfile(folders("growing") / "config.json", tmp_path / "config.json")
    onnx.save(model, tmp_path / "model.onnx")
    expected = open_decoder(ModelBundle.open(folders("growing")), threads=1).score(ids)
    assert np.array_equal(open_decoder(ModelBundle.open(tmp_path), threads=1).score(ids), expected)


def _rename(model, names):
    for value in (*model.graph.input, *model.graph.output):
        value.name = names.get(value.name, value.name)
    for node in model.graph.node:
        for field in (node.input, node.output):
            for index, name in enumerate(field):
                field[index] = names.get(name, name)


@pytest.mark.parametrize("form", ["fp32", "growing"])
def test_impossible_prompts_are_refused(folders, form):
    engine = open_decoder(ModelBundle.open(folders(form)), threads=1, max_length=16)
    for prompt, message in (([], "empty"), ([0, 320], "token 320"), ([1] * (engine.capacity + 1), "too long")):
        with pytest.raises(InputError, match=message):
            engine.prefill(np.array(prompt, np.int64))
        with pytest.raises(InputError, match=message):
            engine.score(np.array(prompt, np.int64))
    engine.prefill(np.ones(engine.capacity, np.int64))
    with pytest.raises(InputError, match="too long"):
        engine.decode(1)
    with pytest.raises(ValueError, match="roll back"):
        engine.rollback(engine.capacity + 1)


def _add_input(graph):
    graph.input.append(helper.make_tensor_value_info("adapter_id", TensorProto.INT64, [1]))


def _add_flat_cache(graph):
    graph.input.append(helper.make_tensor_value_info("past_key_values.9.key", TensorProto.FLOAT, [1, "past", 64]))


def _add_wide_cache(graph):
    graph.input.append(helper.make_tensor_value_info("past_key_values.9.key", TensorProto.DOUBLE, [1, 2, "past", 16]))


def _drop_output(graph):
    del graph.output[-1]


def _prune_head(graph):
    graph.output[0].type.tensor_type.shape.dim[1].Clear()
    graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1


def _lie_about_heads(graph):
    for value in graph.value_info:
        value.type.tensor_type.shape.dim[-1].dim_value = 24


def _forget_sizes(graph):
    del graph.value_info[:]


def _widen_positions(graph):
    positions = next(value for value in graph.input if value.name == "position_ids")
    positions.type.tensor_type.shape.dim.add().dim_value = 3


@pytest.mark.parametrize(
    ("form", "damage", "message"),
    [
        ("fp32", _add_input, "`adapter_id`"),
        ("growing", _add_input, "`adapter_id`"),
        ("growing", _add_flat_cache, r"`past_key_values.9.key` is tensor\(float\) \[1, 'past', 64\]"),
        ("growing", _add_wide_cache, r"`past_key_values.9.key` is tensor\(double\)"),
        ("growing", _drop_output, "takes 4 caches and gives back 3"),
        ("fp32", _prune_head, "no output `logits`"),
        ("growing", _prune_head, r"`logits` \[1, 1, 320\]"),
        ("fp32", _lie_about_heads, "does not run as a decoder"),
        ("fp32", _forget_sizes, "how many features a head of `past_key_values.0.key` has"),
        ("position_ids", _widen_positions, "`position_ids` is not"),
    ],
)
def test_graphs_that_no_engine_runs_are_named(folders, tmp_path, form, damage, message):
    folder = shutil.copytree(folders(form), tmp_path / "model")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    damage(model.graph)
    onnx.save(model, folder / "model.onnx")
    with pytest.raises(LlmfastError, match=message) as caught:
        open_decoder(ModelBundle.open(folder), threads=1)
    assert caught.value.exit_code in (3, 5)


def test_decoder_without_a_cache_is_unsupported(checkpoint, cacheless, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(checkpoint / name, tmp_path / name)
    onnx.save(cacheless, tmp_path / "decoder_model.onnx")
    with pytest.raises(UnsupportedError, match=r"no cache: it lacks inputs `past_key_values") as caught:
        infer(tmp_path, "hello", emit=print)
    assert caught.value.exit_code == 5
    assert "text-generation-with-past" in caught.value.hint


def test_folder_of_transformers_js(folders, ids, tmp_path):
    growing = folders("growing")
    (tmp_path / "onnx").mkdir()
    shutil.copyfile(growing / "model.onnx", tmp_path / "onnx" / "model.onnx")
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(growing / name, tmp_path / name)
    folder, lone = ModelBundle.open(tmp_path), ModelBundle.open(tmp_path / "onnx" / "model.onnx")
    assert (folder.name, folder.path, folder.model) == (tmp_path.name, tmp_path, lone.model)
    assert folder.companion("tokenizer.json") == lone.companion("tokenizer.json") == tmp_path / "tokenizer.json"
    assert folder.size_bytes == sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert np.array_equal(open_decoder(lone, threads=1).score(ids), open_decoder(folder, threads=1).score(ids))
    quantized = quantize(tmp_path, tmp_path.parent / f"{tmp_path.name}-int8", QuantizeOptions("int8"))
    assert quantized.companion("tokenizer.json") is not None


def test_missing_tokenizer_and_context_are_said(folders, tmp_path):
    shutil.copyfile(folders("growing") / "model.onnx", tmp_path / "model.onnx")
    with pytest.raises(InputError, match="no tokenizer"):
        infer(tmp_path, "hello", emit=print)
    with pytest.raises(InputError, match="how long its context is"):
        open_decoder(ModelBundle.open(tmp_path))


def test_encoders_are_no_decoders(tmp_path):
    names = ("input_ids", "attention_mask")
    ints = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "seq"]) for name in names]
    output = helper.make_tensor_value_info("logits", TensorProto.INT64, ["batch", "seq"])
    graph = helper.make_graph([helper.make_node("Add", names, ["logits"])], "encoder", ints, [output])
    onnx.save(helper.make_model(graph, ir_version=10), tmp_path / "model.onnx")
    config = {"architectures": ["RobertaForSequenceClassification"], "max_position_embeddings": 514}
    (tmp_path / "config.json").write_text(json.dumps(config))
    bundle = ModelBundle.open(tmp_path)
    assert bundle.manifest.task == "unknown"
    assert bundle.longest_text() == 512  # some positions are not for tokens


@pytest.mark.parametrize("form", ["fp32", "growing"])
def test_skeleton_is_the_model_without_weights(folders, form):
    path = folders(form) / "model.onnx"
    expected, found = onnx.load(path, load_external_data=False), read_skeleton(path)
    assert [(one.name, one.dims, one.data_type) for one in found.graph.initializer] == [
        (one.name, one.dims, one.data_type) for one in expected.graph.initializer
    ]
    assert sum(len(one.raw_data) for one in found.graph.initializer if len(one.raw_data) > 256) == 0
    for model in (expected, found):
        del model.graph.initializer[:]
    assert found == expected


def test_skeleton_of_a_damaged_file_is_refused(folders, tmp_path):
    whole = (folders("fp32") / "model.onnx").read_bytes()
    path = tmp_path / "model.onnx"
    for length in [*range(1, 60), *range(60, len(whole) - 1, 997)]:
        path.write_bytes(whole[:length])
        try:
            read_skeleton(path)
        except InputError:
            continue
        assert onnx.load(path, load_external_data=False).graph.node == []  # it ends between two fields
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(InputError, match="corrupt ONNX"):
        read_skeleton(path)
    assert ModelBundle.open(path).manifest.task == "unknown"
    with pytest.raises(InputError, match="cannot read"):
        read_skeleton(tmp_path / "absent.onnx")
