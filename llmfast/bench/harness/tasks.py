"""Tasks found and their data loaded before any model is opened, without a network unless a download is wished."""

import contextlib
import difflib
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmfast import report
from llmfast.bench.options import BenchOptions
from llmfast.errors import InputError, LlmfastError, OptionError, UnsafeInputError, UnsupportedError

# lm-eval's own; it draws the examples before a question.
_FEWSHOT_SEED = 1234
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
# What the libraries would print over llmfast's own progress.
_QUIET = {
    "TQDM_DISABLE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
}
_UNREACHED = ("ConnectionError", "DatasetNotFoundError", "OfflineModeIsEnabled", "LocalEntryNotFoundError")
# lm-eval's name of a filter that leaves answers as they are.
_NO_FILTER = "none"

Aggregate = Callable[[list[Any]], Any]


@dataclass(frozen=True)
class Figure:
    """One figure of a task or group.

    Attributes:
        key: in a row, `TASK.METRIC` or `TASK.METRIC.FILTER`, of letters, digits and underscores.
        task: the task's or the group's name.
        metric: as lm-eval calls it.
        filter: as lm-eval calls it.
        higher_is_better: as lm-eval says.
        aggregate: the figure of some documents' values.
    """

    key: str
    task: str
    metric: str
    filter: str
    higher_is_better: bool
    aggregate: Aggregate


@dataclass(frozen=True)
class Tasks:
    """What was asked for, loaded.

    Attributes:
        loaded: as lm-eval's `evaluate` takes it.
        figures: task -> its figures.
        groups: group -> its figures, and the tasks in it.
        shown: tasks and groups that a table has columns of.
    """

    loaded: dict[str, Any]
    figures: dict[str, tuple[Figure, ...]]
    groups: dict[str, tuple[tuple[Figure, ...], tuple[str, ...]]]
    shown: tuple[str, ...]

    def seed(self) -> None:
        """Let the next evaluation draw the examples that the last one drew."""
        for task in self.loaded["tasks"].values():
            task.set_fewshot_seed(seed=_FEWSHOT_SEED)


def load_tasks(options: BenchOptions) -> Tasks:
    """Find tasks by name, group, tag or pattern, and load their data.

    Raises:
        UnsupportedError: lm-eval is not installed.
        OptionError: no such task, or none in the folder.
        InputError: data that is missing or would have to be downloaded; a malformed task.
        UnsafeInputError: a task that runs what the model writes.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UnsupportedError("--tasks needs lm-eval, which is not installed", "pip install 'llmfast[eval]'")
    if options.tasks_dir is not None and not options.tasks_dir.is_dir():
        raise InputError(f"no such folder: `{options.tasks_dir}`", "--tasks-dir takes a folder of lm-eval's YAML files")
    with _environment(options.download):
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        manager = _find_tasks(options)
        loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        names = _match(manager, options)
        for name in names:
            if any(config.get("unsafe_code") for config in _configs(manager, name)):
                raise UnsafeInputError(
                    f"task `{name}` runs what the model writes", "use lm-eval itself, in a container"
                )
            if options.download:
                report.note(f"note: loading the data of `{name}`")
            found = _load(manager, name, options)
            for part in loaded:
                loaded[part] |= found.get(part, {})
    for name, task in loaded["tasks"].items():
        if getattr(task, "MULTIMODAL", False):
            raise UnsupportedError(f"task `{name}` shows images", "leave it out")
        if options.num_fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=options.num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return _describe(loaded, names)


def _find_tasks(options: BenchOptions) -> Any:
    """Return the list of tasks: of the user's folder alone where that has all, since lm-eval's own take seconds."""
    from lm_eval.tasks import TaskManager

    if options.tasks_dir is None:
        return TaskManager()
    folder = str(options.tasks_dir.resolve())
    manager = TaskManager(include_path=folder, include_defaults=False)
    found = [manager.match_tasks([asked]) for asked in options.tasks]
    if all(found) and all({} not in list(_configs(manager, name)) for names in found for name in names):
        return manager
    return TaskManager(include_path=folder)


def _match(manager: Any, options: BenchOptions) -> list[str]:
    """Return the names of tasks, groups and tags that the user meant."""
    names = []
    for asked in options.tasks:
        found = sorted(manager.match_tasks([asked]))
        if not found:
            near = difflib.get_close_matches(asked, manager.all_tasks, 3)
            hint = f"did you mean {', '.join(f'`{one}`' for one in near)}?" if near else "`lm-eval ls tasks` lists them"
            where = f" and `{options.tasks_dir}`" if options.tasks_dir else ""
            raise OptionError(f"--tasks `{asked}`: no such task in lm-eval{where}", hint)
        names += found
    return list(dict.fromkeys(names))


def _load(manager: Any, name: str, options: BenchOptions) -> dict[str, Any]:
    """Load a task; relative paths in it are tried from here, as lm-eval does, then from the tasks' folder."""
    for place in (Path(), *([options.tasks_dir] if options.tasks_dir else [])):
        try:
            with _inside(place):
                found: dict[str, Any] = manager.load([name])
            return found
        except LlmfastError:
            raise
        except FileNotFoundError as error:
            missing = error
        except Exception as error:  # the libraries raise network, YAML and their own exceptions
            reason = _first_line(error)
            if any(kind.__name__ in _UNREACHED for one in _causes(error) for kind in type(one).__mro__):
                named = {str(config["dataset_path"]) for config in _configs(manager, name) if "dataset_path" in config}
                data = ", ".join(sorted(named)) or "its data"
                if options.download:
                    raise InputError(
                        f"task `{name}`: can't download `{data}`: {reason}", "check the network"
                    ) from error
                raise InputError(
                    f"task `{name}` needs `{data}`, which is not on this machine",
                    "--download fetches it from the Hugging Face hub; the copy it leaves serves without a network",
                ) from error
            raise InputError(f"task `{name}` can't be loaded: {reason}", "does lm-eval itself run it?") from error
    raise InputError(
        f"task `{name}`: {_first_line(missing)}", "paths in a task begin in the current folder or in --tasks-dir"
    ) from missing


