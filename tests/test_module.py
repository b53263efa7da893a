"""`export --module`: a module of the user's own, its inputs and axes, and the mistakes one makes."""

import json
import sys
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

from llmfast.bundle import ModelBundle
from llmfast.errors import GateError, InputError, LlmfastError, UnsupportedError
from llmfast.export import module_parity
from llmfast.export.dynamic_axes import Dimension, parse_dynamic_axes
from llmfast.export.module_parity import choose_sizes, prove_module
from llmfast.export.module_trace import trace_module
from llmfast.export.user_module import UserModule, flatten_outputs, load_user_module
from llmfast.graph.linear import find_embeddings, find_linears
from llmfast.graph.model import OnnxModel, count_parameters
from tests.tiny_module import RECIPE, export, load, module, run_cli, run_graph


@pytest.fixture(autouse=True)
def _own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bundle of the recipe's module; do not change it."""
    output = tmp_path_factory.mktemp("transformer") / "fp32"
    result = run_cli("export", "--module", f"{RECIPE}:factory", "-o", output)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{output}: Transformer, 30.8 MB; differs from PyTorch by at most ")
    return output


def test_transformer_of_the_recipe_equals_pytorch(transformer: Path) -> None:
    user = load_user_module(RECIPE, "factory", None)
    rng = np.random.default_rng(7)
    for batch, source_length, target_length in ((1, 9, 1), (3, 30, 21), (2, 512, 40)):
        source, target = rng.integers(0, 8000, (batch, source_length)), rng.integers(0, 8000, (batch, target_length))
        source[:, 0] = 1  # a text of padding alone is no text
        (actual,) = run_graph(transformer / "model.onnx", source=source, target=target)
        with torch.inference_mode():
            expected = user.module(torch.from_numpy(source), torch.from_numpy(target))["logits"].numpy()
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4)


def test_transformer_of_the_recipe_is_found_layer_by_layer(transformer: Path) -> None:
    bundle = ModelBundle.open(transformer)
    graph = OnnxModel.load(bundle.model)
    linears = find_linears(graph)
    roles = Counter(linear.role for linear in linears)
    assert roles == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), 9),
        **dict.fromkeys(("feed_forward.0", "feed_forward.2"), 6),
        "embedding": 1,  # of the target: the head multiplies by it
    }
    assert {table.weight for table in find_embeddings(graph, linears)} == {linears[-1].weight}  # stored once
    assert bundle.manifest.task == "unknown"
    assert bundle.manifest.source["id"] == "transformer.py:factory"
    assert bundle.manifest.lineage[0].options["module"] == "transformer.py:factory"
    assert bundle.manifest.architecture["dimensions"] == {
        "batch": [1, None],
        "source_length": [1, 512],
        "target_length": [1, 512],
    }
    assert [value.name for value in graph.proto.graph.output] == ["logits"]
    names = [[size.dim_param for size in value.type.tensor_type.shape.dim] for value in graph.proto.graph.input]
    assert names == [["batch", "source_length"], ["batch", "target_length"]]


