"""The search for session settings: what is not proven faster is not taken, and what is kept is used."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from llmfast.bench import tuning
from llmfast.bench.options import BenchOptions
from llmfast.bench.stage import bench
from llmfast.bench.table import make_footer
from llmfast.bench.tuning import candidates, search
from llmfast.bundle import ModelBundle
from llmfast.cli import app
from llmfast.errors import OptionError, ResourceError, UnsupportedError
from llmfast.infer.engine import Engine
from llmfast.infer.opening import open_decoder
from llmfast.quantize.options import QuantizeOptions
from llmfast.quantize.stage import quantize
from llmfast.tuned import IGNORE, SessionSettings, ignoring_tuned, keep_settings, settings_for, settings_path
from llmfast.worker import Worker
from tests.fake_bench import make_stage
from tests.tiny_bench import QUICK, make_bundle
from tests.tiny_encoder import save_encoder

DEFAULT = SessionSettings(4)
TRIED = candidates(4)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep settings in a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(IGNORE, raising=False)
    return tmp_path / "cache"


class Machine:
    """Takes a second for a request, times a factor for each setting, with noise that rounds and launches share or not.

    Args:
        factors: settings that differ from the defaults -> factor of the time.
        noise: of single measurements, as a share.
        drift: of whole rounds.
    """

    def __init__(
        self, factors: dict[tuple[str, object], float], noise: float, drift: float = 0.3, seed: int = 0
    ) -> None:
        self.factors, self.noise = factors, noise
        self._rng = np.random.default_rng(seed)
        self._drifts = np.random.default_rng(seed + 1).lognormal(0, drift, 200)
        self.measured: list[SessionSettings] = []

    def __call__(self, settings: SessionSettings, number: int, launch: int) -> float:
        self.measured.append(settings)
        seconds = float(self._drifts[number] * self._rng.lognormal(0, self.noise))
        for (name, value), factor in self.factors.items():
            seconds *= factor if getattr(settings, name) == value else 1.0
        return seconds


def _search(machine: Machine, rounds: int = 9) -> SessionSettings:
    return search(DEFAULT, TRIED, machine, rounds, 0.02)[0]


def test_candidates_differ_from_the_defaults_in_one_setting() -> None:
    for cores in (1, 2, 3, 4, 64):
        for one in candidates(cores):
            default = SessionSettings(cores)
            assert sum(getattr(one, name) != getattr(default, name) for name in vars(default)) == 1
    assert {one.threads for one in candidates(4)} == {2, 3, 4}
    assert {one.threads for one in candidates(1)} == {1}


def test_what_is_faster_is_found_under_drift_and_combined() -> None:
    machine = Machine({("chunk_tokens", 128): 0.85, ("chunk_tokens", 64): 0.92, ("block_base", 4): 0.9}, noise=0.01)
    assert _search(machine) == replace(DEFAULT, chunk_tokens=128, block_base=4)


def test_noise_is_never_taken_for_a_gain() -> None:
    """Machines on which nothing is faster, with noise as large as the gains that one hopes for."""
    found = [_search(Machine({}, noise=noise, seed=seed)) for noise in (0.02, 0.1, 0.4) for seed in range(12)]
    assert found == [DEFAULT] * len(found)


def test_a_gain_within_the_margin_is_left() -> None:
    assert _search(Machine({("chunk_tokens", 128): 0.99}, noise=0.0005)) == DEFAULT


def test_a_winner_that_does_not_win_again_is_left() -> None:
    class Fading(Machine):
        def __call__(self, settings: SessionSettings, number: int, launch: int) -> float:
            seconds = super().__call__(settings, number, launch)
            return seconds * (0.8 if not settings.spin and number < 9 else 1.0)

    machine = Fading({}, noise=0.005)
    assert _search(machine) == DEFAULT
    assert len(machine.measured) == 9 * (1 + len(TRIED)) + 9 * 2  # there was a second pass


def test_settings_that_spoil_each_other_are_not_combined() -> None:
    class Rivals(Machine):
        def __call__(self, settings: SessionSettings, number: int, launch: int) -> float:
            seconds = super().__call__(settings, number, launch)
            return seconds * (3 if not settings.spin and settings.block_base else 1)

    machine = Rivals({("spin", False): 0.8, ("block_base", 4): 0.9}, noise=0.005)
    assert _search(machine) == replace(DEFAULT, spin=False)


def test_each_round_measures_all_once_in_turns_and_launches_are_thirds() -> None:
    calls: list[tuple[SessionSettings, int, int]] = []

    def measure(settings: SessionSettings, number: int, launch: int) -> float:
        calls.append((settings, number, launch))
        return 1.0

    search(DEFAULT, TRIED, measure, 9, 0.02)
    rounds = [[one for one, number, _ in calls if number == place] for place in range(9)]
    assert all(set(one) == {DEFAULT, *TRIED} and len(one) == 1 + len(TRIED) for one in rounds)
    assert len({one[0] for one in rounds}) == len(rounds[0])
    assert [launch for _, _, launch in calls] == sorted(launch for _, _, launch in calls)
    assert {launch for _, _, launch in calls} == {0, 1, 2}


@pytest.fixture(scope="module")
def bundle(fp32_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    output = tmp_path_factory.mktemp("tuning") / "int8"
    return quantize(fp32_bundle, output, QuantizeOptions("int8", measure=False))


def test_kept_settings_are_used_and_said(bundle: ModelBundle, capsys: pytest.CaptureFixture[str]) -> None:
    best = SessionSettings(1, spin=False, block_base=4, chunk_tokens=32)
    assert settings_for(bundle) == SessionSettings()
    path = keep_settings(bundle, "cpu", best, {"rows": []})
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert capsys.readouterr().err == ""
    engine = open_decoder(bundle, max_length=64)
    assert isinstance(engine, Engine)
    assert engine.chunk_tokens == 32
    options = engine.session.get_session_options()
    assert options.intra_op_num_threads == 1
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert options.get_session_config_entry("session.dynamic_block_base") == "4"
    assert (
        "tune-session` found best: 1 thread, not spinning, blocks by 4, chunks of 32 tokens" in capsys.readouterr().err
    )
    assert settings_for(bundle, threads=1) == best
    assert settings_for(bundle, threads=2) == SessionSettings(2), "they were found for another number of threads"
    assert settings_for(bundle, "cuda") == SessionSettings()
    with ignoring_tuned(True):
        assert settings_for(bundle) == SessionSettings()
        assert open_decoder(bundle, max_length=64).chunk_tokens == 256  # type: ignore[attr-defined]
    assert settings_for(bundle) == best
    keep_settings(bundle, "cpu", None, {})
    assert not path.exists()
    assert settings_for(bundle) == SessionSettings()


def test_bench_says_the_threads_that_were_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, path = make_stage(monkeypatch), make_bundle(tmp_path, "a")
    stage.add("a")
    keep_settings(ModelBundle.open(path), "cpu", SessionSettings(7), {})
    for asked, used in ((None, [7]), (3, [3]), ((3, 7), [3, 7])):
        document = bench([path], replace(QUICK, threads=asked)).document()
        assert [row["threads"] for row in document["rows"]] == document["settings"]["threads"] == used
        assert any(f"cpu, {', '.join(map(str, used))} threads" in line for line in make_footer(document))


def test_another_machine_or_model_has_other_settings(
    bundle: ModelBundle, fp32_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = settings_path(bundle, "cpu")
    assert settings_path(ModelBundle.open(fp32_bundle), "cpu") != path
    assert settings_path(bundle, "cuda") != path
    assert settings_path(bundle, "cuda,cpu") == settings_path(bundle, "cuda")
    monkeypatch.setattr("llmfast.tuned.usable_cores", lambda: 99)
    assert settings_path(bundle, "cpu") != path


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"settings": {"threads": 0, "spin": true}}',
        b'{"settings": {"threads": true, "spin": true}}',
        b'{"settings": {"threads": 2, "spin": 1}}',
        b'{"settings": {"threads": 2, "chunk_tokens": 0}}',
        b'{"settings": {"threads": 2, "chunk_tokens": "128"}}',
        b'{"settings": {"threads": 2, "more": 1}}',
    ],
)
def test_malformed_settings_are_not_used(
    content: bytes, bundle: ModelBundle, capsys: pytest.CaptureFixture[str]
) -> None:
    path = keep_settings(bundle, "cpu", SessionSettings(1), {})
    path.write_bytes(content)
    assert settings_for(bundle) == SessionSettings()
    assert "it is not used" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written(bundle: ModelBundle, cache: Path) -> None:
    cache.write_text("a file where a folder should be")
    with pytest.raises(ResourceError, match="cannot write"):
        keep_settings(bundle, "cpu", SessionSettings(1), {})


@pytest.fixture
def fast_machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that puts a machine in the place of processes."""

    def put(machine: Machine, disturbances: tuple[str, ...] = ()) -> None:
        watch = SimpleNamespace(finish=lambda workers: list(disturbances))
        monkeypatch.setattr(tuning, "Watch", SimpleNamespace(start=lambda: watch))
        monkeypatch.setattr(tuning.Requests, "measure", lambda self, *args: machine(*args))

    return put


