"""The quantize stage on whole models: decoders, encoders, and files that llmfast did not export."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from llmfast import registry
from llmfast.bundle import ModelBundle
from llmfast.cli import app
from llmfast.errors import GateError, InputError, OptionError, UnsupportedError
from llmfast.export.stage import export
from llmfast.graph.floats import FloatFormat
from llmfast.graph.linear import find_embeddings, find_linears
from llmfast.graph.model import OnnxModel
from llmfast.graph.packed import Grid
from llmfast.infer.engine import Engine
from llmfast.quantize import stage
from llmfast.quantize.budget import Budget
from llmfast.quantize.calibrate import Calibration
from llmfast.quantize.plan import block_wise_grid
from llmfast.quantize.rounding import rtn
from llmfast.quantize.stage import QuantizeOptions, plan_layers, quantize
from llmfast.quantize.summary import slow_forms
from llmfast.verdict import Gate
from tests.tiny_encoder import save_encoder

SCHEMES = registry.names("quantize.schemes")
# What correlation the logits of random weights keep, at least.
KEPT = {"int2": 0.6, "int4": 0.98}
# How much smaller a model gets whose table and head, in 8 bits, are seven tenths of its weights.
SHRUNK = {"int2": 3.7, "int8": 3.5, "w8": 3.5, "int4": 3.6, "fp16": 1.95, "bf16": 1.95}


def _foreign_model(folder: Path, seed: int = 0) -> Path:
    """Write a model as exporters do: an embedding, Gemm, MatMul behind a Transpose, MatMul, a tied head."""
    rng = np.random.default_rng(seed)

    def matrix(name: str, *shape: int) -> TensorProto:
        values = rng.standard_normal(shape) / np.sqrt(shape[-1])
        return numpy_helper.from_array(values.astype(np.float32), name)

    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["h0"], name="embed"),
        helper.make_node("Transpose", ["w1"], ["w1_t"], perm=[1, 0]),
        helper.make_node("MatMul", ["h0", "w1_t"], ["h1"], name="/block/proj/MatMul"),
        helper.make_node("Relu", ["h1"], ["h2"]),
        helper.make_node("Reshape", ["h2", "flat"], ["h3"]),
        helper.make_node("Gemm", ["h3", "w2.weight", "w2.bias"], ["h4"], transB=1),
        helper.make_node("Transpose", ["table"], ["table_t"], perm=[1, 0]),
        helper.make_node("MatMul", ["h4", "table_t"], ["y"]),
    ]
    constants = [
        matrix("table", 4200, 256),
        matrix("w1", 128, 256),
        matrix("w2.weight", 256, 128),
        matrix("w2.bias", 256),
        numpy_helper.from_array(np.array([-1, 128]), "flat"),
    ]
    graph = helper.make_graph(
        nodes,
        "foreign",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "seq"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", 4200])],
        constants,
    )
    path = folder / "foreign.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def _answer(model: Path, ids: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: ids})[0]


def test_linears_and_embeddings_are_found_whoever_wrote_them(tmp_path: Path) -> None:
    model = OnnxModel.load(_foreign_model(tmp_path))
    linears = find_linears(model)
    assert [(linear.name, linear.shape) for linear in linears] == [
        ("block.proj", (128, 256)),
        ("w2", (256, 128)),
        ("y", (4200, 256)),
    ]
    for linear in linears:
        assert linear.read(model).shape == linear.shape
    assert [table.shape for table in find_embeddings(model, linears)] == [(4200, 256)]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_foreign_model_keeps_its_answers(scheme: str, tmp_path: Path) -> None:
    source = _foreign_model(tmp_path)
    before = source.read_bytes()
    bundle = quantize(source, tmp_path / "out", QuantizeOptions(scheme))
    ids = np.arange(12).reshape(2, 6)
    expected, actual = _answer(source, ids), _answer(bundle.model, ids)
    assert np.corrcoef(expected.ravel(), actual.ravel())[0, 1] > KEPT.get(scheme, 0.999)
    assert bundle.size_bytes < len(before) / SHRUNK[scheme]
    assert source.read_bytes() == before
    names = {tensor.name for tensor in OnnxModel.load(bundle.model).proto.graph.initializer}
    assert not names & {"table", "w1", "w2.weight"}, "a float weight was left in the file"


def _layer_applied_twice(folder: Path) -> Path:
    """Write a model that multiplies by one matrix twice, each time with a bias of its own."""
    rng = np.random.default_rng(0)
    constants = {"w": rng.standard_normal((64, 64)) / 8, "b1": rng.standard_normal(64), "b2": rng.standard_normal(64)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h1"], name="/first/MatMul"),
        helper.make_node("Add", ["h1", "b1"], ["h2"]),
        helper.make_node("Relu", ["h2"], ["h3"]),
        helper.make_node("MatMul", ["h3", "w"], ["h4"], name="/second/MatMul"),
        helper.make_node("Add", ["h4", "b2"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tokens", 64]) for name in ("x", "y")]
    initializers = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "twice", values[:1], values[1:], initializers)
    path = folder / "twice.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize(
    ("scheme", "settings"), [*((scheme, {}) for scheme in SCHEMES), ("int8", {"granularity": "tensor"})]
)
def test_layers_that_share_a_weight_share_its_codes(scheme: str, settings: dict[str, str], tmp_path: Path) -> None:
    source = _layer_applied_twice(tmp_path)
    bundle = quantize(source, tmp_path / "out", QuantizeOptions(scheme, settings=settings))
    x = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    assert np.corrcoef(_answer(source, x).ravel(), _answer(bundle.model, x).ravel())[0, 1] > KEPT.get(scheme, 0.999)
    (row,) = bundle.manifest.measured["quantize"]["layers"]
    assert (row["layers"], row["num_parameters"]) == (1, 64 * 64)
    large = [one for one in OnnxModel.load(bundle.model).initializers.values() if np.prod(one.dims) > 64 * 64 / 8]
    assert len(large) == 1


@pytest.mark.parametrize("form", ["qdq", "operator"])
def test_encoder_blocks_that_share_weights_are_rounded_once(form: str, albert: Path, tmp_path: Path) -> None:
    settings = {"activations": "static", "form": form}
    calibration = Calibration(num_samples=4, seq_len=16)
    options = QuantizeOptions("int8", "gptq", settings=settings, calibration=calibration)
    bundle = quantize(albert, tmp_path / "out", options)
    rows = bundle.manifest.measured["quantize"]["layers"]
    assert {row["layers"] for row in rows if row["role"] in ("query", "key", "value", "ffn")} == {1}
    assert bundle.manifest.measured["quantize"]["cosine"] > 0.99


@pytest.fixture(scope="module")
def albert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("albert")
    save_encoder(folder / "checkpoint", "albert")
    return export(str(folder / "checkpoint"), folder / "fp32").path


@pytest.mark.parametrize("is_stated", [True, False])
def test_a_table_of_any_width_is_looked_up_by_any_indices(is_stated: bool, tmp_path: Path) -> None:
    """Its width is no multiple of a block, and its indices are a vector."""
    table = np.random.default_rng(0).standard_normal((3600, 300)).astype(np.float32)
    nodes = [
        helper.make_node("Squeeze", ["ids", "first"], ["row"]),
        helper.make_node("Gather", ["table", "row"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "positions",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, [1, "n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 300])],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.array([0]), "first")],
        value_info=[helper.make_tensor_value_info("row", TensorProto.INT64, ["n"])] if is_stated else [],
    )
    source = tmp_path / "positions.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), source)
    bundle = quantize(source, tmp_path / "out", QuantizeOptions("int8"))
    operators = {node.op_type for node in OnnxModel.load(bundle.model).proto.graph.node}
    assert "GatherBlockQuantized" in operators
    assert ("Shape" in operators) != is_stated
    ids = np.array([[0, 3599, 7]])
    np.testing.assert_allclose(_answer(bundle.model, ids), table[ids[0]], atol=np.abs(table).max() / 120)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_decoder_computes_with_the_rounded_weights(
    scheme: str, checkpoints: Callable[[str], Path], fp32_bundle: Path, tmp_path: Path
) -> None:
    """PyTorch with the same weights rounded differs only by the rounding of activations."""
    bundle = quantize(fp32_bundle, tmp_path / "out", QuantizeOptions(scheme))
    plugin = registry.load("quantize.schemes", scheme)
    reference = AutoModelForCausalLM.from_pretrained(checkpoints("llama-tied"), attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if parameter.ndim == 2:
                grid = plugin.grid(plugin.Options())
                if isinstance(grid, FloatFormat):
                    parameter.copy_(parameter.to(getattr(torch, grid.name)))
                    continue
                grid = block_wise_grid(64, 8) if "embed_tokens" in name else grid
                rounded = rtn.quantize_weight(parameter.numpy(), grid, rtn.Options()).dequantize()
                parameter.copy_(torch.from_numpy(rounded))
        ids = np.random.default_rng(0).integers(3, 259, 64)
        expected = reference(torch.from_numpy(ids[None])).logits[0].numpy()
    actual = Engine(bundle).score(ids)
    assert np.corrcoef(expected.ravel(), actual.ravel())[0, 1] > 0.99


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_linear_layer_is_replaced(scheme: str, fp32_bundle: Path, tmp_path: Path) -> None:
    bundle = quantize(fp32_bundle, tmp_path / "out", QuantizeOptions(scheme))
    assert find_linears(OnnxModel.load(bundle.model)) == []
    step = bundle.manifest.lineage[-1]
    assert (step.stage, step.method) == ("quantize", f"{scheme}:rtn")
    assert [step.stage for step in bundle.manifest.lineage] == ["export", "quantize"]
    assert bundle.manifest.bits_per_weight < 32
    assert (bundle.path / "tokenizer.json").is_file()
    rows = bundle.manifest.measured["quantize"]["layers"]
    assert all(0 < row["relative_error"] < (0.5 if row["bits"] == 2 else 0.2) for row in rows)
    assert [(row["role"], row["layers"], row["bits"]) for row in rows] == [
        (row["role"], row["layers"], row["bits"])
        for row in plan_layers(fp32_bundle, tmp_path / "other", QuantizeOptions(scheme))
    ]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_same_input_gives_the_same_bytes(scheme: str, fp32_bundle: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        quantize(fp32_bundle, tmp_path / name, QuantizeOptions(scheme))
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_tied_embedding_and_head_share_their_codes(tmp_path: Path) -> None:
    bundle = quantize(_foreign_model(tmp_path), tmp_path / "out", QuantizeOptions("int4"))
    graph = OnnxModel.load(bundle.model).proto.graph
    (gather,) = [node for node in graph.node if node.op_type == "GatherBlockQuantized"]
    head = next(node for node in graph.node if node.output[0] == "y")
    assert gather.input[0] == head.input[1]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_plan_may_give_any_layer_its_own_grid(scheme: str, fp32_bundle: Path, tmp_path: Path, monkeypatch) -> None:
    """Blocks of several widths and sizes side by side compute what their weights say."""
    choose = stage.choose_layers

    def mixed(*args):
        layers = choose(*args)
        grids = dict(layers.grids)
        for number, linear in enumerate(layers.linears[:-1]):
            if number % 2:
                grids[linear.weight] = Grid(*[(8, 32, True), (4, 16, False), (4, 64, True), (8, 16, False)][number % 4])
        return replace(layers, grids=grids)

    monkeypatch.setattr(stage, "choose_layers", mixed)
    bundle = quantize(fp32_bundle, tmp_path / "out", QuantizeOptions(scheme))
    bits = {row["bits"] for row in bundle.manifest.measured["quantize"]["layers"]}
    assert bits >= {4, 8}
    ids = np.random.default_rng(0).integers(3, 259, 48)
    expected, actual = Engine(ModelBundle.open(fp32_bundle)).score(ids), Engine(bundle).score(ids)
    assert np.corrcoef(expected.ravel(), actual.ravel())[0, 1] > {"int2": 0.3}.get(scheme, 0.9)


def test_include_and_exclude_choose_layers(fp32_bundle: Path, tmp_path: Path) -> None:
    options = QuantizeOptions("int8", include=r"\.mlp\.", exclude=r"layers\.1\.")
    bundle = quantize(fp32_bundle, tmp_path / "out", options)
    kept = {linear.name for linear in find_linears(OnnxModel.load(bundle.model))}
    assert "model.layers.0.mlp.up_proj" not in kept
    assert {"model.layers.1.mlp.up_proj", "model.layers.0.self_attn.o_proj"} <= kept


@pytest.mark.parametrize(("include", "bits"), [("^lm_head$", {8}), ("down_proj|embedding", {4, 8})])
def test_include_and_exclude_match_roles_too(include: str, bits: set[int], fp32_bundle: Path, tmp_path: Path) -> None:
    rows = plan_layers(fp32_bundle, tmp_path / "out", QuantizeOptions("int4", include=include))
    assert {row["bits"] for row in rows} == bits
    others = plan_layers(fp32_bundle, tmp_path / "out", QuantizeOptions("int4", exclude=include))
    assert not {row["role"] for row in others} & {"down_proj"} or include == "^lm_head$"


def test_head_stays_float_on_request(fp32_bundle: Path, tmp_path: Path) -> None:
    bundle = quantize(fp32_bundle, tmp_path / "out", QuantizeOptions("int4", settings={"head_bits": "32"}))
    assert "model.embed_tokens.weight" in OnnxModel.load(bundle.model).initializers


def test_a_table_of_four_bits_is_looked_up_and_multiplied(fp32_bundle: Path, tmp_path: Path) -> None:
    """Embedding and head of 4 bits are one weight, and compute with what it stands for."""
    bundle = quantize(fp32_bundle, tmp_path / "out", QuantizeOptions("int4", settings={"head_bits": "4"}))
    model = OnnxModel.load(fp32_bundle / "model.onnx")
    table = model.read(model.initializers["model.embed_tokens.weight"])
    rounded = rtn.quantize_weight(table, block_wise_grid(table.shape[1], 4), rtn.Options()).dequantize()
    halved = quantize(fp32_bundle, tmp_path / "halved", QuantizeOptions("int4", settings={"head_bits": "32"}))
    graph = onnx.load(halved.model)
    (tensor,) = (one for one in graph.graph.initializer if one.name == "model.embed_tokens.weight")
    tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))
    onnx.save(graph, tmp_path / "halved" / "model.onnx")
    expected = Engine(replace(halved, model=tmp_path / "halved" / "model.onnx")).score(np.arange(3, 30))
    actual = Engine(bundle).score(np.arange(3, 30))
    assert np.corrcoef(actual.ravel(), expected.ravel())[0, 1] > 0.999
    sizes = [one.manifest.bits_per_weight for one in (bundle, halved)]
    assert sizes[0] < sizes[1]


def test_external_weights_stay_outside_and_complete(
    checkpoints: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmfast.graph.weights.SINGLE_FILE_BYTES", 1 << 10)
    bundle = export(str(checkpoints("llama")), tmp_path / "fp32")
    (data,) = bundle.path.glob("model.*.onnx.data")
    referenced = sum(
        int(entry.value)
        for tensor in OnnxModel.load(bundle.model).proto.graph.initializer
        for entry in tensor.external_data
        if entry.key == "length"
    )
    tensors = sum(bool(tensor.external_data) for tensor in OnnxModel.load(bundle.model).proto.graph.initializer)
    assert referenced <= data.stat().st_size < referenced + 4096 * tensors  # gaps are alignment only
    small = quantize(bundle.path, tmp_path / "int4", QuantizeOptions("int4"))
    assert np.isfinite(Engine(small).score(np.arange(3, 20))).all()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (QuantizeOptions("int5"), "unknown scheme `int5`"),
        (QuantizeOptions("int4", method="rnt"), "unknown method `rnt`"),
        (QuantizeOptions("int4", settings={"blocksize": "32"}), "no option `blocksize`"),
        (QuantizeOptions("int4", settings={"block_size": "many"}), "not of type int"),
        (QuantizeOptions("int4", settings={"block_size": "48"}), "block_size 48"),
        (QuantizeOptions("int2", settings={"block_size": "16"}), "block_size 16"),
        (QuantizeOptions("int4", settings={"head_bits": "3"}), "head_bits 3"),
        (QuantizeOptions("int4", settings={"search_steps": "0"}), "search_steps 0"),
        (QuantizeOptions("int4", settings={"search_floor": "nan"}), "search_floor nan"),
        (QuantizeOptions("int4", "gptq", {"damping": "-1"}), "damping -1"),
        (QuantizeOptions("int8", "smoothquant", {"alpha": "1.5"}), "alpha 1.5"),
        (QuantizeOptions("int8", settings={"activations": "statik"}), "activations `statik`"),
        (QuantizeOptions("int8", settings={"activation_range": "max"}), "activation_range `max`"),
        (QuantizeOptions("int4", include="("), "not a regular expression"),
    ],
)
def test_impossible_choices_are_refused(
    options: QuantizeOptions, reason: str, fp32_bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=reason):
        quantize(fp32_bundle, tmp_path / "out", options)
    assert list(tmp_path.iterdir()) == []


def test_quantized_model_is_not_quantized_again(fp32_bundle: Path, tmp_path: Path) -> None:
    bundle = quantize(fp32_bundle, tmp_path / "int8", QuantizeOptions("int8", settings={"head_bits": "32"}))
    with pytest.raises(UnsupportedError, match=r"already quantized: it has 10 MatMulIntegerToFloat$"):
        quantize(bundle.path, tmp_path / "again", QuantizeOptions("int4"))
    bundle = quantize(fp32_bundle, tmp_path / "int4", QuantizeOptions("int4"))
    with pytest.raises(UnsupportedError, match=r"10 MatMulNBits of 4 bits in blocks of 32, 1 GatherBlockQ.* of 8"):
        quantize(bundle.path, tmp_path / "again", QuantizeOptions("int4"))


def test_nothing_to_quantize_is_no_success(fp32_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="nothing to quantize"):
        quantize(fp32_bundle, tmp_path / "out", QuantizeOptions("int8", include="no such layer"))


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    path = _foreign_model(tmp_path)
    model = onnx.load(path)
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == "w1"]
    values = numpy_helper.to_array(tensor).copy()
    values[3, 5] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(values, "w1"))
    onnx.save(model, path)
    # With a method that calibrates, nothing is calibrated: there is no text for a model without a tokenizer.
    for method in ("rtn", "awq,gptq"):
        with pytest.raises(InputError, match=r"`w1`.*1 values that are NaN or infinite, the first at \[3, 5\]"):
            quantize(path, tmp_path / "out", QuantizeOptions("int8", method))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["foreign.onnx"]


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_damaged_vectors_are_named(method: str, fp32_bundle: Path, tmp_path: Path) -> None:
    """A norm that is NaN makes every answer NaN."""
    damaged = Path(shutil.copytree(fp32_bundle, tmp_path / "damaged"))
    (damaged / "llmfast.json").unlink()  # it holds the hash of the file
    model = onnx.load(damaged / "model.onnx")
    (norm,) = (one for one in model.graph.initializer if one.name == "model.layers.1.input_layernorm.weight")
    values = numpy_helper.to_array(norm).copy()
    values[5] = np.nan
    norm.CopyFrom(numpy_helper.from_array(values, norm.name))
    onnx.save(model, damaged / "model.onnx")
    with pytest.raises(
        InputError, match=r"layers\.1\.input_layernorm\.weight`.*1 values that are NaN, the first at \[5\]"
    ):
        quantize(damaged, tmp_path / "out", QuantizeOptions("int4", method))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scheme", registry.names("quantize.schemes"))
def test_no_scheme_writes_slow_forms(scheme: str, fp32_bundle: Path, tmp_path: Path) -> None:
    bundle = quantize(fp32_bundle, tmp_path / "out", QuantizeOptions(scheme, measure=False))
    assert bundle.manifest.measured["quantize"]["slow_forms"] == []


def test_slow_forms_are_named_unless_the_float_graph_has_them(fp32_bundle: Path, tmp_path: Path) -> None:
    bundle = quantize(fp32_bundle, tmp_path / "out", QuantizeOptions("int4", measure=False))
    fast, slow = (OnnxModel.load(bundle.model) for _ in range(2))
    nodes = [node for node in slow.proto.graph.node if node.op_type == "MatMulNBits"]
    for node in nodes:
        (level,) = (one for one in node.attribute if one.name == "accuracy_level")
        node.attribute.remove(level)
    (form,) = slow_forms([fast], [slow])
    assert f"[nbits-accuracy-level: {len(nodes)} nodes of model.onnx]" in form
    assert slow_forms([slow], [slow]) == []


def test_what_is_missing_on_the_command_line_is_named(fp32_bundle: Path, tmp_path: Path) -> None:
    model, output = str(fp32_bundle), ["-o", str(tmp_path / "out")]
    for arguments, missing in [
        ([], "quantize needs a MODEL, and --output, and --scheme, a budget or --auto"),
        ([model, "--scheme", "int8"], "quantize needs --output"),
        ([model, *output], "quantize needs --scheme, a budget or --auto"),
        ([*output, "--target-bits", "5"], "quantize needs a MODEL"),
    ]:
        result = CliRunner().invoke(app, ["quantize", *arguments])
        assert result.exit_code == 2, result.output
        assert f"error: {missing}\n" in result.stderr


def test_gates_that_do_not_fit_the_model_say_which_do(tmp_path: Path) -> None:
    save_encoder(tmp_path / "checkpoint")
    fp32 = export(str(tmp_path / "checkpoint"), tmp_path / "fp32").path
    with pytest.raises(GateError, match="`kld` is not measured: the answers of this model are compared by cosine"):
        quantize(fp32, tmp_path / "out", QuantizeOptions("int8", gates=(Gate("kld", 1.0, "max"),)))
    with pytest.raises(GateError, match="budget missed: 1 - cosine"):
        quantize(fp32, tmp_path / "out", QuantizeOptions("int4", budget=Budget(max_kld=1e-9)))


def test_blocks_that_do_not_divide_are_filled_up_and_it_is_said(
    fp32_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize(fp32_bundle, tmp_path / "small", QuantizeOptions("int4", settings={"block_size": "32"}, measure=False))
    assert "do not divide" not in capsys.readouterr().err
    large = quantize(fp32_bundle, tmp_path / "large", QuantizeOptions("int4", settings={"block_size": "256"}))
    assert "blocks of 256 do not divide the input features of" in capsys.readouterr().err
    assert large.manifest.measured["quantize"]["kld"] < 1
