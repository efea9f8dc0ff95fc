"""Folders with options of other people: --config-dir DIR, hydra.searchpath=[…], and conf/ of an allowed plug-in.

Hydra would obey settings of Hydra itself in such a file before kd sees them. So Hydra never gets these folders: this
module reads and checks every file, and compose.register() passes the checked content on.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from kd.config import components, overrides, plugins
from kd.config.components import GROUPS, PRESETS, builtin_option_names, typed
from kd.config.schema import GROUPLESS, RUN_OPTIONS
from kd.errors import UserError
from kd.system import files, programs
from kd.system.remote import is_default_root

FLAGS = ("--config-dir", "-cd")
WORD = "hydra.searchpath"
ENTRY = re.compile(r"(override )?/?(\w+)(@_here_)?")  # entries that a list of defaults may have


class Option(NamedTuple):
    """Option of a group, from a file that is not kd's."""

    group: str
    name: str
    node: dict[str, Any]
    is_global: bool  # its settings are those of other groups


def take(words: list[str]) -> list[str]:
    """Add the folders that a command line names to those with options; return the other words."""
    others, rest = [], iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name in FLAGS:
            plugins.add_folder(_folder(value if equals else next(rest, ""), name))
        elif name == WORD and equals:
            for place in _listed(word):
                plugins.add_folder(_folder(place, WORD))
        else:
            others.append(word)
    return others


def words() -> list[str]:
    """Return the word that gives another process the same folders of the command line; [] if there are none."""
    places = [f"file://{folder}" for folder in plugins.typed_folders()]
    return [f"{WORD}={typed(places)}"] if places else []


def sweep_command(name: str, root: str | Path) -> str:
    """Return the command that runs the sweep of a file in a root, with the folders of the command line."""
    place = [] if is_default_root(root) else [f"root={typed(str(root))}"]
    return f"{programs.command('train')} {shlex.join([*words(), f'sweeps={name}', *place])}"


def how_to_run(sweep: str, root: str | Path) -> str:
    """Return a hint: the command that runs a sweep in a root, which only the user knows if it has no file."""
    if sweep in components.option_names("sweeps"):
        return f"to run the sweep, type {sweep_command(sweep, root)}"
    return "type the command of this sweep again"


def _listed(word: str) -> list[str]:
    """Return the places that an override of Hydra's search path lists."""
    override = overrides.parsed(word)
    places = None if override is None or override.is_sweep_override() else override.value()
    if not isinstance(places, list) or not all(isinstance(place, str) for place in places):
        hint = f"type e.g. '{WORD}=[file:///home/me/conf]'"
        raise UserError(option=WORD, got=word.partition("=")[2], need="a list of places", hint=hint)
    return places


def _folder(place: str, option: str) -> Path:
    """Return the folder that `place` stands for, a path, file://… or pkg://…; raise UserError if there is none."""
    scheme, mark, rest = place.partition("://")
    if mark and scheme not in ("file", "pkg"):
        need, hint = "a folder of this machine", "type file:///path/to/folder, or pkg://package.folder"
        raise UserError(option=option, got=place, need=need, hint=hint)
    if scheme == "pkg" and mark:
        package, *inner = rest.replace("/", ".").strip(".").split(".")
        plugin = plugins.allowed().get(package)
        if plugin is None:
            why = "names a package that is not allowed, and to find its folders would run its code"
            raise UserError(option=option, got=place, why=why, hint=plugins.how_to_allow(package))
        folders = [folder.joinpath(*inner) for folder in plugin.folders]
    else:
        folders = [Path(files.expanded(rest if mark else place)).absolute()] if place else []
    folder = next(filter(Path.is_dir, folders), None)
    if folder is None:
        hint = f"type {option} with the folder that holds e.g. loss/NAME.yaml"
        raise UserError(option=option, got=place, why="no such folder", hint=hint)
    return folder


def options() -> Iterator[Option]:
    """Yield the options of all folders that are not kd's; raise UserError for a file that kd refuses."""
    files: dict[tuple[str, str], Path] = {}
    for folder in plugins.folders():
        listed = [(group, file) for group in GROUPS for file in sorted((folder / group).glob("*.yaml"))]
        if not listed and folder in plugins.typed_folders():
            hint = f"put options into folders that are called as their groups, e.g. {folder}/loss/NAME.yaml"
            raise UserError(option=folder, why="has no options", hint=hint)
        for group, file in listed:
            name = file.stem
            if name in builtin_option_names(group):
                why = f"would take the place of kd's own {group}={name}"
                raise UserError(option=file, why=why, hint="give the file another name")
            if other := files.get((group, name)):
                why = f"is an option {group}={name}, and so is {other}"
                raise UserError(option=file, why=why, hint="give one of the two files another name, or leave one out")
            files[group, name] = file
            yield checked(group, file)


@cache
def _content(file: Path) -> tuple[str, Any]:
    """Return the text of a file and its content. Callers must not change it: a file is read once in a process."""
    text = file.read_text(encoding="utf-8")
    return text, OmegaConf.to_container(OmegaConf.create(text))


def checked(group: str, file: Path) -> Option:
    """Return the option in a file; raise UserError for content that does not belong to kd's groups."""

    def refused(why: str, hint: str) -> UserError:
        return UserError(option=file, why=why, hint=hint)

    try:
        text, node = _content(file)
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        raise refused(f"is no plain YAML: {error}", "correct this file, or remove it") from None
    if not isinstance(node, dict) or not all(isinstance(key, str) for key in node):
        raise refused("holds no settings", "write NAME: VALUE in each line")
    if any(re.search(r"\$\{.*:", value) for value in _texts(node)):
        raise refused("refers to something other than settings", "write the value itself in place of ${…:…}")
    if group == "sweeps":
        return Option(group, file.stem, node, True)
    package = re.search(r"^#\s*@package\s+(\S+)", text, re.MULTILINE)
    header = package[1] if package else "_group_"
    if header not in ("_group_", group, "_global_"):
        raise refused(f"sets the package {header}", "leave the line with @package out, or write # @package _global_")
    is_global = header == "_global_" or group in PRESETS
    if is_global:
        for key in node.keys() - {*GROUPS, *RUN_OPTIONS, *GROUPLESS, "defaults"}:
            raise refused(f"sets {key}, which is no option of kd", f"leave {key} out")
    _check_defaults(group, node.get("defaults", []), refused)
    settings = {key: value for key, value in node.items() if key != "defaults"}
    try:
        components.check_targets(settings if is_global else {group: settings})
    except UserError as error:
        raise error.replace(why=f"{error.why}, and stands in {file}") from None
    return Option(group, file.stem, node, is_global)


def _check_defaults(group: str, entries: Any, refused) -> None:
    """Raise UserError unless a list of defaults only chooses options of kd's groups by name."""
    for entry in entries if isinstance(entries, list) else [entries]:
        if isinstance(entry, str):
            entry = {group: entry} if entry != "_self_" else {}
        for key, name in entry.items() if isinstance(entry, dict) else [(str(entry), None)]:
            other = ENTRY.fullmatch(str(key))
            if not other or other[2] not in GROUPS or (name and name not in components.option_names(other[2])):
                hint = "write e.g. - override /loss: akl in defaults"
                raise refused(f"has defaults with {key}: {name}, which is no option of a group", hint)


def _texts(node: Any) -> Iterator[str]:
    """Yield all texts in a tree, keys too."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield str(key)
            yield from _texts(value)
    elif isinstance(node, list):
        for value in node:
            yield from _texts(value)
    elif isinstance(node, str):
        yield node
