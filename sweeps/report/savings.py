"""FLOPs that one store of teacher logits would have saved a sweep whose runs compute the teacher online."""

from __future__ import annotations

from typing import NamedTuple

from sweeps.report.groups import Group, subset
from sweeps.report.wording import format_amount

RECORDED = ("flops", "tokens", "flops_per_token", "teacher_flops_per_token", "train_rows")  # in a result


class Saving(NamedTuple):
    """FLOPs of online runs, and those of the stores that would replace their teachers."""

    runs: int
    flops: float  # of these runs
    teacher: float  # part of them that the teacher took
    stores: float  # to write the stores

    def __str__(self) -> str:
        saved, flops = format_amount(self.teacher - self.stores), format_amount(self.flops)
        return (
            f"would have saved {saved} of {flops} FLOPs of {self.runs} online runs: the teacher took "
            f"{format_amount(self.teacher)}, writing its logits once takes {format_amount(self.stores)}"
        )


def offline_saving(groups: list[Group]) -> Saving | None:
    """Return what logits=offline would have saved; None if nothing, or if no run has it on record.

    Each teacher needs one store of each training text, which all its runs share. Only FLOPs are on record: the seconds
    of a run are those of student and teacher together.
    """
    shared: dict[str, list[dict]] = {}
    for result in (result for group in groups for result in group.results):
        if teacher_flops(result) is not None:
            shared.setdefault(subset(result["config"], "teacher", "data"), []).append(result)
    runs, flops, teacher, stores = 0, 0.0, 0.0, 0.0
    for results in shared.values():
        online, store = sum(teacher_flops(r) or 0.0 for r in results), store_flops(results[0])
        if online > store:
            runs += len(results)
            flops += sum(r["flops"] for r in results)
            teacher, stores = teacher + online, stores + store
    return Saving(runs, flops, teacher, stores) if runs else None


def teacher_flops(result: dict) -> float | None:
    """Return the FLOPs that the teacher of an online run took: those that the student did not.

    None if a store could not have replaced it, as for text that the student writes, or if the positions of the student
    are not on record, as for rows with padding.
    """
    config = result["config"]
    if config["logits"] != "online" or config.get("rollout", "none") != "none" or config.get("lm", "data") != "data":
        return None
    if any(result.get(name) is None for name in RECORDED):
        return None
    if result["tokens"] != config["trainer.steps"] * config["trainer.batch"] * config["data.seq_len"]:
        return None
    return result["flops"] - 3 * result["flops_per_token"] * result["tokens"]  # forward and backward pass


def store_flops(result: dict) -> float:
    """Return the FLOPs of writing a store: a forward pass of the teacher over all rows for training."""
    return result["train_rows"] * result["config"]["data.seq_len"] * result["teacher_flops_per_token"]
