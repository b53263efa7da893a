"""Does speculation change an answer, and does it pay? Real prompts of two kinds, with and without it.

    python scripts/check_speculation.py BUNDLE TEXT_FILE [--prompts 200] [--max-tokens 64] [--draft BUNDLE]

Paragraphs of the file become prompts: half ask for a copy of the paragraph, half ask what comes next. Each is answered
greedily by a plain decoder and by one that speculates, one right after the other. If an answer differs, the exit code
is 1. CPU time is that of this process: on a busy machine it says more than the clock.
"""

import argparse
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from llmfast.bundle import ModelBundle
from llmfast.infer.engine import Engine
from llmfast.infer.generate import Generation, encode_prompt, finish, generate
from llmfast.infer.opening import open_decoder, open_speculating
from llmfast.infer.sampling import Sampling
from llmfast.infer.speculate import Speculation
from llmfast.tokenizer import Tokenizer

KINDS = {
    "copying": "Repeat this text word for word, without any comment:\n\n{text}",
    "not copying": "What could the author write next, on another subject? Begin at once.\n\n{text}",
}
ROOM = 1024  # tokens of a prompt and its answer


@dataclass
class Answer:
    generation: Generation
    wall_s: float
    cpu_s: float


def read_prompts(path: Path, count: int) -> list[tuple[str, str]]:
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    texts = [line[:600] for line in lines if len(line) >= 200]
    if len(texts) < count:
        sys.exit(f"{path} has {len(texts)} paragraphs of 200 characters, {count} are wanted")
    step = len(texts) // count
    kinds = list(KINDS)
    return [(kinds[i % 2], KINDS[kinds[i % 2]].format(text=texts[i * step])) for i in range(count)]


def answer(
    engine: Engine, tokenizer: Tokenizer, prompt: str, max_tokens: int, speculation: Speculation | None
) -> Answer:
    ids = encode_prompt(tokenizer, prompt)
    wall, cpu = time.perf_counter(), time.process_time()
    pieces = generate(engine, tokenizer, ids, max_tokens, Sampling(), (), tokenizer.eos_ids, speculation)
    generation = finish(pieces)
    return Answer(generation, time.perf_counter() - wall, time.process_time() - cpu)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("texts", type=Path, nargs="?", default=os.environ.get("LLMFAST_TEXTS"))
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--draft", type=Path)
    options = parser.parse_args()
    if options.texts is None:
        parser.error("give a file of texts, or name it in LLMFAST_TEXTS")
    prompts = read_prompts(Path(options.texts), options.prompts)
    bundle = ModelBundle.open(options.bundle)
    tokenizer = Tokenizer.load(bundle.path)
    room = ROOM - options.max_tokens
    plain = open_decoder(bundle, "cpu", options.threads, ROOM)
    engine, speculation = open_speculating(
        bundle, tokenizer, room, options.max_tokens, "cpu", options.threads, True, options.draft
    )
    pairs: dict[str, list[tuple[Answer, Answer]]] = {kind: [] for kind in KINDS}
    for number, (kind, prompt) in enumerate(prompts):
        order = ((plain, None), (engine, speculation))
        results = [
            answer(one, tokenizer, prompt, options.max_tokens, drafts)
            for one, drafts in (order if number % 2 else order[::-1])
        ]
        before, after = results if number % 2 else results[::-1]
        pairs[kind].append((before, after))
        if before.generation.text != after.generation.text:
            print(f"differs: {before.generation.text!r}\n         {after.generation.text!r}")
    differing = 0
    for kind, answers in pairs.items():
        same = sum(a.generation.text == b.generation.text for a, b in answers)
        differing += len(answers) - same
        drafted = sum(b.generation.drafted_tokens for _, b in answers)
        accepted = sum(b.generation.accepted_tokens for _, b in answers)
        decode = [
            b.generation.decode_tokens_per_s / a.generation.decode_tokens_per_s
            for a, b in answers
            if a.generation.decode_tokens_per_s and b.generation.decode_tokens_per_s
        ]
        tokens = sum(a.generation.generated_tokens for a, _ in answers)
        slowest = sorted(decode)[len(decode) // 20]
        wall = sum(a.wall_s for a, _ in answers) / sum(b.wall_s for _, b in answers)
        cpu = sum(a.cpu_s for a, _ in answers) / sum(b.cpu_s for _, b in answers)
        print(
            f"{kind}: {same} of {len(answers)} answers identical, {tokens} tokens; {accepted} of {drafted} drafted "
            f"tokens accepted; decode {statistics.median(decode):.2f}x (median), {slowest:.2f}x (5th percentile); "
            f"{wall:.2f}x by the clock and {cpu:.2f}x in CPU time with the prompts"
        )
    print(f"rows of a step have the bits of single steps: {'yes' if speculation and speculation.is_exact else 'no'}")
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
