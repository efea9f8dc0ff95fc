"""Facts of a sweep, warnings why rows may not be comparable, and caveats of its intervals."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from statistics import fmean

from kd.experiment.results import Entry
from kd.runs.export import selected_step
from kd.runs.identity import model_name, size_text
from kd.runs.provenance import doubts_of_many
from kd.system.console import format_duration
from sweeps.report.groups import Group, subset, tasks_of, varying
from sweeps.report.savings import offline_saving
from sweeps.report.table import ReferenceLine, Row
from sweeps.report.wording import format_amount, join_words

MORE_TOKENS = 1.05  # as a factor: rows of one task that differ by more in their tokens are warned of


def facts(entries: list[Entry], groups: list[Group]) -> dict[str, str]:
    """Return runs, seeds, data, models, time and revisions of a sweep, and what a store would have saved."""
    results = [result for group in groups for result in group.results]
    tokens = sorted({r.get("tokens", 0) for r in results})
    states = Counter({entry.folder: entry.state for entry in entries}.values())
    data = [[r["config"].get(k) for k in ("data", "data.name", "data.files")] for r in results]
    saving = offline_saving(groups)
    return {
        "runs": ", ".join(f"{count} {state}" for state, count in states.items()),
        "seeds": join_words([str(seed) for seed in sorted({r["config"]["seed"] for r in results})]),
        "data": alternatives(" ".join(map(str, filter(None, words))) for words in data),
        "teacher": alternatives(model_text(result, "teacher", "teacher_") for result in results),
        "student": alternatives(model_text(result, "student", "") for result in results),
        "tokens per run": alternatives(f"{n:,}" for n in tokens)
        if len(tokens) < 5
        else f"{tokens[0]:,} to {tokens[-1]:,}",
        **selected_steps(results),
        "time": f"{format_duration(sum(r.get('seconds', 0) for r in results))} in all",
        "git": alternatives(str(r["environment"]["git"] or "unknown") for r in results),
    } | ({"logits=offline": str(saving)} if saving else {})


def selected_steps(results: list[dict]) -> dict[str, str]:
    """Return how many results are not of the last of all steps, and of which; nothing if there are none."""
    steps = [result["step"] for result in results if selected_step(result)]
    if not steps:
        return {}
    best = sum(result["step"] != result["steps"] for result in results if selected_step(result))
    early = sum(result["steps"] != result["config"]["trainer.steps"] for result in results if selected_step(result))
    text = f"{best} of {len(results)} results are of the validation with the lowest loss, {early} of a training that "
    return {"selected steps": f"{text}ended early; of steps {min(steps):,} to {max(steps):,}"}


def alternatives(values: Iterable[str | None]) -> str:
    return " / ".join(dict.fromkeys(filter(None, values))) or "none"


def model_text(result: dict, role: str, prefix: str) -> str | None:
    """Return name and size of a model."""
    name, size = model_name(result["config"], role), result.get(f"{prefix}parameters")
    active, trainable = (result.get(f"{prefix}{kind}_parameters") for kind in ("active", "trainable"))
    return f"{name} ({size_text(size, active, trainable)})" if name and size else name


def warnings(groups: list[Group]) -> list[str]:
    """Return why rows of the table may not be comparable."""
    lines = doubts_of_many(result for g in groups for result in g.results)
    lines += environment_warnings([result["environment"] for g in groups for result in g.results])
    texts = [json.loads(subset(g.config, "data")) for g in groups]
    if keys := [key for key in varying(texts) if key != "data.tokens"]:  # less text for training, the same held out
        lines.append(f"Held-out text differs ({join_words(keys)}): compare losses only where it is the same.")
    if keys := varying([json.loads(subset(g.config, "responses")) for g in groups]):
        lines.append(f"Responses were generated with different settings ({join_words(keys)}): compare them only where "
                     "these are the same.")  # fmt: skip
    lines += token_warnings(groups)
    if len({frozenset(g.runs) for g in groups}) > 1:
        lines.append("Rows differ in their seeds: compare by the paired difference rather than by the mean loss.")
    return lines


def environment_warnings(environments: list[dict]) -> list[str]:
    lines = []
    for key in dict.fromkeys(k for e in environments for k in e):
        seen = Counter(str(e.get(key) or "unknown") for e in environments)
        if len(seen) > 1:
            name = "git revision, so the code may have changed on the way" if key == "git" else key
            values = ", ".join(f"{count} of {value}" for value, count in seen.most_common())
            lines.append(f"Runs differ in {name} ({values}).")
    if any(str(e["git"]).endswith("+") for e in environments):
        lines.append("A + behind a git revision: files were changed and not committed, so what ran is not on record.")
    return lines


def token_warnings(groups: list[Group]) -> list[str]:
    """Return a warning for the first task whose rows learn from different numbers of tokens."""
    for task in tasks_of(groups):
        tokens = {g.label: fmean(r.get("tokens", 0) for r in g.results) for g in task}
        least, most = min(tokens, key=tokens.__getitem__), max(tokens, key=tokens.__getitem__)
        if tokens[most] > MORE_TOKENS * tokens[least]:
            return [
                f"Rows learn from different numbers of tokens in the same steps, {format_amount(tokens[least])} "
                f"({least}) to {format_amount(tokens[most])} ({most}): a row that is better may be so because it "
                "learned from more."
            ]
    return []


def caveats(groups: list[Group], rows: list[Row], lines: list[ReferenceLine], ranked: bool) -> list[str]:
    """Return what the intervals leave out, with the numbers of this sweep."""
    notes = held_out_sizes(groups)
    teachers = sum(line.dash == "solid" for line in lines)
    if teachers:
        used = (
            "One teacher was used: with another one" if teachers == 1 else f"{teachers} teachers were used: with others"
        )
        notes.append(f"{used} the order of the rows may be another.")
    tests = [row.difference for row in rows if row.baseline is not row.group]
    tests += [row.vs_best for row in rows if ranked]
    count = sum(test is not None and test.half is not None for test in tests)
    if count > 1:
        notes.append(
            f"{count} differences have intervals of 95% each, not corrected for their number: if none were real, "
            f"about {0.05 * count:.2g} would still look beyond noise."
        )
    return notes


def held_out_sizes(groups: list[Group]) -> list[str]:
    """Return the sizes of the held-out texts, from the rows that were packed: data.val_rows is only their limit."""
    sizes = set()
    for result in (result for group in groups for result in group.results):
        counts, length = result.get("data") or {}, result["config"].get("data.seq_len")
        if (rows := counts.get("rows", {}).get("val")) and length:  # results of earlier versions lack the counts
            sizes.add((rows, length, counts.get("unit") == "examples"))
    return [
        f"The held-out text has {rows:,} row{'s' if rows > 1 else ''} of {'at most ' * padded}{length:,} tokens, "
        f"{'at most ' * padded}{rows * length:,} in all."
        for rows, length, padded in sorted(sizes)
    ]