def _describe(loaded: dict[str, Any], named: Sequence[str]) -> Tasks:
    figures = {name: tuple(_task_figures(name, task)) for name, task in loaded["tasks"].items()}
    groups = {}
    for name, group in loaded["groups"].items():
        members = tuple(task.task_name for task in group.get_all_tasks())
        if group.has_aggregation:
            groups[name] = tuple(_group_figures(name, group, [figures[member] for member in members])), members
    covered = {member for _, members in groups.values() for member in members}
    # Of groups within groups the outermost is shown.
    inner = {child for group in groups for child in loaded["group_map"].get(group, ()) if child in groups}
    outer = [group for group in groups if group not in inner] + [task for task in figures if task not in covered]
    shown = (*outer, *(name for name in named if name not in outer))
    return Tasks(loaded, figures, groups, shown)


def _task_figures(name: str, task: Any) -> Iterator[Figure]:
    higher = task.higher_is_better()
    filters = [one["name"] for one in task.get_config("filter_list") or ()] if hasattr(task, "config") else []
    for metric, aggregate in task.aggregation().items():
        for chosen in filters or [_NO_FILTER]:
            yield Figure(_key(name, metric, chosen), name, metric, chosen, higher.get(metric) is not False, aggregate)


def _group_figures(name: str, group: Any, members: Sequence[Sequence[Figure]]) -> Iterator[Figure]:
    for wanted in group.aggregate_metric_list:
        filters = dict.fromkeys(one.filter for own in members for one in own if one.metric == wanted.metric)
        for chosen in wanted.filter_list or filters:
            parts = [next((one for one in own if (one.metric, one.filter) == (wanted.metric, chosen)), None)
                     for own in members]  # fmt: skip
            having = [part for part in parts if part is not None]
            if having:
                aggregate = _over_members(parts, wanted.weight_by_size)
                is_higher = having[0].higher_is_better
                yield Figure(_key(name, wanted.metric, chosen), name, wanted.metric, chosen, is_higher, aggregate)


def _over_members(parts: Sequence[Figure | None], weight_by_size: bool) -> Aggregate:
    """Return the mean of the members' figures, of values (number of the member, value), as lm-eval's groups do it."""

    def aggregate(values: list[tuple[int, Any]]) -> float:
        total = weights = 0.0
        for number, part in enumerate(parts):
            own = [value for member, value in values if member == number]
            if part is not None and own:
                weight = len(own) if weight_by_size else 1
                total, weights = total + weight * part.aggregate(own), weights + weight
        return total / weights

    return aggregate


def _key(*names: str) -> str:
    parts = names if names[-1] != _NO_FILTER else names[:-1]
    return ".".join(re.sub(r"\W+", "_", part) for part in parts)


def _configs(manager: Any, name: str) -> Iterator[Mapping[str, Any]]:
    """Yield what the YAML files say of a task, of a group or tag also of all its members; nothing of unknown ones."""
    entry = manager.task_index.get(name)
    config: Mapping[str, Any] = (entry and entry.cfg) or {}
    members = config.get("task") if isinstance(config.get("task"), list) else []
    if entry is not None and not config:  # a tag
        members = sorted(entry.tags)
    else:
        yield config
    for member in members or ():
        if isinstance(member, str):
            yield from _configs(manager, member)
        elif "dataset_path" in member:  # a task of its own, written into the group
            yield member
        else:
            yield from _configs(manager, str(member.get("task") or member.get("group")))


@contextlib.contextmanager
def _environment(download: bool) -> Iterator[None]:
    """Import lm-eval and load data quietly, and without a network unless one is wished."""
    wanted = _QUIET if download else _QUIET | _OFFLINE
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    config = sys.modules.get("datasets.config")  # read the environment when it was imported
    was_offline = getattr(config, "HF_HUB_OFFLINE", None)
    if config is not None:
        config.HF_HUB_OFFLINE = not download  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if config is not None:
            config.HF_HUB_OFFLINE = was_offline  # type: ignore[attr-defined]
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    here = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
