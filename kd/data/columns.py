"""Conversion of table rows to examples, for many names of columns.

An example includes system prompts, history, tools, and weights of 0 and 1. Other columns, and keys of messages that no
template reads, are counted by name. Values that would change the meaning and cannot be used are refused.
"""

from __future__ import annotations

import json
from pathlib import Path

from kd.data.conversations import HISTORY, SYSTEM, ConversationReader
from kd.data.examples import Example, Turn
from kd.data.messages import (
    LEARNED,
    brief,
    check_decision,
    column_error,
    entry_of,
    has_content,
    is_present,
    messages_in,
    parsed_json,
)
from kd.data.shapes import SHAPES, Shape, shape_of
from kd.data.tables import Documents, JsonRows
from kd.errors import UserError

TOOLS, OPTIONS, LABEL = ("tools", "functions"), "chat_template_kwargs", "label"  # columns
# Variables of a template that kd and transformers set themselves.
RENDERING = {
    "messages", "conversation", "tools", "tokenize", "chat_template", "add_generation_prompt", "continue_final_message",
    "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs", "sanitize_control_tokens",
}  # fmt: skip


class RowReader:
    """Reader of the rows of one table.

    learn: last or all of the assistant's turns. filled: true for a table that fills missing keys of rows with null.
    named: true where data.prompt names the column of the prompt.
    """

    def __init__(self, shape: Shape, learn: str, option: str, filled: bool = True, named: bool = False):
        self.shape, self.learn, self.option, self.filled, self.named = shape, learn, option, filled, named
        self.conversation = ConversationReader(shape, option, filled)
        self.used = {*filter(None, shape), *SYSTEM, HISTORY, *TOOLS, OPTIONS, *LEARNED, LABEL}

    def __call__(self, row: dict) -> Example:
        """Return the example in a row; one without turns where there is nothing to learn."""
        shape = self.shape
        unused = [f"column {name}" for name, value in row.items() if name not in self.used and is_present(value)]
        turns, are_messages = self.conversation(row, unused)
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
        return self._learned(row, turns, answers, len(greetings), are_messages, unused)

    def _learned(
        self, row: dict, turns: list[Turn], answers: list[int], greetings: int, are_messages: bool, unused: list[str]
    ) -> Example:  # fmt: skip
        """Return the example with the turns that are learned; answers: places of the assistant's turns, no greeting."""
        full = [place for place in answers if turns[place].learned and has_content(turns[place])]
        if not full or (self.learn == "last" and not has_content(turns[max(p for p in answers if turns[p].learned)])):
            weighted = answers and not any(turns[place].learned for place in answers)
            return Example((), left_out="weight" if weighted else "no_response", unused=tuple(unused))
        learned = full if self.learn == "all" else full[-1:]
        unused += ["turns after the last that is learned"] if learned[-1] < len(turns) - 1 else []
        weights = sum(not turns[place].learned for place in answers)
        empty = sum(turns[place].learned and not has_content(turns[place]) for place in answers)
        unlearned = {"weight": weights, "empty": empty, "earlier": len(answers) - weights - empty - len(learned),
                     "no_prompt": greetings}  # fmt: skip
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

    def _tools(self, row: dict) -> tuple:
        """Return schemas of functions; those in a column `functions` are bare."""
        schemas: list[dict] = []
        for column in TOOLS:
            value = row.get(column) if column not in self.shape else None
            if not is_present(value):
                continue
            filled = self.filled and not isinstance(value, str)
            try:
                tools = [entry_of(tool, filled) for tool in parsed_json(value)]
            except TypeError:
                tools = [None]
            if not all(isinstance(tool, dict) for tool in tools):
                need = "a list of objects, each the schema of a function"
                raise column_error(self.option, column, brief(value), need)
            bare = [column == "functions" and "function" not in tool for tool in tools]
            tools = [{"type": "function", "function": t} if b else t for t, b in zip(tools, bare, strict=True)]
            schemas += [tool for tool in tools if tool not in schemas]
        return tuple(schemas)

    def _options(self, row: dict) -> dict:
        value = row.get(OPTIONS)
        if not is_present(value):
            return {}
        try:
            options = json.loads(value) if isinstance(value, str) else value
        except ValueError:
            options = None
        if not isinstance(options, dict):
            raise column_error(self.option, OPTIONS, brief(value), "an object")
        options = {key: option for key, option in options.items() if option is not None}
        if reserved := RENDERING & options.keys():
            names = ", ".join(sorted(reserved))
            raise UserError(
                option=self.option,
                why=f"column {OPTIONS!r} sets {names}, which kd sets itself",
                hint=f"leave {names} out of that column; tools belong in a column 'tools'",
            )
        return options

    def _excluded(self, row: dict, unused: list[str]) -> str:
        """Return the reason why a whole row is not to be learned, if its weight or its label says so."""
        weighted = True
        for name, learned_value in LEARNED.items():
            value = row.get(name) if name not in self.shape else None
            if is_present(value):
                place, hint = f"column {name!r} holds {brief(value)}", "leave that column out, or rename it"
                check_decision(value, self.option, place, "row", hint)
                weighted = weighted and bool(value) == learned_value
        label = row.get(LABEL) if LABEL not in self.shape else None
        if isinstance(label, bool) and not label:  # of KTO: a completion that is not wanted
            return "label"
        unused += [f"column {LABEL}"] if is_present(label) and not isinstance(label, bool) else []
        return "" if weighted else "weight"


def examples(
    rows, prompt: str | None, response: str | None, learn: str, option: str, file: Path | None = None
) -> Documents:
    """Return the examples of a table; raise UserError, which lists the columns, if no known columns exist."""
    columns = Documents(rows, dict, option).columns
    shape = shape_of(columns, prompt, response, option)
    reader = RowReader(shape, learn, option, filled=not isinstance(rows, JsonRows), named=prompt is not None)
    documents = Documents(rows, reader, option, file)
    value = documents.first().get(shape.prompt)
    if shape.response is None and shape not in SHAPES[-1:] and value is not None and messages_in(value) is None:
        raise UserError(
            option=option,
            why=f"column {shape.prompt!r} is no list of messages with role and content, so that the response has to be "
            f"in another of the columns {', '.join(columns)}",
            hint="type data.response=ONE_OF_THEM. Prompts alone need a column called prompt",
        )
    return documents
