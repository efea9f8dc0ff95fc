"""Names of older versions of kd in files, with today's: modules of components, settings and metrics.

A renamed setting or metric gets one line here. What is read is renamed where it is read: configs in
ExperimentConfig.from_dict, results in Run.result, metrics in files.read_metrics, words in results.read_manifest and in
kd.launch.sweep_list.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

# Older names of modules, in manifests of stores that were written before kd had packages.
MODULES = {
    **dict.fromkeys(("logits.offline", "logits.recorded"), "teachers.stored"),
    **{f"logits.{name}": f"teachers.{name}" for name in ("none", "online", "cotrained")},
    "losses": "objective.losses", "truncation": "objective.truncation", "treatment": "objective.target_transforms",
    "temperature": "objective.temperature", "routing": "objective.token_selection", "schedules": "training.schedules",
    "rollout": "rollout.strategies", "corpora": "data.corpora",
    "instructions": "data.instructions", "optimizers": "models.optimizers", "loggers": "runs.loggers",
}  # fmt: skip


class RenamedSetting(NamedTuple):
    """Setting of some options of a group. An option of a plug-in may have a setting of either name."""

    group: str
    options: tuple[str, ...]  # names of the yaml files and of their functions
    methods: tuple[str, ...]  # that choose one of these options
    former: str
    current: str


SETTINGS = (
    RenamedSetting(
        "rollout", ("mixed", "mixed_code"), ("minillm", "minillm_code", "opd_token"), "from_next", "exclude_own_reward"
    ),
)

NULLS = {("trainer", "compile"): "auto"}  # group and setting -> today's value for a null of earlier versions

METRICS = {
    "train/by_student": "train/student_token_share",
    "val/ended": "val/eos_rate",
    "val/teacher_ended": "val/teacher_eos_rate",
}


def current_config(node: Any) -> Any:
    """Return the settings of an older config or manifest with today's modules and names, without `_partial_`."""
    if isinstance(node, list):
        return [current_config(value) for value in node]
    if not isinstance(node, dict):
        return node
    new = {key: current_config(value) for key, value in node.items() if key != "_partial_"}
    package, _, name = str(new.get("_target_", "")).rpartition(".")
    if package.startswith("kd."):
        module = package.removeprefix("kd.")
        new["_target_"] = f"kd.{MODULES.get(f'{module}.{name}') or MODULES.get(module, module)}.{name}"
    for setting in SETTINGS:
        component = new.get(setting.group)
        if not isinstance(component, dict):
            continue
        package, _, name = str(component.get("_target_")).rpartition(".")
        if package.startswith("kd.") and name in setting.options:
            new[setting.group] = _replaced(component, {setting.former: setting.current})
    for (group, name), value in NULLS.items():
        settings = new.get(group)
        if isinstance(settings, dict) and settings.get(name, value) is None:
            new[group] = settings | {name: value}
    return new


def current_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a flat config (kd.config.components.flat) with today's names."""
    names = {f"{s.group}.{s.former}": f"{s.group}.{s.current}" for s in _settings_of(options)}
    values = {f"{group}.{name}": value for (group, name), value in NULLS.items()}
    return {k: values[k] if v is None and k in values else v for k, v in _replaced(options, names).items()}


def former_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a flat config with the first name of each setting, as it is in the digests of run names."""
    names = {f"{s.group}.{s.current}": f"{s.group}.{s.former}" for s in _settings_of(options)}
    return _replaced(options, names)


def current_words(words: Iterable[str]) -> list[str]:
    """Return the words of an older command with today's names."""
    words = list(words)
    typed = {name: value for name, _, value in (word.lstrip("+").partition("=") for word in words)}
    for s in SETTINGS:
        if typed[s.group] in s.options if s.group in typed else typed.get("method") in s.methods:
            former, current = f"{s.group}.{s.former}=", f"{s.group}.{s.current}="
            words = [word.replace(former, current) if word.lstrip("+").startswith(former) else word for word in words]
    return words


def current_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return metrics, or a line of metrics.jsonl, with today's names."""
    return _replaced(metrics, METRICS)


def current_result(result: dict) -> dict:
    """Return the content of a result.json with today's names of settings and metrics."""
    new = dict(result)
    if isinstance(new.get("config"), dict):
        new["config"] = current_options(new["config"])
    for part in ("initial", "final"):
        if isinstance(new.get(part), dict):
            new[part] = current_metrics(new[part])
    return new


def renamed_setting(group: str, name: str) -> str | None:
    """Return the full name that a setting of this former name has today; None if it was never renamed."""
    return next((f"{group}.{s.current}" for s in SETTINGS if (s.group, s.former) == (group, name)), None)


def _settings_of(options: Mapping[str, Any]) -> list[RenamedSetting]:
    """Return the renamed settings that the options of a flat config have."""
    return [setting for setting in SETTINGS if options.get(setting.group) in setting.options]


def _replaced(mapping: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return a mapping with other keys, in the same order."""
    return {names.get(key, key): value for key, value in mapping.items()}
