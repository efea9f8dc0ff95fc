"""Overrides of config groups, checked before Hydra reads them: one option per group, by name, with its own settings.

Of a list for a group, Hydra takes the last option. Of a number for a group, and of a setting that only another option
has, it says what is wrong at length, and not what to type.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import cache

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString, Sweep
from hydra.errors import HydraException
from omegaconf import OmegaConf

from kd.config import components
from kd.config.components import CONF, GROUPS, PLAIN
from kd.config.sizes import SIZES
from kd.errors import UserError

PLUGINS = {"hydra/launcher": "processes", "hydra/sweeper": "lines"}  # and what is taken where none is typed
# Groups whose settings are also those of another, which is meant first.
BESIDE = ("plain", "start", "teacher", "record")
OPTIONAL = ("record", "sweeps")  # groups of which no option need be taken
SHOWN = 12  # names of options in a message, at most
NOTES = ("_target_", "_partial_", "defaults")  # keys of a yaml that are no settings


def check_groups(words: Iterable[str]) -> None:
    """Raise UserError for an override that names no single option of its group, or a setting that is not there."""
    words = list(words)
    for word in words:
        _check_slash(word)
    overrides = [override for word in words if (override := _parsed(word))]
    for override in filter(Override.is_delete, overrides):
        group = override.key_or_group
        if group in GROUPS and group not in OPTIONAL:
            raise UserError(f"{override.input_line}: {group} needs an option; {_instead(group)}.")
    overrides = [override for override in overrides if not override.is_delete()]
    for override in overrides:
        if override.key_or_group in (*GROUPS, *PLUGINS):
            _check_option(override)
    chosen = _chosen(overrides)
    for override in overrides:
        _check_setting(override, chosen)


def check_single(words: Iterable[str]) -> None:
    """Raise UserError for an override with several values, in a command that makes one run."""
    for override in filter(None, map(_parsed, words)):
        if override.is_sweep_override():
            raise UserError(
                f"{override.input_line}: one command makes one run; for a run of each value, type -m first."
            )


def _parsed(word: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        return None  # Hydra refuses it, and says where it ends


def _values(override: Override) -> list:
    """The values that are listed for a key, one run each; a range or an interval is one."""
    value = override._value
    values = value.list if isinstance(value, ChoiceSweep) else [value]
    return [value.text if isinstance(value, QuotedString) else value for value in values]


def _is_number(value) -> bool:
    return type(value) in (int, float) or (isinstance(value, Sweep) and not isinstance(value, ChoiceSweep))


def _check_slash(word: str) -> None:
    """Raise UserError for a / in the name of a setting or group, which none of kd's has."""
    key, equals, text = word.partition("=")
    name = key.lstrip("+~")
    if "/" not in name or not equals or name in PLUGINS:
        return
    parts = [part for part in name.split("/") if part]
    if parts and parts[0] == "hydra":
        needed = "/".join(parts)
    else:
        needed = parts[-1] if parts and parts[-1].partition(".")[0] in GROUPS else ".".join(parts)
    raise UserError(f"{word}: no setting of kd has a / in its name; type {needed or 'NAME'}={text}.")


def _named(names: Iterable[str]) -> str:
    """Names of options, the first of them where there are many."""
    names = list(names)
    shown = ", ".join(names if len(names) <= SHOWN else names[: SHOWN - 4])
    return shown if len(names) <= SHOWN else f"{shown} or another ({len(names)} in all: python train.py --help)"


def _instead(group: str, value: bool | None = None) -> str:
    """What to type in place of null, true or false for a group."""
    if group in PLUGINS:
        return f"leave it out, or type {group}={PLUGINS[group]}"
    names = _names(group)
    if value is not True and "none" in names:
        return f"type {group}=none"
    leave = "leave it out for none, or " if value is not True and group in OPTIONAL else ""
    return f"{leave}choose one of {_named(names)}"


def _names(group: str) -> list[str]:
    if group == "sweeps":
        return sorted(file.stem for file in components.SWEEPS.glob("*.yaml"))
    return list(options(group))


