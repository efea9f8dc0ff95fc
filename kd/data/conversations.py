"""Turns of a conversation in a row of a table, for many forms of columns and messages."""

from __future__ import annotations

from collections.abc import Mapping

from kd.data.examples import Turn
from kd.data.messages import (
    CALLS,
    LEARNED,
    ROLES,
    begins_with,
    brief,
    check_decision,
    column_error,
    entry_of,
    has_system,
    is_present,
    messages_in,
    parsed_json,
    role_of,
    without_null,
)
from kd.data.shapes import Shape
from kd.data.tables import kind_of
from kd.errors import UserError

SYSTEM, HISTORY = ("system", "system_prompt"), "history"  # columns


class ConversationReader:
    """Reader of the turns in rows of one table; see kd.data.columns.RowReader."""

    def __init__(self, shape: Shape, option: str, filled: bool):
        self.shape, self.option, self.filled = shape, option, filled

    def __call__(self, row: dict, unused: list[str]) -> tuple[list[Turn], bool]:
        """Return all turns of a row, with those of its further columns, and True if any were messages with roles."""
        shape = self.shape
        columns = [shape.prompt] if shape.response is None else [shape.prompt, shape.response]
        as_json = all(messages_in(row.get(column)) for column in columns)
        prompt, are_messages = self._turns(row, shape.prompt, "user", unused, as_json)
        if shape.input:
            prompt += [turn for turn in self._turns(row, shape.input, "input", unused)[0] if turn.content.strip()]
        if shape.response:
            as_json = as_json or self._repeats(prompt, row.get(shape.response))
            answer, is_list = self._turns(row, shape.response, "assistant", unused, as_json)
            are_messages = are_messages or is_list
            if any(turn.role in ("user", "system", "developer") for turn in answer):
                prompt, answer = self._whole(prompt, answer)
            turns = prompt + (answer or [Turn("user", "")])
        else:
            turns = prompt
        history = self._history(row, unused)
        systems = [part[0] for part in (turns, history) if has_system(part)]
        for name in SYSTEM:
            if is_present(text := row.get(name)) and name not in shape:
                if not isinstance(text, str):
                    raise column_error(self.option, "system", type(text).__name__, "text")
                systems.append(Turn("system", text))
        self._check_same(systems)
        others = [turn for part in (history, turns) for turn in part[has_system(part) :]]
        return [*systems[:1], *others], are_messages

    def _check_same(self, systems: list[Turn]) -> None:
        """Raise UserError unless all system prompts in a row are the same."""
        for turn in systems:
            if turn.content.strip() != systems[0].content.strip():
                both = f"{brief(systems[0].content)} and {brief(turn.content)}"
                why = f"the columns or messages hold two system prompts, {both}"
                raise UserError(option=self.option, why=why, hint="keep one of these system prompts")

    def _whole(self, prompt: list[Turn], answer: list[Turn]) -> tuple[list[Turn], list[Turn]]:
        """Return system prompts and turns of a conversation in the response's column that begins with the prompt."""
        if not begins_with(answer, prompt):
            column = self.shape.response
            raise UserError(
                option=self.option,
                why=f"column {column!r} holds turns of the user, and does not begin with column {self.shape.prompt!r}: "
                f"{brief([list(t[:2]) for t in answer])}",
                hint=f"to learn from column {column!r} alone, type data.prompt={column} and leave data.response out",
            )
        systems = [turn for turn in prompt if turn.role == "system"]
        if any(turn.role == "system" for turn in answer):
            self._check_same([turn for turn in (*systems, *answer) if turn.role == "system"])
            systems = []
        return systems, answer

    def _repeats(self, prompt: list[Turn], value) -> bool:
        """Return True for the JSON text of a whole conversation that begins with the prompt, and has a response."""
        messages = messages_in(value) if isinstance(value, str) else None
        if not prompt or not messages or not any(role_of(message) == "assistant" for message in messages):
            return False
        return begins_with([Turn(role_of(m) or "", str(m.get("content", m.get("value")))) for m in messages], prompt)

    def _turns(
        self, row: dict, column: str, role: str, unused: list[str], as_json: bool = False
    ) -> tuple[list[Turn], bool]:
        """Return the turns in a column, and True if it was a list of messages.

        Text is one turn of `role`, null is none. as_json: text that is the JSON of messages is read as these.
        """
        value = row.get(column)
        if value is None:
            return [], False
        if isinstance(value, str) and not (as_json and messages_in(value)):
            return [Turn(role, value, learned=role == "assistant")], False
        if (messages := messages_in(value)) is None:
            first = value[0] if isinstance(value, list) and value else None
            got = kind_of(value) if first is None else f"a list with {brief(first)}"
            raise column_error(self.option, column, got)
        filled = self.filled and not isinstance(value, str)
        return [self._turn(message, column, unused, filled) for message in messages], True

    def _turn(self, message: Mapping, column: str, unused: list[str], filled: bool) -> Turn:
        keys = {key: value for key, value in message.items() if value is not None}
        role, written = role_of(keys), str(keys.pop("role", None) or keys.pop("from", None))
        if role is None:
            raise UserError(
                option=self.option,
                why=f"column {column!r} has a message of the role {written!r}",
                need=f"one of the roles {', '.join(ROLES)}",
                hint="rename that role, or leave such rows out",
            )
        calls = [self._call(keys, key, filled) for key in CALLS if is_present(keys.get(key))]
        content = keys.pop("content", keys.pop("value", "" if calls else None))
        if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise column_error(self.option, column, f"a list with {brief(dict(message))}")
        learned = True
        for key in LEARNED:
            if key in keys:
                value = keys.pop(key)
                place, hint = f"{key}={brief(value)} in a message", "leave that key out, or such rows"
                check_decision(value, self.option, place, "turn", hint)
                learned = learned and bool(value) == LEARNED[key]
        if role != "assistant" and learned and any(LEARNED.get(key) and message.get(key) for key in message):
            unused.append("weight of turns that are not the assistant's")
        keys = {
            key: without_null(value) if filled and key not in CALLS else value
            for key, value in keys.items() if is_present(value)
        }  # fmt: skip
        return Turn(role, content, keys, learned and role == "assistant")

    def _call(self, keys: dict, key: str, filled: bool) -> object:
        """Put the calls of tools in a message, which may be JSON text, in the form of objects, and return them."""
        filled = filled and not isinstance(keys[key], str)
        calls = parsed_json(keys[key])
        entries = calls if key == "tool_calls" and isinstance(calls, list) else [calls]
        entries = [entry_of(call, filled) for call in entries]
        if not all(isinstance(call, dict) for call in entries):
            raise column_error(self.option, key, brief(calls), "calls of functions, as objects or their JSON")
        keys[key] = entries if key == "tool_calls" else entries[0]
        return keys[key]

    def _history(self, row: dict, unused: list[str]) -> list[Turn]:
        """Return earlier turns: a list of [question, answer], or of messages."""
        value = row.get(HISTORY)
        if HISTORY in self.shape or not is_present(value):
            return []
        if messages_in(value) is not None:
            return self._turns(row, HISTORY, "user", unused, as_json=True)[0]
        parsed = parsed_json(value)
        pairs: list = parsed if isinstance(parsed, list) else [None]
        if not all(isinstance(p, list) and len(p) == 2 and all(isinstance(t, str) for t in p) for p in pairs):
            raise column_error(self.option, HISTORY, brief(value), "a list of [question, answer]")
        return [
            turn
            for question, answer in pairs
            for turn in (Turn("user", question), Turn("assistant", answer, learned=True))
        ]
