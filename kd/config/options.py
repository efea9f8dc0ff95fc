"""What the files of conf/ say of each option: its settings, and what it chooses in other groups."""

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
    """The option of each group that is taken where none is typed."""
    pairs = [
        pair for entry in _yaml(CONF / "config.yaml")["defaults"] if isinstance(entry, dict) for pair in entry.items()
    ]
    return {group: name for group, name in pairs if group in GROUPS and group != "sweeps"}


def overridden(group: str, name: str) -> dict[str, str]:
    """The options of other groups that an option chooses."""
    entries = [entry for entry in _option(group, name).get("defaults", []) if isinstance(entry, dict)]
    pairs = [(key.split("/")[-1], value) for entry in entries for key, value in entry.items() if "override" in key]
    return dict(pairs)


def options(group: str) -> dict[str, dict]:
    """The options of a group, with the settings and defaults of each; a preset has none but those of other groups."""
    return _options(group, plugins.folders())


@cache
def _options(group: str, folders: tuple[Path, ...]) -> dict[str, dict]:
    """The options of a group. folders: those of others, for which the answer holds."""
    shared = _yaml(CONF / "config.yaml").get(group) or {}
    return {name: shared | _settings(group, name) for name in option_names(group)}


def _settings(group: str, name: str) -> dict:
    """The settings of an option, with those that it takes over from other files."""
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
    own = node[group] if isinstance(node.get(group), dict) else node
    return inherited | {k: v for k, v in own.items() if k not in NOTES}


def _option(group: str, name: str) -> dict:
    """Return the content of an option's file; nothing for an option without one."""
    return next((_yaml(file) for file in option_files(group) if file.stem == name), {})


@cache
def _yaml(file: Path) -> dict:
    return OmegaConf.to_container(OmegaConf.load(file))


def option_of(group: str, words: Iterable[str]) -> str | None:
    """The option that words choose for a group by name, themselves or by a preset; None where they choose none."""
    named = dict(word.split("=", 1) for word in words if "=" in word)
    if group in named:
        return named[group]
    names = [overridden(preset, named[preset]).get(group) for preset in PRESETS if preset in named]
    return next(filter(None, reversed(names)), None)


def words_of(preset: str, name: str) -> list[str]:
    """What an option of a preset stands for, as one would type it."""
    chosen = [f"{group}={option}" for group, option in overridden(preset, name).items()]
    return chosen + [f"{key}={typed(value)}" for key, value in flat(settings_of_preset(preset, name)).items()]


def settings_of_preset(preset: str, name: str) -> dict:
    return {key: value for key, value in _option(preset, name).items() if key not in NOTES}
