"""Fields of the config's dataclasses: their traits, and one converter from plain mappings that raises UserError."""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from functools import cache
from typing import Any, ClassVar, Self

from kd.config.argument_types import check_type
from kd.config.components import GROUPS, option_names
from kd.errors import UserError

MAX_SEED = 2**32 - 1
UNSET: Any = object()  # value of a trait that an option does not have


@dataclass(frozen=True)
class Traits:
    """Properties of an option beside its name, type and default."""

    effect: bool = True  # False: no value changes the outcome of a run, but for rounding
    identity: bool = True  # False: no part of a run's name, since what is made of it is one
    neutral: Any = UNSET  # with this value the option is left out of a run's name
    needs_signal: bool = False  # without a signal from a teacher it changes nothing
    least: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()


def setting(*, default: Any = UNSET, **traits: Any) -> Any:
    """Return a field of a ConfigNode; traits are those of Traits.

    default: value of an option that a config lacks. Defaults for the command line are in conf/.
    neutral: value for an option that is newer than the names of existing runs. Older configs count as having this
    value, and a run with this value leaves the option out of its name. The neutral value must never change. A default
    in conf/ may change, and then runs get new names, as they should. An option that cannot change the result has
    effect=False instead.
    """
    option_traits = Traits(**traits)
    absent = option_traits.neutral if default is UNSET else default
    return field(default=MISSING if absent is UNSET else absent, metadata={"traits": option_traits})


def seed_setting() -> Any:
    """Return a field for a seed."""
    return setting(least=0, most=MAX_SEED)


def traits_of(option: Field) -> Traits:
    """Return the traits of a field."""
    return option.metadata.get("traits", Traits())


@dataclass(frozen=True, eq=False)
class ConfigNode:
    """Base of the config's dataclasses, which are built from plain mappings and turned into them."""

    NO_OPTIONS: ClassVar[tuple[str, ...]] = ()  # fields that no option sets
    INPUT_ONLY: ClassVar[tuple[str, ...]] = ()  # options that are resolved into others

    @classmethod
    def from_node(cls, node: Any, path: str = "") -> Self:
        """Build from a plain mapping; raise UserError for unknown options, missing ones and values of other types."""
        check_shape(node, path)
        names = {f.name for f in fields(cls)}
        for name in node:
            if name not in names:
                raise UserError(
                    option=joined(path, name),
                    got=node[name],
                    why="no such option",
                    need=f"one of {', '.join(scalars(cls))}",
                )
        return cls(**converted(cls, node, path))

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers, in the order of the fields."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in self.INPUT_ONLY}
        return {k: v.to_dict() if isinstance(v, ConfigNode) else v for k, v in values.items()}

    def derive(self, **changes: Any) -> Self:
        """Return a copy with other values; a mapping for a group changes some of the group's options."""
        nodes = {
            name: getattr(self, name).derive(**change)
            for name, change in changes.items()
            if isinstance(change, Mapping) and isinstance(getattr(self, name), ConfigNode)
        }
        return replace(self, **changes | nodes)


def check_shape(node: Any, path: str, component: bool = False) -> None:
    """Raise UserError unless the node of a group is a mapping, and that of a component names its function."""
    if not isinstance(node, Mapping) or (component and "_target_" not in node):
        names = option_names(path) if path in GROUPS else []
        need = "one of the options of this group" if names else "a mapping with the settings of this group"
        hint = f"type e.g. {path}={names[0]}" if names else f"leave {path} as it is"
        raise UserError(option=path, need=need, hint=hint)


def converted(cls: type, node: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return the values of a dataclass's options, checked; those with a default may be missing."""
    values = {}
    for option in options(cls):
        name = joined(path, option.name)
        if option.name in node:
            values[option.name] = value_of(node[option.name], hints(cls)[option.name], traits_of(option), name)
        elif option.default is MISSING:
            if group_type(hints(cls)[option.name]):
                check_shape(None, name)
            raise UserError(option=name, why="is needed here", hint=f"type {name}=VALUE")
    return values


def value_of(value: Any, hint: Any, traits: Traits, name: str) -> Any:
    """Return the value of one option. A group is converted to its dataclass.

    Raises UserError for a wrong type, and for a number or word outside the allowed ones.
    """
    if group := group_type(hint):
        return None if value is None and type(None) in typing.get_args(hint) else group.from_node(value, name)
    literal = typing.get_origin(hint) is typing.Literal
    words = typing.get_args(hint) if literal else traits.choices
    check_type(name, value, str if literal else hint)
    number = type(value) in (int, float)
    if number and traits.most is not None and not (traits.least or 0) <= value <= traits.most:
        raise UserError(option=name, got=value, need=f"a whole number from {traits.least} to {traits.most}")
    if number and traits.least is not None and not traits.least <= value < math.inf:
        raise UserError(option=name, got=value, need=f"a number of at least {traits.least}")
    if words and isinstance(value, str) and value not in words:
        allowed = ("true", "false", *words) if bool in typing.get_args(hint) else words
        raise UserError(option=name, got=value, need=f"one of {', '.join(allowed)}")
    return value


def group_type(hint: Any) -> type[ConfigNode] | None:
    """Return the dataclass that a hint names, alone or beside None."""
    for part in (hint, *typing.get_args(hint)):
        if isinstance(part, type) and issubclass(part, ConfigNode):
            return part
    return None


@cache
def hints(cls: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields."""
    return typing.get_type_hints(cls)


def options(cls: type[ConfigNode]) -> list[Field]:
    """Return the fields of a dataclass that are options, in a component's without its function and arguments."""
    return [option for option in fields(cls) if option.name not in cls.NO_OPTIONS]


def scalars(cls: type) -> tuple[str, ...]:
    """Return the names of a dataclass's fields that are no groups."""
    return tuple(f.name for f in fields(cls) if not group_type(hints(cls)[f.name]))


def all_traits(cls: type, path: str = "") -> dict[str, Traits]:
    """Return the traits of all options below a dataclass: full name, such as trainer.steps or lr -> traits."""
    traits = {}
    for option in options(cls):
        name = joined(path, option.name)
        traits[name] = traits_of(option)
        if group := group_type(hints(cls)[option.name]):
            traits |= all_traits(group, name)
    return traits


def joined(path: str, name: str) -> str:
    """Return the full name of an option: trainer.steps, or steps where there is no group."""
    return f"{path}.{name}" if path else name
