"""Declarations of components: decorators with literal arguments, read from the source without an import.

Losses declare by @needs what they read, rollouts and token selections by @provides what they compute. Sources of logits
and rollouts declare properties by @traits.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

from kd.config import plugins
from kd.config.components import definitions, modules_of, takes_group


class Declaration(NamedTuple):
    """Names that a component declares. They hold if its settings have the values of `needed`."""

    names: tuple[str, ...] = ()
    needed: Mapping[str, Any] = {}

    def holds(self, name: str, settings: Mapping[str, Any]) -> bool:
        """Return True if the name is declared and holds with these settings."""
        return name in self.names and not self.missing(settings)

    def missing(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings that need another value: setting -> value."""
        return {name: value for name, value in self.needed.items() if settings.get(name) != value}


@cache
def of_module(module: str, decorator: str) -> dict[str, Declaration]:
    """Return the declarations of the public functions of a module of kd that have a decorator."""
    calls = {name: plugins.decorator(function, decorator) for name, function in definitions(module).items()}
    return {name: Declaration(*arguments) for name, arguments in calls.items() if arguments}


def of_group(group: str, decorator: str) -> dict[str, Declaration]:
    """Return the declarations of a group's functions that have a decorator, of kd and of the allowed packages."""
    return _of_group(group, decorator, tuple(plugins.allowed()))


@cache
def _of_group(group: str, decorator: str, packages: tuple[str, ...]) -> dict[str, Declaration]:
    """Return of_group(). packages: the allowed ones, part of the cache key."""
    others = {
        target.rpartition(".")[2]: Declaration(*arguments)
        for target, function, arguments in plugins.decorated(decorator)
        if takes_group(function, group)
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
    return Declaration(*((function and plugins.decorator(function, decorator)) or ()))
