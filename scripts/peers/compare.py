"""Bundles of llmfast against other engines on the same checkpoint: prompt and decode speed in interleaved rounds.

    python scripts/peers/compare.py --checkpoint smollm2 --gguf smollm2.gguf --ours int8 int4 --data text.txt --install

Each peer runs in an environment of its own, which --install makes (gigabytes, and minutes) and --peer names; each
format of a peer and each bundle is a process that lives through the run. In a round each takes its turn at every
workload, in an order that rotates, with the same random tokens, new ones each time. Decoding is greedy; its speed does
not count the prompt, but that of --batch counts the prompts in: it is generated tokens by the whole time. With --data,
how close each one's predictions on a text stay to the checkpoint's in float32, by PyTorch, is measured first. A peer
that does not install, convert or run gets a row that says why, and the run goes on. Prints Markdown: quality,
megabytes of weights, medians of tokens per second, and how many times as fast as each peer llmfast is, formed within
rounds.
"""

import argparse
import hashlib
import importlib
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Not the folder of this file: in it are scripts with the names of the peers' packages.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from peers.contestant import Batch, Contestant, Workload  # noqa: E402

from llmfast.processor import instruction_sets, processor_name  # noqa: E402

PEERS = ("onnxruntime_genai", "openvino_genai", "llama_cpp", "ctranslate2", "torch_eager")
REFERENCE = "torch_eager"  # of quality
PAUSE = 0.2  # seconds between turns: threads of some peers spin for a while, and would take the next one's cores


def main() -> int:
    options = parse()
    workloads: list[Workload | Batch] = [Workload(f"prompt {length}", length, 0) for length in options.prompt]
    workloads += [
        Workload(f"decode {options.decode} after {length}", max(length, 1), options.decode)
        for length in (0, *options.after)
    ]
    if options.batch:
        workloads.append(Batch(f"{options.batch} prompts", options.batch, *options.batch_lengths, options.decode))
    windows = windows_of(options)
    context = max(*(one.context for one in workloads), *map(len, windows))
    vocab_size = json.loads((options.checkpoint / "config.json").read_text())["vocab_size"]
    peers = {name: list(enter_peer(name, options, context)) for name in options.only}
    contestants = [*itertools.chain(*peers.values()), *(enter_bundle(path, options, context) for path in options.ours)]
    reference = None
    if windows:
        (reference,) = peers.get(REFERENCE) or enter_peer(REFERENCE, options, context)
        if reference.failure is not None:
            note(f"error: --data needs {REFERENCE} to compare with: {reference.failure}")
            return 2
    load = os.getloadavg()[0]
    try:
        for one in contestants:
            open_contestant(one, options.threads)
        if reference is not None:
            score(contestants, reference, windows, options.threads)
        measure(contestants, workloads, options.rounds, random.Random(options.seed), vocab_size)
    except KeyboardInterrupt:
        return 130
    finally:
        for one in contestants:
            one.close()
    machine = {**describe_machine(), "threads": options.threads, "load_average_before": load}
    data = {"file": options.data.name, "windows": len(windows), "window_length": len(windows[0])} if windows else None
    print(render(contestants, workloads, machine, options.rounds, data))
    if options.json:
        rows = [
            {
                "name": c.name,
                "ours": c.ours,
                "failure": c.failure,
                **c.hello,
                "quality": c.quality or None,
                "unscored": c.unscored,
                "speeds": c.speeds,
            }
            for c in contestants
        ]
        document = {"machine": machine, "rounds": options.rounds, "data": data, "contestants": rows}
        options.json.write_text(json.dumps(document, indent=1))
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
    add("--data", type=Path, metavar="FILE", help="a text to measure quality on, against the checkpoint in float32")
    add("--windows", type=int, default=8, help="how many windows of the text, from its beginning (default: 8)")
    add("--window-length", type=int, default=512, help="tokens of each window (default: 512)")
    add("--prompt", type=int, nargs="+", default=[512], help="lengths of prompts (default: 512)")
    add("--decode", type=int, default=128, help="steps of decoding (default: 128)")
    add("--after", type=int, nargs="*", default=[512], help="decode after so many tokens too (default: 512)")
    add("--batch", type=int, default=0, metavar="N", help="answer so many prompts at once too")
    add("--batch-lengths", type=int, nargs=2, default=[64, 256], metavar="TOKENS", help="of these (default: 64 256)")
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
    for path in filter(None, (options.gguf, options.data, *options.ours)):
        if not path.exists():
            parser.error(f"{path} does not exist")
    if min(options.rounds, options.decode, options.threads, options.windows, *options.prompt, *options.after) < 1:
        parser.error("lengths, rounds, windows and threads must be at least 1")
    if options.batch < 0 or not 0 < options.batch_lengths[0] <= options.batch_lengths[1]:
        parser.error("--batch must not be negative; --batch-lengths are the shortest prompt and the longest")
    if options.window_length < 2:
        parser.error(
            "--window-length must be at least 2: the last token of a window is predicted, and predicts nothing"
        )
    options.work = options.work.resolve()
    return options


def windows_of(options: argparse.Namespace) -> list[Any]:
    """Return what quality is measured on, int64 [length] each; nothing without --data."""
    if options.data is None:
        return []
    from peers.quality import read_windows

    from llmfast.errors import LlmfastError

    try:
        return read_windows(options.checkpoint, options.data, options.windows, options.window_length)
    except LlmfastError as error:
        note(f"error: {error}")
        sys.exit(error.exit_code)