def test_transformer_of_the_recipe_is_quantized_and_benched(transformer: Path, tmp_path: Path) -> None:
    int8 = tmp_path / "int8"
    result = run_cli("quantize", transformer, "-o", int8, "--scheme", "int8", "--format", "json")
    assert result.exit_code == 0, result.output
    assert sum(row["num_parameters"] for row in json.loads(result.stdout)["layers"]) == 7_553_024
    source, target = np.array([[5, 6, 7, 0]]), np.array([[8, 9]])
    (exact,) = run_graph(transformer / "model.onnx", source=source, target=target)
    (near,) = run_graph(int8 / "model.onnx", source=source, target=target)
    assert 0 < np.abs(near - exact).max() < 0.1 * np.abs(exact).max()
    result = run_cli("bench", transformer, int8, "--rounds", 1, "--warmup", 0, "--format", "json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert rows[1]["size_bytes"] < 0.28 * rows[0]["size_bytes"]
    assert all(row["forward_s"] > 0 for row in rows)
    assert rows[0]["output_error"] == 0
    assert 0 < rows[1]["output_error"] < 0.05


@pytest.mark.parametrize(
    ("build", "inputs", "roles"),
    [
        ("nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)", "(torch.randn(2, 8, 32),)", {"in_proj": 1}),
        (
            "nn.TransformerDecoderLayer(32, 4, 64, batch_first=True)",
            "(torch.randn(2, 8, 32), torch.randn(2, 5, 32))",
            {"in_proj": 1, "q_proj": 1, "kv_proj": 1},
        ),
    ],
)
def test_layers_of_torch_keep_their_packed_weights(tmp_path: Path, build: str, inputs: str, roles: dict) -> None:
    code = f"def factory():\n    return {build}, {inputs}, {{'src': {{0: 'b', 1: 's'}}}}"
    if "Decoder" in build:
        code = code.replace("{'src'", "{'memory': {0: 'b', 1: 'm'}, 'tgt'")
    user = load(tmp_path, code)
    graph, _ = export(tmp_path, user)
    linears = {linear.name: linear for linear in find_linears(graph)}
    counted = Counter(linear.role for linear in linears.values())
    attentions = sum(isinstance(part, torch.nn.MultiheadAttention) for part in user.module.modules())
    assert counted == {**roles, "out_proj": attentions, "linear1": 1, "linear2": 1}
    packed = user.module.self_attn.in_proj_weight.detach().numpy()
    np.testing.assert_array_equal(linears["self_attn.in_proj"].read(graph), packed)
    assert not {"IsNaN", "Split"} & {node.op_type for node in graph.proto.graph.node if node.input[0] in linears}


def test_masked_attention_has_no_slow_nodes_and_rows_without_a_key_are_zero(tmp_path: Path) -> None:
    forward = """
        y = self.linear(x).view(x.shape[0], -1, 2, 4).transpose(1, 2)
        mask = (x[..., 0] > 0)[:, None, None, :]
        causal = F.scaled_dot_product_attention(y, y, y, is_causal=True)
        biased = F.scaled_dot_product_attention(y, y, y, torch.zeros(1).masked_fill(~mask, float("-inf")))
        grouped = F.scaled_dot_product_attention(y, y[:, :1], y[:, :1], scale=0.3, enable_gqa=True)
        return F.scaled_dot_product_attention(y, y, y, attn_mask=mask), causal, biased, grouped
    """
    user = load(tmp_path, module(forward, "(torch.randn(3, 6, 8),)", "{'x': {0: 'batch', 1: 'length'}}"))
    user.inputs["x"][1, :, 0] = -1.0  # this row may look at nothing
    graph, parity = export(tmp_path, user)
    assert parity["max_abs_diff"] < 1e-5
    assert "IsNaN" not in {node.op_type for node in graph.proto.graph.node}
    masked, _, biased, _ = run_graph(tmp_path / "model.onnx", x=user.inputs["x"].numpy())
    assert np.abs(masked[1]).max() == np.abs(biased[1]).max() == 0
    assert np.abs(masked[0]).max() > 0


def test_outputs_are_named_as_the_module_names_them() -> None:
    one, two = torch.ones(1), torch.zeros(1)
    assert list(flatten_outputs(one)) == ["output"]
    assert list(flatten_outputs((one,))) == ["output"]
    assert list(flatten_outputs((one, two))) == ["output_0", "output_1"]
    assert list(flatten_outputs({"logits": one, "states": (one, two), "none": None})) == [
        "logits",
        "states_0",
        "states_1",
    ]
    assert list(flatten_outputs(namedtuple("Pair", "left right")(one, two))) == ["left", "right"]
    assert list(flatten_outputs(Dimension(one, two, None, None))) == ["name", "size"]  # any dataclass
    with pytest.raises(InputError, match="`int` as `output_1`"):
        flatten_outputs((one, 3))
    with pytest.raises(UnsupportedError, match="complex numbers as `output`"):
        flatten_outputs(torch.complex(one, two))


def test_file_may_import_its_neighbours_and_what_lies_in_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beside_it.py").write_text("WIDTH = 3")
    for name in ("here", "on_the_path"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"is_{name}.py").write_text("WIDTH = 4")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "on_the_path"))
    code = """
        import beside_it, is_here, is_on_the_path

        def factory():
            return nn.Linear(beside_it.WIDTH, is_here.WIDTH), torch.ones(is_on_the_path.WIDTH, beside_it.WIDTH)
    """
    assert list(load(tmp_path, code).inputs) == ["input"]


