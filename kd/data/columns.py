"""Rows of a table as examples, whatever the columns are called.

What belongs to an example is used: system prompts, history, tools, weights of 0 and 1. Other columns, and keys of
messages that no template reads, are counted by name. What would change the meaning and cannot be used is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

from kd.data.examples import Example, Turn
from kd.data.tables import Documents, JsonRows, kind_of
from kd.errors import UserError


class Shape(NamedTuple):
    """Names of columns; without a response the prompt is a whole conversation, or all that there is."""

    prompt: str
    input: str | None
    response: str | None


SHAPES = (
    Shape("messages", None, None),
    Shape("conversations", None, None),  # ShareGPT
    Shape("instruction", "context", "response"),  # Dolly
    Shape("instruction", "input", "output"),  # Alpaca
    Shape("prompt", None, "response"),
    Shape("prompt", None, "completion"),
    Shape("question", None, "answer"),
    Shape("prompt", None, None),
)
SYSTEM, HISTORY, TOOLS, OPTIONS, LABEL = (
    ("system", "system_prompt"), "history", ("tools", "functions"), "chat_template_kwargs", "label"
)  # fmt: skip
ROLES = {
    "human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatbot": "assistant",
    "ai": "assistant",
    **{role: role for role in ("system", "developer", "user", "assistant", "tool", "function", "ipython")},
}  # fmt: skip
INPUTS = ("input", "context")  # beside a prompt and a response
# Keys of a message, and columns of a row, that decide if it is learned, and the value for yes.
LEARNED = {
    "weight": True, "loss_weight": True, "sample_weight": True, "loss": True, "loss_mask": True, "train": True,
    "trainable": True, "training": True, "train_on_turn": True, "train_detail": True, "mask": False, "masked": False,
}  # fmt: skip

# Names that belong to kd and to transformers where a conversation is rendered.
RENDERING = {
    "messages", "conversation", "tools", "tokenize", "chat_template", "add_generation_prompt", "continue_final_message",
    "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs", "sanitize_control_tokens",
}  # fmt: skip
CALLS = ("tool_calls", "function_call")
MESSAGES = "text, or a list of messages with role and content"


class Reader:
    """Reads the rows of one table.

    learn: last or all of the assistant's turns. filled: true for a table that fills in null where rows have other keys.
    named: true where data.prompt names the column of the prompt.
    """

    def __init__(self, shape: Shape, learn: str, option: str, filled: bool = True, named: bool = False):
        self.shape, self.learn, self.option, self.filled, self.named = shape, learn, option, filled, named
        self.used = {*filter(None, shape), *SYSTEM, HISTORY, *TOOLS, OPTIONS, *LEARNED, LABEL}

    def __call__(self, row: dict) -> Example:
        """The example in a row; one without turns where there is nothing to learn."""
        shape = self.shape
        unused = [f"column {name}" for name, value in row.items() if name not in self.used and _is_there(value)]
        turns, are_messages = self._conversation(row, unused)
        if reason := self._excluded(row, unused):
            return Example((), left_out=reason, unused=tuple(unused))
        answers = [place for place, turn in enumerate(turns) if turn.role == "assistant"]
        if shape.response and answers and answers[-1] < len(turns) - 1:
            answers = []  # the response has no turn of the assistant
        prompts = [
            place for place, turn in enumerate(turns)
            if turn.role not in ("system", "assistant") and turn.content.strip()
        ]  # fmt: skip
        if not prompts:
            return Example((), left_out="no_prompt", unused=tuple(unused))
        greetings = [place for place in answers if place < prompts[0]]  # context for the turns behind them
        answers = answers[len(greetings) :]
        if shape == SHAPES[-1] and turns[-1].role != "assistant":
            self._check_alone(row)
            answer = Turn("assistant", "", learned=True)
            return Example((*turns, answer), are_messages, tools=self._tools(row), options=self._options(row),
                           unused=tuple(unused), prompt_only=True)  # fmt: skip
        full = [place for place in answers if turns[place].learned and _says(turns[place])]
        if not full or (self.learn == "last" and not _says(turns[max(p for p in answers if turns[p].learned)])):
            weighted = answers and not any(turns[place].learned for place in answers)
            return Example((), left_out="weight" if weighted else "no_response", unused=tuple(unused))
        learned = full if self.learn == "all" else full[-1:]
        unused += ["turns after the last that is learned"] if learned[-1] < len(turns) - 1 else []
        weights = sum(not turns[place].learned for place in answers)
        empty = sum(turns[place].learned and not _says(turns[place]) for place in answers)
        unlearned = {"weight": weights, "empty": empty, "earlier": len(answers) - weights - empty - len(learned),
                     "no_prompt": len(greetings)}  # fmt: skip
        return Example(
            tuple(turn._replace(learned=place in learned) for place, turn in enumerate(turns[: learned[-1] + 1])),
            are_messages, tools=self._tools(row), options=self._options(row),
            opening=answers[0] if self.learn == "all" else None,
            unlearned={name: count for name, count in unlearned.items() if count}, unused=tuple(unused),
        )  # fmt: skip

    def _check_alone(self, row: dict) -> None:
        """Raise UserError where another column may hold the response, unless the prompt's column was named."""
        others = [
            name for name, value in row.items()
            if name not in self.used and (value.strip() if isinstance(value, str) else messages_in(value))
        ]  # fmt: skip
        if others and not self.named:
            response = others[0] if len(others) == 1 else "ONE_OF_THEM"
            raise UserError(
                option=self.option,
                why=f"column 'prompt' has no response, and {', '.join(others)} may hold the response",
                hint=f"type data.prompt=prompt data.response={response} to learn that column, or data.prompt=prompt "
                "for prompts alone",
            )

    def _conversation(self, row: dict, unused: list[str]) -> tuple[list[Turn], bool]:
        """All turns of a row, with those of its further columns, and whether any were messages with roles."""
        shape = self.shape
        columns = [shape.prompt] if shape.response is None else [shape.prompt, shape.response]
        as_json = all(messages_in(row.get(column)) for column in columns)
        asked, are_messages = self._turns(row, shape.prompt, "user", unused, as_json)
        if shape.input:
            asked += [turn for turn in self._turns(row, shape.input, "input", unused)[0] if turn.content.strip()]
        if shape.response:
            as_json = as_json or self._repeats(asked, row.get(shape.response))
            answer, is_list = self._turns(row, shape.response, "assistant", unused, as_json)
            are_messages = are_messages or is_list
            if any(turn.role in ("user", "system", "developer") for turn in answer):
                asked, answer = self._whole(asked, answer)
            turns = asked + (answer or [Turn("user", "")])
        else:
            turns = asked
        history = self._history(row, unused)
        systems = [part[0] for part in (turns, history) if _has_system(part)]
        for name in SYSTEM:
            if _is_there(text := row.get(name)) and name not in shape:
                if not isinstance(text, str):
                    raise self._refused("system", type(text).__name__, "text")
                systems.append(Turn("system", text))
        self._check_same(systems)
        others = [turn for part in (history, turns) for turn in part[_has_system(part) :]]
        return [*systems[:1], *others], are_messages

    def _check_same(self, systems: list[Turn]) -> None:
        """Raise UserError unless all system prompts in a row are the same."""
        for turn in systems:
            if turn.content.strip() != systems[0].content.strip():
                both = f"{_brief(systems[0].content)} and {_brief(turn.content)}"
                why = f"a row has two system prompts, {both}, in its columns or messages"
                raise UserError(option=self.option, why=why, hint="keep one of these system prompts")

    def _whole(self, asked: list[Turn], answer: list[Turn]) -> tuple[list[Turn], list[Turn]]:
        """A conversation in the response's column, which has to begin with the prompt."""
        if not _begins(answer, asked):
            column = self.shape.response
            raise UserError(
                option=self.option,
                why=f"column {column!r} holds turns of the user, and does not begin with column {self.shape.prompt!r}: "
                f"{_brief([list(t[:2]) for t in answer])}",
                hint=f"to learn from column {column!r} alone, type data.prompt={column} and leave data.response out",
            )
        systems = [turn for turn in asked if turn.role == "system"]
        if any(turn.role == "system" for turn in answer):
            self._check_same([turn for turn in (*systems, *answer) if turn.role == "system"])
            systems = []
        return systems, answer

    def _repeats(self, asked: list[Turn], value) -> bool:
        """True for the JSON text of a whole conversation that begins with the prompt, and has a response."""
        messages = messages_in(value) if isinstance(value, str) else None
        if not asked or not messages or not any(_role(message) == "assistant" for message in messages):
            return False
        return _begins([Turn(_role(m) or "", str(m.get("content", m.get("value")))) for m in messages], asked)

    def _turns(
        self, row: dict, column: str, role: str, unused: list[str], as_json: bool = False
    ) -> tuple[list[Turn], bool]:
        """Turns in a column, and whether it was a list of messages: text is one turn of `role`, null is none.

        as_json: text that is the JSON of messages is read as these.
        """
        value = row.get(column)
        if value is None:
            return [], False
        if isinstance(value, str) and not (as_json and messages_in(value)):
            return [Turn(role, value, learned=role == "assistant")], False
        if (messages := messages_in(value)) is None:
            what = kind_of(value)
            wrong = value[0] if isinstance(value, list) and value else None
            raise self._refused(column, f"a list with {_brief(wrong)}" if wrong is not None else what)
        filled = self.filled and not isinstance(value, str)
        return [self._turn(message, column, unused, filled) for message in messages], True

    def _turn(self, message: Mapping, column: str, unused: list[str], filled: bool) -> Turn:
        keys = {key: value for key, value in message.items() if value is not None}
        role, written = _role(keys), str(keys.pop("role", None) or keys.pop("from", None))
        if role is None:
            raise UserError(
                option=self.option,
                why=f"column {column!r} has a message of the role {written!r}",
                need=f"one of the roles {', '.join(ROLES)}",
                hint="rename that role, or leave such rows out",
            )
        calls = [self._call(keys, key, filled) for key in CALLS if _is_there(keys.get(key))]
        content = keys.pop("content", keys.pop("value", "" if calls else None))
        if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise self._refused(column, f"a list with {_brief(dict(message))}")
        learned = True
        for key in LEARNED:
            if key in keys:
                value = keys.pop(key)
                if not _is_decision(value):
                    raise UserError(
                        option=self.option,
                        why=f"{key}={_brief(value)} in a message, and a turn is learned as a whole or not at all",
                        need="0 or 1",
                        hint="leave that key out, or such rows",
                    )
                learned = learned and bool(value) == LEARNED[key]
        if role != "assistant" and learned and any(LEARNED.get(key) and message.get(key) for key in message):
            unused.append("weight of turns that are not the assistant's")
        keys = {
            key: _without_null(value) if filled and key not in CALLS else value
            for key, value in keys.items() if _is_there(value)
        }  # fmt: skip
        return Turn(role, content, keys, learned and role == "assistant")

    def _call(self, keys: dict, key: str, filled: bool) -> object:
        """Put the calls of tools in a message, which may be JSON text, in the form of objects, and return them."""
        filled = filled and not isinstance(keys[key], str)
        calls = _parsed(keys[key])
        many = calls if key == "tool_calls" and isinstance(calls, list) else [calls]
        many = [_entry(call, filled) for call in many]
        if not all(isinstance(call, dict) for call in many):
            raise self._refused(key, _brief(calls), "calls of functions, as objects or their JSON")
        keys[key] = many if key == "tool_calls" else many[0]
        return keys[key]

    def _history(self, row: dict, unused: list[str]) -> list[Turn]:
        """Earlier turns: a list of [question, answer], or of messages."""
        value = row.get(HISTORY)
        if HISTORY in self.shape or not _is_there(value):
            return []
        if messages_in(value) is not None:
            return self._turns(row, HISTORY, "user", unused, as_json=True)[0]
        parsed = _parsed(value)
        pairs: list = parsed if isinstance(parsed, list) else [None]
        if not all(isinstance(p, list) and len(p) == 2 and all(isinstance(t, str) for t in p) for p in pairs):
            raise self._refused(HISTORY, _brief(value), "a list of [question, answer]")
        return [turn for ask, say in pairs for turn in (Turn("user", ask), Turn("assistant", say, learned=True))]

    def _tools(self, row: dict) -> tuple:
        """Schemas of functions; those in a column `functions` are bare."""
        found: list[dict] = []
        for column in TOOLS:
            value = row.get(column) if column not in self.shape else None
            if not _is_there(value):
                continue
            filled = self.filled and not isinstance(value, str)
            try:
                tools = [_entry(tool, filled) for tool in _parsed(value)]
            except TypeError:
                tools = [None]
            if not all(isinstance(tool, dict) for tool in tools):
                raise self._refused(column, _brief(value), "a list of objects, each the schema of a function")
            bare = [column == "functions" and "function" not in tool for tool in tools]
            tools = [{"type": "function", "function": t} if b else t for t, b in zip(tools, bare, strict=True)]
            found += [tool for tool in tools if tool not in found]
        return tuple(found)

    def _options(self, row: dict) -> dict:
        value = row.get(OPTIONS)
        if not _is_there(value):
            return {}
        try:
            options = json.loads(value) if isinstance(value, str) else value
        except ValueError:
            options = None
        if not isinstance(options, dict):
            raise self._refused(OPTIONS, _brief(value), "an object")
        options = {key: option for key, option in options.items() if option is not None}
        if taken := RENDERING & options.keys():
            names = ", ".join(sorted(taken))
            raise UserError(
                option=self.option,
                why=f"column {OPTIONS!r} sets {names}, which kd sets itself",
                hint=f"leave {names} out of that column; tools belong in a column 'tools'",
            )
        return options

    def _excluded(self, row: dict, unused: list[str]) -> str:
        """The reason why a whole row is not to be learned, if its weight or its label says so."""
        weighted = True
        for name, yes in LEARNED.items():
            value = row.get(name) if name not in self.shape else None
            if _is_there(value):
                if not _is_decision(value):
                    raise UserError(
                        option=self.option,
                        why=f"column {name!r} holds {_brief(value)}, and a row is learned as a whole or not at all",
                        need="0 or 1",
                        hint="leave that column out, or rename it",
                    )
                weighted = weighted and bool(value) == yes
        label = row.get(LABEL) if LABEL not in self.shape else None
        if isinstance(label, bool) and not label:  # of KTO: a completion that is not wanted
            return "label"
        unused += [f"column {LABEL}"] if _is_there(label) and not isinstance(label, bool) else []
        return "" if weighted else "weight"

    def _refused(self, column: str, got: str, need: str = MESSAGES) -> UserError:
        return UserError(
            option=self.option,
            why=f"column {column!r} holds {got}",
            need=need,
            hint="name other columns with data.prompt= and data.response=, or leave such rows out",
        )