def _check_option(override: Override) -> None:
    """Raise UserError unless each value is the name of an option of the group."""
    group, word, text = override.key_or_group, override.input_line, override.input_line.partition("=")[2]
    values = _values(override)
    if several := next((v for v in values if isinstance(v, list)), None):
        names = ",".join(dict.fromkeys(text.translate(str.maketrans("", "", "[] ")).split(",")))
        one_by_one = group in ("sweeps", "logger", *PLUGINS)
        raise UserError(
            f"{word}: this is a list of {len(several)}, and a run takes one option of {group}; "
            + (f"choose one of {names}." if one_by_one else f"for a run of each, type -m {_renamed(group, names)}.")
        )
    if group == "sweeps" and len(values) > 1:
        raise UserError(f"{word}: one command makes one sweep; type sweeps={values[0]}, and the others after it.")
    for value in values:
        if value is None or isinstance(value, bool) or (group in PLUGINS and _is_number(value)):
            got = "null" if value is None else str(value).lower()
            raise UserError(f"{word}: {group} needs the name of an option, and got {got}; {_instead(group, value)}.")
    if group in PLUGINS:
        return
    if override.is_add() or override.is_force_add():
        raise UserError(f"{word}: every group has an option already; type {group}={text}, without the +.")
    names = _names(group)
    for value in values:
        if _is_number(value) and group != "sweeps":
            shown = text if all(map(_is_number, values)) else str(value)
            needed = _for_number(group, value, shown)
            raise UserError(f"{word}: {group} needs the name of an option, and this is a number; {needed}.")
        if type(value) in (str, int, float) and str(value) not in names:
            close = difflib.get_close_matches(str(value), names, 1)
            close = f"type {group}={close[0]}, or another of" if close else "choose one of"
            hub = f"; what the Hub calls so is {group}=hub {group}.name={value}" if "hub" in names else ""
            raise UserError(f"{word}: there is no {group}={value}; {close} {_named(names)}{hub}.")


def _renamed(group: str, values: str) -> str:
    """`GROUP=VALUES`, or the setting that is meant where the values are numbers."""
    parsed = _parsed(f"{group}={values}")
    if parsed and all(map(_is_number, _values(parsed))):
        return _for_number(group, _values(parsed)[0], values).removeprefix("type ")
    return f"{group}={values}"


def _for_number(group: str, value, text: str) -> str:
    """What to type for a number that is meant for a setting of the group: one that all options have, or their only one.

    A whole number is for settings with a whole default too, and a number above 1 for none with a default below 1.
    """
    names = options(group)
    numeric = {name: [k for k, v in of.items() if type(v) in (int, float)] for name, of in names.items()}
    shared = set.intersection(*map(set, numeric.values()))
    if len(shared) == 1:
        return f"type {group}.{shared.pop()}={text}"

    def takes(default) -> bool:
        if type(value) not in (int, float):
            return True
        return value >= 1 and float(value).is_integer() if type(default) is int else value <= 1 or default >= 1

    only = {name: keys[0] for name, keys in numeric.items() if len(keys) == 1 and takes(names[name][keys[0]])}
    if not only or len(shared) > 1:
        return f"choose one of {_named(names)}"
    shares = {
        name: sum(only[name] in of for of in names.values()) for name in only
    }  # of a setting, options that have it
    preferred = sorted(only, key=lambda name: -shares[name])
    return "type " + ", or ".join(f"{group}={name} {group}.{only[name]}={text}" for name in preferred)


def _check_setting(override: Override, chosen: dict[str, str | None]) -> None:
    """Raise UserError for a setting that the chosen option of its group does not have; chosen: the groups known."""
    group, _, key = override.key_or_group.partition(".")
    word, text, added = override.input_line, override.input_line.partition("=")[2], override.is_add()
    if not key and not added and group not in (*GROUPS, *PLAIN, *PLAIN[""]) and "/" not in group:
        raise UserError(f"{word}: there is no option {group}; {_anywhere(group, text, chosen)}.")
    if group in PLAIN and group not in GROUPS:  # no options to choose from
        settings, others, which = dict.fromkeys(PLAIN[group]), [], group
    elif group in chosen:
        name = chosen[group]
        settings, which = options(group).get(name, {}), f"{group}={name}" if name else f"{group}=null"
        others = [other for other, of in options(group).items() if key.partition(".")[0] in of]
    else:
        return
    key = key.partition(".")[0]
    if not key or key in settings or key in NOTES or (added and not others):
        return
    others.sort(key=lambda other: len(options(group)[other]))
    if others:
        also = f" (or take it with {' or '.join(others[1:])})" if others[1:] else ""
        raise UserError(f"{word}: {which} has no {key}; type {group}={others[0]} {group}.{key}={text}{also}.")
    close = difflib.get_close_matches(key, settings, 1)
    if close:
        needed = f"type {group}.{close[0]}={text}"
    elif key in GROUPS:
        value = _values(override)[0]
        needed = _for_number(key, value, text) if _is_number(value) else f"type {key}={text}"
    else:
        needed = f"it has {', '.join(settings)}" if settings else "it has no settings; leave it out"
    raise UserError(f"{word}: {which} has no {key}; {needed}.")