def test_inputs_are_named_after_forward(tmp_path: Path) -> None:
    code = """
        class Two(nn.Module):
            def forward(self, first, *, second, scale: float = 2.0):
                return first + scale * second

        def factory():
            return Two(), {"second": torch.ones(2, 3), "first": torch.zeros(2, 3, dtype=torch.float16)}
    """
    user = load(tmp_path, code)
    assert sorted(user.inputs) == ["first", "second"]
    assert user.inputs["first"].dtype == torch.float32
    graph, parity = export(tmp_path, user)
    assert sorted(value.name for value in graph.proto.graph.input) == ["first", "second"]
    assert parity["sizes"] == [{}, {}]
    (actual,) = run_graph(tmp_path / "model.onnx", first=np.full((2, 3), 5, np.float32), second=np.ones((2, 3), "f"))
    np.testing.assert_array_equal(actual, np.full((2, 3), 7))


def test_axes_are_read_as_torch_spells_them() -> None:
    shapes, dim = {"x": (2, 8), "y": (2, 5)}, torch.export.Dim
    expected = {"x": {0: "batch", 1: "length"}}
    for spelled in (
        {"x": {0: "batch", 1: "length"}},
        {"x": {0: dim("batch"), -1: dim("length", max=9)}, "out": {0: "batch"}},
        {"x": ("batch", "length"), "y": None},
        ({0: "batch", 1: "length"}, {0: None, 1: dim.STATIC}),
    ):
        assert parse_dynamic_axes(spelled, shapes, ["out"], "f").names == expected
    axes = parse_dynamic_axes({"x": {0: dim("b", min=2, max=9)}, "y": [1]}, shapes, [], "f")
    assert axes.narrow("y_1", 3, None).dimensions["y_1"] == Dimension("y_1", 5, 3)
    assert axes.narrow("b", None, 7).dimensions["b"] == Dimension("b", 2, 2, 7)
    assert axes.dimensions == {"b": Dimension("b", 2, 2, 9), "y_1": Dimension("y_1", 5)}
    assert parse_dynamic_axes({"y": {1: dim.AUTO}}, shapes, [], "f").names == {"y": {1: "y_1"}}
    assert axes.sizes(shapes, {"b": 7, "y_1": 3}) == {"x": (7, 8), "y": (2, 3)}


