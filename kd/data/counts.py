"""Counts of what was read and packed, and a line for people about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from kd.data.examples import Example

if TYPE_CHECKING:
    from kd.data.templates import Row

REASONS = {  # of what is left out or not learned
    "empty": "empty", "no_prompt": "without a prompt", "no_response": "without a response",
    "prompt_too_long": "with a prompt beyond data.prompt_len", "weight": "of weight 0", 
    "label": "labelled as not wanted", "limit": "beyond data.tokens",
}  # fmt: skip


def in_words(counts: dict) -> str:
    """Return the counts of packed data as one line, without zeros."""
    if not counts:
        return ""
    used, kind = counts["used"], counts["unit"]
    rows = " rows" if kind == "examples" else ""  # one for each turn that is learned
    train_rows = counts.get("rows", used)["train"]
    if kind == "examples" and train_rows < used["train"]:  # packed
        rows = f" responses in {train_rows:,} rows"
    parts = [f"{counts['read']:,} {kind} read, {used['train']:,}{rows} for training and {used['val']:,} for validation"]
    if counts["left_out"]:
        parts += ["left out: " + ", ".join(f"{n:,} {REASONS[k]}" for k, n in counts["left_out"].items())]
    if counts["cut"]:
        parts += [f"cut: {counts['cut']:,} responses that are longer than their row"]
    if counts["unlearned"]:
        turns = [f"{n:,} {'earlier' if k == 'earlier' else REASONS[k]}" for k, n in counts["unlearned"].items()]
        hint = " (data.turns=all learns the earlier ones)" if "earlier" in counts["unlearned"] else ""
        parts += [f"not learned: turns of the assistant, {', '.join(turns)}{hint}"]
    if counts["unused"]:
        parts += ["not used: " + ", ".join(f"{name} in {n:,}" for name, n in counts["unused"].items())]
    if counts["special_as_text"]:
        parts += [f"{counts['special_as_text']:,} {kind} hold special tokens, written out and read as text "
                  "(data.special=tokens reads those of the tokenizer as tokens)"]  # fmt: skip
    if counts["prompts_only"]:
        parts += [f"{counts['prompts_only']:,} prompts without a response, for a rollout that writes them all"]
    return "; ".join(parts)


class Counts:
    """Counts of documents or examples that were read, used and left out. unit: documents or examples."""

    def __init__(self, unit: str):
        self.unit, self.read, self.cut, self.special_as_text, self.prompts_only = unit, 0, 0, 0, 0
        self.used, self.rows = {"train": 0, "val": 0}, {"train": 0, "val": 0}
        self.left_out: Counter[str] = Counter()  # by reason
        self.unlearned: Counter[str] = Counter()  # turns of the assistant, by reason
        self.unused: Counter[str] = Counter()  # columns and keys, by name

    def add(self, example: Example, rows: list[Row], as_text: Callable[[str], bool]) -> None:
        """Count an example. as_text: see kd.data.templates.special_as_text."""
        self.read += 1
        self.unused.update(dict.fromkeys([*example.unused, *(name for row in rows for name in row.unused)], 1))
        self.unlearned.update(example.unlearned)
        if example.left_out:
            self.left_out[example.left_out] += 1
        self.prompts_only += example.prompt_only
        self.special_as_text += any(as_text(turn.content) for turn in example.turns)

    def as_dict(self) -> dict:
        """Return the counts for a manifest, without reasons and names with a count of 0."""
        return {name: {k: n for k, n in value.items() if n or name in ("used", "rows")} if isinstance(value, dict)
                else value for name, value in vars(self).items()}  # fmt: skip
