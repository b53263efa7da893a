"""Batches side by side: each request answered as alone, whatever thread it came to, and no thread left behind."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmfast.bundle import ModelBundle
from llmfast.errors import InputError
from llmfast.infer import memory, opening
from llmfast.infer.batch import Counts, Request
from llmfast.infer.decoder import Decoder
from llmfast.infer.engine import Engine
from llmfast.infer.lanes import Lanes, count_lanes
from llmfast.infer.many import answer_file
from llmfast.infer.opening import open_lanes, open_rows
from llmfast.infer.rows import SlabRows
from llmfast.infer.sampling import Sampling
from llmfast.runtime import resolve_threads
from llmfast.tokenizer import Tokenizer
from llmfast.tuned import SessionSettings
from tests.tiny_decoder import TOKENS, answer_alone, write_bundle

CAPACITY = 96


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    return ModelBundle.open(write_bundle(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def lanes(tiny: ModelBundle) -> Lanes:
    rows, plan = open_lanes(tiny, "cpu", 3, CAPACITY, most_rows=100, batch_size=26)
    assert plan.rows == 26
    assert [part.count for part in rows] == [8, 9, 9]
    return Lanes(rows, Tokenizer.load(tiny.path))


def _requests(count: int) -> list[Request]:
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 60, count)
    limits = rng.integers(1, 30, count)
    return [
        Request(number, rng.integers(0, TOKENS, length), int(limit), Sampling(temperature=0.7, seed=number))
        for number, (length, limit) in enumerate(zip(lengths, limits, strict=True))
    ]


def _threads() -> set[threading.Thread]:
    return set(threading.enumerate())


def test_answers_are_those_of_one_at_a_time(tiny: ModelBundle, lanes: Lanes) -> None:
    before = _threads()
    requests = _requests(70)
    tokenizer = Tokenizer.load(tiny.path)
    pieces = {request.id: "" for request in requests}
    generations = {}
    for event in lanes.answer(iter(requests)):
        pieces[event.id] += event.text
        if event.generation is not None:
            generations[event.id] = event.generation
    assert _threads() == before
    engine = Engine(tiny, threads=1, max_length=CAPACITY)
    for request in requests:
        alone = answer_alone(engine, tokenizer, request)
        ours = generations[request.id]
        assert ours.text == pieces[request.id] == alone.text
        assert (ours.prompt_tokens, ours.generated_tokens) == (alone.prompt_tokens, alone.generated_tokens)
        assert ours.finish_reason == alone.finish_reason
    assert lanes.counts.prompt_tokens == sum(len(request.prompt_ids) for request in requests)
    assert lanes.counts.generated_tokens == sum(one.generated_tokens for one in generations.values())
    assert lanes.counts.differing == 0
    # The same lanes answer again, and count on.
    assert len([event for event in lanes.answer(iter(requests[:5])) if event.generation]) == 5
    assert lanes.counts.prompt_tokens > sum(len(request.prompt_ids) for request in requests)


def test_all_lanes_work(lanes: Lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    working: dict[int, set[int]] = {}
    decode = SlabRows.decode

    def record(rows: SlabRows, *given: Any) -> np.ndarray:
        working.setdefault(id(rows), set()).add(threading.get_ident())
        return decode(rows, *given)

    monkeypatch.setattr(SlabRows, "decode", record)
    list(lanes.answer(Request(number, np.arange(1, 9), 20) for number in range(26)))
    assert [len(threads) for threads in working.values()] == [1, 1, 1]
    assert len(set.union(*working.values())) == 3


def test_requests_are_taken_as_rows_fall_free(lanes: Lanes) -> None:
    requests = _requests(60)
    taken = answered = 0

    def source() -> Iterator[Request | None]:
        nonlocal taken
        for request in requests:
            taken += 1
            yield request
            yield None  # there is none yet: asked again after the next event

    for event in lanes.answer(source()):
        assert taken - answered <= 26 + 3
        answered += event.generation is not None
    assert taken == answered == 60


def test_what_can_not_be_answered_is_refused_at_once(lanes: Lanes) -> None:
    with pytest.raises(InputError, match="token"):
        lanes.submit(Request("bad", np.array([TOKENS + 5]), 4))
    assert lanes.pending == 0
    assert lanes.wait() == []


def test_what_can_not_be_answered_fails_alone_among_others(lanes: Lanes) -> None:
    requests = _requests(4)
    requests.insert(2, Request("bad", np.array([TOKENS + 5]), 4))
    last = {event.id: event for event in lanes.answer(iter(requests)) if event.is_last}
    assert isinstance(last.pop("bad").error, InputError)
    assert len(last) == 4
    assert all(event.generation for event in last.values())


def test_what_fails_in_a_lane_is_raised_and_ends_all(lanes: Lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _threads()
    prefill = SlabRows.prefill

    def fail_once(rows: SlabRows, row: int, ids: np.ndarray, start: int = 0) -> np.ndarray:
        if len(ids) == 61:
            raise RuntimeError("out of bounds")
        return prefill(rows, row, ids, start)

    monkeypatch.setattr(SlabRows, "prefill", fail_once)
    bad = Request("bad", np.arange(61) % TOKENS, 4)
    with pytest.raises(RuntimeError, match="out of bounds"):
        list(lanes.answer(iter([*_requests(20), bad])))
    assert _threads() == before
    assert lanes.pending == 0


def test_who_stops_reading_leaves_no_thread_and_no_request(lanes: Lanes) -> None:
    before = _threads()
    events = lanes.answer(iter(_requests(40)))
    next(events)
    assert len(_threads() - before) == 3
    events.close()
    assert _threads() == before
    assert lanes.pending == 0
    again = [event.id for event in lanes.answer(iter(_requests(3))) if event.generation is not None]
    assert sorted(again) == [0, 1, 2]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the numbers of threads that decoders are opened with from now on."""
    counts: list[int] = []
    open_decoder = opening.open_decoder

    def record(*given: Any, settings: SessionSettings, **others: Any) -> Decoder:
        counts.append(resolve_threads(settings.threads))
        return open_decoder(*given, settings=settings, **others)

    monkeypatch.setattr(opening, "open_decoder", record)
    return counts


