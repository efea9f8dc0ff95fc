"""Counts of packed data, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


REASONS = {  # of what is left out or not learned
    "empty": "empty", "no_prompt": "without a prompt", "no_response": "without a response",
    "prompt_too_long": "with a prompt beyond data.prompt_len", "weight": "of weight 0", 
    "label": "labelled as not wanted", "limit": "beyond data.tokens",
}  # fmt: skip


def in_words(counts: dict) -> str:
    """The counts of packed data as a line; without those that are 0."""
    if not counts:
        return ""
    used, kind = counts["used"], counts["unit"]
    rows = " rows" if kind == "examples" else ""  # one for each turn that is learned
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
