"""Bundles of llmfast against other engines on the same checkpoint: prompt and decode speed in interleaved rounds.

    python scripts/peers/compare.py --checkpoint smollm2 --gguf smollm2.gguf --ours int8 int4 --install

Each peer runs in an environment of its own, which --install makes (gigabytes, and minutes) and --peer names; each
format of a peer and each bundle is a process that lives through the run. In a round each takes its turn at every
workload, in an order that rotates, with the same random tokens, new ones each time. Decoding is greedy; its speed does
not count the prompt. A peer that does not install, convert or run gets a row that says why, and the run goes on.
Prints Markdown: medians of tokens per second, and how many times as fast as each peer llmfast is, formed within rounds.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Not the folder of this file: in it are scripts with the names of the peers' packages.
SCRIPTS = Path(__file__).resolve().parent.parent
sys.path[0] = str(SCRIPTS)

PEERS = ("onnxruntime_genai", "openvino_genai", "llama_cpp", "ctranslate2", "torch_eager")
OPEN_LIMIT, TURN_LIMIT = 1800, 600  # seconds: to convert and open a model, and to answer once
PAUSE = 0.2  # seconds between turns: threads of some peers spin for a while, and would take the next one's cores


@dataclass(frozen=True)
class Workload:
    """Read a prompt of random tokens, then take so many steps: these are timed if there are any, else the prompt is."""

    name: str
    prompt: int
    steps: int

    def speed(self, seconds: list[float]) -> float:
        """Return tokens per second."""
        return self.steps / sum(seconds[1:]) if self.steps else self.prompt / seconds[0]


@dataclass
class Contestant:
    """A peer with one format, or a bundle of llmfast.

    Attributes:
        name: as the tables print it.
        command: starts its script; empty when there is none to start.
        log: what it prints on standard error.
        ours: it is a bundle of llmfast.
        failure: why it does not run (any more).
        hello: what its script said first.
        speeds: workload -> tokens per second of each round.
    """

    name: str
    command: list[str]
    log: Path
    ours: bool = False
    failure: str | None = None
    hello: dict[str, Any] = field(default_factory=dict)
    speeds: dict[str, list[float]] = field(default_factory=dict)
    process: subprocess.Popen[str] | None = None

    def open(self, threads: int) -> None:
        """Start the script, which converts the model the first time, and wait until it is ready."""
        settings = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1"}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=SCRIPTS,
                env={**os.environ, **settings},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.hello = self._read(OPEN_LIMIT) or {}

    def run(self, workload: Workload, ids: list[int], is_warmup: bool) -> None:
        """Take a turn; a contestant that fails keeps the reason and takes no more."""
        assert self.process is not None
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is gone, which reading tells
            print(json.dumps({"ids": ids, "tokens": workload.steps + 1}), file=self.process.stdin, flush=True)
        reply = self._read(TURN_LIMIT)
        if reply is not None and not is_warmup:
            self.speeds.setdefault(workload.name, []).append(workload.speed(reply["seconds"]))

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()

    def _read(self, limit: float) -> dict[str, Any] | None:
        """Return the next reply; None, and a failure, when the process ended or took too long."""
        assert self.process is not None
        assert self.process.stdout is not None
        late = threading.Event()
        timer = threading.Timer(limit, lambda: (late.set(), self.close()))
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        if line:
            return dict(json.loads(line))
        self.process.wait()
        said = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        reason = said[-1] if said else f"ended with {self.process.returncode}"
        self.failure = f"no answer in {limit:.0f} s" if late.is_set() else f"{reason} ({self.log})"
        return None


def main() -> int:
    options = parse()
    workloads = [Workload(f"prompt {length}", length, 0) for length in options.prompt]
    workloads += [
        Workload(f"decode {options.decode} after {length}", max(length, 1), options.decode)
        for length in (0, *options.after)
    ]
    context = max(one.prompt + one.steps + 1 for one in workloads)
    vocab_size = json.loads((options.checkpoint / "config.json").read_text())["vocab_size"]
    contestants = list(enter(options, context))
    load = os.getloadavg()[0]
    try:
        for one in contestants:
            if one.failure is None:
                note(f"opening {one.name}")
                one.open(options.threads)
        measure(contestants, workloads, options.rounds, random.Random(options.seed), vocab_size)
    except KeyboardInterrupt:
        return 130
    finally:
        for one in contestants:
            one.close()
    machine = {**describe_machine(), "threads": options.threads, "load_average_before": load}
    print(render(contestants, workloads, machine, options.rounds))
    if options.json:
        rows = [
            {"name": c.name, "ours": c.ours, "failure": c.failure, **c.hello, "speeds": c.speeds} for c in contestants
        ]
        options.json.write_text(
            json.dumps({"machine": machine, "rounds": options.rounds, "contestants": rows}, indent=1)
        )
    return 0 if any(one.speeds for one in contestants) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="Hugging Face folder of a decoder")
    add("--gguf", type=Path, help="the same weights for llama.cpp")
    add(
        "--ours", type=Path, nargs="*", default=[], metavar="BUNDLE", help="bundles that llmfast made of the checkpoint"
    )
    add("--only", nargs="+", choices=PEERS, default=PEERS, help="peers to run (default: all)")
    add(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=PYTHON",
        help="a Python that has this peer; can be repeated",
    )
    add("--install", action="store_true", help="make the environments that are missing, below --work")
    add("--work", type=Path, default=Path(".peers"), help="environments, converted models and logs (default: .peers)")
    add("--prompt", type=int, nargs="+", default=[512], help="lengths of prompts (default: 512)")
    add("--decode", type=int, default=128, help="steps of decoding (default: 128)")
    add("--after", type=int, nargs="*", default=[512], help="decode after so many tokens too (default: 512)")
    add("--rounds", type=int, default=5, help="rounds that count, after one that does not (default: 5)")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--seed", type=int, default=0)
    add("--json", type=Path, metavar="FILE", help="write every figure")
    options = parser.parse_args()
    pythons = dict(pair.partition("=")[::2] for pair in options.peer)
    if unknown := sorted(set(pythons) - set(PEERS)):
        parser.error(f"--peer {unknown[0]}: the peers are {', '.join(PEERS)}")
    options.pythons = {name: Path(os.path.abspath(path)) for name, path in pythons.items()}  # links are kept: venvs
    if not (options.checkpoint / "config.json").is_file():
        parser.error(f"--checkpoint {options.checkpoint}: there is no config.json in it")
    for path in filter(None, (options.gguf, *options.ours)):
        if not path.exists():
            parser.error(f"{path} does not exist")
    if min(options.rounds, options.decode, options.threads, *options.prompt, *options.after) < 1:
        parser.error("lengths, rounds and threads must be at least 1")
    options.work = options.work.resolve()
    return options


def enter(options: argparse.Namespace, context: int) -> Any:
    """Yield the contestants, not yet opened; environments are made here."""
    arguments = ["--checkpoint", str(options.checkpoint.resolve())]
    arguments += ["--gguf", str(options.gguf.resolve())] if options.gguf else []
    arguments += ["--threads", str(options.threads), "--context", str(context)]
    for name in options.only:
        module = importlib.import_module(f"peers.{name}")
        python, failure = environment(name, module, options)
        if failure is None and name == "llama_cpp" and options.gguf is None:
            failure = "needs the checkpoint as a GGUF file (--gguf)"
        source = options.gguf if name == "llama_cpp" and options.gguf else options.checkpoint
        models = options.work / "models" / fingerprint(source.resolve())
        for form in module.FORMATS:
            model = models / f"{name}-{form.partition(' ')[0]}"  # the rest is how it is run
            command = [str(python), "-m", f"peers.{name}", "--model", str(model), "--format", form]
            log = options.work / "logs" / f"{name}-{form.replace(' ', '-')}.log"
            yield Contestant(f"{name} {form}", [*command, *arguments], log, failure=failure)
    for path in options.ours:
        command = [sys.executable, "-m", "peers.llmfast_bundle", "--model", str(path.resolve()), "--format", path.name]
        log = options.work / "logs" / f"llmfast-{path.name}.log"
        yield Contestant(f"llmfast {path.name}", [*command, *arguments], log, ours=True)


def fingerprint(path: Path) -> str:
    """Return what tells checkpoints apart: where one is, and the sizes and times of its files."""
    files = [path] if path.is_file() else sorted(path.iterdir())
    states = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()[:12]


def environment(name: str, module: Any, options: argparse.Namespace) -> tuple[Path, str | None]:
    """Return the peer's Python, and why it cannot be used."""
    if name in options.pythons:
        python = options.pythons[name]
        return python, None if python.is_file() else f"--peer {name}: `{python}` does not exist"
    folder = options.work / "environments" / name
    python, stamp, wanted = folder / "bin" / "python", folder / "installed", "\n".join(module.REQUIREMENTS)
    if stamp.is_file() and stamp.read_text() == wanted:
        return python, None
    if not options.install:
        return python, f"not installed: give --install or --peer {name}=PYTHON"
    note(f"installing {name}")
    log = options.work / "logs" / f"{name}-install.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    settings = getattr(module, "BUILD_SETTINGS", {})
    with log.open("w") as output:
        for command in (
            [sys.executable, "-m", "venv", str(folder)],
            [str(python), "-m", "pip", "install", "--disable-pip-version-check", *module.REQUIREMENTS],
        ):
            status = subprocess.run(command, env={**os.environ, **settings}, stdout=output, stderr=subprocess.STDOUT)
            if status.returncode:
                return python, f"could not be installed: see {log}"
    stamp.write_text(wanted)
    return python, None


