"""Fuzz one reader with atheris: python scripts/fuzz.py TARGET FOLDER [libFuzzer's flags]. See scripts/fuzz.sh."""

import resource
import sys
import tempfile
import time
from pathlib import Path

import atheris

ROOT = Path(__file__).parent.parent
MAX_CPU_S = 5.0
sys.path.insert(0, str(ROOT))

with atheris.instrument_imports(include=["llmfast"]):
    from tests.fuzz_targets import TARGETS


def main() -> None:
    target, folder = TARGETS[sys.argv[1]], Path(sys.argv[2])
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        for index, seed in enumerate(target.seeds(Path(made))):
            (corpus / f"seed-{index}").write_bytes(seed)
    place = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    flags = ["-timeout=600", "-rss_limit_mb=512", "-max_len=65536", f"-artifact_prefix={folder}/finding-"]

    def run(content: bytes) -> None:
        started = time.process_time()  # not of the clock, which goes on when the machine sleeps or others are at work
        target.survives(content, place)
        assert time.process_time() - started < MAX_CPU_S

    atheris.Setup([sys.argv[0], str(corpus), *flags, *sys.argv[3:]], run)
    atheris.Fuzz()


main()
