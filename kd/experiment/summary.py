"""Result of a run as a table in the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from kd.data.counts import in_words
from kd.system.console import clock, console, styled

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