def _anywhere(key: str, text: str, chosen: dict[str, str | None]) -> str:
    """Where a setting of this name is, in any group."""
    chosen = dict(sorted(chosen.items(), key=lambda item: item[0] in BESIDE))
    here = [group for group, name in chosen.items() if name and key in options(group)[name]]
    here += [group for group in PLAIN if group not in GROUPS and key in PLAIN[group]]
    if here:
        return f"type {', or '.join(f'{group}.{key}={text}' for group in here)}"
    there = [(group, name) for group in chosen for name, of in options(group).items() if key in of]
    there = [pair for pair in there if pair[0] not in BESIDE] or there
    if there:
        return "type " + ", or ".join(f"{group}={name} {group}.{key}={text}" for group, name in there)
    close = difflib.get_close_matches(key, [*GROUPS, *PLAIN[""]], 1)
    return f"type {close[0]}={text}" if close else "python train.py --help shows all"


def _chosen(overrides: list[Override]) -> dict[str, str | None]:
    """The option of each group; groups of which several are asked for, or that a sweep may choose, are left out."""
    chosen: dict[str, str | None] = dict(_defaults())
    typed = {override.key_or_group: _values(override) for override in overrides if override.key_or_group in GROUPS}
    for group, values in typed.items():
        if group in chosen and len(values) == 1 and isinstance(values[0], str):
            for other, name in _overridden(group, values[0]).items():
                chosen[other] = name
    if "sweeps" in typed:
        chosen = {group: name for group, name in chosen.items() if group in typed}
    for group, values in typed.items():
        if len(values) == 1 and (values[0] is None or isinstance(values[0], str)):
            chosen[group] = values[0]
        else:
            chosen.pop(group, None)
    chosen.pop("sweeps", None)
    return chosen


@cache
def _defaults() -> dict[str, str | None]:
    """The option of each group that is taken where none is typed."""
    pairs = [pair for entry in _yaml("config")["defaults"] if isinstance(entry, dict) for pair in entry.items()]
    return {group: name for group, name in pairs if group in GROUPS and group != "sweeps"}


def _overridden(group: str, name: str) -> dict[str, str]:
    """The options of other groups that an option chooses."""
    entries = [entry for entry in _yaml(f"{group}/{name}").get("defaults", []) if isinstance(entry, dict)]
    pairs = [(key.split("/")[-1], value) for entry in entries for key, value in entry.items() if "override" in key]
    return dict(pairs)


@cache
def options(group: str) -> dict[str, dict]:
    """The options of a group, with the settings and defaults of each."""
    found = {size: {"size": size, "name": None} for size in SIZES} if group in ("student", "teacher") else {}
    found |= {file.stem: _settings(group, file.stem) for file in sorted((CONF / group).glob("*.yaml"))}
    shared = _yaml("config").get(group) or {}
    return {name: shared | settings for name, settings in found.items()}


def _settings(group: str, name: str) -> dict:
    """The settings of an option, with those that it takes over from other files."""
    node, inherited = _yaml(f"{group}/{name}"), {}
    for entry in node.get("defaults", []):
        if isinstance(entry, str):
            inherited |= _settings(group, entry)
        else:
            for key, other in entry.items():  # as /data@_here_
                inherited |= _settings(key.strip("/").partition("@")[0], other) if "_here_" in key else {}
    own = node[group] if isinstance(node.get(group), dict) else node
    return inherited | {k: v for k, v in own.items() if k not in NOTES}


@cache
def _yaml(name: str) -> dict:
    file = CONF / f"{name}.yaml"
    return OmegaConf.to_container(OmegaConf.load(file)) if file.exists() else {}
