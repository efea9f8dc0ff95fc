"""Benchmarks of a model in a folder, by lm-eval: its own tasks, or tasks in files."""

from __future__ import annotations

import difflib
import importlib.metadata
import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from kd.errors import UserError, first_line
from kd.evaluation.catalog import BENCHMARK
from kd.evaluation.task_files import check_task_files
from kd.models.hub import adapter_base
from kd.system import files
from kd.system.network import offline_unless_reachable


class Benchmark(NamedTuple):
    """Task, group or tag of lm-eval."""

    name: str
    folder: Path | None = None  # of the files that define it

    @property
    def digest(self) -> str | None:
        """Digest of its files, so that a changed task is measured again."""
        return files.folder_fingerprint(str(self.folder)) if self.folder else None


def benchmarks_of(names: str | list[str] | None) -> list[Benchmark]:
    """Return the benchmarks that a config names: a task of lm-eval, a .yaml file, or a folder of such files.

    What has a / or ends with .yaml is a path. Raises UserError for unknown names, and without lm-eval.
    """
    chosen = [benchmark for name in names_of(names) for benchmark in _named(files.expanded(name))]
    return list(dict.fromkeys(chosen))


def names_of(names: str | list[str] | None) -> list[str]:
    """Return the value of the option as a list."""
    return [names] if isinstance(names, str) else list(names or [])


def _named(name: str) -> list[Benchmark]:
    _require()
    path = Path(name)
    if "/" not in name and path.suffix != ".yaml":
        if name not in (tasks := _manager().all_tasks):
            close = difflib.get_close_matches(name, tasks, 3)
            hint = f"type {' or '.join(close)}" if close else "see all by lm-eval ls tasks"
            raise UserError(option="benchmarks", got=name, need="a task of lm-eval, a file or a folder/", hint=hint)
        return [Benchmark(name)]
    folder = path if path.is_dir() else path.parent
    if not path.exists():
        need = "a .yaml file of a task, or a folder of them"
        raise UserError(option="benchmarks", got=name, why="does not exist", need=need, hint="correct the path")
    check_task_files(folder)
    index = _manager(folder, False).task_index
    chosen = [
        task for task, entry in index.items()
        if entry.yaml_path and (path.is_dir() or entry.yaml_path.resolve() == path.resolve())
    ]  # fmt: skip
    if not chosen:
        raise UserError(option="benchmarks", got=name, why="names no task", need="a key task: with its name")
    return [Benchmark(task, folder) for task in chosen]


def check_data(benchmarks: Iterable[Benchmark]) -> None:
    """Load the data of benchmarks, which lm-eval keeps; raise UserError for one that cannot be loaded."""
    for benchmark in benchmarks:
        offline_unless_reachable()
        try:
            _manager(*_place(benchmark)).load([benchmark.name])
        except UserError:
            raise
        except Exception as error:  # of several libraries
            raise _failed(benchmark, error) from error


def measure(model: str, benchmarks: list[Benchmark], device: str, batch_size: int):
    """Yield each benchmark with its results on the model of a folder or a Hub name.

    Results: `tasks`, by name: values, standard errors, numbers of samples and shots, and which values are better;
    version of lm-eval, digest of the files, seconds.
    """
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    evaluator.get_git_commit_hash = lambda: None  # git would print an error outside of a checkout

    base = adapter_base(model, "benchmarks")
    arguments = {"pretrained": base, "peft": model} if base else {"pretrained": model}
    lm = HFLM(**arguments, device=device, batch_size=batch_size, trust_remote_code=False)
    for benchmark in benchmarks:
        start = time.monotonic()
        manager = _manager(*_place(benchmark))
        results = evaluator.simple_evaluate(lm, tasks=[benchmark.name], task_manager=manager, log_samples=False)
        yield benchmark, {
            "tasks": {name: _row(results, name) for name in _rows(results, benchmark.name)},
            "lm_eval": importlib.metadata.version("lm_eval"), "files": benchmark.digest,
            "seconds": round(time.monotonic() - start, 2),
        }  # fmt: skip


def final_metrics(results: dict[str, dict]) -> dict[str, float]:
    """Return the values of all benchmarks as final metrics: bench/TASK/METRIC."""
    tasks = {name: row for result in results.values() for name, row in result["tasks"].items()}
    return {f"{BENCHMARK}{name}/{key}": value for name, row in tasks.items() for key, value in row["values"].items()}


def _rows(results: dict[str, Any], name: str) -> list[str]:
    """Return the task or group itself if it has values; else the tasks below it."""
    rows = [row for row in results["results"] if _values(results["results"][row])]
    return [name] if name in rows else rows


def _row(results: dict[str, Any], name: str) -> dict[str, Any]:
    row = results["results"][name]
    values = _values(row)
    errors = {key: row[f"{metric}_stderr,{rule}"] for key, (metric, rule) in values.items()
              if isinstance(row.get(f"{metric}_stderr,{rule}"), float)}  # fmt: skip
    return {
        "values": {key: float(row[f"{metric},{rule}"]) for key, (metric, rule) in values.items()}, "stderr": errors,
        "higher_is_better": {key: results["higher_is_better"].get(name, {}).get(metric) for key, (metric, _)
                             in values.items()},
        "samples": row.get("sample_len") or results["n-samples"].get(name, {}).get("effective"),
        "shots": results["n-shot"].get(name), "version": results["versions"].get(name),
    }  # fmt: skip


def _values(row: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Return the metrics of a row: acc, or exact_match/strict for one of several filters -> metric and filter."""
    pairs = [tuple(key.split(",", 1)) for key, value in row.items() if "," in key and type(value) in (int, float)]
    pairs = [(metric, rule) for metric, rule in pairs if not metric.endswith("_stderr")]
    return {metric if rule == "none" else f"{metric}/{rule}": (metric, rule) for metric, rule in pairs}


def _place(benchmark: Benchmark) -> tuple[Path | None, bool]:
    return benchmark.folder, benchmark.folder is None


def _manager(folder: Path | None = None, built_in: bool = True):
    """Return lm-eval's index of tasks: its own, or those of a folder."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder) if folder else None, include_defaults=built_in)


def _require() -> None:
    """Raise UserError without lm-eval. Templates of tasks are rendered in a sandbox from now on."""
    try:
        from lm_eval import utils
    except ModuleNotFoundError as error:
        hint = "type pip install 'kd[lm-eval]'"
        raise UserError(option="benchmarks", need="the package lm-eval", hint=hint) from error
    from jinja2.sandbox import SandboxedEnvironment

    if not isinstance(utils.env, SandboxedEnvironment):
        sandbox = SandboxedEnvironment(undefined=utils.env.undefined, keep_trailing_newline=True)
        sandbox.filters |= utils.env.filters
        utils.env = sandbox
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def _failed(benchmark: Benchmark, error: Exception) -> UserError:
    hint = "check the network, or give a folder of tasks with their data"
    why = f"its data could not be loaded: {type(error).__name__}: {first_line(error)}"
    return UserError(option="benchmarks", got=benchmark.name, why=why, hint=hint if not benchmark.folder else
                     "correct dataset_path and data_files in its file")  # fmt: skip
