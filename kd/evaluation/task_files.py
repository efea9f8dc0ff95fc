"""Files of tasks for lm-eval that a person wrote. What would run code is refused before lm-eval reads them."""

from __future__ import annotations

from pathlib import Path

import yaml

from kd.errors import UserError

READERS = ("json", "csv", "parquet", "arrow", "text")  # of local data; others read pickles or run scripts
CODE = {"class": "a class of Python", "unsafe_code": "code that a model wrote", "hf_evaluate": "a metric of the Hub"}


class _Loader(yaml.SafeLoader):
    """Loader of plain YAML: a tag such as !function is an error."""


def check_task_files(folder: Path) -> None:
    """Raise UserError for a folder without tasks, and for a task that would run code."""
    paths = sorted(folder.rglob("*.yaml"))
    if not paths:
        raise UserError(
            option="benchmarks", got=f"{folder}/", why="has no .yaml file", need="files of tasks for lm-eval"
        )
    for path in paths:
        try:
            content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        except yaml.constructor.ConstructorError as error:
            raise _refused(path, error.problem or "a tag") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(option=path, why=f"is no plain YAML: {error}", hint="correct this file") from None
        if not isinstance(content, dict):
            raise UserError(option=path, why="is no task of lm-eval", need="settings by name", hint="remove this file")
        _check_task(path, content, folder)


def _check_task(path: Path, content: dict, folder: Path) -> None:
    from lm_eval.api import metrics, registry  # noqa: F401, the first fills the second

    metric_list = content.get("metric_list") or []
    for settings in (content, *metric_list):
        for key in CODE.keys() & settings.keys():
            if settings[key]:
                raise _refused(path, f"{key}: {CODE[key]}")
    for metric in metric_list:
        if metric.get("metric") not in registry.metric_registry:
            raise _refused(path, f"metric: {metric.get('metric')}, which is none of lm-eval's own")
    source = str(content.get("dataset_path", "json"))
    if source not in READERS and (source.count("/") != 1 or source.endswith(".py") or source.startswith(".")):
        need = f"one of {', '.join(READERS)}, or a dataset of the Hub"
        raise UserError(option=path, why=f"reads dataset_path: {source}", need=need, hint="correct this file")
    includes = content.get("include") or []
    for name in includes if isinstance(includes, list) else [includes]:
        if not (path.parent / name).resolve().is_relative_to(folder.resolve()):
            need, hint = f"a file in {folder}", "copy it there"
            raise UserError(option=path, why=f"includes {name}", need=need, hint=hint)


def _refused(path: Path, what: str) -> UserError:
    need = "a task of settings alone, as a config runs no code"
    return UserError(
        option=path, why=f"has {what}", need=need, hint="write it with templates and lm-eval's own metrics"
    )
