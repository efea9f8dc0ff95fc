"""Messages of a conversation, as tables hold them: lists, dicts of lists, or the JSON text of these."""

from __future__ import annotations

import json
from collections.abc import Mapping

from kd.data.examples import Turn
from kd.errors import UserError

ROLES = {
    "human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatbot": "assistant",
    "ai": "assistant",
    **{role: role for role in ("system", "developer", "user", "assistant", "tool", "function", "ipython")},
}  # fmt: skip
# Keys of a message, and columns of a row, that decide if it is learned, and the value for yes.
LEARNED = {
    "weight": True, "loss_weight": True, "sample_weight": True, "loss": True, "loss_mask": True, "train": True,
    "trainable": True, "training": True, "train_on_turn": True, "train_detail": True, "mask": False, "masked": False,
}  # fmt: skip
CALLS = ("tool_calls", "function_call")
MESSAGES = "text, or a list of messages with role and content"


def messages_in(value) -> list[dict] | None:
    """Return the messages in a value: a list of them, one, a dict of lists, or the JSON of these; None for others."""
    if isinstance(value, str):
        if value.lstrip()[:1] not in ("[", "{"):
            return None
        try:
            return messages_in(json.loads(value))
        except ValueError:
            return None
    if isinstance(value, dict):
        lists = [column for column in value.values() if isinstance(column, list)]
        if lists and len(lists) == len(value) and len({*map(len, lists)}) == 1:
            value = [dict(zip(value, message, strict=True)) for message in zip(*lists, strict=True)]
        else:
            value = [value]
    is_valid = isinstance(value, list) and all(
        isinstance(message, dict) and any(isinstance(message.get(key), str) for key in ("role", "from"))
        and message.keys() & {"content", "value", *CALLS}
        for message in value
    )  # fmt: skip
    return value if is_valid else None


def role_of(message: Mapping) -> str | None:
    """Return the role of a message, None for one that is not known."""
    return ROLES.get(str(message.get("role") or message.get("from")).lower())


def has_system(turns: list[Turn]) -> bool:
    return bool(turns) and turns[0].role == "system"


def begins_with(turns: list[Turn], prompt: list[Turn]) -> bool:
    """Return True where a conversation begins with the turns of a prompt, apart from system prompts."""
    prompt, turns = ([turn for turn in part if turn.role != "system"] for part in (prompt, turns))
    head = [(turn.role, turn.content.strip()) for turn in turns[: len(prompt)]]
    return head == [("user" if turn.role == "input" else turn.role, turn.content.strip()) for turn in prompt]


def parsed_json(value):
    """Return the value of JSON text; other values, and text that is no JSON, as they stand."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def entry_of(value, filled: bool):
    """Return an object, which may be JSON text, without the null entries that a table filled in."""
    return without_null(value) if filled and not isinstance(value, str) else parsed_json(value)


def check_decision(value, option: str, place: str, unit: str, hint: str) -> None:
    """Raise UserError unless a value is 0 or 1. place: where it stands; unit: what it decides on, a turn or a row."""
    if not (isinstance(value, int | float) and value in (0, 1)):
        why = f"{place}, and a {unit} is learned as a whole or not at all"
        raise UserError(option=option, why=why, need="0 or 1", hint=hint)


def has_content(turn: Turn) -> bool:
    """Return True where a turn has text, or a call of a tool."""
    return bool(turn.content.strip() or any(turn.keys.get(key) for key in CALLS))


def is_present(value) -> bool:
    return value is not None and value not in ("", [], {})


def without_null(value):
    """Return a value without the null entries that tables put in where rows have different keys."""
    if isinstance(value, dict):
        return {key: without_null(entry) for key, entry in value.items() if entry is not None}
    return [without_null(entry) for entry in value] if isinstance(value, list) else value


def brief(value) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def column_error(option: str, column: str, got: str, need: str = MESSAGES) -> UserError:
    """Return the error for a column whose values cannot be read."""
    return UserError(
        option=option,
        why=f"column {column!r} holds {got}",
        need=need,
        hint="name other columns with data.prompt= and data.response=, or leave such rows out",
    )
