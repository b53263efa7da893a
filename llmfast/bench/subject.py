"""One bundle under measurement, as it lives in its worker process."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from llmfast import registry
from llmfast.batch_session import open_encoder
from llmfast.bench.energy import open_meter
from llmfast.bench.opening import opener
from llmfast.bundle import ModelBundle
from llmfast.errors import ResourceError, UnsupportedError
from llmfast.runtime import placement, profiled, resolve_threads
from llmfast.tuned import SessionSettings

if TYPE_CHECKING:
    from llmfast.bench.harness.scoring import Pair
    from llmfast.infer.rows import Rows
    from llmfast.tokenizer import Text

Result = TypeVar("Result")


@dataclass(frozen=True)
class Trial:
    """What every subject does in one round: the same token ids for all, others in the next round.

    Attributes:
        seed: of the token ids, different in every round.
        vocab_size: ids are below this, the smallest vocabulary of the run.
        shapes: name -> (batch, length) of the input or prompt.
        output_tokens: tokens a text-generation model generates.
        price_per_hour: of the machine, None when nobody asked.
    """

    seed: tuple[int, ...]
    vocab_size: int
    shapes: dict[str, tuple[int, int]]
    output_tokens: int = 2
    price_per_hour: float | None = None

    def ids(self, *shape: int) -> np.ndarray:
        """Return random token ids, int64 of the given shape; the same for the same trial and shape."""
        return np.random.default_rng(self.seed).integers(self.vocab_size, size=shape, dtype=np.int64)


@dataclass(frozen=True)
class Spent:
    """What a piece of work cost: CPU seconds of all threads, and joules as the subject's meter counts them."""

    cpu_s: float
    joules: float


@dataclass(frozen=True)
class Generation:
    """The times of one greedy generation, in seconds since the request.

    Attributes:
        prefill_s: when the prompt's logits were there.
        tokens_s: when each output token had been picked.
        prefill: what the prompt and the first token cost.
        decode: what the tokens after the first cost.
    """

    prefill_s: float
    tokens_s: tuple[float, ...]
    prefill: Spent = Spent(0.0, 0.0)
    decode: Spent = Spent(0.0, 0.0)


