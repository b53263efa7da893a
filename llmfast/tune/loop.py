"""The training loop: batches to steps, validations, checkpoints, and the ways it may end."""

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llmfast.errors import GateError, ResourceError
from llmfast.report import note, progress
from llmfast.tune.average import Average
from llmfast.tune.curves import Log, peak_memory
from llmfast.tune.fake_quantize import FakeQuantizer
from llmfast.tune.objective import Objective, Row
from llmfast.tune.optimizers import learning_rate_at, make_optimizer
from llmfast.tune.parallel import Parallel, read_state, read_weights, write_state
from llmfast.tune.precision import Precision
from llmfast.tune.rows import epoch_batches, in_order_of_length
from llmfast.tune.signals import deferred_signals
from llmfast.tune.snapshots import Snapshots

_SEEN_ROWS = 64  # whose activations tell how weights are rounded at the start

if TYPE_CHECKING:
    from llmfast.tune.options import TuneOptions


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: steps of the optimizer that are done.
        evaluated: the step of the last validation.
        best_loss: the lowest validation loss.
        best_step: its step.
        stale: validations since then.
        loss_sum: losses since the last line of the log, of all items; a resumed run logs the same mean.
        items: how many these are.
    """

    step: int = 0
    evaluated: int = -1
    best_loss: float = float("inf")
    best_step: int = 0
    stale: int = 0
    loss_sum: float = 0.0
    items: int = 0


class Trainer:
    """Trains an objective's model.

    Args:
        objective: model, data and loss.
        options: the user's, every default filled in.
        precision: what the forward pass computes in.
        parallel: this process's place among all.
        snapshots: where checkpoints go.
        quantizer: rounds weights while the model computes; None leaves them.
    """

    def __init__(
        self,
        objective: Objective,
        options: "TuneOptions",
        precision: Precision,
        parallel: Parallel,
        snapshots: Snapshots,
        quantizer: FakeQuantizer | None,
    ) -> None:
        assert options.batch_size is not None
        assert options.epochs is not None
        assert options.learning_rate is not None
        self._objective = objective
        self._options = options
        self._precision = precision
        self._parallel = parallel
        self._snapshots = snapshots
        self._quantizer = quantizer
        self._batch_size = options.batch_size
        self._highest_rate = options.learning_rate
        self._model = parallel.wrap(objective.model)
        self._trained = [one for one in objective.model.parameters() if one.requires_grad]
        self._optimizer = make_optimizer(objective.model, options, options.learning_rate)
        self._average = Average(self._trained, options.average) if options.average else None
        self._lengths = np.array([row.num_tokens for row in objective.train])
        self._epoch_steps = -(-len(objective.train) // options.batch_size)
        self.total = options.max_steps or options.epochs * self._epoch_steps
        self.progress = Progress()
        self._best: dict[str, Any] = {}
        self._best_grids: list[Any] = []
        self._log = Log(snapshots.log if parallel.is_main else None)

    def run(self) -> None:
        """Train to the end, or until validation has stopped to improve.

        Raises:
            GateError: the loss or its gradient is no number; the step is named.
            ResourceError: a checkpoint can't be written.
            KeyboardInterrupt: after Ctrl-C, with a checkpoint written.
        """
        with progress("tuning", self.total) as advance, deferred_signals() as received:
            advance(self.progress.step)
            is_interrupted = False
            if self._quantizer and not self.progress.step:
                self._quantizer.start(self._see_rows)
                if self._average:
                    self._average.restart()  # from the weights that GPTQ moved
            self._evaluate_when_due()
            started, tokens = time.perf_counter(), 0
            for rows in self._batches():
                if is_interrupted:
                    self._interrupt(received)
                if self.progress.step >= self.total or self._is_stale:
                    break
                loss, norm, taken = self._step(rows)
                self.progress.step += 1
                is_interrupted = bool(self._parallel.sum(len(received))[0])
                step = self.progress.step
                tokens += sum(row.num_tokens for row in rows)
                if taken:
                    if self._average:
                        self._average.update()
                    weight = sum(row.items for row in rows)
                    self.progress.loss_sum += loss * weight
                    self.progress.items += weight
                is_last = step == self.total
                if step % self._options.log_every == 0 or is_last:
                    seconds = time.perf_counter() - started
                    self._log.write(
                        step=step,
                        epoch=round(step / self._epoch_steps, 4),
                        loss=self.progress.loss_sum / self.progress.items if self.progress.items else None,
                        learning_rate=learning_rate_at(step - 1, self.total, self._options, self._highest_rate),
                        gradient_norm=norm if taken else None,
                        tokens_per_s=round(tokens / seconds, 1),
                        peak_memory_bytes=peak_memory(self._parallel.device),
                        **({"loss_scale": self._precision.scale} if self._precision.name == "fp16" else {}),
                    )
                    started, tokens = time.perf_counter(), 0
                    self.progress.loss_sum, self.progress.items = 0.0, 0
                advance(1, self._log.describe())
                before = time.perf_counter()
                self._evaluate_when_due(is_last)
                if step % self._options.save_every == 0 and not is_last:
                    self._save()
                started += time.perf_counter() - before  # the speed is that of training
        if self._average:
            self._average.adopt()
        if self._best:
            self._restore_best()
        if self._quantizer:
            self._quantizer.settle()

    def resume(self) -> None:
        """Take over the last checkpoint: from here on everything is as if there had been no interruption."""
        import torch

        state = self._snapshots.read()
        write_state(self._objective.model, self._optimizer, state["weights"], state["optimizer"])
        self._precision.load(state["precision"])
        self.progress = Progress(**state["progress"])
        self._best, self._best_grids = state["best"], state["best_grids"]
        if self._quantizer and state["grids"]:
            self._quantizer.load(state["grids"])
        if self._average:
            self._average.load(state["average"])
        torch.set_rng_state(state["random"][self._parallel.rank])
        if self._parallel.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_random"][self._parallel.rank], self._parallel.device)
        self._log.forget_after(self.progress.step)
        note(f"note: going on from step {self.progress.step} of {self.total}")

    def figures(self) -> dict[str, Any]:
        """Return what the run measured."""
        return self._log.summary() | {"steps": self.progress.step, "skipped_steps": self._precision.skipped}

    @property
    def _is_stale(self) -> bool:
        return self._options.patience is not None and self.progress.stale >= self._options.patience

    def _batches(self) -> Iterator[list[Row]]:
        """Yield the rows of every step from the current one on."""
        while True:
            epoch, position = divmod(self.progress.step, self._epoch_steps)
            order = epoch_batches(self._lengths, self._batch_size, self._options.seed, epoch)
            for indices in order[position:]:
                yield [self._objective.train[index] for index in indices]

    def _see_rows(self) -> None:
        """Let the model compute some of the first rows."""
        rows = self._objective.train[:_SEEN_ROWS]
        size = max(1, self._batch_size // self._options.accumulate)
        self._model.eval()
        for start in range(0, len(rows), size):
            with self._precision.autocast():
                self._objective.loss(self._model, rows[start : start + size])

    def _step(self, rows: Sequence[Row]) -> tuple[float, float, bool]:
        """Take one step; return mean loss, length of the gradient, and whether it was taken."""
        import torch

        model, parallel = self._model, self._parallel
        rate = learning_rate_at(self.progress.step, self.total, self._options, self._highest_rate)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["share"]
        model.train()
        # The mean over the whole batch, however it is split: into passes, and over processes that average gradients.
        factor = parallel.world / sum(row.items for row in rows)
        loss_sum = torch.zeros((), device=parallel.device)
        parts = parallel.share(rows, self._options.accumulate)
        with self._quantizer.rounded() if self._quantizer else nullcontext():
            for index, (part, counts) in enumerate(parts):
                with parallel.passing(model, index == len(parts) - 1):
                    with self._precision.autocast():
                        loss, _ = self._objective.loss(model, part)
                    self._precision.backward(loss * (factor * counts))
                loss_sum += loss.detach() * counts
        (total,) = parallel.sum(float(loss_sum))
        mean = total / sum(row.items for row in rows)
        self._precision.unscale(self._optimizer)
        longest = self._options.max_grad_norm or float("inf")
        length = torch.nn.utils.clip_grad_norm_(self._trained, longest)
        norm = float(length.full_tensor() if hasattr(length, "full_tensor") else length)
        if not (np.isfinite(mean) and np.isfinite(norm)) and (
            self._precision.name != "fp16" or self._precision.is_exhausted
        ):
            what = "loss" if not np.isfinite(mean) else "gradient"
            last = self._snapshots.last()
            raise GateError(
                f"the {what} is not a number at step {self.progress.step + 1} of {self.total}: training has diverged",
                "a lower --lr, a longer --warmup, or --precision fp32"
                + (f"; the last checkpoint is in `{last.parent}`" if last else ""),
            )
        taken = self._precision.step(self._optimizer)
        self._optimizer.zero_grad(set_to_none=True)
        return mean, norm, taken

    def _evaluate_when_due(self, is_last: bool = False) -> None:
        step, every = self.progress.step, self._options.evaluate_every or self._epoch_steps
        if not self._objective.validation or step == self.progress.evaluated:
            return
        if step % every == 0 or is_last:
            with self._average.in_place() if self._average else nullcontext():
                self._evaluate()

    def _evaluate(self) -> None:
        """Measure on the held-back rows, and remember the best weights if the run may stop early."""
        progress, objective = self.progress, self._objective
        loss, score = self.evaluate()
        progress.evaluated = progress.step
        self._log.write(
            step=progress.step,
            epoch=round(progress.step / self._epoch_steps, 4),
            validation_loss=loss,
            **{objective.metric: score},
        )
        if self._options.patience is None:
            return
        progress.stale += 1
        if loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.stale = loss, progress.step, 0
            self._best = read_weights(objective.model)
            self._best_grids = self._quantizer.state() if self._quantizer else []

    def evaluate(self) -> tuple[float, float | None]:
        """Return the mean loss per item and the metric of the validation rows, every process computing its share."""
        import torch

        rows, parallel = self._objective.validation, self._parallel
        lengths = np.array([row.num_tokens for row in rows])
        batches = list(in_order_of_length(lengths, max(1, self._batch_size // self._options.accumulate)))
        own = list(range(parallel.rank, len(batches), parallel.world))
        company = [0] * (-(-len(batches) // parallel.world) - len(own))  # with fsdp all compute together
        found = {}
        self._model.eval()
        with torch.no_grad(), self._quantizer.rounded(follow=False) if self._quantizer else nullcontext():
            for number in (*own, *company):
                with self._precision.autocast():
                    loss, predictions = self._objective.loss(self._model, [rows[index] for index in batches[number]])
                found[number] = float(loss), predictions.float().cpu().numpy()
        merged = {number: part for parts in parallel.gather(found) for number, part in parts.items()}
        ordered = [merged[number] for number in range(len(batches))]
        predicted = np.empty((len(rows), *ordered[0][1].shape[1:]), np.float32)
        for indices, (_, predictions) in zip(batches, ordered, strict=True):
            predicted[indices] = predictions
        mean = sum(loss for loss, _ in ordered) / sum(row.items for row in rows)
        return mean, self._objective.score(predicted, rows, mean)

    def _save(self) -> None:
        """Write a checkpoint: everything that the steps to come depend on."""
        import torch

        weights, optimizer = read_state(self._objective.model, self._optimizer)
        cuda = torch.cuda.get_rng_state(self._parallel.device) if self._parallel.device.type == "cuda" else None
        random = self._parallel.gather((torch.get_rng_state(), cuda))
        failure: ResourceError | None = None
        if self._parallel.is_main:
            state = {
                "weights": weights,
                "optimizer": optimizer,
                "precision": self._precision.state(),
                "progress": asdict(self.progress),
                "best": self._best,
                "best_grids": self._best_grids,
                "grids": self._quantizer.state() if self._quantizer else None,
                "average": self._average.state() if self._average else None,
                "random": [one for one, _ in random],
                "cuda_random": [one for _, one in random],
            }
            try:
                self._snapshots.write(self.progress.step, state)
            except ResourceError as error:
                failure = error
        failed = next((one for one in self._parallel.gather(failure) if one is not None), None)
        if failed is not None:
            raise failed

    def _restore_best(self) -> None:
        """Put the weights of the best validation in place of the last ones."""
        if any(self._parallel.gather(bool(self._best))) and self.progress.best_step != self.progress.step:
            best = next(one for one in self._parallel.gather(self._best) if one)
            _, state = read_state(self._objective.model, self._optimizer)
            write_state(self._objective.model, self._optimizer, best, self._parallel.gather(state)[0])
            if self._quantizer:
                self._quantizer.load(self._best_grids)
            note(f"note: the weights are those of step {self.progress.best_step}, which validated best")

    def _interrupt(self, received: list[int]) -> None:
        self._save()
        note(f"note: stopped after step {self.progress.step}: the same command with --resume goes on from there")
        if signal.SIGTERM in received:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt
