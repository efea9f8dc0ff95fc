"""Progress for people: a bar in a terminal, an occasional line elsewhere."""

from __future__ import annotations

import logging
import re
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sized
from typing import NoReturn, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

# What would move the cursor, rename the window, fill the clipboard or reverse text, were it said by a file or a log.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def strip_control_characters(text: str) -> str:
    """Return text without characters that control a terminal."""
    return CONTROL.sub("", text)


def counted(number: int, one: str, many: str) -> str:
    """Return a number with its noun: 1 run is, 2 runs are."""
    return f"{number:,} {one if number == 1 else many}"


class Terminal(Console):
    """Console that shows text as it is: no text controls the terminal, is markup, or names an emoji."""

    def __init__(self, **options):
        super().__init__(**{"markup": False, "emoji": False} | options)

    def render_str(self, text: str, **options) -> Text:
        return super().render_str(strip_control_characters(text), **options)


def styled(text: str, style: str) -> Text:
    """Return text in a style of rich."""
    return Text(strip_control_characters(text), style)


console = Terminal(stderr=True, highlight=False)


def exit_with_error(error: Exception) -> NoReturn:
    """Print an error that a person can correct, without a traceback, and exit with code 2."""
    console.print(str(error), style="red", soft_wrap=True)
    sys.exit(2)


QUIET = 10.0  # seconds between two lines, without a terminal


def track(items: Iterable, title: str) -> Iterator:
    """Yield items under a bar that counts them; without a terminal, print a line now and then."""
    if not console.is_terminal:
        yield from _lines(items, title)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        yield from progress.track(items, description=strip_control_characters(title))


def _lines(items: Iterable, title: str) -> Iterator:
    try:
        total = f"/{len(cast(Sized, items))}"
    except TypeError:  # a stream of unknown length
        total = ""
    begun = time.monotonic()
    printed = begun - 0.8 * QUIET  # the first line comes soon
    for number, item in enumerate(items):
        if time.monotonic() - printed > QUIET:
            printed = time.monotonic()
            print(f"{title}  {number}{total}  {format_duration(printed - begun)}", file=sys.stderr, flush=True)
        yield item


def format_duration(seconds: float) -> str:
    """Return seconds as text: 1:05 or 2:03:04."""
    minutes, s = divmod(int(seconds + 0.5), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


class StepProgress:
    """Progress of long work in equal steps: number of steps, tokens/s, time left.

    shown: False if another process shows it.
    """

    def __init__(self, title: str, steps: int, start: int, unit: str = "step", shown: bool = True):
        self.steps, self.start, self.title, self.unit, self.shown = steps, start, title, unit, shown
        self.begun, self.printed = time.monotonic(), 0.0
        self.bar = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(bar_width=30), MofNCompleteColumn(),
            TextColumn("{task.fields[say]}", markup=False), console=console, transient=True, refresh_per_second=4,
        )  # fmt: skip
        self.task = self.bar.add_task(strip_control_characters(title), total=steps, completed=start, say="")
        if console.is_terminal and shown:
            self.bar.start()

    def update(self, step: int, tokens: int, also: str = "") -> None:
        """Show the number of finished steps. tokens: those of this process in these steps."""
        spent = time.monotonic() - self.begun
        say = f"{also}{tokens / max(spent, 1e-9):,.0f} tokens/s"
        if step > self.start:
            say += f"  {format_duration(spent / (step - self.start) * (self.steps - step))} left"
        self.bar.update(self.task, completed=step, say=say)
        if self.shown and not console.is_terminal and (time.monotonic() - self.printed > QUIET or step == self.steps):
            self.printed = time.monotonic()
            print(f"{self.title}  {self.unit} {step}/{self.steps}  {say}", file=sys.stderr, flush=True)

    def stop(self) -> None:
        if console.is_terminal and self.shown:
            self.bar.stop()


def silence_libraries() -> None:
    """Hide the warnings of libraries about intended behaviour."""
    import transformers

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for message in (".*does not have many workers.*", ".*GPU available but not used.*", ".*isinstance.treespec.*"):
        warnings.filterwarnings("ignore", message)
