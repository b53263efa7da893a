"""Many sequences at once: equal to one at a time, to the bit, whoever sits in the rows beside."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmfast import resources
from llmfast.bundle import ModelBundle
from llmfast.errors import InputError, OptionError, ResourceError
from llmfast.export.stage import export
from llmfast.infer import memory
from llmfast.infer.batch import Batch, Event, Request
from llmfast.infer.decoder import cuts
from llmfast.infer.engine import Engine
from llmfast.infer.generate import Generation
from llmfast.infer.memory import plan_memory
from llmfast.infer.rows import OneRow, Rows, SlabRows
from llmfast.infer.sampling import Sampling
from llmfast.quantize.options import QuantizeOptions
from llmfast.quantize.stage import quantize
from llmfast.tokenizer import Tokenizer
from tests.kernels import rows_are_independent
from tests.tiny_decoder import CONTEXT, TOKENS, answer_alone, make_weights, reference_logits, write_bundle

CHUNK = 32


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    return ModelBundle.open(write_bundle(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def tokenizer(tiny: ModelBundle) -> Tokenizer:
    return Tokenizer.load(tiny.path)


@pytest.fixture(scope="module")
def engine(tiny: ModelBundle) -> Engine:
    return Engine(tiny, threads=1, chunk_tokens=CHUNK)


def _requests(count: int, capacity: int, **sampling: Any) -> list[Request]:
    """Return prompts of 1 to 80 tokens; every second begins with the same 40."""
    rng = np.random.default_rng(5)
    common = rng.integers(0, TOKENS, 40)
    requests = []
    for number in range(count):
        ids = rng.integers(0, TOKENS, int(rng.integers(1, 40)))
        ids = np.concatenate([common, ids]) if number % 2 else ids
        limit = int(rng.integers(1, capacity - len(ids)))
        requests.append(Request(number, ids, limit, Sampling(**sampling, seed=number)))
    return requests


def _run(batch: Batch, requests: list[Request]) -> dict[Any, Generation]:
    for request in requests:
        batch.submit(request)
    answers: dict[Any, Generation] = {}
    pieces: dict[Any, str] = {request.id: "" for request in requests}
    while events := batch.step():
        for event in events:
            assert event.error is None
            pieces[event.id] += event.text
            if event.generation is not None:
                answers[event.id] = event.generation
    assert {name: answer.text for name, answer in answers.items()} == pieces
    return answers


def _same(left: Generation, right: Generation) -> bool:
    fields = ("text", "prompt_tokens", "generated_tokens", "finish_reason")
    return all(getattr(left, field) == getattr(right, field) for field in fields)


def _check_equal(bundle: ModelBundle, capacity: int = 120, is_exact: bool = True) -> Batch:
    tokenizer = Tokenizer.load(bundle.path)
    engine = Engine(bundle, threads=1, max_length=capacity, chunk_tokens=CHUNK)
    requests = _requests(10, 100)
    batch = Batch(SlabRows(engine, 4, capacity), tokenizer)
    answers = _run(batch, requests)
    alone = {request.id: answer_alone(engine, tokenizer, request) for request in requests}
    assert not is_exact or all(_same(answers[name], alone[name]) for name in alone)
    assert answers.keys() == alone.keys()
    assert batch.counts.audited >= 4
    assert batch.counts.shared_tokens >= 3 * 32
    assert batch.counts.generated_tokens == sum(answer.generated_tokens for answer in answers.values())
    return batch


@pytest.mark.parametrize("name", ["mistral-sliding", "gemma2", "gpt2"])
def test_greedy_answers_are_those_of_one_at_a_time(
    name: str, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    export(str(checkpoints(name)), tmp_path / "fp32")
    assert _check_equal(ModelBundle.open(tmp_path / "fp32")).exact


def test_experts_share_their_rows_and_say_so(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    # An expert multiplies the rows that chose it together, so their number depends on the neighbours.
    export(str(checkpoints("qwen3_moe")), tmp_path / "fp32")
    _check_equal(ModelBundle.open(tmp_path / "fp32"))


@pytest.mark.parametrize("scheme", ["int8", "int4", "w8", "int8-kv"])
def test_greedy_answers_of_quantized_models_are_those_of_one_at_a_time(
    scheme: str, fp32_bundle: Path, tmp_path: Path
) -> None:
    kv = "int8" if scheme == "int8-kv" else None
    quantize(fp32_bundle, tmp_path / "out", QuantizeOptions(scheme.removesuffix("-kv"), kv=kv, measure=False))
    is_exact = scheme != "int4" or rows_are_independent()
    assert _check_equal(ModelBundle.open(tmp_path / "out"), is_exact=is_exact).exact == is_exact


def test_rows_of_any_length_give_the_logits_of_the_reference(engine: Engine) -> None:
    weights, rng = make_weights(), np.random.default_rng(2)
    ids = [rng.integers(0, TOKENS, length) for length in (40, 3, 71, 1)]
    rows = SlabRows(engine, 4, CONTEXT)
    for row in (2, 0, 3, 1):
        logits = rows.prefill(row, ids[row])
        assert np.abs(logits - reference_logits(weights, ids[row])[-1]).max() < 1e-4
    for _ in range(20):
        tokens = rng.integers(0, TOKENS, 4).tolist()
        logits = rows.decode(tokens, [len(row) for row in ids])
        ids = [np.append(row, token) for row, token in zip(ids, tokens, strict=True)]
        for row in range(4):
            assert np.abs(logits[row] - reference_logits(weights, ids[row])[-1]).max() < 1e-4


def test_rows_give_the_bits_of_the_engine(engine: Engine) -> None:
    rng = np.random.default_rng(3)
    ids = [rng.integers(0, TOKENS, length) for length in (33, 5, 64)]
    rows = SlabRows(engine, 3, CONTEXT)
    together = [rows.prefill(row, ids[row]) for row in range(3)]
    steps = [rows.decode([7, 8, 9], [len(row) + step for row in ids]).copy() for step in range(5)]
    for row in range(3):
        engine.reset()
        assert np.array_equal(engine.prefill(ids[row]), together[row])
        for step in steps:
            assert np.array_equal(engine.decode(7 + row), step[row])


@pytest.mark.parametrize("start", [16, 32, 48])
def test_a_copied_beginning_gives_the_bits_of_the_whole(engine: Engine, start: int) -> None:
    ids = np.random.default_rng(4).integers(0, TOKENS, 70)
    rows = SlabRows(engine, 2, CONTEXT)
    whole = rows.prefill(0, ids)
    rows.copy(0, 1, start)
    assert np.array_equal(rows.prefill(1, ids, start), whole)


def test_prompts_are_cut_where_the_engine_cuts_them() -> None:
    assert cuts(0, 70, 32) == [(0, 32), (32, 64), (64, 70)]
    assert cuts(16, 70, 32) == [(16, 32), (32, 64), (64, 70)]
    assert cuts(32, 33, 32) == [(32, 33)]


def test_sampled_answers_are_those_of_one_at_a_time(engine: Engine, tokenizer: Tokenizer) -> None:
    requests = _requests(8, CONTEXT, temperature=0.9, top_k=50, repetition_penalty=1.1)
    answers = _run(Batch(SlabRows(engine, 3, CONTEXT), tokenizer), requests)
    assert all(_same(answers[request.id], answer_alone(engine, tokenizer, request)) for request in requests)
    assert len({answer.text for answer in answers.values()}) == 8


def test_stop_strings_are_each_requests_own(engine: Engine, tokenizer: Tokenizer) -> None:
    ids = np.array(tokenizer.encode("ab c"), np.int64)
    whole = answer_alone(engine, tokenizer, Request("x", ids, 40)).text
    requests = [Request("all", ids, 40), Request("cut", ids, 40, stop=(whole[6:9],))]
    answers = _run(Batch(SlabRows(engine, 2, CONTEXT), tokenizer), requests)
    assert answers["all"].text == whole
    assert (answers["cut"].text, answers["cut"].finish_reason) == (whole[: whole.index(whole[6:9])], "stop")


def test_one_row_serves_engines_that_have_no_more(engine: Engine, tokenizer: Tokenizer) -> None:
    requests = [request for request in _requests(8, CONTEXT) if request.id % 2]
    batch = Batch(OneRow(engine), tokenizer)
    answers = _run(batch, requests)
    assert batch.counts.shared_tokens > 0
    assert all(_same(answers[request.id], answer_alone(engine, tokenizer, request)) for request in requests)


def test_a_common_beginning_is_computed_once(engine: Engine, tokenizer: Tokenizer) -> None:
    common = np.arange(50)
    computed = []

    class Counting(SlabRows):
        def prefill(self, row: int, ids: np.ndarray, start: int = 0) -> np.ndarray:
            computed.append(len(ids) - start)
            return super().prefill(row, ids, start)

    batch = Batch(Counting(engine, 2, CONTEXT), tokenizer)
    _run(batch, [Request(number, np.append(common, [100 + number, 7]), 3) for number in range(6)])
    # The second prompt is computed whole once more, to see that the copy gives the same bits.
    assert computed == [52, 4, 52, 4, 4, 4, 4]
    assert batch.counts.shared_tokens == 5 * 48


def test_free_rows_are_filled_and_no_idle_row_is_computed(engine: Engine, tokenizer: Tokenizer) -> None:
    counts = []

    class Watching(SlabRows):
        def decode(self, tokens: Any, lengths: Any, first: int = 0) -> np.ndarray:
            counts.append(len(tokens))
            return super().decode(tokens, lengths, first)

    rows = Watching(engine, 3, CONTEXT)
    batch = Batch(rows, tokenizer)
    requests = [Request(number, np.array([number, 9]), limit) for number, limit in enumerate((2, 9, 5, 7, 3))]
    answers = _run(batch, requests)
    generated = sum(answer.generated_tokens for answer in answers.values())
    # Every answer's first token comes with its prompt; single audits decode a row of a batch again.
    assert sum(counts) - (batch.counts.audited) == generated - len(requests)
    assert max(counts) == 3
    assert batch.counts.steps < generated - len(requests)


def test_cancelled_requests_leave_their_rows(engine: Engine, tokenizer: Tokenizer) -> None:
    batch = Batch(SlabRows(engine, 2, CONTEXT), tokenizer)
    requests = _requests(4, CONTEXT)
    for request in requests:
        batch.submit(request)
    batch.step()
    batch.step()
    assert (batch.active, batch.waiting) == (2, 2)
    assert batch.cancel(requests[0].id)
    assert batch.cancel(requests[3].id)
    assert not batch.cancel("nobody")
    events: list[Event] = []
    while found := batch.step():
        events += found
    answers = {event.id: event.generation for event in events if event.generation is not None}
    assert set(answers) == {requests[1].id, requests[2].id}
    for request in requests[1:3]:
        assert _same(answers[request.id], answer_alone(engine, tokenizer, request))


def test_requests_that_cannot_be_answered_are_refused(engine: Engine, tokenizer: Tokenizer) -> None:
    batch = Batch(SlabRows(engine, 1, CONTEXT), tokenizer)
    ids = np.zeros(5, np.int64)
    with pytest.raises(InputError, match="no token"):
        batch.submit(Request(0, ids[:0]))
    with pytest.raises(InputError, match=f"{CONTEXT + 3} tokens, the context holds {CONTEXT} .* 4 too many"):
        batch.submit(Request(0, np.zeros(CONTEXT + 3, np.int64)))
    with pytest.raises(InputError, match="token 100000"):
        batch.submit(Request(0, ids + 100000))
    with pytest.raises(OptionError, match="--max-tokens 0"):
        batch.submit(Request(0, ids, 0))
    with pytest.raises(OptionError, match="empty string"):
        batch.submit(Request(0, ids, 5, stop=("",)))
    assert batch.step() == []


class Scripted(Rows):
    """Rows whose logits a test decides on."""

    def __init__(self, count: int) -> None:
        self.count, self.capacity, self.vocab_size = count, CONTEXT, TOKENS
        self.poisoned: set[int] = set()
        self.error = 0.0

    def prefill(self, row: int, ids: np.ndarray, start: int = 0) -> np.ndarray:
        return np.arange(TOKENS, dtype=np.float32) % 97

    def decode(self, tokens: Any, lengths: Any, first: int = 0) -> np.ndarray:
        logits = np.tile(np.arange(TOKENS, dtype=np.float32) % 97, (len(tokens), 1))
        logits[[row for row in range(len(tokens)) if first + row in self.poisoned]] = np.nan
        return logits + np.float32(self.error * len(tokens))

    def copy(self, source: int, target: int, length: int) -> None:
        pass


def test_kernels_that_round_otherwise_in_a_batch_are_found_out(tokenizer: Tokenizer) -> None:
    rows = Scripted(2)
    requests = [Request(number, np.array([number]), 9) for number in range(2)]
    batch = Batch(rows, tokenizer)
    _run(batch, requests)
    assert batch.exact
    rows.error = 0.5
    _run(batch, requests)
    assert not batch.exact


def test_logits_that_are_not_finite_end_their_requestanswer_alone(tokenizer: Tokenizer) -> None:
    rows = Scripted(2)
    rows.poisoned = {1}
    batch = Batch(rows, tokenizer)
    for number in range(2):
        batch.submit(Request(number, np.array([number]), 5))
    events: list[Event] = []
    while found := batch.step():
        events += found
    failed, answered = ([event for event in events if getattr(event, name)] for name in ("error", "generation"))
    assert [(event.id, type(event.error)) for event in failed] == [(1, InputError)]
    assert [event.id for event in answered] == [0]


def test_memory_is_planned(tiny: ModelBundle, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    position = 2 * 16 * 4  # key and value of one head, float32
    monkeypatch.setattr(memory, "available_memory", lambda: 10 * CONTEXT * position)
    plan = plan_memory(tiny, engine, CONTEXT, most_rows=100)
    assert (plan.rows, plan.cache_bytes) == (5, 5 * CONTEXT * position)
    assert plan_memory(tiny, engine, CONTEXT, most_rows=2).rows == 2
    assert plan_memory(tiny, engine, CONTEXT, 100, batch_size=9).rows == 9
    with pytest.raises(ResourceError, match="12 rows of 96 positions") as raised:
        plan_memory(tiny, engine, CONTEXT, 100, batch_size=12)
    assert "--batch-size 10" in raised.value.hint
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    assert plan_memory(tiny, engine, CONTEXT, 100).rows == memory.DEFAULT_ROWS


def test_who_insists_plans_more_than_there_is(
    tiny: ModelBundle, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(resources.MAX_MEMORY, f"1000 {os.getpid()}")
    with pytest.raises(ResourceError, match="9 rows of 96 positions"):
        plan_memory(tiny, engine, CONTEXT, 100, batch_size=9)
    monkeypatch.setenv(resources.FORCE, "1")
    assert plan_memory(tiny, engine, CONTEXT, 100, batch_size=9).rows == 9


def test_what_the_user_allows_is_less_what_the_process_and_its_children_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    held = resources.memory_of(os.getpid())
    if held is None:
        pytest.skip("needs /proc")
    monkeypatch.setenv(resources.MAX_MEMORY, "")
    resources.allow_memory(held + (200 << 20))
    program = (
        "from llmfast.resources import available_memory; held = b'1' * (100 << 20);"
        "print(available_memory(), flush=True); input()"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        seen_by_the_child = int(child.stdout.readline())
        for seen in (seen_by_the_child, resources.available_memory()):
            assert seen is not None
            assert 0 < seen < 120 << 20
        child.communicate("\n")


def test_the_cgroup_caps_the_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(resources, "_CGROUP", tmp_path)
    assert resources.available_memory() is None
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    assert resources.available_memory() == 4000 * 1024
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    (tmp_path / "memory.stat").write_text("active_file 70000\ninactive_file 50000\n")
    assert resources.available_memory() == 650_000
    (tmp_path / "memory.max").write_text("max\n")
    assert resources.available_memory() == 4000 * 1024