def enter_peer(name: str, options: argparse.Namespace, context: int) -> Iterator[Contestant]:
    """Yield a peer in each of its formats, not yet opened; its environment is made here."""
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
        yield Contestant(f"{name} {form}", [*command, *model_arguments(options, context)], log, failure=failure)


def enter_bundle(path: Path, options: argparse.Namespace, context: int) -> Contestant:
    """Return a bundle of llmfast, not yet opened."""
    command = [sys.executable, "-m", "peers.llmfast_bundle", "--model", str(path.resolve()), "--format", path.name]
    log = options.work / "logs" / f"llmfast-{path.name}.log"
    return Contestant(f"llmfast {path.name}", [*command, *model_arguments(options, context)], log, ours=True)


def model_arguments(options: argparse.Namespace, context: int) -> list[str]:
    """Return what every script is told."""
    arguments = ["--checkpoint", str(options.checkpoint.resolve())]
    arguments += ["--gguf", str(options.gguf.resolve())] if options.gguf else []
    return [*arguments, "--threads", str(options.threads), "--context", str(context)]


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
        pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
        unwanted = getattr(module, "UNWANTED", ())
        for command in (
            [sys.executable, "-m", "venv", str(folder)],
            [*pip, "install", *module.REQUIREMENTS],
            *([*pip, "uninstall", "--yes", package] for package in unwanted),
        ):
            status = subprocess.run(command, env={**os.environ, **settings}, stdout=output, stderr=subprocess.STDOUT)
            if status.returncode:
                return python, f"could not be installed: see {log}"
    stamp.write_text(wanted)
    return python, None


def open_contestant(one: Contestant, threads: int) -> None:
    if one.failure is None:
        note(f"opening {one.name}")
        one.open(threads)


def score(contestants: list[Contestant], reference: Contestant, windows: list[Any], threads: int) -> None:
    """Measure the quality of all; a reference that takes part in nothing else lives no longer than this."""
    from peers.quality import measure_quality

    if reference in contestants:
        measure_quality(contestants, reference, windows, note)
        return
    try:
        open_contestant(reference, threads)
        measure_quality(contestants, reference, windows, note)
    finally:
        reference.close()


def measure(
    contestants: list[Contestant], workloads: list[Workload | Batch], rounds: int, rng: random.Random, vocab_size: int
) -> None:
    """Let all take turns; the first round warms up and does not count."""
    for number in range(rounds + 1):
        note(f"round {number} of {rounds}" if number else "warm-up")
        for workload in workloads:
            request = workload.draw(rng, vocab_size)
            shift = number % len(contestants)
            for one in contestants[shift:] + contestants[:shift]:
                if one.failure is None:
                    time.sleep(PAUSE)
                    one.run(workload, request, is_warmup=number == 0)


def render(
    contestants: list[Contestant],
    workloads: list[Workload | Batch],
    machine: dict[str, Any],
    rounds: int,
    data: dict[str, Any] | None,
) -> str:
    """Return two tables: quality, size and speeds, and how many times as fast as each peer llmfast is."""
    names = [workload.name for workload in workloads]
    title = ", ".join(f"{key} {value}" for key, value in machine.items()) + f", rounds {rounds}"
    if data:
        title += f", quality on {data['windows']} x {data['window_length']} tokens of {data['file']}"
    columns = [*(("KLD", "top-1 %") if data else ()), "MB", *names]
    lines = [title, "", *row("tokens/s", *columns, "versions"), *row("---", *["--:"] * len(columns), "---")]
    for one in contestants:
        quality = qualities(one) if data else []
        speeds = [f"{statistics.median(one.speeds[name]):.1f}" if name in one.speeds else "" for name in names]
        size = f"{one.hello['bytes'] / 1e6:.0f}" if one.hello else ""
        remarks = [" ".join(f"{name} {version}" for name, version in one.hello.get("versions", {}).items())]
        remarks += [f"no quality: {one.unscored}"] if one.unscored else []
        remarks = [f"failed: {one.failure}"] if one.failure else remarks
        lines += row(one.name, *quality, size, *speeds, "; ".join(remarks))
    ours = [one for one in contestants if one.ours]
    peers = [one for one in contestants if not one.ours and one.speeds]
    for bundle in ours if peers else ():
        lines += ["", *row(f"{bundle.name}, times as fast as", *names), *row("---", *["--:"] * len(names))]
        for peer in peers:
            lines += row(peer.name, *(ratio(bundle, peer, name) for name in names))
        lines += row("**the fastest**", *(f"**{ratio(bundle, fastest(peers, name), name)}**" for name in names))
        if close := [peer for peer in peers if is_as_close(peer, bundle)]:
            cells = (f"**{ratio(bundle, fastest(close, name), name)}**" for name in names)
            lines += row("**the fastest of no larger KLD**", *cells)
    return "\n".join(lines)


def qualities(one: Contestant) -> list[str]:
    """Return the cells of divergence and agreement."""
    if not one.quality:
        return ["-", "-"]
    return [f"{one.quality['kld']:.4f}", f"{one.quality['top1_agreement'] * 100:.1f}"]


def is_as_close(peer: Contestant, bundle: Contestant) -> bool:
    """Tell whether a peer stays as close to the checkpoint as a bundle does, where both are known."""
    return bool(peer.quality and bundle.quality) and peer.quality["kld"] <= bundle.quality["kld"]


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
    return {
        "cpu": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "isa": " ".join(instruction_sets()),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