def measure(
    contestants: list[Contestant], workloads: list[Workload], rounds: int, rng: random.Random, vocab_size: int
) -> None:
    """Let all take turns; the first round warms up and does not count."""
    for number in range(rounds + 1):
        note(f"round {number} of {rounds}" if number else "warm-up")
        for workload in workloads:
            ids = [rng.randrange(vocab_size) for _ in range(workload.prompt)]
            shift = number % len(contestants)
            for one in contestants[shift:] + contestants[:shift]:
                if one.failure is None:
                    time.sleep(PAUSE)
                    one.run(workload, ids, is_warmup=number == 0)


def render(contestants: list[Contestant], workloads: list[Workload], machine: dict[str, Any], rounds: int) -> str:
    """Return two tables: speeds, and how many times as fast as each peer llmfast is."""
    names = [workload.name for workload in workloads]
    lines = [", ".join(f"{key} {value}" for key, value in machine.items()) + f", rounds {rounds}", ""]
    lines += row("tokens/s", "MB", *names, "versions") + row(*["---"], *["--:"] * (len(names) + 1), "---")
    for one in contestants:
        speeds = [f"{statistics.median(one.speeds[name]):.1f}" if name in one.speeds else "" for name in names]
        size = f"{one.hello['bytes'] / 1e6:.0f}" if one.hello else ""
        versions = " ".join(f"{name} {version}" for name, version in one.hello.get("versions", {}).items())
        lines += row(one.name, size, *speeds, f"failed: {one.failure}" if one.failure else versions)
    ours = [one for one in contestants if one.ours]
    peers = [one for one in contestants if not one.ours and one.speeds]
    for bundle in ours if peers else ():
        lines += ["", *row(f"{bundle.name}, times as fast as", *names), *row("---", *["--:"] * len(names))]
        for peer in peers:
            lines += row(peer.name, *(ratio(bundle, peer, name) for name in names))
        lines += row("**the fastest**", *(f"**{ratio(bundle, fastest(peers, name), name)}**" for name in names))
    return "\n".join(lines)


def row(*cells: str) -> list[str]:
    return [f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"]


def fastest(peers: list[Contestant], workload: str) -> Contestant:
    return max(peers, key=lambda peer: statistics.median(peer.speeds.get(workload, [0.0])))


def ratio(bundle: Contestant, peer: Contestant, workload: str) -> str:
    """Return the median of the rounds' ratios, of those rounds that both have."""
    pairs = zip(bundle.speeds.get(workload, []), peer.speeds.get(workload, []), strict=False)
    ratios = [mine / theirs for mine, theirs in pairs]
    return f"{statistics.median(ratios):.2f}" if ratios else ""


def describe_machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(fields.get("flags", "").split())
    return {
        "cpu": fields.get("model name", platform.processor() or platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "isa": " ".join(flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8") if flag in flags),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
