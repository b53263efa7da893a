"""Put load on `llmfast serve`, and compare it with `llmfast infer` on the same machine.

    python scripts/bench_serve.py BUNDLE --clients 16 --minutes 10

1. One client alone: TTFT and decode speed of streamed answers, against `infer` of the same prompts, interleaved.
2. --clients at once for --minutes, each asking anew when it has its answer, every other one a stream; 429 and 503 are
   counted apart from errors. /health is asked ten times a second meanwhile.
3. The first --again of the prompts answered in 2 once more by `infer --input`: the batch without a server.
4. A stream that is left after its first piece: how long until its row is free.

Prints one JSON object a line. Tokens per second in 2 and 3 are generated tokens over the whole time, prompts included.
"""

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from llmfast import quantize
from llmfast.text import read_text

_TEXT = Path(quantize.__file__).parent / "texts" / "calibration.txt"
_CHARACTERS = 300, 1000  # of a prompt: about 64 to 256 tokens


@dataclass
class Seen:
    """What clients have seen.

    Attributes:
        prompts: those that were answered.
        statuses: how often each status came; 0 is a broken connection, -1 an error within a stream.
        generated: tokens of the answers.
        first_s: seconds to the first piece of a stream.
        health_s: seconds of each answer of /health.
    """

    prompts: list[str] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)
    generated: int = 0
    first_s: list[float] = field(default_factory=list)
    health_s: list[float] = field(default_factory=list)

    def count(self, status: int) -> None:
        """Count an answer."""
        self.statuses[status] = self.statuses.get(status, 0) + 1


class Prompts:
    """Pieces of a text, of random lengths from random places; all different."""

    def __init__(self, text: str) -> None:
        self._text, self._rng = text, np.random.default_rng(0)

    def next(self) -> str:
        """Return another prompt."""
        length = int(self._rng.integers(*_CHARACTERS))
        start = int(self._rng.integers(0, max(1, len(self._text) - length)))
        return self._text[start : start + length]


async def ask(client: httpx.AsyncClient, prompt: str, tokens: int, stream: bool, seen: Seen) -> float:
    """Ask once; return tokens per second after the first piece of a stream, 0 where there is none."""
    body = {"prompt": prompt, "max_tokens": tokens, "stream": stream, "stream_options": {"include_usage": True}}
    start, first, usage = time.perf_counter(), 0.0, None
    try:
        if not stream:
            answer = await client.post("/v1/completions", json={"prompt": prompt, "max_tokens": tokens})
            seen.count(answer.status_code)
            usage = answer.json().get("usage")
        else:
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                async for line in answer.aiter_lines():
                    first = first or time.perf_counter()
                    if line.startswith("data: {"):
                        chunk = json.loads(line.removeprefix("data: "))
                        usage = chunk.get("usage") or usage
                seen.count(answer.status_code if answer.status_code != 200 or usage else -1)
    except (httpx.HTTPError, ValueError):
        seen.count(0)
    if usage is None:
        return 0.0
    seen.prompts.append(prompt)
    seen.generated += usage["completion_tokens"]
    if not first:
        return 0.0
    seen.first_s.append(first - start)
    return float((usage["completion_tokens"] - 1) / (time.perf_counter() - first))


async def load(url: str, prompts: Prompts, tokens: int, clients: int, seconds: float) -> tuple[Seen, float]:
    """Let clients ask for some time; return what they saw, and the seconds until the last answer."""
    seen, start = Seen(), time.perf_counter()
    limits = httpx.Limits(max_connections=clients + 1)

    async def one(client: httpx.AsyncClient, number: int) -> None:
        while time.perf_counter() - start < seconds:
            before = sum(seen.statuses.get(status, 0) for status in (429, 503))
            await ask(client, prompts.next(), tokens, number % 2 == 0, seen)
            if sum(seen.statuses.get(status, 0) for status in (429, 503)) > before:
                await asyncio.sleep(1)

    async def health(client: httpx.AsyncClient) -> None:
        while True:
            begin = time.perf_counter()
            try:
                (await client.get("/health")).raise_for_status()
            except httpx.HTTPError:
                seen.count(0)
            seen.health_s.append(time.perf_counter() - begin)
            await asyncio.sleep(0.1)

    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        watching = asyncio.create_task(health(client))
        await asyncio.gather(*(one(client, number) for number in range(clients)))
        watching.cancel()
    return seen, time.perf_counter() - start


