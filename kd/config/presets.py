"""Presets: options of a group that choose options and settings of other groups, such as method=gkd."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from kd.config.components import PRESETS
from kd.config.options import options, overridden, settings_of_preset, words_of
from kd.config.sizes import SIZES
from kd.errors import UserError


def set_by(choices: dict[str, list], groups: Iterable[str]) -> dict[str, list]:
    """Return the options that the choices in `groups` set in other groups: a list per group, all that differ."""
    changed: dict[str, list] = {}
    for group in groups:
        sets = [overridden(group, name) for name in choices.get(group, []) if isinstance(name, str)]
        for other in {key for chosen in sets for key in chosen}:
            changed[other] = list({chosen.get(other) for chosen in sets})
    return changed


def check_conflict(chosen: dict[str, str | None], typed: set[str]) -> None:
    """Raise UserError if two presets choose different options of a group and the command line chooses none."""
    presets = {f"{preset}={name}": overridden(preset, name) for preset in PRESETS if (name := chosen.get(preset))}
    for (first, some), (second, others) in itertools.combinations(presets.items(), 2):
        groups = [group for group in some.keys() & others.keys() - typed if some[group] != others[group]]
        if groups:
            ways = (" ".join(f"{group}={choice[group]}" for group in sorted(groups)) for choice in (some, others))
            why, hint = "these two do not agree", f"type {', or '.join(ways)}"
            raise UserError(option=first, conflict=second, why=why, hint=hint)


def check_preset(preset: str, chosen: dict[str, str | None], words: list[str]) -> None:
    """Raise UserError if a preset has settings for one option of a group and the command line chooses another."""
    if not (name := chosen.get(preset)):
        return
    for group, settings in settings_of_preset(preset, name).items():
        option = chosen.get(group)
        if not isinstance(settings, dict) or option in (None, overridden(preset, name).get(group)):
            continue
        word = f"{group}={option}"
        for key in settings.keys() - options(group).get(option, {}).keys():
            others = [other for other in words_of(preset, name) if not other.startswith((f"{group}=", f"{group}."))]
            raise UserError(
                option=word,
                conflict=f"{preset}={name}",
                why=f"{preset}={name} sets {group}.{key}, which {word} does not have",
                hint=f"leave {preset}={name} out, and type the rest of what {name} stands for: {' '.join(others)}",
            )
        if "name" in settings and option in SIZES and f"{group}.name=null" not in words:
            why = f"{preset}={name} sets {group}.name, and {option} is a size"
            raise UserError(option=word, conflict=f"{preset}={name}", why=why, hint=f"type {word} {group}.name=null")