def examples(rows, prompt: str | None, response: str | None, learn: str, option: str) -> Documents:
    """Examples of a table; raises UserError, with the columns that there are, where none are known."""
    columns = Documents(rows, dict, option).columns
    shape = _shape(columns, prompt, response, option)
    reader = Reader(shape, learn, option, filled=not isinstance(rows, JsonRows), named=prompt is not None)
    documents = Documents(rows, reader, option)
    value = documents.first().get(shape.prompt)
    if shape.response is None and shape not in SHAPES[-1:] and value is not None and messages_in(value) is None:
        raise UserError(
            option=option,
            why=f"column {shape.prompt!r} is no list of messages with role and content, so that the response has to be "
            f"in another of the columns {', '.join(columns)}",
            hint="type data.response=ONE_OF_THEM. Prompts alone need a column called prompt",
        )
    return documents


def _shape(columns: list[str], prompt: str | None, response: str | None, option: str) -> Shape:
    has = f"has the columns {', '.join(columns)}"
    if response and not prompt:
        hint = "type data.prompt=ONE_OF_THEM too"
        raise UserError(option=option, conflict=f"data.response={response}", why=has, need="data.prompt", hint=hint)
    for name, column in (("prompt", prompt), ("response", response)):
        if column and column not in columns:
            hint = f"type data.{name}=ONE_OF_THEM"
            raise UserError(option=option, why=f"{has}, and no {column!r}", hint=hint)
    if prompt:
        known = any(shape.prompt == prompt and shape.response for shape in SHAPES)
        return _with_input(Shape(prompt, None, response), columns) if known else Shape(prompt, None, response)
    for shape in SHAPES:
        if shape.prompt in columns and shape.response in (None, *columns):
            return _with_input(shape, columns)
    names = "; ".join(", ".join(filter(None, shape)) for shape in SHAPES)
    raise UserError(
        option=option,
        why=has,
        need=f"columns of one of these names: {names}",
        hint="or name the columns: type data.prompt=COLUMN data.response=COLUMN",
    )


