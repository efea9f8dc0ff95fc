"""Declarations of components: decorators with literal arguments, read from the source without an import.

Losses declare by @needs what they read, rollouts and token selections by @provides what they compute. Sources of logits
and rollouts declare properties by @traits.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

from kd.config import plugins
from kd.config.components import definitions, modules_of, takes_group


class Declaration(NamedTuple):
    """Names that a component declares. They hold if its settings have the values of `needed`.

    defaults: values of settings that are not given, from the signature.
    """

    names: tuple[str, ...] = ()
    needed: Mapping[str, Any] = {}
    defaults: Mapping[str, Any] = {}

    def holds(self, name: str, settings: Mapping[str, Any]) -> bool:
        """Return True if the name is declared and holds with these settings."""
        return name in self.names and not self.missing(settings)

    def missing(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings that need another value: setting -> value."""
        present = {**self.defaults, **settings}
        return {name: value for name, value in self.needed.items() if present.get(name) != value}


@cache
def of_module(module: str, decorator: str) -> dict[str, Declaration]:
    """Return the declarations of the public functions of a module of kd that have a decorator."""
    declared = {name: of_function(function, decorator) for name, function in definitions(module).items()}
    return {name: declaration for name, declaration in declared.items() if declaration}


def of_group(group: str, decorator: str) -> dict[str, Declaration]:
    """Return the declarations of a group's functions that have a decorator, of kd and of the allowed packages."""
    return _of_group(group, decorator, tuple(plugins.allowed()))


@cache
def _of_group(group: str, decorator: str, packages: tuple[str, ...]) -> dict[str, Declaration]:
    """Return of_group(). packages: the allowed ones, part of the cache key."""
    others = {
        target.rpartition(".")[2]: declaration
        for target, function, _ in plugins.decorated(decorator)
        if takes_group(function, group) and (declaration := of_function(function, decorator))
    }
    ours: dict[str, Declaration] = {}
    for module in modules_of(group):
        ours |= of_module(module, decorator)
    return ours | others


def of_target(target: str, decorator: str) -> Declaration:
    """Return the declaration of the function of kd or a plug-in that `target` names; an empty one if it has none."""
    module, _, name = target.rpartition(".")
    if module.startswith("kd."):
        return of_module(module.removeprefix("kd."), decorator).get(name, Declaration())
    function = plugins.definition(target)
    return (function and of_function(function, decorator)) or Declaration()


def of_function(function: ast.FunctionDef, decorator: str) -> Declaration | None:
    """Return the declaration of a function; None if it has no such decorator."""
    arguments = plugins.decorator(function, decorator)
    if arguments is None:
        return None
    signature, defaults = function.args, {}
    positional = signature.args[len(signature.args) - len(signature.defaults) :]
    pairs = [*zip(positional, signature.defaults), *zip(signature.kwonlyargs, signature.kw_defaults)]
    for argument, default in pairs:
        with suppress(ValueError):  # a default that is no literal is no value that a declaration can need
            if default is not None:
                defaults[argument.arg] = ast.literal_eval(default)
    return Declaration(*arguments, defaults)
