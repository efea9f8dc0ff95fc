"""Progress that people see: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable, Iterator
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from kd.data import in_words

# What would move the cursor, rename the window, fill the clipboard or reverse text, were it said by a file or a log.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def harmless(text: str) -> str:
    """Without what a terminal would obey rather than show."""
    return CONTROL.sub("", text)


def counted(number: int, one: str, many: str) -> str:
    """A number, and what there is of it: 1 run is, 2 runs are."""
    return f"{number:,} {one if number == 1 else many}"


class Terminal(Console):
    """A console that shows text as it is: no text steers the terminal, and none is markup or the name of an emoji."""

    def __init__(self, **how):
        super().__init__(**{"markup": False, "emoji": False} | how)

    def render_str(self, text: str, **how) -> Text:
        return super().render_str(harmless(text), **how)


def styled(text: str, style: str) -> Text:
    """Text in a style, as rich calls it."""
    return Text(harmless(text), style)


console = Terminal(stderr=True, highlight=False)


def end_with(error: Exception) -> NoReturn:
    """Say what a person can mend, without a traceback, and exit with 2."""
    console.print(str(error), style="red", soft_wrap=True)
    sys.exit(2)


QUIET = 10.0  # seconds between two lines where nobody watches a bar


def track(items: Iterable, title: str) -> Iterator:
    """Yield items under a bar that counts them; without a terminal, print a line now and then."""
    if not console.is_terminal:
        yield from _lines(items, title)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        yield from progress.track(items, description=harmless(title))


def _lines(items: Iterable, title: str) -> Iterator:
    try:
        total = f"/{len(items)}"
    except TypeError:  # a stream, whose length nobody knows
        total = ""
    begun = time.monotonic()
    printed = begun - 0.8 * QUIET  # the first line comes soon
    for number, item in enumerate(items):
        if time.monotonic() - printed > QUIET:
            printed = time.monotonic()
            print(f"{title}  {number}{total}  {clock(printed - begun)}", file=sys.stderr, flush=True)
        yield item


def clock(seconds: float) -> str:
    """1:05 or 2:03:04"""
    minutes, s = divmod(int(seconds + 0.5), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


class Steps:
    """Long work in equal steps: which of how many, tokens/s, time left. shown: False where another process shows it."""

    def __init__(self, title: str, steps: int, start: int, unit: str = "step", shown: bool = True):
        self.steps, self.start, self.title, self.unit, self.shown = steps, start, title, unit, shown
        self.begun, self.printed = time.monotonic(), 0.0
        self.bar = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(bar_width=30), MofNCompleteColumn(),
            TextColumn("{task.fields[say]}", markup=False), console=console, transient=True, refresh_per_second=4,
        )  # fmt: skip
        self.task = self.bar.add_task(harmless(title), total=steps, completed=start, say="")
        if console.is_terminal and shown:
            self.bar.start()

    def update(self, step: int, tokens: int, also: str = "") -> None:
        """So many steps are done; tokens of them in this process."""
        spent = time.monotonic() - self.begun
        say = f"{also}{tokens / max(spent, 1e-9):,.0f} tokens/s"
        if step > self.start:
            say += f"  {clock(spent / (step - self.start) * (self.steps - step))} left"
        self.bar.update(self.task, completed=step, say=say)
        if self.shown and not console.is_terminal and (time.monotonic() - self.printed > 10 or step == self.steps):
            self.printed = time.monotonic()
            print(f"{self.title}  {self.unit} {step}/{self.steps}  {say}", file=sys.stderr, flush=True)

    def stop(self) -> None:
        if console.is_terminal and self.shown:
            self.bar.stop()


MEASURES = {
    "val/lm": "loss on held-out text, nats per token",
    "val/bpb": "the same in bits per byte",
    "val/teacher_lm": "loss of the teacher",
    "val/perplexity": "perplexity of the references",
    "val/fkl": "KL(teacher || student), nats per token",
    "val/rkl": "KL(student || teacher), nats per token",
    "val/tvd": "total variation distance between the two",
    "val/agreement": "share of positions where both rank the same token first",
    "val/accuracy": "share of held-out tokens that the student ranks first",
    "val/teacher_accuracy": "that of the teacher",
    "val/ece": "calibration error of the student",
    "val/teacher_ece": "calibration error of the teacher",
    "val/rouge_l": "Rouge-L F1 of responses to held-out prompts",
    "val/teacher_rouge_l": "that of the teacher's responses",
    "val/exact_match": "share of responses that equal the reference, but for white space",
    "val/distinct_4": "distinct 4-grams of words in all responses, as a share of all",
    "val/response_length": "tokens of a response",
    "val/ended": "share of responses that end by themselves",
    "val/on_policy_rkl": "KL(student || teacher) on text that the student wrote",
    "val/on_policy_tvd": "total variation distance there",
    "val/on_policy_ece": "calibration error there, beside the teacher",
    "val/exaccerr": "excess accumulated error, a share: 0 where mistakes do not add up",
}


NOT_ALL = ("cut", "unlearned", "unused", "special_as_text", "prompts_only")  # counts that a run's table has


def show(run, result: dict, notes: Iterable[str] = ()) -> None:
    """The result of a run, as a table under notes on it."""
    for note in notes:
        console.print(note, style="yellow", soft_wrap=True)
    spent = f"{result['tokens']:,} tokens in {clock(result['seconds'])}, {result['flops']:.2e} FLOPs"
    console.print(measures(result))
    counts = result.get("data") or {}
    if counts.get("left_out", {}).keys() - {"limit"} or any(counts.get(name) for name in NOT_ALL):
        console.print(f"Data: {in_words(counts)}.", soft_wrap=True)
    console.print(f"{spent}. All of it: {run.where}", highlight=False, soft_wrap=True)


def measures(result: dict) -> Table:
    """The measures of a result, with what they mean, and what they were before training if that was measured."""
    table, initial = Table(box=None, show_header=False, pad_edge=False), result.get("initial") or {}
    for name, meaning in MEASURES.items():
        if name in result["final"]:
            meaning += f"; before training {initial[name]:.4f}" if name in initial else ""
            table.add_row(name.removeprefix("val/"), f"{result['final'][name]:.4f}", styled(meaning, "dim"))
    if result["entropy"] is not None:
        table.add_row("entropy", f"{result['entropy']:.4f}", styled("loss of a perfect model of this data", "dim"))
    return table
