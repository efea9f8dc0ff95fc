"""Packages of other people: those that the user allows, and the content of their files.

A package is allowed by an entry point of an installed distribution, in the group kd.plugins, or by the environment
variable KD_PLUGINS. No config, manifest or override allows one. Files are parsed here; load() alone imports them.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import metadata
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kd.errors import UserError, first_line
from kd.system import files

ENTRY_POINTS = "kd.plugins"  # group of entry points
VARIABLE = "KD_PLUGINS"  # environment variable: names of packages, with commas between them
NO_PLUGIN = ("kd", "sweeps", "train", "hydra_plugins")  # names of top-level modules that are kd's or Hydra's

_typed_folders: list[Path] = []  # of --config-dir and hydra.searchpath


@dataclass(frozen=True)
class Plugin:
    """Package or module that the user allows."""

    name: str  # as it is imported
    spec: ModuleSpec
    distribution: metadata.Distribution | None  # None where KD_PLUGINS names the package

    @cached_property
    def modules(self) -> dict[str, Path]:
        """Modules of the package by their full names."""
        return _modules(self.name, self.spec)

    @property
    def folders(self) -> list[Path]:
        """Folders of the package; none of a module in one file."""
        return [Path(folder) for folder in self.spec.submodule_search_locations or ()]

    @property
    def conf(self) -> list[Path]:
        """Folders with options that belong to the package."""
        return [folder / "conf" for folder in self.folders if (folder / "conf").is_dir()]

    @cached_property
    def installed_as(self) -> metadata.Distribution | None:
        """Distribution that the package belongs to, if any."""
        if self.distribution is None:
            names = metadata.packages_distributions().get(self.name, [])
            return metadata.distribution(names[0]) if names else None
        return self.distribution

    @cached_property
    def digest(self) -> str:
        """Digest of all Python files of the distribution, or of the package where it is not installed."""
        modules = dict(self.modules)
        if self.installed_as:
            for name in (self.installed_as.read_text("top_level.txt") or "").split():
                if spec := find_spec(name):
                    modules |= _modules(name, spec)
        return files.digest_of({name: files.digest(path) for name, path in sorted(modules.items())})[:16]

    def to_dict(self) -> dict[str, str | None]:
        """Return what a result records of the package."""
        version = self.installed_as.version if self.installed_as else None
        return {"name": self.name, "version": version, "digest": self.digest}


def allowed() -> dict[str, Plugin]:
    """Return the allowed packages by name; raise UserError for one that cannot be a plug-in."""
    return _allowed(os.environ.get(VARIABLE, ""), tuple(sys.path))


@cache
def _allowed(named: str, path: tuple[str, ...]) -> dict[str, Plugin]:
    """Return the allowed packages. path: sys.path, part of the cache key."""
    packages: dict[str, Plugin] = {}
    for point in metadata.entry_points(group=ENTRY_POINTS):
        name = point.module.partition(".")[0]
        hint = f"reinstall or uninstall the distribution {point.dist.name if point.dist else point.name}"
        packages.setdefault(name, Plugin(name, _spec(name, f"the entry point {point.name}", hint), point.dist))
    for name in filter(None, map(str.strip, named.split(","))):
        hint = f"install it, or type PYTHONPATH=FOLDER {VARIABLE}={name} … with the folder that holds it"
        packages.setdefault(name, Plugin(name, _spec(name, VARIABLE, hint), None))
    return packages


def _spec(name: str, option: str, hint: str) -> ModuleSpec:
    """Return the spec of a package without importing it; raise UserError if it is missing, or has a name of kd's."""
    if not name.isidentifier() or name in NO_PLUGIN:
        need = "the name of a package of yours as it is imported, e.g. mypackage"
        raise UserError(option=option, got=name, need=need, hint="correct the name")
    spec = find_spec(name)
    if spec is None:
        raise UserError(option=option, got=name, why="names a package that this Python cannot import", hint=hint)
    return spec


def _modules(name: str, spec: ModuleSpec) -> dict[str, Path]:
    """Return the Python files of a package by the names of their modules."""
    if spec.submodule_search_locations is None:
        return {name: Path(spec.origin)} if spec.origin and spec.origin.endswith(".py") else {}
    modules = {}
    for folder in map(Path, spec.submodule_search_locations):
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            modules[".".join((name, *(parts[:-1] if parts[-1] == "__init__" else parts)))] = file
    return modules


def plugin_of(target: object) -> Plugin | None:
    """Return the allowed package that a dotted name belongs to; None if there is none."""
    return allowed().get(str(target).partition(".")[0])


