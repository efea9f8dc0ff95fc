"""Types of settings: the signature of a component's function is the schema of its options."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Mapping
from functools import cache

from kd import former_names
from kd.errors import UserError


def check_types(function, settings: Mapping[str, typing.Any], path: str) -> None:
    """Raise UserError for a setting that the function's signature lacks, or a value of another type."""
    parameters, hints = parameters_of(function)
    accepted = [name for name in parameters if name not in GIVEN and (path, name) != ("optim", "lr")]
    for name, value in settings.items():
        if name not in accepted and (current := former_names.renamed_setting(path, name)):
            hint = f"type {current}, also in a file of options"
            raise UserError(option=f"{path}.{name}", got=value, why=f"was renamed to {current}", hint=hint)
        if name not in accepted:
            raise UserError(
                option=f"{path}.{name}",
                got=value,
                why="no such option here",
                need=f"one of {', '.join(accepted)}" if accepted else "",
                hint="" if accepted else f"leave {path}.{name} out",
            )
        # The annotations of torch are too loose to check. Defaults that are not None give the types.
        default = parameters[name].default
        hint = hints.get(name, float if type(default) is int else type(default))
        if name in hints or default is not None:
            check_type(f"{path}.{name}", value, hint)


@cache
def parameters_of(function) -> tuple[Mapping[str, inspect.Parameter], dict]:
    """Return the parameters of a function or class, and the types that a function's are annotated with."""
    hints = typing.get_type_hints(function) if inspect.isfunction(function) else {}
    return inspect.signature(function).parameters, hints


def check_type(option: str, value, hint) -> None:
    """Raise UserError for a value of another type."""
    if not _fits(value, hint):
        correction = ""
        if isinstance(value, float) and value.is_integer() and _fits(int(value), hint):
            correction = f"type {option}={int(value):_}"
        elif _fits(True, hint):
            correction = f"type {option}=true or {option}=false"
        raise UserError(option=option, got=value, why=f"got {_got(value)}", need=_say(hint), hint=correction)


# Arguments that kd gives, never the config.
GIVEN = ("student", "target", "measured", "progress", "params", "origin", "samplers", "model", "folder", "about",
         "corpus", "cache")  # fmt: skip


def _fits(value, hint) -> bool:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        option = typing.get_origin(option) or option
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return True
        if option in (int, str, bool) and type(value) is option:
            return True
        if option is tuple and isinstance(value, list) and all(type(v) in (int, float) for v in value):
            return True
        if option is list and isinstance(value, list) and all(type(v) is str for v in value):
            return True
        if option is dict and isinstance(value, dict):
            return True
        if option is type(None) and value is None:
            return True
    return False


WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null",
         tuple: "a list of numbers", list: "a list", dict: "settings"}  # fmt: skip


def _got(value) -> str:
    """Return the kind of a value in words."""
    if isinstance(value, float) and not value.is_integer():
        return "a number with a fraction"
    return WORDS.get(type(value), type(value).__name__)


def _say(hint) -> str:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return " or ".join(WORDS.get(typing.get_origin(option) or option, str(option)) for option in options)


def checked(function, node: Mapping[str, typing.Any], path: str) -> dict[str, typing.Any]:
    """Return the settings of a node that the function has parameters for; raise UserError for a wrong type."""
    settings = {k: v for k, v in node.items() if k in parameters_of(function)[0]}
    check_types(function, settings, path)
    return settings
