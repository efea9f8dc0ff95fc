"""Options in the files of conf/: the settings of each, and the options that it chooses in other groups."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path

from omegaconf import OmegaConf

from kd.config import plugins
from kd.config.components import CONF, GROUPS, PRESETS, as_record, flat, option_files, option_names, typed
from kd.config.sizes import SIZES

NOTES = ("_target_", "defaults")  # keys of a yaml that are no settings


@cache
def defaults() -> dict[str, str | None]:
    """Return the default option of each group."""
    pairs = [
        pair for entry in _yaml(CONF / "config.yaml")["defaults"] if isinstance(entry, dict) for pair in entry.items()
    ]
    return {group: name for group, name in pairs if group in GROUPS and group != "sweeps"}


def overridden(group: str, name: str) -> dict[str, str]:
    """Return the options of other groups that an option chooses."""
    return dict(_overridden(group, name, plugins.folders()))


@cache
def _overridden(group: str, name: str, folders: tuple[Path, ...]) -> dict[str, str]:
    """Return the options of other groups that an option chooses. folders: see _options."""
    entries = [entry for entry in _option(group, name).get("defaults", []) if isinstance(entry, dict)]
    pairs = [(key.split("/")[-1], value) for entry in entries for key, value in entry.items() if "override" in key]
    return dict(pairs)


def options(group: str) -> dict[str, dict]:
    """Return the options of a group, each with its settings and their defaults; {} for each option of a preset."""
    return _options(group, plugins.folders())


@cache
def _options(group: str, folders: tuple[Path, ...]) -> dict[str, dict]:
    """Return the options of a group. folders: folders of other people, part of the cache key."""
    shared = _yaml(CONF / "config.yaml").get(group) or {}
    return {name: shared | _settings(group, name) for name in option_names(group)}


def defaults_of(name: str) -> list:
    """Return the defaults of a setting: one per option that has it, or that of conf/config.yaml; [] for others."""
    group, _, key = name.partition(".")
    if group in GROUPS:
        return [settings[key] for settings in options(group).values() if key in settings]
    node: object = _yaml(CONF / "config.yaml")
    for part in name.split("."):
        node = node.get(part, {}) if isinstance(node, dict) else {}
    return [] if isinstance(node, dict) else [node]


def _settings(group: str, name: str) -> dict:
    """Return the settings of an option, with those that it inherits from other files."""
    if group in PRESETS:
        return {}
    if group == "record":
        return {key: value for key, value in as_record(_option("truncation", name)).items() if key not in NOTES}
    if group in ("student", "teacher") and name in SIZES:
        return {"size": name, "name": None}
    node = _option(group, name)
    inherited: dict = {}
    for entry in node.get("defaults", []):
        if isinstance(entry, str):
            inherited |= _settings(group, entry)
        else:
            for key, other in entry.items():  # as /data@_here_
                inherited |= _settings(key.strip("/").partition("@")[0], other) if "_here_" in key else {}
    settings = node[group] if isinstance(node.get(group), dict) else node
    return inherited | {k: v for k, v in settings.items() if k not in NOTES}


def _option(group: str, name: str) -> dict:
    """Return the content of an option's file; nothing for an option without one."""
    return next((_yaml(file) for file in option_files(group) if file.stem == name), {})


@cache
def _yaml(file: Path) -> dict:
    return OmegaConf.to_container(OmegaConf.load(file))


def option_of(group: str, words: Iterable[str]) -> str | None:
    """Return the option that words choose for a group, directly or by a preset; None if they choose none."""
    named = dict(word.split("=", 1) for word in words if "=" in word)
    if group in named:
        return named[group]
    names = [overridden(preset, named[preset]).get(group) for preset in PRESETS if preset in named]
    return next(filter(None, reversed(names)), None)


def setting_of(name: str, words: Iterable[str]) -> object:
    """Return the value of a group's setting in a run of these words, as text if they contain the setting itself."""
    words = list(words)
    named = dict(word.lstrip("+").split("=", 1) for word in words if "=" in word)
    group, _, key = name.partition(".")
    values = {name: options(group).get(option_of(group, words) or defaults()[group] or "", {}).get(key)}
    for preset in PRESETS:
        values |= flat(settings_of_preset(preset, named[preset])) if preset in named else {}
    return (values | named)[name]


def words_of(preset: str, name: str) -> list[str]:
    """Return the words that an option of a preset stands for, as on a command line."""
    chosen = [f"{group}={option}" for group, option in overridden(preset, name).items()]
    return chosen + [f"{key}={typed(value)}" for key, value in flat(settings_of_preset(preset, name)).items()]


def settings_of_preset(preset: str, name: str) -> dict:
    return {key: value for key, value in _option(preset, name).items() if key not in NOTES}
