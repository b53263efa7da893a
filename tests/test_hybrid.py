"""Two graphs over one cache: one reads prompts, the other decodes, each as if it were alone."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from llmfast import runtime
from llmfast.bundle import PREFILL, ModelBundle
from llmfast.cli import app
from llmfast.errors import InputError, OptionError, UnsupportedError
from llmfast.export.stage import export
from llmfast.graph.model import OnnxModel, count_weight_bytes
from llmfast.infer.batch import Batch, Request
from llmfast.infer.engine import Engine
from llmfast.infer.generate import finish, generate
from llmfast.infer.opening import open_rows, open_speculating
from llmfast.infer.sampling import Sampling
from llmfast.inspect.stage import inspect
from llmfast.quantize.calibrate import Calibration
from llmfast.quantize.hybrid import make_plans
from llmfast.quantize.options import QuantizeOptions
from llmfast.quantize.stage import quantize
from llmfast.tokenizer import Tokenizer
from tests.kernels import rows_are_independent
from tests.tiny_encoder import save_encoder

PROMPT = np.random.default_rng(3).integers(3, 259, 70)
ANSWER = 12
HYBRID = ["--scheme", "int4", "--prefill", "int8", "--num-samples", "2", "--seq-len", "64"]
CALIBRATION = Calibration(num_samples=2, seq_len=64)


@pytest.fixture(scope="module")
def hybrid(fp32_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    output = tmp_path_factory.mktemp("hybrid") / "hybrid"
    return quantize(fp32_bundle, output, QuantizeOptions("int4", prefill="int8", calibration=CALIBRATION))


def _alone(hybrid: ModelBundle, role: str) -> ModelBundle:
    """Return a bundle of one of the two graphs."""
    graph = hybrid.manifest.graphs[role]
    return replace(hybrid, manifest=replace(hybrid.manifest, graphs={"model": graph}), model=hybrid.graphs[role])


def _greedy(engine: Engine, logits: np.ndarray, count: int) -> list[np.ndarray]:
    steps = [logits.copy()]
    for _ in range(count):
        steps.append(engine.decode(int(steps[-1].argmax())).copy())
    return steps


def _expected(hybrid: ModelBundle, prompt: np.ndarray, count: int) -> list[np.ndarray]:
    """Return the logits of an answer whose prompt one session read, and whose tokens another decoded."""
    reader = Engine(_alone(hybrid, PREFILL), threads=1, max_length=128)
    decoder = Engine(_alone(hybrid, "model"), threads=1, max_length=128)
    logits = reader.prefill(prompt)
    decoder.load_cache(reader.copy_cache(reader.length))
    return _greedy(decoder, logits, count)


@pytest.mark.parametrize("length", [1, 15, 16, 17, len(PROMPT)])
def test_each_graph_gives_what_it_gives_alone(length: int, hybrid: ModelBundle) -> None:
    engine = Engine(hybrid, threads=1, max_length=128)
    actual = _greedy(engine, engine.prefill(PROMPT[:length]), ANSWER)
    np.testing.assert_array_equal(actual, _expected(hybrid, PROMPT[:length], ANSWER))
    only = Engine(_alone(hybrid, "model"), threads=1, max_length=128)
    assert not np.array_equal(actual[0], only.prefill(PROMPT[:length])), "the second graph is not used"
    engine.reset()
    np.testing.assert_array_equal(engine.score(PROMPT), only.score(PROMPT))


@pytest.mark.parametrize("settings", [{}, {"prefill_method": "smoothquant,gptq", "method": "awq"}, {"kv": "int8"}])
def test_the_graphs_cache_the_same_values(settings: dict[str, str], fp32_bundle: Path, tmp_path: Path) -> None:
    """Whatever methods fold into the weights, keys and values stay those of the float model."""
    options = QuantizeOptions("int4", prefill="int8", calibration=CALIBRATION, measure=False, **settings)
    bundle = quantize(fp32_bundle, tmp_path / "hybrid", options)
    caches = []
    for one in (_alone(bundle, "model"), _alone(bundle, PREFILL)):
        engine = Engine(one, threads=1, max_length=128)
        engine.prefill(PROMPT)
        caches.append(engine.copy_cache(len(PROMPT)))
    for name, ours in caches[0].items():
        assert np.corrcoef(ours.astype(float).ravel(), caches[1][name].astype(float).ravel())[0, 1] > 0.9, name


def test_rotation_of_one_graph_alone_is_refused() -> None:
    with pytest.raises(OptionError, match="would cache turned values"):
        make_plans(QuantizeOptions("int4", prefill="int8", prefill_method="rotate"))
    both = {"method": "rotate", "prefill_method": "rotate"}
    make_plans(QuantizeOptions("int4", prefill="int8", **both))
    with pytest.raises(OptionError, match="would cache turned values"):
        make_plans(QuantizeOptions("int4", prefill="int8", settings={"rotate.values": "false"}, method="rotate"))


def test_settings_go_to_the_graph_whose_method_has_them() -> None:
    settings = {"block_size": "64", "int8.granularity": "tensor", "smoothquant.alpha": "0.7", "int4.head_bits": "32"}
    plan, second = make_plans(QuantizeOptions("int4", settings=settings, prefill="int8", prefill_method="smoothquant"))
    assert second is not None
    assert plan.scheme.options.block_size == 64
    assert second.scheme.options.granularity == "tensor"
    assert second.transforms[0].options.alpha == 0.7
    assert plan.scheme.options.head_bits == second.scheme.options.head_bits == 32
    with pytest.raises(OptionError, match="no option `granularity`"):
        make_plans(QuantizeOptions("int4", settings={"granularity": "tensor"}, prefill="int8"))


@pytest.mark.parametrize("name", ["int8.head_bits", "int8.head-bits"])
def test_the_second_graphs_own_head_bits_are_kept_however_they_are_spelled(name: str) -> None:
    plan, second = make_plans(QuantizeOptions("int4", settings={name: "4", "head-bits": "32"}, prefill="int8"))
    assert second is not None
    assert (plan.scheme.options.head_bits, second.scheme.options.head_bits) == (32, 4)


def test_what_the_graphs_share_is_stored_once(hybrid: ModelBundle, fp32_bundle: Path, tmp_path: Path) -> None:
    alone = quantize(fp32_bundle, tmp_path / "int4", QuantizeOptions("int4", measure=False))
    models = {role: OnnxModel.load(path) for role, path in hybrid.graphs.items()}
    placed = {
        role: {
            tuple((entry.key, entry.value) for entry in tensor.external_data)
            for name, tensor in model.initializers.items()
            if tensor.external_data and ("embed" in name or "rotary" in name)
        }
        for role, model in models.items()
    }
    assert placed["model"]
    assert placed["model"] == placed[PREFILL]
    rows = {row["graph"]: row for row in hybrid.manifest.measured["quantize"]["graphs"]}
    whole = count_weight_bytes(models.values())
    assert rows[PREFILL]["own_bytes"] == whole - count_weight_bytes([models["model"]])
    assert rows["model"]["weight_bytes"] == count_weight_bytes([OnnxModel.load(alone.model)])
    assert 0 < rows[PREFILL]["own_bytes"] < rows[PREFILL]["weight_bytes"]
    parameters = hybrid.manifest.architecture["num_parameters"]
    assert hybrid.manifest.bits_per_weight == 8 * whole / parameters
    assert parameters == alone.manifest.architecture["num_parameters"]


def test_the_manifest_says_what_became_of_both_graphs(hybrid: ModelBundle) -> None:
    step, measured = hybrid.manifest.lineage[-1], hybrid.manifest.measured["quantize"]
    assert step.method == "int4:rtn"
    assert step.options["prefill"]["method"] == "int8:smoothquant,rtn"
    assert step.options["prefill"]["int8"]["activations"] == "dynamic"
    assert {row["bits"] for row in measured["layers"]} == {4, 8}
    assert all(row["bits"] == 4 for row in measured["layers"] if row["role"] != "embedding")
    ours, theirs = (row["kld"] for row in measured["graphs"])
    assert theirs < ours == measured["kld"]
    assert [graph["role"] for graph in inspect(hybrid.path).document()["graphs"]] == ["model", PREFILL]


def test_only_the_session_that_decodes_keeps_spinning(hybrid: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = {}

    def record(model: Path, *args: object) -> object:
        opened[model.stem] = args[5]
        return open_session(model, *args)

    open_session = runtime.open_session
    monkeypatch.setattr("llmfast.infer.engine.open_session", record)
    engine = Engine(hybrid, threads=1, max_length=128)
    assert opened == {"model": False, "prefill": True}
    assert len(engine.sessions) == 2
    Engine(hybrid, threads=1, max_length=128, verify_rows=(2,))  # steps of both alternate
    assert opened == {"model": True, "prefill": True}


def test_a_batch_reads_with_the_second_graph_too(hybrid: ModelBundle) -> None:
    tokenizer = Tokenizer.load(hybrid.path)
    rows, _ = open_rows(hybrid, "cpu", 1, 128, 4, 4)
    batch = Batch(rows, tokenizer)
    prompts = [PROMPT[start : start + 40] for start in range(4)]
    for number, ids in enumerate(prompts):
        batch.submit(Request(number, ids, ANSWER))
    answers = {}
    while len(answers) < len(prompts):
        answers |= {event.id: event.generation for event in batch.step() if event.generation}
    assert batch.exact == rows_are_independent()
    if not batch.exact:
        return
    engine = Engine(hybrid, threads=1, max_length=128)
    for number, ids in enumerate(prompts):
        alone = finish(generate(engine, tokenizer, ids, ANSWER, Sampling(), (), tokenizer.eos_ids))
        assert answers[number].text == alone.text


def test_speculation_is_exact_unless_it_is_asked_for(hybrid: ModelBundle) -> None:
    """By default the graph that decodes verifies; --speculate lets the faster one do it, and says what it costs."""
    tokenizer = Tokenizer.load(hybrid.path)
    prompt = np.tile(PROMPT[:16], 5)
    plain = finish(generate(Engine(hybrid, threads=1), tokenizer, prompt, 60, Sampling()))
    engine, speculation = open_speculating(hybrid, tokenizer, len(prompt), 60, threads=1)
    assert speculation is not None
    exact = finish(generate(engine, tokenizer, prompt, 60, Sampling(), speculation=speculation))
    assert exact.text == plain.text
    assert speculation.is_exact
    engine, speculation = open_speculating(hybrid, tokenizer, len(prompt), 60, threads=1, speculate=True)
    assert speculation is not None
    assert isinstance(engine, Engine)
    engine.prefill(prompt[:20])
    reader = Engine(_alone(hybrid, PREFILL), threads=1, max_length=256)
    reader.prefill(prompt[:20])
    np.testing.assert_array_equal(engine.verify(prompt[20:24]), reader.verify(prompt[20:24]))


def test_graphs_with_different_caches_are_refused(hybrid: ModelBundle, fp32_bundle: Path, tmp_path: Path) -> None:
    calibration = Calibration(num_samples=1, seq_len=32)
    options = QuantizeOptions("int8", kv="int8", calibration=calibration, measure=False)
    other = quantize(fp32_bundle, tmp_path / "kv", options)
    (tmp_path / "prefill.onnx").write_bytes(other.model.read_bytes())
    mixed = replace(hybrid, path=tmp_path)  # its graph for prompts is the one just written
    with pytest.raises(InputError, match="have different caches"):
        Engine(mixed, threads=1, max_length=64)


def test_what_cannot_have_a_second_graph_is_refused(fp32_bundle: Path, tmp_path: Path) -> None:
    save_encoder(tmp_path / "encoder", "bert", "AutoModel")
    encoder = export(str(tmp_path / "encoder"), tmp_path / "fp32").path
    with pytest.raises(UnsupportedError, match="gets no second graph"):
        quantize(encoder, tmp_path / "out", QuantizeOptions("int4", prefill="int8"))
    for arguments, reason in [
        (["--scheme", "int8", "--prefill", "int8"], "that is the --scheme already"),
        (["--scheme", "int4", "--prefill", "int9"], "unknown scheme `int9`"),
        (["--scheme", "int4", "--prefill-method", "smoothquant"], "--prefill-method needs --prefill"),
        (["--target-bits", "5", "--prefill", "int8"], "does not go with a budget"),
        (["--auto", "--prefill", "int8"], "--prefill does not go with --auto"),
    ]:
        result = CliRunner().invoke(app, ["quantize", str(fp32_bundle), "-o", str(tmp_path / "out"), *arguments])
        assert result.exit_code == 2, result.output
        assert reason in result.stderr, arguments
    assert not (tmp_path / "out").exists()


def test_commands(fp32_bundle: Path, tmp_path: Path) -> None:
    """What a user runs: quantize prints what the second graph costs, and infer uses it."""
    run = CliRunner().invoke
    output = str(tmp_path / "hybrid")
    result = run(app, ["quantize", str(fp32_bundle), "-o", output, *HYBRID])
    assert result.exit_code == 0, result.output
    assert "its own MB" in result.stdout
    assert "int8:smoothquant,rtn" in result.stdout
    result = run(app, ["infer", output, "-p", "abab", "--max-tokens", "4", "--threads", "1", "--format", "json"])
    assert result.exit_code == 0, result.output
    nodes = json.loads(result.stdout)["placement"]["CPUExecutionProvider"]
    one = Engine(_alone(ModelBundle.open(Path(output)), "model"), threads=1, max_length=64)
    assert nodes > runtime.placement(one.session)["CPUExecutionProvider"]
    assert run(app, ["verify", output]).exit_code == 0
    (Path(output) / "prefill.onnx").write_bytes(b"0" * (Path(output) / "prefill.onnx").stat().st_size)
    result = run(app, ["verify", output])
    assert result.exit_code == 3
    assert "prefill.onnx` is changed" in result.stderr
