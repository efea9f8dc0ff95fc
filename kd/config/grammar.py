"""Words of a command line that are no overrides, each refused with the override that was probably meant."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Collection, Iterable, Iterator

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from kd.config import overrides
from kd.config.components import GROUPS, PRESETS, option_names, quoted
from kd.config.options import defaults_of
from kd.config.schema import GROUPLESS, RUN_OPTIONS
from kd.config.secrets import check_secrets
from kd.errors import UserError
from kd.system import programs

QUOTES = "quotes around a value with other signs than letters, digits and ./:-_, for the shell and for Hydra"
CALLS = "a function of Hydra's with its arguments, as choice(1,2), range(1,9) or interval(0,1)"
ELSEWHERE = ("--config-dir", "--config-path", "--config-name", "--experimental-rerun")  # read other files; refused
BRACKETS = {"[": "]", "{": "}"}
NEGATIVE = re.compile(r"-\.?\d")


def check(words: Iterable[str]) -> None:
    """Raise UserError for the first word that Hydra cannot parse, or that names no setting."""
    words = list(words)
    for index, word in enumerate(words):
        if not _key(word):
            raise _refused(words, index)


def check_switches(words: list[str], switches: Collection[str], names: Collection[str] = ()) -> None:
    """Raise UserError for a secret, and for the first word with a - in front that is none of the switches.

    names: settings of a program itself, each of which needs a value too.
    """
    check_secrets(words)
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        after = words[index + 1 :]
        if name.strip("-:") in names and not (equals and name in names):
            value = next((text for text in (value, *after) if text.strip("=:")), "…").lstrip("=:")
            raise UserError(
                option=word, why="is no setting", need="NAME=VALUE", hint=f"type {name.strip('-:')}={value}"
            )
        if not word.startswith("-") or name in switches:
            continue
        if NEGATIVE.match(word):
            raise _refused(words, index - 1 if index and _is_value(words[index - 1]) else index)
        setting = name.lstrip("-").replace("-", "_")
        offered = [switch for switch in switches if switch not in ELSEWHERE]
        close = difflib.get_close_matches(name, offered, 1, 0.75) if len(name) > 3 and not _is_setting(setting) else []
        if close:
            hint = f"type {close[0]}{equals}{value}"
            raise UserError(option=word, why="is no switch", need="a switch that exists", hint=hint)
        if not equals and after and _is_value(after[0]):
            equals, value = "=", after[0]
        hint = _hint([*words[:index], f"{setting}{equals}{value}", *after], index)
        raise UserError(option=word, why="is no switch", need="NAME=VALUE without a - in front", hint=hint)


def _key(word: str) -> str | None:
    """Return the name of the setting or group of an override; None if Hydra cannot parse it."""
    override = overrides.parsed(word)
    return override and override.key_or_group


def _refused(words: list[str], index: int) -> UserError:
    """Return the error for a word that Hydra cannot parse."""
    word = words[index]
    if "=" not in word:
        why = "is no setting without =VALUE" if _is_setting(word) else "is no setting: it has no ="
        return UserError(option=shlex.quote(word), why=why, need="NAME=VALUE", hint=_hint(words, index))
    reason = _reason(word)
    if " while evaluating " in reason:
        why = reason.partition(": ")[2].partition("\n")[0]
        hint = f"type {word.partition('=')[0]}=…,… with its values"
        if why.startswith("Unknown function") and _takes_text(word):
            hint = f"{hint}, or for a text with brackets {_quoted(word)}"
        return UserError(option=word, why=why, need=CALLS, hint=hint)
    hint = _hint(words, index)
    need = QUOTES if hint.endswith(_quoted(word)) else "NAME=VALUE"
    return UserError(option=word, why="cannot be read", need=need, hint=hint)


def _reason(word: str) -> str:
    """Return Hydra's error for a word; it is long, and mostly about the grammar."""
    try:
        OverridesParser.create().parse_override(word)
    except HydraException as error:
        return str(error)
    return ""