def figure(url: str, name: str) -> float:
    """Return one of the server's figures."""
    found = re.search(rf"^{name} (\S+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE)
    assert found is not None
    return float(found.group(1))


def leave(url: str, prompt: str) -> float:
    """Leave a stream after its first piece; return the seconds until nothing is being answered."""
    body = {"prompt": prompt, "max_tokens": 1000, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=600) as answer:
        next(answer.iter_lines())
    start = time.perf_counter()
    while figure(url, "llmfast_requests_active"):
        time.sleep(0.005)
    return time.perf_counter() - start


def infer(bundle: Path, threads: list[str], *arguments: str) -> dict[str, Any]:
    """Run `llmfast infer`; return its document."""
    command = [sys.executable, "-m", "llmfast", "infer", str(bundle), "--raw", "--format", "json", *threads, *arguments]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def measure_alone(url: str, bundle: Path, threads: list[str], prompts: Prompts, tokens: int, rounds: int) -> None:
    """Compare a single stream with `infer`."""
    served: list[tuple[float, float]] = []
    alone: list[tuple[float, float]] = []

    async def once(prompt: str) -> tuple[float, float]:
        seen = Seen()
        async with httpx.AsyncClient(base_url=url, timeout=600) as client:
            speed = await ask(client, prompt, tokens, True, seen)
        return seen.first_s[0], speed

    asyncio.run(once(prompts.next()))  # the first request of a server opens connections and warms caches
    for _ in range(rounds):
        prompt = prompts.next()
        served.append(asyncio.run(once(prompt)))
        limits = "--max-tokens", str(tokens), "--no-speculate"
        found = infer(bundle, threads, "--prompt", prompt, *limits)
        alone.append((found["ttft_s"], found["decode_tokens_per_s"] or 0.0))
    for place, name in enumerate(("ttft_s", "decode_tokens_per_s")):
        ratio = statistics.median(one[place] / other[place] for one, other in zip(served, alone, strict=True))
        medians = [round(statistics.median(one[place] for one in found), 4) for found in (served, alone)]
        print(json.dumps({"single_stream": name, "serve": medians[0], "infer": medians[1], "ratio": round(ratio, 3)}))


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path, default=_TEXT, help="text that the prompts are cut from")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--again", type=int, default=400, help="prompts that `infer` answers, at most")
    parser.add_argument("--rounds", type=int, default=7, help="of the single stream, and of streams that are left")
    parser.add_argument("--threads", type=int, help="of server and `infer`")
    arguments = parser.parse_args()
    threads = [] if arguments.threads is None else ["--threads", str(arguments.threads)]
    prompts, tokens = Prompts(read_text(arguments.data)), arguments.new_tokens
    command = [sys.executable, "-m", "llmfast", "serve", str(arguments.bundle), "--port", "0", "--batch-size"]
    server = subprocess.Popen([*command, str(arguments.clients), *threads], stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    with tempfile.TemporaryDirectory(prefix="bench-serve-") as temporary:
        drain = None
        try:
            first = server.stderr.readline()
            found = re.search(r"on (http://\S+)", first)
            if found is None:
                server.terminate()
                raise SystemExit(f"the server did not start: {first}{server.stderr.read()}")
            url = found.group(1)
            drain = subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL)  # its log
            measure_alone(url, arguments.bundle, threads, prompts, tokens, arguments.rounds)
            seen, seconds = asyncio.run(load(url, prompts, tokens, arguments.clients, arguments.minutes * 60))
            left = [leave(url, prompts.next()) for _ in range(arguments.rounds)]
        finally:
            server.terminate()
            server.wait()
            if drain is not None:
                drain.wait()
        path = Path(temporary) / "prompts.jsonl"
        path.write_text(
            "".join(json.dumps({"prompt": one}) + "\n" for one in seen.prompts[: arguments.again]), encoding="utf-8"
        )
        options = "--max-tokens", str(tokens), "--batch-size", str(arguments.clients)
        batch = infer(
            arguments.bundle, threads, "--input", str(path), "--output", str(path.with_name("answers.jsonl")), *options
        )
    served = seen.generated / seconds
    refused = sum(seen.statuses.get(status, 0) for status in (429, 503))
    figures = {
        "clients": arguments.clients,
        "seconds": round(seconds, 1),
        "answered": len(seen.prompts),
        "refused": refused,
        "errors": sum(seen.statuses.values()) - seen.statuses.get(200, 0) - refused,
        "tokens_per_s": round(served, 1),
        "batch_infer_tokens_per_s": round(batch["tokens_per_s"], 1),
        "ratio": round(served / batch["tokens_per_s"], 3),
        "ttft_p50_s": round(float(np.percentile(seen.first_s, 50)), 4),
        "ttft_p99_s": round(float(np.percentile(seen.first_s, 99)), 4),
        "health_p99_s": round(float(np.percentile(seen.health_s, 99)), 4),
    }
    print(json.dumps(figures))
    print(json.dumps({"left_stream_frees_row_s": [round(one, 4) for one in left]}))


if __name__ == "__main__":
    main()
