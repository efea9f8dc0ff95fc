"""Shapes of tables: which columns hold the prompt, its input and the response."""

from __future__ import annotations

from typing import NamedTuple

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
INPUTS = ("input", "context")  # beside a prompt and a response


def shape_of(columns: list[str], prompt: str | None, response: str | None, option: str) -> Shape:
    """Return the shape of a table with these columns; raises UserError where it is not known. option: names the table.

    prompt, response: columns that were named, data.prompt and data.response.
    """
    has = f"has the columns {', '.join(columns)}"
    if response and not prompt:
        hint = "type data.prompt=ONE_OF_THEM too"
        raise UserError(option=option, conflict=f"data.response={response}", why=has, need="data.prompt", hint=hint)
    for name, column in (("prompt", prompt), ("response", response)):
        if column and column not in columns:
            hint = f"type data.{name}=ONE_OF_THEM"
            raise UserError(option=option, why=f"{has}, and no {column!r}", hint=hint)
    if prompt:
        is_standard = any(shape.prompt == prompt and shape.response for shape in SHAPES)
        return _with_input(Shape(prompt, None, response), columns) if is_standard else Shape(prompt, None, response)
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
    """Return a shape with the column of the input, if there is one; a conversation has none."""
    names = (shape.input, *INPUTS) if shape.response else ()
    others = {*columns} - {shape.prompt, shape.response}
    return shape._replace(input=next((name for name in names if name in others), None))