class Subject:
    """A bundle opened for measurement.

    Args:
        path: the bundle.
        provider: a name in `llmfast.providers`.
        threads: intra-op threads; None takes the cores this process may use.
        max_length: positions a text-generation model must hold; None takes its context length.
        watts_per_core: for an estimate of energy.
        profile: prefix of the profile that ONNX Runtime writes; None writes none.
        settings: of a decoder's session; None takes those that were found best on this machine, or the defaults.
        is_batch: an encoder gets several rows at a time.
        clock: monotonic seconds.

    Attributes:
        bundle: the bundle's facts.
        engine: of a model that generates text, otherwise None.
        session: the ONNX Runtime session; the decoder's where there are two.
        load_s: seconds it took to open, without importing libraries.
        meter: counts joules.
        latencies: what `measure` timed one by one, name -> seconds.
    """

    def __init__(
        self,
        path: Path,
        provider: str = "cpu",
        threads: int | None = None,
        max_length: int | None = None,
        watts_per_core: float = 0.0,
        profile: Path | None = None,
        settings: SessionSettings | None = None,
        is_batch: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.bundle = ModelBundle.open(path)
        self.clock = clock
        self.threads = resolve_threads(threads)
        self._tokenizer: Any = None
        self._rows: Rows | None = None
        self._shared: tuple[Trial | None, dict[str, Any]] = (None, {})
        self.latencies: dict[str, list[float]] = {}
        self._provider, self._is_batch = provider, is_batch
        self._other: Any = None
        open_model = opener(self.bundle, provider, self.threads, max_length, settings, is_batch)
        start = clock()
        with profiled(profile):
            self.engine, self.session = open_model()
        self.load_s = clock() - start
        self.meter = open_meter(placement(*self.sessions), watts_per_core)

    @property
    def tokenizer(self) -> Any:
        """The bundle's own tokenizer."""
        if self._tokenizer is None:  # not at the start: its memory is not the model's
            from llmfast.tokenizer import Tokenizer

            self._tokenizer = Tokenizer.load(self.bundle.path)
        return self._tokenizer

    def encode(self, texts: "Sequence[Text]") -> dict[str, np.ndarray]:
        """Return the inputs that the tokenizer makes of texts or pairs: name -> int64 [batch, seq].

        Of a task of images or sound, what the processor makes of one file: name -> float32 [1, ...].
        """
        if hasattr(self.task, "read_input"):
            [path] = texts
            values: dict[str, np.ndarray] = self.task.read_input(self.bundle, path)
            return values
        encoded: dict[str, np.ndarray] = self.tokenizer.encode_batch(texts, self.bundle.longest_text())
        return encoded

    @property
    def task(self) -> Any:
        """The bundle's task plug-in."""
        return registry.load("tasks", self.bundle.manifest.task)

    @property
    def sessions(self) -> Sequence[Any]:
        """All ONNX Runtime sessions that the model takes, the decoder's first."""
        sessions: Sequence[Any] = self.engine.sessions if self.engine is not None else (self.session,)
        return sessions

    def encoder(self, batch: int) -> Any:
        """Return the session of an encoder for so many rows at a time; of a sweep over both kinds the second is opened
        when it is first asked for."""
        if (batch > 1) == self._is_batch:
            return self.session
        self._other = self._other or open_encoder(self.bundle.model, self._provider, self.threads, batch > 1)
        return self._other

    def facts(self) -> dict[str, Any]:
        """Return `vocab_size` (None when unknown), the engine's `note`, `placement`: nodes per provider, and
        `energy_source`."""
        facts = {"vocab_size": self.bundle.manifest.architecture.get("vocab_size"), "note": ""}
        if self.engine is not None:
            facts = {"vocab_size": self.engine.vocab_size, "note": self.engine.note}
        return facts | {"placement": placement(*self.sessions), "energy_source": self.meter.source}

    def generate(self, trial: Trial, shape: str) -> Generation:
        """Run the trial's prompt and decode greedily; metrics of one round share one run."""
        return self.once(trial, shape, lambda: self._generate(trial, shape))

    def time_request(self, trial: Trial, shape: str) -> float:
        """Return the seconds from the trial's prompt to its last token; the process is idle again then."""
        seconds = self._generate(trial, shape).tokens_s[-1]
        settle()
        return seconds

    def once(self, trial: Trial, name: str, work: Callable[[], Result]) -> Result:
        """Do a piece of a trial's work once, for all metrics that look at it."""
        if self._shared[0] != trial:
            self._shared = (trial, {})
        done = self._shared[1]
        if name not in done:
            done[name] = work()
        result: Result = done[name]
        return result

    @contextmanager
    def spending(self) -> Iterator[Callable[[], Spent]]:
        """Yield a function that says what the body has cost so far."""
        cpu, joules = time.process_time(), self.meter.read()
        yield lambda: Spent(time.process_time() - cpu, self.meter.read() - joules)

    def measure(self, metrics: Sequence[str], trial: Trial) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Return the figures of some speed metrics for one round, and what was timed one by one, name -> seconds.

        The process is idle again when this returns.
        """
        figures: dict[str, float] = {}
        self.latencies = {}
        for name in metrics:
            figures |= registry.load("bench.metrics", name).measure(self, trial)
        settle()
        return figures, self.latencies

    def describe(self, metrics: Sequence[str]) -> dict[str, float | None]:
        """Return the figures of some static metrics."""
        figures: dict[str, float | None] = {}
        for name in metrics:
            figures |= registry.load("bench.metrics", name).measure(self)
        return figures

    def profile(self, trial: Trial) -> list[dict[str, Any]]:
        """Return where the time goes, of a subject that was opened with a profile."""
        from llmfast.bench.profile import profile_subject

        return profile_subject(self, trial)

    def continuation_scores(self, pairs: "Sequence[Pair]") -> list[tuple[float, bool]]:
        """Return log p and greediness of continuations, see `harness.scoring`."""
        from llmfast.bench.harness.scoring import continuation_scores

        return continuation_scores(self.engine, pairs)

    def continuations(self, prompts: "Sequence[tuple[Sequence[int], Any]]") -> list[str]:
        """Return what the model writes after each prompt, see `harness.scoring`."""
        from llmfast.bench.harness.scoring import continuations

        return continuations(self.engine, self.tokenizer, prompts)

    def compare(self, metric: str, item: Any, reference: Path, is_baseline: bool) -> np.ndarray:
        """Answer one item of the data and compare the answer with the baseline's.

        Args:
            metric: a quality metric.
            item: what its `prepare` made.
            reference: a `.npy` file through which the baseline's answer goes, one item at a time; the
                baseline writes it, the others map it into memory.
            is_baseline: this subject is the baseline.

        Returns:
            float64 [units, fields], as the metric defines them.

        Raises:
            ResourceError: no room for the baseline's answer.
        """
        plugin = registry.load("bench.metrics", metric)
        answer = plugin.answer(self, item)
        if not is_baseline:
            rows: np.ndarray = plugin.compare(item, answer, np.load(reference, mmap_mode="r"))
            return rows
        try:
            np.save(reference, answer)
        except OSError as error:
            raise ResourceError(
                f"cannot write {answer.nbytes} bytes to `{reference.parent}`: {error.strerror}",
                "point TMPDIR at a disk with room, or lower --seq-len",
            ) from error
        rows = plugin.compare(item, answer, answer)
        return rows

    def _generate(self, trial: Trial, shape: str) -> Generation:
        batch, length = trial.shapes[shape]
        if batch > 1:
            return self._generate_rows(self._rows_for(trial), trial, shape)
        prompt = trial.ids(length)
        self.engine.reset()
        with self.spending() as spent:
            start = self.clock()
            logits = self.engine.prefill(prompt)
            prefilled = self.clock() - start
            token = int(logits.argmax())
            times = [self.clock() - start]
            prefill = spent()
        with self.spending() as spent:
            for _ in range(trial.output_tokens - 1):
                token = int(self.engine.decode(token).argmax())
                times.append(self.clock() - start)
            decode = spent()
        return Generation(prefilled, tuple(times), prefill, decode)

    def _generate_rows(self, rows: "Rows", trial: Trial, shape: str) -> Generation:
        """Read a prompt into every row, and write a token to all of them at a time."""
        batch, length = trial.shapes[shape]
        prompts = trial.ids(batch, length)
        tokens = np.zeros(batch, np.int64)
        with self.spending() as spent:
            start = self.clock()
            for row, prompt in enumerate(prompts):
                tokens[row] = rows.prefill(row, prompt).argmax()
            prefilled = self.clock() - start
            times = [prefilled]
            prefill = spent()
        with self.spending() as spent:
            for position in range(length, length + trial.output_tokens - 1):
                tokens = rows.decode(tokens.tolist(), [position] * batch).argmax(axis=1)
                times.append(self.clock() - start)
            decode = spent()
        return Generation(prefilled, tuple(times), prefill, decode)

    def _rows_for(self, trial: Trial) -> "Rows":
        """Return rows for the largest batch of a run; smaller ones use the first of them.

        Raises:
            UnsupportedError: the graph takes one sequence at a time.
            ResourceError: no memory for the KV cache.
        """
        if self._rows is None:
            from llmfast.infer.memory import plan_memory
            from llmfast.infer.rows import SlabRows

            if not getattr(self.engine, "takes_rows", False):
                raise UnsupportedError(
                    "one sequence at a time: its graph is another exporter's, or its cache is on a device",
                    "leave --batch out",
                )
            count = max(batch for batch, _ in trial.shapes.values())
            capacity = max(length for _, length in trial.shapes.values()) + trial.output_tokens
            plan_memory(self.bundle, self.engine, capacity, count, count)
            self._rows = SlabRows(self.engine, count, capacity)
        return self._rows


def settle(cpu_time: Callable[[], float] = time.process_time, sleep: Callable[[float], None] = time.sleep) -> None:
    """Wait until this process uses no CPU, for a second at most.

    ONNX Runtime's threads spin for some 30 ms after a run, and would take the next bundle's cores.
    """
    for _ in range(100):
        before = cpu_time()
        sleep(0.01)
        if cpu_time() - before < 0.001:
            return
