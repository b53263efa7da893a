"""README and recipes: what they name exists, and their commands parse."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from llmfast import registry
from llmfast.cli import app
from llmfast.export import (
    architectures,
    encoder_decoder,
    gguf_architectures,
    traced,
    traced_contrastive,
    traced_signals,
)

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _commands(text: str) -> list[list[str]]:
    text = re.sub(r"\\\n\s*", " ", text)
    return [
        shlex.split(line.removeprefix("$ "), comments=True) for line in re.findall(r"^(?:\$ )?llmfast .*$", text, re.M)
    ]


def _parses(words: list[str]) -> None:
    command = get_command(app).commands[words[1]]
    command.make_context(words[1], words[2:], resilient_parsing=False).close()


@pytest.mark.parametrize("words", [words for words in _commands(README) if "->" not in words], ids=" ".join)
def test_commands_of_the_readme_parse(words: list[str]) -> None:
    _parses(words)


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.sh")), ids=lambda path: path.name)
def test_recipes_are_short_strict_and_parse(recipe: Path) -> None:
    text = recipe.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 30
    assert "set -eu" in text
    commands = _commands(text)
    assert commands
    for words in commands:
        _parses([re.sub(r"^\$(MAX_KLD|MAX_RATIO|EPOCHS)$", "1", word) for word in words])


def test_scripts_of_the_readme_exist() -> None:
    for name in re.findall(r"\./(scripts/\S+?\.sh)", README):
        assert (ROOT / name).stat().st_mode & 0o111


def test_readme_names_every_scheme_method_and_objective() -> None:
    folders = ("schemes", "transforms", "rounding")
    for folder in (*(f"quantize.{name}" for name in folders), "prune.structured", "prune.masks", "tune.objectives"):
        for name in registry.names(folder):
            assert f"| `{name}`" in README


def test_readme_names_every_architecture_of_the_direct_route() -> None:
    row = next(line for line in README.splitlines() if line.startswith("| direct "))
    names = row.split("|")[2].partition(";")[0].strip().split(", ")
    assert names == architectures.supported_model_types()


def test_readme_names_every_encoder_and_its_tasks() -> None:
    ((encoders, tasks),) = re.findall(r"^\| traced \| (.*?) \| (.*) \|$", README, re.M)
    assert encoders.split(", ") == traced.supported_model_types()
    named = set(re.sub(r" \(.*?\)", "", tasks).split(", "))
    assert named == set(registry.load("bench.metrics", "latency").TASKS)


def test_readme_names_every_encoder_decoder_and_its_tasks() -> None:
    ((names, tasks),) = re.findall(r"^\| direct, an encoder and a decoder graph \| (.*?) \| (.*) \|$", README, re.M)
    assert re.sub(r" \(.*?\)", "", names).split(", ") == encoder_decoder.supported_model_types()
    assert set(re.sub(r" \(.*?\)", "", tasks).split(", ")) == encoder_decoder.supported_tasks()


def test_readme_names_every_architecture_of_gguf() -> None:
    ((names,),) = [row.groups() for row in re.finditer(r"^\| direct, from GGUF \| (.*?) \| .*$", README, re.M)]
    assert re.sub(r" \(.*?\)", "", names).split(", ") == sorted(gguf_architectures.ARCHITECTURES)


@pytest.mark.parametrize(("kind", "name"), [("images", "pixel_values"), ("sound", "input_values")])
def test_readme_names_every_encoder_of_signals(kind: str, name: str) -> None:
    ((encoders, tasks),) = re.findall(rf"^\| traced, encoders of {kind} \| (.*?) \| (.*) \|$", README, re.M)
    assert encoders.split(", ") == traced_signals.supported_signal_model_types(name)
    plugins = {task: registry.load("tasks", task) for task in registry.names("tasks")}
    named = re.sub(r" \(.*?\)", "", tasks).split(", ")
    assert named == traced_signals.signal_tasks(name)
    takes_signals = {task for task, plugin in plugins.items() if getattr(plugin, "INPUT", "") == name}
    assert takes_signals - {*traced_contrastive.contrastive_tasks()} <= {*named} <= takes_signals


def test_readme_names_every_model_of_texts_and_images_and_its_tasks() -> None:
    ((models, tasks),) = re.findall(r"^\| traced, texts and images \| (.*?) \| (.*) \|$", README, re.M)
    assert models.split(", ") == traced_contrastive.supported_contrastive_model_types()
    assert tasks.split(", ") == traced_contrastive.contrastive_tasks()