def _with_input(shape: Shape, columns: list[str]) -> Shape:
    """A shape with the column of the input, if there is one; a conversation has none."""
    names = (shape.input, *INPUTS) if shape.response else ()
    others = {*columns} - {shape.prompt, shape.response}
    return shape._replace(input=next((name for name in names if name in others), None))


def messages_in(value) -> list[dict] | None:
    """The messages in a value: a list of them, one, a dict of lists, or one of these as JSON; None for others."""
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
    good = isinstance(value, list) and all(
        isinstance(message, dict) and any(isinstance(message.get(key), str) for key in ("role", "from"))
        and message.keys() & {"content", "value", *CALLS}
        for message in value
    )  # fmt: skip
    return value if good else None


def _role(message: Mapping) -> str | None:
    """The role of a message, None for one that is not known."""
    return ROLES.get(str(message.get("role") or message.get("from")).lower())


def _has_system(turns: list[Turn]) -> bool:
    return bool(turns) and turns[0].role == "system"


def _begins(answer: list[Turn], asked: list[Turn]) -> bool:
    """True where the turns of a conversation begin with these, apart from system prompts."""
    asked, answer = ([turn for turn in turns if turn.role != "system"] for turns in (asked, answer))
    head = [(turn.role, turn.content.strip()) for turn in answer[: len(asked)]]
    return head == [("user" if turn.role == "input" else turn.role, turn.content.strip()) for turn in asked]


def _parsed(value):
    """The value of JSON text; other values, and text that is no JSON, as they stand."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _entry(value, filled: bool):
    """An object, which may be JSON text, without the null entries that a table filled in."""
    return _without_null(value) if filled and not isinstance(value, str) else _parsed(value)


def _is_decision(value) -> bool:
    return isinstance(value, int | float) and value in (0, 1)


def _says(turn: Turn) -> bool:
    """True where a turn has text, or a call of a tool."""
    return bool(turn.content.strip() or any(turn.keys.get(key) for key in CALLS))


def _is_there(value) -> bool:
    return value is not None and value not in ("", [], {})


def _without_null(value):
    """A value without the null entries that tables put in where rows have different keys."""
    if isinstance(value, dict):
        return {key: _without_null(entry) for key, entry in value.items() if entry is not None}
    return [_without_null(entry) for entry in value] if isinstance(value, list) else value


def _brief(value) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