@pytest.mark.parametrize(
    ("spelled", "words"),
    [
        ({"xs": {0: "b"}}, "`xs`, which is no input"),
        ({"x": {2: "b"}}, "dynamic axis 2 of `x`, whose example has 2 axes"),
        ({"x": {1: "n"}, "y": {1: "n"}}, "`n` is 8 in one example input and 5 in `y`"),
        ({"x": {0: "a b"}}, "`a b` is no name"),
        ({"x": {0: 2 * torch.export.Dim("n")}}, "no name and no torch.export.Dim"),
        ({"x": {0: torch.export.Dim("n", min=3)}}, "outside the range of `n`"),
        ({"x": "batch"}, "dynamic axes of `x` are `'batch'`"),
        ("batch", "dynamic axes are a `str`"),
    ],
)
def test_wrong_axes(spelled: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse_dynamic_axes(spelled, {"x": (2, 8), "y": (2, 5)}, [], "f")


def test_sizes_that_are_tried() -> None:
    runs = choose_sizes({"b": Dimension("b", 2), "n": Dimension("n", 8, 2, 16)})
    assert runs[:4] == [{"b": 2, "n": 8}, {"b": 1, "n": 2}, {"b": 5, "n": 11}, {"b": 2, "n": 16}]
    assert {"b": 5, "n": 8} in runs
    assert {"b": 2, "n": 2} in runs


def test_range_of_an_axis_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = module("return x + self.table[: x.shape[1]]", "(torch.randn(2, 6, 8),)", "{'x': {1: 'length'}}")
    user = load(tmp_path, code.replace("pass", "self.table = nn.Parameter(torch.randn(12, 8))"))
    _, parity = export(tmp_path, user)
    assert {run["length"] for run in parity["sizes"]} == {1, 6, 9, 12}
    assert "note: `length` (axis 1 of `x`) is at most 12" in capsys.readouterr().err


def test_bare_parameters_and_tied_heads_keep_their_names(tmp_path: Path) -> None:
    code = """
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.table = nn.Embedding(300, 16)
                self.mixer = nn.Parameter(torch.randn(16, 16))

            def forward(self, ids):
                return self.table(ids) @ self.mixer @ self.table.weight.T

        def factory():
            return Tied(), (torch.arange(6).reshape(2, 3),)
    """
    graph, _ = export(tmp_path, load(tmp_path, code))
    linears = find_linears(graph)
    assert [(linear.name, linear.shape) for linear in linears] == [("mixer", (16, 16)), ("table", (300, 16))]
    assert [table.weight for table in find_embeddings(graph, linears)] == ["table.weight"]
    assert count_parameters([graph]) == 300 * 16 + 16 * 16


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        ("import nothing_of_this_name", InputError, r"fails at `own.py:6`, `import nothing_of_this_name`: ModuleNotF"),
        ("def factory(:", InputError, r"fails at `own.py:6`: SyntaxError"),
        ("def make():\n    return 1", InputError, "no function `factory` in"),
        ("def factory():\n    raise KeyError('size')", InputError, r"`own.py:7`, `raise KeyError\('size'\)`: KeyError"),
        ("def factory():\n    raise SystemExit(3)", InputError, r"`own.py:7`.*SystemExit: 3"),
        ("def factory(size):\n    return 1", InputError, "missing 1 required positional argument: 'size'"),
        ("def factory():\n    return nn.Linear(2, 2)", InputError, "returns a `Linear`"),
        ("def factory():\n    return 1, (torch.ones(1),)", InputError, "a `int` as its module"),
        ("def factory():\n    return nn.Linear(2, 2), ()", InputError, "no example inputs"),
        ("def factory():\n    return nn.Linear(2, 2), (3,)", InputError, "example input `0` is a `int`, not a tensor"),
        (
            "def factory():\n    return nn.Linear(2, 2), {'y': torch.ones(2)}",
            InputError,
            r"do not fit `forward\(input: torch.Tensor\).*missing a required argument: 'input'",
        ),
        ("def factory():\n    return nn.Linear(2, 2), (torch.ones(3),)", InputError, "`forward` on the example inputs"),
        (module("return {'x': x}", "(torch.ones(2, 8),)"), InputError, "`x` is an input and an output"),
        (
            module("return x", "(torch.ones(2, 8),)", init="self.linear.weight.data[0, 0] = float('nan')"),
            InputError,
            r"weight `linear.weight` of .*own.py:factory` has NaN",
        ),
    ],
)
def test_what_the_file_does_wrong_is_said_with_its_line(
    tmp_path: Path, code: str, error: type[LlmfastError], words: str
) -> None:
    with pytest.raises(error, match=words):
        load(tmp_path, code)


