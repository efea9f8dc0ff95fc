"""Sections that plug-ins add to reports: a title, a paragraph of text and a table.

@section
def losses(report: Report) -> Section:
    return Section("Losses", columns=("run", "loss"), rows=[(row.group.label, 2.5) for row in report.rows])
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from kd.config import plugins
from kd.errors import UserError, first_line
from kd.system.console import console
from sweeps.report.wording import format_number

if TYPE_CHECKING:
    from sweeps.report.report import Report

Function = TypeVar("Function", bound=Callable)
Cell = str | int | float | None


@dataclass(frozen=True)
class Section:
    """Section of a report. Its text is plain: no part of it is interpreted as HTML or Markdown.

    Raises TypeError or ValueError for parts that no report can show.
    """

    title: str
    text: str = ""  # one paragraph
    columns: Sequence[str] = ()  # titles of the table; no table without them
    rows: Sequence[Sequence[Cell]] = ()  # a float is shown with four decimals, and None as a dash

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", tuple(self.columns))
        object.__setattr__(self, "rows", tuple(map(tuple, self.rows)))
        if not all(isinstance(text, str) for text in (self.title, self.text, *self.columns)):
            raise TypeError("title, text and columns of a section are texts")
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"a row has {len(row)} cells, and there are {len(self.columns)} columns")
            if strange := [cell for cell in row if not isinstance(cell, Cell)]:
                raise TypeError(f"a cell is a {type(strange[0]).__name__}, and a table has texts and numbers")

    @property
    def texts(self) -> list[list[str]]:
        """Rows of the table as text."""
        return [[_text(cell) for cell in row] for row in self.rows]


def _text(cell: Cell) -> str:
    return format_number(cell) if cell is None or isinstance(cell, float) else str(cell)


def section(function: Function) -> Function:
    """Declare a function of a plug-in as a section of every report: Report -> Section, or None to leave it out."""
    return function


def plugged_in(report: Report) -> tuple[tuple[Section, ...], list[str]]:
    """Return the sections of allowed plug-ins, and a warning for each that failed."""
    sections: list[Section] = []
    faults: list[str] = []
    for target, _, _ in plugins.decorated("section"):
        try:
            content = plugins.load(target, "the section")(report)
            if content is not None and not isinstance(content, Section):
                raise TypeError(f"it returned a {type(content).__name__}, and need is a Section or None")
        except Exception as error:
            faults.append(f"The section {target} is missing, since it failed: {_reason(error, target)}")
            console.print(faults[-1], style="yellow", soft_wrap=True)
            continue
        sections += [content] if content else []
    return tuple(sections), faults


def _reason(error: Exception, target: str) -> str:
    """Return an error on one line, with the last line of the plug-in that it went through."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    plugin = plugins.plugin_of(target)
    files = plugin.modules.values() if plugin else ()
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) in files]
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {first_line(error)}{place}"