def used(targets: Iterable[object]) -> list[Plugin]:
    """Return the allowed packages that these dotted names belong to, ordered by name."""
    by_name = {plugin.name: plugin for target in targets if (plugin := plugin_of(target))}
    return [by_name[name] for name in sorted(by_name)]


def digests(targets: Iterable[object]) -> dict[str, str]:
    """Return the digests of the allowed packages that these dotted names belong to, by name."""
    return {plugin.name: plugin.digest for plugin in used(targets)}


def how_to_allow(package: str) -> str:
    """Return a hint: the words to type to allow a package."""
    return (
        f"if you trust the package {package}, type {VARIABLE}={package} before the command, or install a distribution "
        f"of it with an entry point in {ENTRY_POINTS} (docs/extending.md)"
    )


# Source


@cache
def syntax_tree(file: Path) -> ast.Module:
    """Return the syntax tree of a file; raise UserError if it is not valid Python."""
    try:
        return ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise UserError(option=file, why=f"is no valid Python: {error}", hint="correct this file") from None


def functions(file: Path) -> dict[str, ast.FunctionDef]:
    """Return the public functions that a file defines at its top level."""
    body = syntax_tree(file).body
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef) and node.name[0] != "_"}


def definition(target: str) -> ast.FunctionDef | None:
    """Return the public function of an allowed package that a dotted name names."""
    module, _, name = target.rpartition(".")
    plugin = plugin_of(target)
    file = plugin.modules.get(module) if plugin else None
    return functions(file).get(name) if file else None


def decorator(function: ast.FunctionDef, name: str) -> tuple[tuple, dict[str, Any]] | None:
    """Return the literal arguments of a function's decorator, positional and by keyword; None if not decorated."""
    for node in function.decorator_list:
        call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
        if name in (getattr(call.func, "id", None), getattr(call.func, "attr", None)):
            try:
                keywords = {keyword.arg or "**": ast.literal_eval(keyword.value) for keyword in call.keywords}
                return tuple(ast.literal_eval(argument) for argument in call.args), keywords
            except ValueError:
                why, hint = "is not read from its source, as an argument is no literal", "write the value itself"
                raise UserError(option=f"@{name} of {function.name}", why=why, hint=hint) from None
    return None


def decorated(name: str) -> Iterator[tuple[str, ast.FunctionDef, tuple[tuple, dict[str, Any]]]]:
    """Yield the functions of allowed packages that have a decorator: dotted name, definition, decorator()."""
    for plugin in allowed().values():
        for module, file in plugin.modules.items():
            for function in functions(file).values():
                if arguments := decorator(function, name):
                    yield f"{module}.{function.name}", function, arguments


def first_docstring_line(function: ast.FunctionDef) -> str:
    return (ast.get_docstring(function) or "").partition("\n")[0]


def load(target: str, option: str) -> Callable:
    """Import and return the function of an allowed package; raise UserError where the import fails."""
    module, _, name = target.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:
        why = f"could not be imported: {type(error).__name__}: {first_line(error)}"
        hint, command = "correct the package; to see the whole traceback, type", f"python -c 'import {module}'"
        raise UserError(option=option, got=target, why=why, hint=hint, commands=[command]) from error
    if not inspect.isfunction(function):
        why = f"is a {type(function).__name__} once it is imported"
        need, hint = "a plain function", "leave decorators away that return something else"
        raise UserError(option=option, got=target, why=why, need=need, hint=hint)
    return function


# Folders with options


def folders() -> tuple[Path, ...]:
    """Return the folders with options except kd's own: those of allowed packages, then those of the command line."""
    return (*(folder for plugin in allowed().values() for folder in plugin.conf), *_typed_folders)


def typed_folders() -> tuple[Path, ...]:
    """Return the folders that the command line named."""
    return tuple(_typed_folders)


def add_folder(folder: Path) -> None:
    """Add a folder that the command line names to those with options."""
    if folder not in folders():
        _typed_folders.append(folder)


def environment() -> dict[str, str]:
    """Return the variables that another machine needs to allow and find the same packages."""
    named = [plugin for plugin in allowed().values() if plugin.distribution is None]
    if not named:
        return {}
    places = [file.parents[name.count(".") + (file.stem == "__init__")] for plugin in named
              for name, file in plugin.modules.items()]  # fmt: skip
    path = os.pathsep.join(dict.fromkeys(map(str, places)))
    return {VARIABLE: ",".join(plugin.name for plugin in named), "PYTHONPATH": path}
