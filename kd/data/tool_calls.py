"""Calls of tools in messages: their arguments as objects or as JSON text, as chat templates expect one or the other."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator


def _arguments(messages: list[dict]) -> Iterator[tuple[dict, object]]:
    """Yield each call of a tool that has arguments, and these."""
    for message in messages:
        calls = message.get("tool_calls")
        for call in [*(calls if isinstance(calls, list) else []), message]:
            function = (call.get("function", call) if call is not message else call.get("function_call")) or {}
            if isinstance(function, dict) and "arguments" in function:
                yield function, function["arguments"]


def with_arguments_as(messages: list[dict], form: str | None = None) -> list[dict]:
    """Return messages with the arguments of calls as objects or JSON text. form: object, text, or None for neither."""
    if form is None:
        return messages
    messages = copy.deepcopy(messages)
    for function, arguments in _arguments(messages):
        try:
            if form == "object" and isinstance(arguments, str):
                function["arguments"] = json.loads(arguments)
            elif form == "text" and not isinstance(arguments, str):
                function["arguments"] = json.dumps(arguments, ensure_ascii=False)
        except ValueError:
            continue  # no JSON: as it stands
    return messages


def is_mangled(messages: list[dict], text: str) -> bool:
    """Return True where the arguments of a call are in a text as a quoted string, or as Python writes an object."""
    for _, arguments in _arguments(messages):
        if isinstance(arguments, str):
            quoted = json.dumps(arguments, ensure_ascii=False)
            try:
                arguments = json.loads(arguments)
            except ValueError:
                continue
            if isinstance(arguments, dict | list) and quoted in text:
                return True
        if arguments and isinstance(arguments, dict):
            name = next(iter(arguments))
            if f'\\"{name}\\"' in text or f"{{'{name}'" in text:
                return True
    return False
