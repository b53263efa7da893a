"""What every bundle of a run is given to do: lengths that fit the smallest context of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llmfast import report
from llmfast.bench.options import BenchOptions, numbers, parse_shapes
from llmfast.bundle import SEQ2SEQ_TASKS, TEXT_GENERATION, UNKNOWN_TASK
from llmfast.errors import OptionError

PROMPT_TOKENS = 512
OUTPUT_TOKENS = 128
ENCODER_BATCH = 8
ENCODER_TOKENS = 128
SEQ_LEN = 512

# What metrics are for, by what a model is given: text to read at once, text to read and write, or inputs of any form.
ENCODER_TASKS = (
    "feature-extraction",
    "fill-mask",
    "question-answering",
    "text-classification",
    "text-ranking",
    "token-classification",
)
TEXT_TASKS = (TEXT_GENERATION, *SEQ2SEQ_TASKS, *ENCODER_TASKS)
SIGNAL_TASKS = (
    "audio-classification",
    "automatic-speech-recognition",
    "image-classification",
    "image-feature-extraction",
    "zero-shot-image-classification",
    UNKNOWN_TASK,
)

Shapes = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Workload:
    """The lengths of a run.

    Attributes:
        task: the bundles'.
        shapes: name, e.g. `8x128` -> (batch, length) of the random inputs or prompts.
        output_tokens: tokens generated after each prompt of a batch.
        seq_len: tokens of a window of text that quality is measured on.
    """

    task: str
    shapes: Shapes
    output_tokens: int = OUTPUT_TOKENS
    seq_len: int = SEQ_LEN

    @property
    def is_batch(self) -> bool:
        """Whether every input is of several rows."""
        return bool(self.shapes) and all(batch > 1 for batch, _ in self.shapes.values())

    @property
    def max_length(self) -> int | None:
        """Positions that a decoder's cache must hold; None for encoders."""
        longest = max((length for _, length in self.shapes.values()), default=0)
        if self.task in SEQ2SEQ_TASKS:
            return self.output_tokens
        return max(longest + self.output_tokens, self.seq_len) if self.task == TEXT_GENERATION else None


def per_case(key: str, shapes: Iterable[str]) -> list[str]:
    """Return a metric's key for every shape.

    `latency_s_{shape}` names its shape always; `ttft_s{case}` only where there are several: `ttft_s_1x512`.
    """
    names = list(shapes)
    if "{shape}" not in key and "{case}" not in key:
        return [key]
    return [key.format(shape=name, case=f"_{name}" if len(names) > 1 else "") for name in names]


def case_of(shape: str, shapes: Iterable[str]) -> str:
    """Return what a shape adds to a key that ends with `{case}`."""
    return per_case("{case}", shapes)[list(shapes).index(shape)]


def plan(task: str, options: BenchOptions, contexts: Sequence[tuple[str, int | None]]) -> Workload:
    """Choose the lengths of a run: those asked for, else defaults that fit.

    Args:
        task: the bundles'.
        options: of the run.
        contexts: each bundle's name and context length, None when unknown.

    Raises:
        OptionError: a length that was asked for and that a bundle does not hold.
    """
    known = [(context, name) for name, context in contexts if context is not None]
    context, name = min(known, default=(None, ""))
    if task in SEQ2SEQ_TASKS and (wide := max(numbers(options.batch), default=1)) > 1:
        hint = "measure decoders and encoders in batches; for encoder-decoders leave --batch out"
        raise OptionError(f"--batch {wide}: models for {task} are measured one sequence at a time", hint)
    if task == TEXT_GENERATION:
        return _plan_decoder(task, options, context, name)
    if task in SEQ2SEQ_TASKS:
        return _plan_seq2seq(task, options, context, name)
    return Workload(task, _plan_encoder(options, context, name))


def _plan_decoder(task: str, options: BenchOptions, context: int | None, name: str) -> Workload:
    shapes = parse_shapes(options.shapes) if options.shapes is not None else {}
    prompts, output = numbers(options.prompt_tokens), options.output_tokens
    prompts = tuple(length for _, length in shapes.values()) or prompts
    room = context if context is not None else PROMPT_TOKENS + OUTPUT_TOKENS
    if output is None:
        output = min(OUTPUT_TOKENS, max(2, room - max(prompts) if prompts else room // 4))
    prompts = prompts or (min(PROMPT_TOKENS, max(1, room - output)),)
    longest = max(prompts) + output
    if context is not None and longest > context:
        flags = " + ".join(
            f"--{flag} {size}"
            for flag, size, asked in (
                ("prompt-tokens", max(prompts), options.prompt_tokens or options.shapes),
                ("output-tokens", output, options.output_tokens),
            )
            if asked is not None
        )
        raise OptionError(f"{flags}: {longest} tokens, `{name}` holds {context}", "ask for fewer")
    is_chosen = options.prompt_tokens is None and options.shapes is None and options.output_tokens is None
    if is_chosen and longest < PROMPT_TOKENS + OUTPUT_TOKENS:
        report.note(f"note: `{name}` holds {context} tokens: {prompts[0]} prompt and {output} output tokens")
    seq_len = options.seq_len if options.seq_len is not None else min(SEQ_LEN, context or SEQ_LEN)
    if options.data is not None and context is not None and seq_len > context:
        raise OptionError(f"--seq-len {seq_len}: `{name}` holds {context} tokens", "ask for fewer")
    return Workload(task, shapes or _grid(numbers(options.batch) or (1,), prompts), output, seq_len)


def _plan_seq2seq(task: str, options: BenchOptions, context: int | None, name: str) -> Workload:
    prompts = numbers(options.prompt_tokens) or (min(PROMPT_TOKENS, context or PROMPT_TOKENS),)
    # The start token takes a position of the target.
    output = options.output_tokens or min(OUTPUT_TOKENS, max(2, (context or OUTPUT_TOKENS + 1) - 1))
    for flag, size in (("--prompt-tokens", max(prompts)), ("--output-tokens + 1", output + 1)):
        if context is not None and size > context:
            raise OptionError(f"{flag}: {size} tokens, `{name}` holds {context}", "ask for fewer")
    seq_len = min(options.seq_len or SEQ_LEN, context or SEQ_LEN)
    return Workload(task, _grid((1,), prompts), output, seq_len)


def _plan_encoder(options: BenchOptions, context: int | None, name: str) -> Shapes:
    if options.shapes is not None:
        shapes = parse_shapes(options.shapes)
    else:
        lengths = numbers(options.prompt_tokens) or (min(ENCODER_TOKENS, context or ENCODER_TOKENS),)
        shapes = _grid(numbers(options.batch) or (ENCODER_BATCH,), lengths)
    for shape, (_, length) in shapes.items():
        if context is not None and length > context:
            flag = "--shapes" if options.shapes is not None else "--prompt-tokens"
            raise OptionError(f"{flag} {shape}: {length} tokens, `{name}` holds {context}", "ask for fewer")
    return shapes


def _grid(batches: Sequence[int], lengths: Sequence[int]) -> Shapes:
    return {f"{batch}x{length}": (batch, length) for batch in batches for length in lengths}