def test_the_command(bundle: ModelBundle, fast_machine: Callable[..., None]) -> None:
    run, path = CliRunner().invoke, str(bundle.path)
    fast_machine(Machine({("chunk_tokens", 128): 0.8}, noise=0.01))
    result = run(app, ["bench", path, "--tune-session", "--format", "json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["settings"]["chunk_tokens"] == 128
    assert settings_for(bundle).chunk_tokens == 128
    assert {row["verdict"] for row in document["rows"]} >= {"better"}
    result = run(app, ["infer", path, "-p", "ab", "--max-tokens", "2"])
    assert "chunks of 128 tokens" in result.stderr
    result = run(app, ["infer", path, "-p", "ab", "--max-tokens", "2", "--no-tuned"])
    assert "chunks of 128 tokens" not in result.stderr
    arguments = ["bench", path, "--rounds", "1", "-p", "8", "-n", "2", "--warmup", "0"]
    assert "chunks of 128 tokens" in run(app, arguments).stderr
    assert "chunks of 128 tokens" not in run(app, [*arguments, "--no-tuned"]).stderr
    fast_machine(Machine({("spin", False): 0.8}, noise=0.01), ("the machine is busy",))
    result = run(app, ["bench", path, "--tune-session"])
    assert "not kept: " in result.stderr
    assert settings_for(bundle).chunk_tokens == 128, "what was found beside others takes nothing's place"
    fast_machine(Machine({}, noise=0.1))
    result = run(app, ["bench", path, "--tune-session"])
    assert "the defaults: they stay" in result.stderr
    assert settings_for(bundle) == SessionSettings(), "what an earlier search kept is gone"


def test_requests_run_in_processes_with_the_settings(bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real measurement, on a tiny model: one process for each settings and launch."""
    opened: list[SessionSettings] = []

    class Recorded(Worker):
        def __init__(self, *args: object, **settings: SessionSettings) -> None:
            opened.append(settings["settings"])
            super().__init__(*args, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(tuning, "Worker", Recorded)
    monkeypatch.setattr(tuning, "candidates", lambda cores: [SessionSettings(cores, spin=False)])
    monkeypatch.setattr(tuning, "usable_cores", lambda: 1)
    document = tuning.tune_session([bundle.path], BenchOptions(prompt_tokens=20, output_tokens=3, rounds=3))
    assert len(opened) >= 3 * 2
    assert set(opened[:2]) == {SessionSettings(1), SessionSettings(1, spin=False)}
    assert all(row["request_s"] > 0 for row in document["rows"])


def test_what_it_has_no_use_for_is_refused(bundle: ModelBundle, tmp_path: Path) -> None:
    run, path = CliRunner().invoke, str(bundle.path)
    for arguments, reason in [
        ([path, path], "takes one model, not 2"),
        ([path, "--threads", "1"], "no use for --threads"),
        ([path, "--max-kld", "1"], "no use for --gates"),
        ([path, "--save", "x.json"], "no use for --save"),
        ([path, "-p", "1,2"], "one length of prompts"),
        ([path, "--provider", "cpu,cuda"], "takes one provider, not 2"),
        ([path, "--warmup", "0"], "no use for --warmup"),
    ]:
        result = run(app, ["bench", *arguments, "--tune-session"])
        assert result.exit_code == 2, arguments
        assert reason in result.stderr
    with pytest.raises(UnsupportedError, match="no bundle of llmfast's"):
        tuning.tune_session([_lone(bundle, tmp_path)], BenchOptions())
    save_encoder(tmp_path / "encoder", "bert", "AutoModel")
    from llmfast.export.stage import export

    with pytest.raises(OptionError, match="is for text-generation"):
        tuning.tune_session([export(str(tmp_path / "encoder"), tmp_path / "fp32").path], BenchOptions())


def _lone(bundle: ModelBundle, folder: Path) -> Path:
    """Return a folder with a decoder's graph and config, as another exporter leaves it."""
    lone = folder / "lone"
    lone.mkdir()
    for name in ("model.onnx", "config.json", "tokenizer.json"):
        (lone / name).write_bytes((bundle.path / name).read_bytes())
    return lone


def test_more_threads_than_cores_are_said(bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmfast.runtime.usable_cores", lambda: 2)
    infer = ["infer", str(bundle.path), "-p", "ab", "--max-tokens", "1"]
    bench = ["bench", str(bundle.path), "--rounds", "1", "-p", "8", "-n", "2", "--warmup", "0"]
    for arguments in (infer, bench):
        result = CliRunner().invoke(app, [*arguments, "--threads", "9"])
        assert result.exit_code == 0, result.output
        assert result.stderr.count("note: --threads 9, but this process may use") == 1
        assert "may use" not in CliRunner().invoke(app, [*arguments, "--threads", "1"]).stderr
