"""Refusal of words on a command line: secrets, and words that make Hydra call code or read a foreign config.

Hydra obeys its own settings (callbacks, logging, plugins) before train.py runs. So words are checked before Hydra gets
them, and of Hydra's settings only those that kd uses are accepted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from hydra._internal.utils import get_args_parser

from kd.config import grammar, overrides
from kd.config.components import GROUPS
from kd.config.secrets import check_secrets
from kd.errors import UserError
from kd.system import programs

HYDRA = re.compile(r"hydra/(launcher|sweeper)|hydra\.(mode|verbose|(launcher|sweeper)(\.[A-Za-z]\w*)+)")


def check_command_line(words: list[str]) -> list[str]:
    """Check a whole command line: Hydra's switches, then check_words() of the rest; raise UserError.

    Returns the switches with their values as one word each, and then the overrides: Hydra refuses a switch between
    overrides, and a switch with an optional value would take the first of them.
    """
    parser = get_args_parser()
    parser.prog = programs.command("train")
    grammar.check_switches(words, parser._option_string_actions)
    given = parser.parse_intermixed_args(words)
    for switch in grammar.ELSEWHERE:
        if (value := getattr(given, switch[2:].replace("-", "_"))) is not None:
            why, hint = "kd reads no config but its own", f"leave {switch} out"
            raise UserError(option=switch, got=value, why=why, hint=hint)
    check_words(given.overrides)
    several = ("sweeps=", "hydra.mode=")
    if not given.multirun and not any(word.startswith(several) for word in given.overrides):
        overrides.check_single(given.overrides)
    switches = {name.replace("_", "-"): value for name, value in vars(given).items() if name != "overrides"}
    typed = [f"--{name}" if value is True else f"--{name}={value}" for name, value in switches.items() if value]
    return typed + given.overrides


def check_words(words: Iterable[str]) -> None:
    """Raise UserError for a dangerous or a wrong override.

    It holds a secret, makes Hydra call or read something foreign, or names no option of its group.
    """
    words = list(words)
    check_secrets(words)
    for word in words:
        override = overrides.parsed(word)
        if override is None:
            overrides.check_slash(word)
            continue  # refused below
        key, value = override.key_or_group, word.partition("=")[2]
        if override.package is not None or (key.startswith("hydra") and not HYDRA.fullmatch(key)):
            raise UserError(option=word, why="not something a config may set", hint=f"leave {key} out")
        if re.search(r"\$\{.*:", value):  # the environment's, which would then be in files
            need = "a value that refers to other settings at most, not to anything outside of them"
            raise UserError(option=word, need=need, hint="type the value itself")
        if key.startswith("hydra") and "{" in value:
            raise UserError(option=word, why="not something a config may call", hint=f"leave {key} out")
        if (key in GROUPS or "/" in key) and re.search(r"[/\\{]|\.\.", value):
            need, hint = "the name of an option, and no path", "type --help to see all names"
            raise UserError(option=word, need=need, hint=hint)
        overrides.check_slash(word)
    grammar.check(words)
    overrides.check_groups(words)
