"""A report as Markdown, to paste into a paper or an issue, and as CSV, a line per run."""

from __future__ import annotations

import csv
import io
import re

from kd.progress import clock, harmless
from sweeps.compare import ALONE, Entry, Goal, Group, Interval, settings, varying, without_loss
from sweeps.samples import Sample
from sweeps.space import TITLES, Plot
from sweeps.table import Columns, Mark, Row, number

SPECIAL = re.compile(r"([\\`*\[\]|~$]|(?<!\w)_|_(?!\w))")  # an _ within a word is none to Markdown


def plain(text: str) -> str:
    """Text without a meaning in Markdown or HTML, on one line."""
    text = " ".join(harmless(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return SPECIAL.sub(r"\\\1", text)


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(row: Row, of: Goal) -> str:
    """The measure that the sweep is judged by, with its interval."""
    mean = row.group.mean(of.key)
    return number(mean.mean) + ("" if mean.half is None else f" ± {number(mean.half)}")


def change(value: Interval | None) -> str:
    """A paired difference, with its interval, and whether that is within noise."""
    if value is None:
        return "–"
    says = number(value.mean, 4, True)
    if value.half is not None:
        says += f" ± {number(value.half)}" + (" (within noise)" if value.noise else "")
    return says


def share(row: Row, footnote: bool) -> str:
    """Of the gap to the teacher, with its interval; † where that is another teacher than the others'."""
    if row.closed is None:
        return "–"
    says = f"{number(100 * row.closed.mean, 0)}%"
    says += f" ± {number(100 * row.closed.half, 0)}%" if row.closed.half is not None else ""
    return says + (" †" if footnote and row.own_teacher else "")


def markdown(name: str, question: str, answers: str, says: str, facts: dict[str, str], warnings: list[str],
             table: list[Row], beside: list[Mark], entries: list[Entry], of: Goal,
             samples: list[Sample], space: dict[str, list[Plot]], task: str, columns: Columns,
             caveats: list[str]) -> str:  # fmt: skip
    """The report with what its plots say in their place. What comes from files cannot be markup."""
    baseline = next((without_loss(row.group.config) for row in table if row.group.alone), ALONE)
    measures, same, ranked, gaps, footnote, seeds = columns
    titles = ["difference", *(["to the first"] if ranked else []), *(["gap closed"] if gaps else [])]
    head = ["", of.title, *titles, *(title for title, _ in measures.values()), *([] if seeds else ["seeds"]), "time"]
    lines = [line(head), line([":--"] + ["--:"] * (len(head) - 1))]
    for row in table:
        means = [row.group.mean(k) for k in measures]
        compared = {
            "difference": "baseline" if row.base is row.group else change(row.change),
            "to the first": "first" if row.first is row.group else change(row.behind),
            "gap closed": share(row, footnote),
        }
        numbers = [compared[title] for title in titles] + [number(mean and mean.mean, 3) for mean in means]
        ends = [*([] if seeds else [str(len(row.group.runs))]), clock(row.group.seconds)]
        lines.append(line([plain(row.group.label), main(row, of), *numbers, *ends]))
    for mark in beside:
        numbers = ["" for _ in titles] + [number(mark.values[k], 3) if k in mark.values else "" for k in measures]
        lines.append(line([plain(mark.label), number(mark.values.get(of.key)), *numbers, *([] if seeds else [""]), ""]))
    seen = [plot for some in space.values() for plot in some]
    left = [entry for entry in entries if entry.state != "done"]
    commands = [harmless(entry.command).replace("\n", " ") for entry in entries]
    parts = [
        f"## Sweep {plain(name)}{f': {plain(question)}' if question else ''}", f"**{plain(says)}**",
        f"Answers to: {plain(answers)}" if answers else "",
        "\n".join(f"- {plain(key)}: {plain(text)}" for key, text in facts.items()),
        "\n".join(f"- Beware: {plain(text)}" for text in warnings), "\n".join(lines),
        (f"{seeds} seed{'s' * (seeds > 1)} each. " if seeds else "")
        + f"± is the 95% interval over seeds. {of.title.capitalize()}: {of.unit}. A difference is to {baseline} "
        f"with the same {task}, seed by seed; {'above' if of.sign > 0 else 'below'} 0 is better. "
        + ("To the first: difference to the row that leads among those with the same task. " if ranked else "")
        + ("Gap closed: share of the way from the baseline to the row's teacher." if gaps else "")
        + (" † Its own teacher, which was trained along with it and is another than that of the other rows."
           if footnote else ""),
        f"The same in all rows: {', '.join(f'{title} {value}' for title, value in same.items())}." if same else "",
        "\n".join(f"- {plain(title)}: {plain(means)}" for title, means in measures.values()),
        "\n".join(f"- {plain(TITLES.get(plot.title, plot.title))}: {plain(plot.says)}" for plot in seen),
        " ".join(["Intervals are of one row each: the best of several looks better than it is.", *caveats]),
        *(side_by_side(sample) for sample in samples),
        "\n".join(["Not done, and not counted:", "", *(f"- {plain(' '.join(e.overrides))}: {plain(e.state)}, "
                  f"{plain(e.says)}" for e in left)]) if left else "",
        "\n".join(["<details><summary>Commands</summary>", "", "```sh", *commands, "```", "", "</details>"]),
    ]  # fmt: skip
    return "\n\n".join(filter(None, parts)) + "\n"


def fenced(text: str) -> str:
    """Text as it is, line by line: between more backticks than it has in a row, so that no part of it is markup."""
    most = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, most + 1)
    return f"{fence}text\n{harmless(text)}\n{fence}"


def side_by_side(sample: Sample) -> str:
    """A prompt with its reference and all responses, folded away."""
    parts = [f"**{plain(said.who)}**{f' (Rouge-L {said.rouge_l:.2f})' if said.rouge_l is not None else ''}\n\n"
             f"{fenced(said.text)}" for said in sample.said]  # fmt: skip
    return "\n\n".join([f"<details><summary>Sample, prompt {sample.number}</summary>", *parts, "</details>"])


def text(cell: object) -> object:
    """A cell that no spreadsheet takes for a formula."""
    if type(cell) is not str:
        return cell
    cell = harmless(cell)
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


def as_csv(entries: list[Entry], table: list[Row], of: Goal) -> str:
    """A line per run: its state, all settings that vary, seed, all final measures, tokens, FLOPs, seconds, command.

    difference and to_the_first are of its loss, or of what else the sweep is judged by, to the run of the same seed of
    the baseline and of the row that leads its task. Settings of a run that is not done are those that were typed.
    """
    runs = list({entry.folder: entry for entry in entries}.values())
    keys = dict.fromkeys(["logits"] if len({row.group.distilled for row in table}) > 1 else [])
    configs = [row.group.config for row in table]
    for kind in sorted({without_loss(config) for config in configs}, key=str):
        keys |= dict.fromkeys(varying([config for config in configs if without_loss(config) == kind]))
    measures = sorted({k for e in runs if e.result for k in e.result["final"] if k.startswith("val/")})
    measures.sort(key="val/lm".__ne__)
    rows = {e.folder: row for row in table for e in row.group.runs.values()}
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "state", "reason", "label", *keys, "seed", *measures, "difference", "to_the_first",
                     "tokens", "flops", "seconds", "command"])  # fmt: skip
    for entry in runs:
        row, result = rows.get(entry.folder), entry.result
        if result is None:
            given = typed(entry)
            cells = ["", *(given.get(k, "") for k in keys), given.get("seed", ""), *[""] * (len(measures) + 5)]
        else:
            config, final = settings(result["config"]), result["final"]
            seed = result["config"]["seed"]
            cells = [row.group.label if row else "", *(config.get(k) for k in keys), seed]
            cells += [final.get(k) for k in measures]
            cells += [
                paired(row.group, other, seed, of) if row else None for other in (row and row.base, row and row.first)
            ]
            cells += [result.get(k) for k in ("tokens", "flops", "seconds")]
        writer.writerow(map(text, [entry.folder.name, entry.state, entry.says, *cells, entry.command]))
    return out.getvalue()


def typed(entry: Entry) -> dict[str, str]:
    """Settings by the words of a command: student=1m is student.size."""
    words = dict(word.lstrip("+").partition("=")[::2] for word in entry.overrides)
    return words | {f"{role}.size": words[role] for role in ("student", "teacher") if role in words}


def paired(group: Group, other: Group | None, seed: int, of: Goal) -> float | None:
    """What the sweep is judged by: of one run minus that of the other with its seed."""
    if other is None or other is group or seed not in other.runs:
        return None
    return group.of(of.key)[seed] - other.of(of.key)[seed]