def test_few_requests_stay_in_one_lane_and_have_all_threads(tiny: ModelBundle, opened: list[int]) -> None:
    rows, plan = open_lanes(tiny, "cpu", 2, CAPACITY, most_rows=100, batch_size=16, fast_alone=True)
    assert opened == [1, 2]
    assert plan.model_bytes == 2 * tiny.size_bytes
    lanes = Lanes(rows, Tokenizer.load(tiny.path))
    list(lanes.answer(iter(_requests(8))))
    assert [part.is_alone for part in rows] == [True, False]
    assert lanes.counts.prompt_tokens == sum(len(request.prompt_ids) for request in _requests(8))
    sizes = [len(request.prompt_ids) for request in _requests(16)]
    events = lanes.answer(iter(_requests(16)))
    seen: set[bool] = set()
    for _ in events:
        seen.add(rows[0].is_alone)
    assert False in seen
    assert lanes.counts.prompt_tokens == sum(sizes[:8]) + sum(sizes)


def test_one_lane_where_a_model_does_not_fit_twice(tiny: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 3 * tiny.size_bytes)
    rows, plan = open_lanes(tiny, "cpu", 2, 8, most_rows=100, batch_size=16, fast_alone=True)
    assert len(rows) == 1
    assert plan.model_bytes == tiny.size_bytes


def test_one_lane_with_all_threads_where_memory_has_room_for_few_rows(
    tiny: ModelBundle, opened: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = open_rows(tiny, "cpu", 2, CAPACITY, 100, batch_size=1)[1].cache_bytes
    opened.clear()
    monkeypatch.setattr(memory, "available_memory", lambda: 2 * 15 * row)
    rows, plan = open_lanes(tiny, "cpu", 2, CAPACITY, most_rows=100, batch_size=None)
    assert plan.rows == 15
    assert [part.count for part in rows] == [15]
    assert opened == [1, 2]


def test_a_request_that_is_dropped_has_no_event_any_more_and_frees_its_row(lanes: Lanes) -> None:
    for number in range(26):
        lanes.submit(Request(number, np.arange(1, 9), 80))
    lanes.wait()
    for number in range(20):
        lanes.cancel(number)
        lanes.cancel(number)  # nobody is hurt
    lanes.cancel("unknown")
    assert lanes.pending == 6
    for number in range(100, 120):
        lanes.submit(Request(number, np.arange(1, 9), 2))
    ended = []
    while lanes.pending:
        events = lanes.wait()
        assert not {event.id for event in events} & set(range(20))
        ended += [event.id for event in events if event.generation is not None]
    assert sorted(ended) == [*range(20, 26), *range(100, 120)]
    lanes.close()


def test_waiting_ends_when_it_has_been_long_enough(lanes: Lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    prefill = SlabRows.prefill

    def slow(*given: Any) -> np.ndarray:
        go.wait()
        return prefill(*given)

    monkeypatch.setattr(SlabRows, "prefill", slow)
    lanes.submit(Request(0, np.arange(1, 9), 1))
    assert lanes.wait(longest_s=0.01) == []
    go.set()
    assert [event.id for event in lanes.wait()] == [0]
    lanes.close()


def test_lanes_share_the_settings_that_were_found_best(tiny: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    found = SessionSettings(threads=2, chunk_tokens=64, block_base=4)
    monkeypatch.setattr(opening, "settings_for", lambda *_: found)
    opened = []
    monkeypatch.setattr(opening, "open_decoder", lambda *_, **given: opened.append(given["settings"]) or Engine(tiny))
    rows, _ = open_lanes(tiny, "cpu", None, CAPACITY, 32, None)
    assert [part.count for part in rows] == [16, 16]
    assert opened == [SessionSettings(threads=1, chunk_tokens=64, block_base=4)]


@pytest.mark.parametrize(
    ("threads", "rows", "lanes"), [(1, 32, 1), (2, 32, 2), (2, 15, 1), (2, 16, 2), (8, 32, 4), (4, 1, 1), (2, 0, 1)]
)
def test_a_lane_has_enough_rows(threads: int, rows: int, lanes: int) -> None:
    assert count_lanes(threads, rows) == lanes


def test_rows_are_not_divided_where_one_batch_is_asked_for(tiny: ModelBundle) -> None:
    rows, plan = open_rows(tiny, "cpu", 4, CAPACITY, 64, None)
    assert rows.count == plan.rows == 64


def test_counts_add_up() -> None:
    assert Counts.total([]) == Counts()
    assert Counts.total([Counts(1, 2, 3, 4, 5, 6), Counts(prompt_tokens=10, differing=1)]) == Counts(11, 2, 3, 4, 5, 7)


def test_lanes_with_a_bundle_on_disk_answer_a_file(tiny: ModelBundle, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("".join(f"word {number}\n" for number in range(50)))
    one, many = (
        answer_file(tiny.path, tmp_path / "prompts.txt", tmp_path / f"{threads}.jsonl", threads=threads, max_tokens=9)
        for threads in (1, 3)
    )
    assert one.answered == many.answered == 50
    assert one.figures["generated_tokens"] == many.figures["generated_tokens"]
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "3.jsonl").read_bytes()
