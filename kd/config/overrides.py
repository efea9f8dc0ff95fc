"""Overrides of config groups, checked before Hydra reads them: one option per group, by name, with its own settings.

For a list of options, Hydra would take the last one. For a number, and for a setting of another option, its errors are
long and do not contain what to type.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterable
from functools import cache

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, OverrideType, QuotedString, Sweep
from hydra.errors import HydraException

from kd import former_names
from kd.config.components import GROUPS, PRESETS, TAKES, option_names, parameters
from kd.config.options import NOTES, defaults, options
from kd.config.presets import check_conflict, check_preset, set_by
from kd.config.schema import GROUPLESS, RUN_OPTIONS
from kd.errors import UserError
from kd.system import programs

PLUGINS = {"hydra/launcher": "processes", "hydra/sweeper": "lines"}  # with their defaults
# Groups whose settings are also those of another, which is meant first.
BESIDE = ("plain", "start", "teacher", "record")
OPTIONAL = (*PRESETS, "record", "sweeps")  # groups without a required option
OFFERED = 3  # settings of an option in a hint, at most
SHOWN = 12  # names of options in a message, at most


def check_groups(words: Iterable[str]) -> None:
    """Raise UserError unless an override names one option of its group, or a setting that exists."""
    words = list(words)
    overrides = [override for word in words if (override := parsed(word))]
    for override in filter(Override.is_delete, overrides):
        group = override.key_or_group
        if group in GROUPS and group not in OPTIONAL:
            raise _refused(override.input_line, f"{group} needs an option", _instead(group))
    overrides = [override for override in overrides if not override.is_delete()]
    for override in overrides:
        if override.key_or_group in (*GROUPS, *PLUGINS):
            _check_option(override)
    chosen = _chosen(overrides)
    targets = {override.key_or_group: _values(override) for override in overrides if _is_target(override)}
    for override in overrides:
        if not _is_setting_of_target(override, chosen, targets):
            _check_setting(override, chosen, {override.key_or_group for override in overrides})
    check_conflict(chosen, {override.key_or_group for override in overrides})
    for preset in PRESETS:
        check_preset(preset, chosen, words)


def check_single(words: Iterable[str]) -> None:
    """Raise UserError for an override with several values, in a command that makes one run."""
    for override in filter(None, map(parsed, words)):
        if override.is_sweep_override():
            hint = "for a run of each value, type -m first"
            raise _refused(override.input_line, "one command makes one run", hint)


def _refused(word: str, why: str, hint: str) -> UserError:
    """Return the error for an override as it was typed."""
    option, equals, value = word.partition("=")
    if shlex.quote(value) != value:  # for the shell, in each word of the hint
        hint = re.sub(rf"[\w.+/]+={re.escape(value)}", lambda match: shlex.quote(match[0]), hint)
    return UserError(option=option, got=value if equals else ..., why=why, hint=hint)


@cache
def parsed(word: str) -> Override | None:
    """Parse an override; return None if Hydra refuses it. Callers must not change it: it is cached."""
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        return None  # grammar.check() refuses it


def deferred(words: list[str]) -> list[str]:
    """Return the words of a sweep. A setting of an option that varies becomes an axis of one value.

    Hydra composes the sweep itself from the words that do not vary. For loss=fkl,akl loss.mu=0.3 that config has the
    default loss, which has no loss.mu; only the runs have it. With sweeps=NAME, --multirun comes first: Hydra reads
    from the file that it is a sweep, and would refuse the axes where the file has an error.
    """
    overrides = {word: override for word in words if (override := parsed(word))}
    varying = {override.key_or_group for override in overrides.values() if override.is_sweep_override()}
    by_file = any(override.key_or_group == "sweeps" for override in overrides.values())

    def is_deferred(override: Override) -> bool:
        group, dot, _ = override.key_or_group.partition(".")
        varies = by_file or group in varying or varying & set(PRESETS)
        plain = override.type == OverrideType.CHANGE and not override.is_sweep_override()
        return bool(dot and group in GROUPS and varies and plain)

    def axis(word: str) -> str:
        key, _, value = word.partition("=")
        return f"{key}=choice({value})"

    out = [axis(word) if word in overrides and is_deferred(overrides[word]) else word for word in words]
    return ["--multirun", *out] if by_file and out != words else out


def undeferred(word: str) -> str:
    """Return an axis of one value as it was typed, before deferred()."""
    return re.sub(r"^([\w.]+)=choice\(([^(),]*)\)$", r"\1=\2", word)


def _values(override: Override) -> list:
    """Return the values that an override lists, one per run; a range or an interval counts as one."""
    value = override._value
    values = value.list if isinstance(value, ChoiceSweep) else [value]
    return [value.text if isinstance(value, QuotedString) else value for value in values]


def _is_number(value) -> bool:
    return type(value) in (int, float) or (isinstance(value, Sweep) and not isinstance(value, ChoiceSweep))


def check_slash(word: str) -> None:
    """Raise UserError for a / in the name of a setting or group; names in kd have none."""
    key, equals, text = word.partition("=")
    name = key.lstrip("+~")
    if "/" not in name or not equals or name in PLUGINS:
        return
    parts = [part for part in name.split("/") if part]
    if parts and parts[0] == "hydra":
        needed = "/".join(parts)
    else:
        needed = parts[-1] if parts and parts[-1].partition(".")[0] in GROUPS else ".".join(parts)
    raise _refused(word, "no setting of kd has a / in its name", f"type {needed or 'NAME'}={text}")


def named(names: Iterable[str]) -> str:
    """Return the names of options as text; of many, only the first SHOWN."""
    names = list(names)
    shown = ", ".join(names if len(names) <= SHOWN else names[: SHOWN - 4])
    if len(names) <= SHOWN:
        return shown
    return f"{shown} or another ({len(names)} in all: {programs.command('train')} --help)"


def _instead(group: str, value: bool | None = None) -> str:
    """Return a hint: the words to type instead of null, true or false for a group."""
    if group in PLUGINS:
        return f"leave {group} out, or type {group}={PLUGINS[group]}"
    names = option_names(group)
    if value is not True and "none" in names:
        return f"type {group}=none"
    leave = f"leave {group} out for none, or " if value is not True and group in OPTIONAL else ""
    return f"{leave}choose one of {named(names)}"


def _check_option(override: Override) -> None:
    """Raise UserError unless each value is the name of an option of the group."""
    group, word, text = override.key_or_group, override.input_line, override.input_line.partition("=")[2]
    values = _values(override)
    if several := next((v for v in values if isinstance(v, list)), None):
        listed = ",".join(dict.fromkeys(text.translate(str.maketrans("", "", "[] ")).split(",")))
        one_by_one = group in ("sweeps", "logger", *PLUGINS)
        hint = f"choose one of {listed}" if one_by_one else f"for a run of each, type -m {_renamed(group, listed)}"
        raise _refused(word, f"this is a list of {len(several)}, and a run takes one option of {group}", hint)
    if group == "sweeps" and len(values) > 1:
        hint = f"type sweeps={values[0]}, and then a command for each of the others"
        raise _refused(word, "one command makes one sweep", hint)
    for value in values:
        if value is None or isinstance(value, bool) or (group in PLUGINS and _is_number(value)):
            got = "null" if value is None else str(value).lower()
            raise _refused(word, f"{group} needs the name of an option, and got {got}", _instead(group, value))
    if group in PLUGINS:
        return
    if override.is_add() or override.is_force_add():
        raise _refused(word, "every group has an option already", f"type {group}={text}, without the +")
    names = option_names(group)
    for value in values:
        if _is_number(value) and group != "sweeps":
            shown = text if all(map(_is_number, values)) else str(value)
            needed = _for_number(group, value, shown)
            raise _refused(word, f"{group} needs the name of an option, and this is a number", needed)
        if type(value) in (str, int, float) and str(value) not in names:
            matches = difflib.get_close_matches(str(value), names, 1)
            close = f"type {group}={matches[0]}, or another of" if matches else "choose one of"
            hub = (
                f"; for a model of that name on the Hub, type {group}=hub {group}.name={value}"
                if "hub" in names
                else ""
            )
            raise _refused(word, f"{group} has no option {value}", f"{close} {named(names)}{hub}")


def _renamed(group: str, values: str) -> str:
    """Return `GROUP=VALUES`, or for numbers the setting that they are meant for."""
    override = parsed(f"{group}={values}")
    if override and all(map(_is_number, _values(override))):
        return _for_number(group, _values(override)[0], values).removeprefix("type ")
    return f"{group}={values}"


def _for_number(group: str, value, text: str) -> str:
    """Return a hint: the setting of the group that a number is meant for, as one would type it.

    It is a setting that all options have, or the only setting of an option. A setting with a whole default takes whole
    numbers from 1 on. A setting with another default below 1 takes no number above 1.
    """
    names = options(group)
    numeric = {name: [k for k, v in settings.items() if type(v) in (int, float)] for name, settings in names.items()}
    shared = set.intersection(*map(set, numeric.values()))
    if len(shared) == 1:
        return f"type {group}.{shared.pop()}={text}"

    only = {name: keys[0] for name, keys in numeric.items() if len(keys) == 1 and _takes(names[name][keys[0]], value)}
    if not only or len(shared) > 1:
        return f"choose one of {named(names)}"
    shares = {
        name: sum(only[name] in settings for settings in names.values()) for name in only
    }  # of a setting, options that have it
    preferred = sorted(only, key=lambda name: -shares[name])
    return "type " + ", or ".join(f"{group}={name} {group}.{only[name]}={text}" for name in preferred)


def _takes(default, value) -> bool:
    """Return True if a setting with this default probably takes a value, a number or a text."""
    if type(default) not in (int, float) or not _is_number(value):
        return not _is_number(value) and isinstance(default, str | None)
    if isinstance(value, Sweep):
        return True
    return value >= 1 and float(value).is_integer() if type(default) is int else value <= 1 or default >= 1


def _check_setting(override: Override, chosen: dict[str, str | None], typed: set[str]) -> None:
    """Raise UserError for a setting that the chosen option of its group does not have.

    chosen: group -> option. typed: names of groups and settings on the command line.
    """
    group, _, key = override.key_or_group.partition(".")
    word, text, added = override.input_line, override.input_line.partition("=")[2], override.is_add()
    if not key and not added and group not in (*GROUPS, *GROUPLESS, *RUN_OPTIONS) and "/" not in group:
        raise _refused(word, f"kd has no setting {group}", _anywhere(group, text, chosen))
    if group in PRESETS and key:
        raise _refused(word, f"{group} has no settings of its own", _anywhere(key, text, chosen))
    if group in GROUPLESS:
        settings, others, which = dict.fromkeys(GROUPLESS[group]), [], group
    elif group in chosen:
        name = chosen[group]
        settings, which = (options(group).get(name, {}), f"{group}={name}") if name else ({}, f"{group}=null")
        others = [other for other, defaults in options(group).items() if key.partition(".")[0] in defaults]
    else:
        return
    key = key.partition(".")[0]
    if not key or key in settings or key in NOTES:
        return
    if current := former_names.renamed_setting(group, key):
        raise _refused(word, f"was renamed to {current}", f"type {current}={text}")
    if added and not others:
        return
    others.sort(key=lambda other: len(options(group)[other]))
    if others:
        also = f" (or {key} with {' or '.join(others[1:])})" if others[1:] else ""
        needed = f"{group}={others[0]} {group}.{key}={text}{also}"
        if group in typed and 0 < len(settings) <= OFFERED:  # the option is meant, and the name of its setting wrong
            likely = [name for name, default in settings.items() if _takes(default, _values(override)[0])]
            needed = ", or ".join([*(f"{group}.{name}={text}" for name in likely), needed])
            refused = _refused(word, f"{which} has no {key}", f"type {needed}")
            raise refused.replace(need=f"a setting of {which}: {' or '.join(settings)}")
        raise _refused(word, f"{which} has no {key}", f"type {needed}")
    close = difflib.get_close_matches(key, settings, 1)
    if close:
        needed = f"type {group}.{close[0]}={text}"
    elif key in GROUPS:
        value = _values(override)[0]
        needed = _for_number(key, value, text) if _is_number(value) else f"type {key}={text}"
    else:
        needed = (
            f"choose one of {', '.join(settings)}" if settings else f"leave {group}.{key} out: {which} has no settings"
        )
    raise _refused(word, f"{which} has no {key}", needed)


def _is_target(override: Override) -> bool:
    """Return True if an override names a function for a group itself: loss._target_=mypackage.losses.mine."""
    group, _, key = override.key_or_group.partition(".")
    return group in TAKES and key == "_target_"


def _is_setting_of_target(override: Override, chosen: dict[str, str | None], targets: dict[str, list]) -> bool:
    """Return True for an added setting of a function that the command line names; False if the option has the setting.

    Raises UserError for a setting that the function does not have, or that is not added by a +. targets: functions that
    are typed, by their setting such as loss._target_.
    """
    group, _, key = override.key_or_group.partition(".")
    functions, name = targets.get(f"{group}._target_"), chosen.get(group)
    if not key or key in NOTES or not functions or name is None:
        return False
    if key.partition(".")[0] in options(group).get(name, {}):
        return False
    settings = {str(function): parameters(str(function), group) for function in functions}
    word, text = override.input_line.lstrip("+"), override.input_line.partition("=")[2]
    if not any(key in names for names in settings.values()):
        function, names = next(iter(settings.items()))
        hint = f"type +{group}.{names[0]}={text}" if len(names) == 1 else f"choose one of {', '.join(names)}"
        raise _refused(word, f"{function} has no {key}", hint if names else f"leave {group}.{key} out")
    if not override.is_add() and not override.is_force_add():
        why = f"it is a setting of {group}._target_, and {group}={name} has none of its name"
        raise _refused(word, why, f"type +{word}, with the +")
    return True


def _anywhere(key: str, text: str, chosen: dict[str, str | None]) -> str:
    """Return a hint: the groups that have a setting of this name, or the closest name."""
    chosen = dict(sorted(chosen.items(), key=lambda item: item[0] in BESIDE))
    here = [group for group, name in chosen.items() if name and key in options(group)[name]]
    here += [group for group in GROUPLESS if key in GROUPLESS[group]]
    if here:
        return f"type {', or '.join(f'{group}.{key}={text}' for group in here)}"
    elsewhere = [(group, name) for group in chosen for name, settings in options(group).items() if key in settings]
    elsewhere = [pair for pair in elsewhere if pair[0] not in BESIDE] or elsewhere
    if elsewhere:
        return "type " + ", or ".join(f"{group}={name} {group}.{key}={text}" for group, name in elsewhere)
    close = difflib.get_close_matches(key, [*GROUPS, *RUN_OPTIONS], 1)
    return f"type {close[0]}={text}" if close else f"see all settings by {programs.command('train')} --help"


def _chosen(overrides: list[Override]) -> dict[str, str | None]:
    """Return group -> option. Groups with several requested options, or that a sweep may choose, are left out."""
    typed = {override.key_or_group: _values(override) for override in overrides if override.key_or_group in GROUPS}
    preset = set_by(typed, PRESETS)
    choices = {group: [name] for group, name in defaults().items()} | preset | typed
    choices |= set_by(choices, [group for group in GROUPS if group not in PRESETS]) | preset | typed
    if "sweeps" in typed:
        choices = {group: values for group, values in choices.items() if group in typed and group != "sweeps"}
    single = {group: values[0] for group, values in choices.items() if len(values) == 1}
    return {group: name for group, name in single.items() if name is None or isinstance(name, str)}
