"""A server in a process of its own, for tests."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai

from llmfast.infer import stage as infer_stage

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}a:"


@dataclass
class Server:
    """A server process that a test may stop; it leads a group of processes."""

    process: "subprocess.Popen[str]"
    url: str
    lines: list[str]

    def client(self, **settings: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **settings})

    def figure(self, name: str) -> float:
        found = re.search(rf"^{name} (\S+)$", httpx.get(f"{self.url}/metrics").text, re.MULTILINE)
        assert found is not None
        return float(found.group(1))

    def wait_for(self, name: str, value: float) -> None:
        deadline = time.monotonic() + 60
        while self.figure(name) != value:
            assert time.monotonic() < deadline, f"{name} is {self.figure(name)}"
            time.sleep(0.02)


@contextlib.contextmanager
def serving(model: Path, *arguments: str, **environment: str) -> Iterator[Server]:
    process = subprocess.Popen(
        [sys.executable, "-m", "llmfast", "serve", str(model), "--port", "0", "--threads", "1", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
    )
    try:
        assert process.stderr is not None
        lines: list[str] = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"on (http://\S+)", line):
                break
        else:
            raise AssertionError("".join(lines))
        threading.Thread(target=lambda: lines.extend(process.stderr or ()), daemon=True).start()
        yield Server(process, found.group(1), lines)
    finally:
        process.kill()
        process.wait()


def copy_with_template(bundle: Path, folder: Path) -> Path:
    shutil.copytree(bundle, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def infer_text(bundle: Path, prompt: str, max_tokens: int, raw: bool = False) -> str:
    return infer_stage.infer(bundle, prompt, emit=lambda piece: None, max_tokens=max_tokens, raw=raw, threads=1).text


def chat(server: Server, text: str, **settings: Any) -> Any:
    return server.client().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": text}], **settings
    )


def processes(server: Server) -> list[int]:
    """Return the process that was started, its child, which serves, and the child's, which holds the model."""
    pids, children = [], [server.process.pid]
    while children:
        pids.append(children[0])
        threads = Path(f"/proc/{pids[-1]}/task").iterdir()
        children = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    return pids