def _hint(words: list[str], index: int) -> str:
    """Return a hint: the override that a word was probably meant to be, as one would type it."""
    for meant in _meant(words, index):
        if key := _key(meant):
            others = [other for other in words if "=" in other and _key(other) not in (None, "", key)]
            try:
                overrides.check_groups([*others, meant])
            except UserError as error:
                if error.hint and error.option == key:
                    return error.hint
            return f"type {shlex.quote(meant)}"
    word = words[index]
    if word in GROUPS:
        leave = f"leave {word} out, or " if word in PRESETS else ""
        return f"{leave}type {word}=NAME with one of {overrides.named(option_names(word))}"
    if defaults_of(name := word.partition("=")[0].strip(" .:+")):
        return f"type {name}=… with its value"
    if groups := [group for group in GROUPS if word in option_names(group)]:
        return f"type {', or '.join(f'{group}={word}' for group in groups)}"
    return f"see all settings by {programs.command('train')} --help"


def _meant(words: list[str], index: int) -> Iterator[str]:
    """Yield what a word may be meant to be, the likeliest first; not all of it can be parsed."""
    word, after = words[index], words[index + 1 :]
    key, equals, value = word.partition("=")
    if not equals:
        yield from _meant_by_name(word, words[:index], after)
        return
    key, value = key.strip(" .:+"), value.strip()
    yield f"{key}={value.lstrip('= ')}"
    opening, closing = value[:1], BRACKETS.get(value[:1], "")
    whole = value
    for other in map(str.strip, after):  # a list with a space in it, which the shell takes for several words
        is_open = whole.count(opening) > whole.count(closing) if closing else whole.endswith(",")
        if "=" in other or not is_open:
            break
        comma = "," if closing and whole[-1] not in ",:[{" and other[:1] not in ",:]}" else ""
        whole += comma + other
        yield f"{key}={whole}"
    if key in GROUPS:
        yield f"{key}={value.strip('={}[]()<>,;:. ')}"
    elif not closing:
        yield f"{key}={value.rstrip(',;)')}"
        if _takes_text(word):
            yield _with_quotes(word)
    elif whole == value:
        yield f"{key}={value.rstrip(',')}{closing}"


def _meant_by_name(word: str, before: list[str], after: list[str]) -> Iterator[str]:
    """Yield what a word without = may be meant to be: a name whose value is another word, or such a value."""
    if before and before[-1].endswith("="):
        yield from _meant([before[-1] + word, *after], 0)
    name, colon, value = word.partition(":")
    if colon and value and _is_setting(name):
        yield f"{name}={value}"
    values = [text for text in (other.lstrip("=:") for other in after[:2]) if text]
    named = word in GROUPS or _is_setting(word) or not any(word in option_names(group) for group in GROUPS)
    if any(isinstance(default, bool) for default in defaults_of(word)) and values[:1] not in (["true"], ["false"]):
        yield f"{word}=true"
    elif named and values and _is_value(values[0]):
        yield f"{word}={values[0]}"


def _is_setting(name: str) -> bool:
    """Return True for the name of a group or of an option, or a name below one."""
    return name in RUN_OPTIONS or name.partition(".")[0] in (*GROUPS, *GROUPLESS)


def _is_value(word: str) -> bool:
    """Return True for a word that may be the value of the name before it: no override, and no switch."""
    return "=" not in word and (not word.startswith("-") or bool(NEGATIVE.match(word)))


def _takes_text(word: str) -> bool:
    """Return True if the setting of an override takes a text; a value that begins with a digit is meant as a number."""
    key, _, value = word.partition("=")
    defaults = defaults_of(key.strip(" .:+"))
    return any(isinstance(default, str) or (default is None and not value[:1].isdigit()) for default in defaults)


def _with_quotes(word: str) -> str:
    """Return an override with its value in the quotes of Hydra's grammar."""
    key, _, value = word.partition("=")
    return f"{key}={quoted(value)}"


def _quoted(word: str) -> str:
    """Return an override with its value in quotes, as one would type it."""
    return shlex.quote(_with_quotes(word))