@pytest.mark.parametrize(
    ("forward", "axes", "error", "words"),
    [
        (
            "if x.sum() > 0:\n    return x\nreturn -x",
            "None",
            UnsupportedError,
            r"`own.py:\d+`, `if x.sum\(\) > 0:` can't",
        ),
        ("return torch.from_numpy(x.numpy() + 1)", "None", UnsupportedError, r"`own.py:\d+`, `return torch.from_nu"),
        (
            "return torch.special.bessel_j0(x)",
            "None",
            UnsupportedError,
            "`prims.bessel_j0`, for which there is no ONNX",
        ),
        (
            "return x if x.shape[0] == 3 else -x",
            "{'x': {0: 'batch'}}",
            InputError,
            r"`batch` \(axis 0 of `x`\) can't be dynamic: .* works for 3 only",
        ),
        (
            "return x[:, :4] + x[:, 4:]",
            "{'x': {1: 'width'}}",
            InputError,
            "PyTorch finds|can't be dynamic",
        ),
        (
            "return F.conv1d(x[:, None], torch.ones(1, 1, 3))",
            "{'x': {1: 'width'}}",
            InputError,
            r"`width` \(axis 1 of `x`\) can't have every size from 3 on: `own.py` needs `\(\(-2\) \+ width\) != 1`",
        ),
        ("return F.dropout(self.linear(x), 0.5)", "None", InputError, "`output` of `own.py` is another each time"),
        ("return self.linear(x) / 0 * 0", "None", InputError, "`output` of `own.py` is NaN in PyTorch itself"),
    ],
)
def test_what_cannot_be_exported(
    tmp_path: Path, forward: str, axes: str, error: type[LlmfastError], words: str
) -> None:
    user = load(tmp_path, module(forward, "(torch.randn(3, 8),)", axes))
    with pytest.raises(error, match=words) as caught:
        export(tmp_path, user)
    assert caught.value.hint


def test_module_in_training_mode_is_exported_as_it_is_used(tmp_path: Path) -> None:
    code = module("return self.drop(self.linear(x))", "(torch.randn(3, 8),)", init="self.drop = nn.Dropout(0.5)")
    user = load(tmp_path, code.replace("return Own(),", "return Own().train(),"))
    graph, _ = export(tmp_path, user)
    assert {node.op_type for node in graph.proto.graph.node} <= {"Gemm", "MatMul", "Add"}


def test_a_difference_is_a_missed_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user = load(tmp_path, module("return self.linear(x)", "(torch.randn(3, 8),)", "{'x': {0: 'batch'}}"))
    trace_module(user, tmp_path)
    original = module_parity._run_reference
    with torch.no_grad():
        user.module.linear.bias[3] += 0.01
    with pytest.raises(GateError, match=r"`output` at batch 3: by up to 0.01"):
        prove_module(user, tmp_path / "model.onnx", user.axes, 1)
    with torch.no_grad():
        user.module.linear.bias[3] -= 0.01

    def differs_at_one(user: UserModule, feeds: dict, where: str) -> dict:
        return {name: array + 0.01 * (len(array) == 1) for name, array in original(user, feeds, where).items()}

    monkeypatch.setattr(module_parity, "_run_reference", differs_at_one)
    with pytest.raises(GateError, match="at batch 1") as caught:
        prove_module(user, tmp_path / "model.onnx", user.axes, 1)
    assert 'torch.export.Dim("batch", min=2)' in caught.value.hint


def test_sizes_that_pytorch_does_not_take_are_no_fault_of_the_export(tmp_path: Path) -> None:
    user = load(tmp_path, module("return self.linear(x)", "(torch.randn(3, 8),)", "{'x': {0: 'batch'}}"))
    trace_module(user, tmp_path)

    def refuse_six(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        assert len(inputs[0]) != 6, "six is too many"

    user.module.register_forward_pre_hook(refuse_six)
    with pytest.raises(InputError, match=r"fails at batch 6, a size that the .* allow: AssertionError: six") as caught:
        prove_module(user, tmp_path / "model.onnx", user.axes, 1)
    assert "torch.export.Dim" in caught.value.hint
