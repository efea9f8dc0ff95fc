"""Report as Markdown, to paste into a paper or an issue."""

from __future__ import annotations

import re

from kd.system.console import format_duration, strip_control_characters
from sweeps.report.groups import baseline_name
from sweeps.report.marginals import COLUMNS, MarginalMean, meaning
from sweeps.report.report import Report
from sweeps.report.samples import Sample
from sweeps.report.sections import Section
from sweeps.report.statistics import Interval
from sweeps.report.table import Row
from sweeps.report.wording import format_number, plus_minus

SPECIAL = re.compile(r"([\\`*\[\]|~$]|(?<!\w)_|_(?!\w))")  # an _ within a word is none to Markdown

MOST_UNFINISHED = 20  # runs that a long report names


def markdown(report: Report) -> str:
    """Return the report as Markdown. Text that comes from files cannot be markup."""
    unfinished = [entry for entry in report.entries if entry.state != "done"]
    listed, files = (unfinished[:MOST_UNFINISHED], f"{plain(report.name)}.csv") if report.extract else (unfinished, "")
    more = f"{len(unfinished) - len(listed)} more, which are in {files}." if len(listed) < len(unfinished) else ""
    commands = [strip_control_characters(entry.command).replace("\n", " ") for entry in report.entries]
    commands_block = ["<details><summary>Commands</summary>", "", "```sh", *commands, "```", "", "</details>"]
    constant = ", ".join(f"{label} {value}" for label, value in report.columns.constant.items())
    parts = [
        f"## Sweep {plain(report.name)}{f': {plain(report.question)}' if report.question else ''}",
        f"**{plain(report.verdict)}**",
        f"Answers to: {plain(report.papers_answer)}" if report.papers_answer else "",
        "\n".join(f"- {plain(key)}: {plain(text)}" for key, text in report.facts.items()),
        "\n".join(f"- Beware: {plain(text)}" for text in report.warnings),
        f"{report.extract} All are in {files}, run by run, with their commands." if files else "",
        "\n".join(table_lines(report)),
        explanation(report),
        f"The same in all rows: {constant}." if constant else "",
        "\n".join(f"- {plain(metric.label)}: {plain(metric.meaning)}" for metric in report.columns.metrics),
        " ".join(["Intervals are of one row each: the best of several looks better than it is.", *report.caveats]),
        *axes_parts(report),
        *map(section_lines, report.sections),
        *map(sample_details, report.samples),
        "\n".join(["Not done, and not counted:", "", *(f"- {plain(' '.join(e.overrides))}: {plain(e.state)}, "
                  f"{plain(e.message)}" for e in listed)]) if unfinished else "",
        more,
        "" if files else "\n".join(commands_block),
    ]  # fmt: skip
    return "\n\n".join(filter(None, parts)) + "\n"


def table_lines(report: Report) -> list[str]:
    """Return the table: rows, then reference lines."""
    columns, metric = report.columns, report.metric
    comparisons = ["difference", *["to the first"] * columns.ranked, *["gap closed"] * columns.gaps]
    seeds = ["seeds"] * (columns.seeds is None)
    head = ["", metric.label, *comparisons, *(m.label for m in columns.metrics), *seeds, "time"]
    lines = [line(head), line([":--"] + ["--:"] * (len(head) - 1))]
    for row in report.shown:
        means = [row.group.mean(m.key) for m in columns.metrics]
        compared = {
            "difference": "baseline" if row.baseline is row.group else difference_cell(row.difference),
            "to the first": "first" if row.best is row.group else difference_cell(row.vs_best),
            "gap closed": gap_cell(row, columns.footnote),
        }
        numbers = [compared[title] for title in comparisons] + [format_number(m and m.mean, 3) for m in means]
        count = [str(len(row.group.runs)) for _ in seeds]
        value = row.group.required_mean(metric.key)
        main = format_number(value.mean) + plus_minus(value.half)
        lines.append(line([plain(row.group.label), main, *numbers, *count, format_duration(row.group.seconds)]))
    for reference in report.reference_lines:
        values = reference.values
        numbers = [format_number(values[m.key], 3) if m.key in values else "" for m in columns.metrics]
        blank = ["" for _ in comparisons]
        main = format_number(values.get(metric.key))
        lines.append(line([plain(reference.label), main, *blank, *numbers, *["" for _ in seeds], ""]))
    return lines


def axes_parts(report: Report) -> list[str]:
    """Return the marginal means: what they are, then a table for each axis."""
    parts = ["### Marginal means", meaning(report.metric, report.several_seeds)] if report.axes else []
    parts += ["\n".join(f"- {title}: {text}" for title, text in COLUMNS.items())] if report.axes else []
    for axis in report.axes:
        parts += [f"**{plain(axis.title)}**. {plain(axis.averaged)}"]
        lines = [line(["", report.metric.label, *COLUMNS]), line([":--"] + ["--:"] * (1 + len(COLUMNS)))]
        for value in axis.means:
            lines.append(line([plain(value.text), *marginal_cells(value)]))
        parts += ["\n".join(lines)] if axis.means else []
    return parts


def marginal_cells(value: MarginalMean) -> list[str]:
    """Return the cells of a value of an axis behind its name."""
    if value.mean is None:
        return ["not compared", "", "", "", str(value.runs)]
    ends = (
        "–" if value.least is None else f"{format_number(value.least, 4, True)} to {format_number(value.most, 4, True)}"
    )
    change = "best" if value.least is None else difference_cell(value.difference)
    main = format_number(value.mean.mean) + plus_minus(value.mean.half)
    return [main, change, ends, str(value.times_best), str(value.runs)]


def explanation(report: Report) -> str:
    """Return the meaning of the columns beside the metrics."""
    columns, metric, base = report.columns, report.metric, baseline_name(report.groups)
    parts = [
        f"{columns.seeds} seed{'s' * (columns.seeds > 1)} each." if columns.seeds else "",
        f"± is the 95% interval over seeds. {metric.label.capitalize()}: {metric.unit}. A difference is to {base} "
        f"with the same {report.task}, seed by seed; {'above' if metric.sign > 0 else 'below'} 0 is better.",
        "To the first: difference to the row that leads among those with the same task." if columns.ranked else "",
        "Gap closed: share of the way from the baseline to the row's teacher." if columns.gaps else "",
        "† Its own teacher, which was trained along with it and is another than that of the other rows."
        if columns.footnote else "",
    ]  # fmt: skip
    return " ".join(filter(None, parts))


def difference_cell(value: Interval | None) -> str:
    if value is None:
        return "–"
    noise = " (within noise)" if value.within_noise else ""
    return format_number(value.mean, 4, True) + plus_minus(value.half) + noise


def gap_cell(row: Row, footnote: bool) -> str:
    """Return the share of the gap to the teacher, with † if its teacher differs from that of the other rows."""
    share = row.gap_closed
    if share is None:
        return "–"
    half = f" ± {format_number(100 * share.half, 0)}%" if share.half is not None else ""
    return f"{format_number(100 * share.mean, 0)}%{half}{' †' if footnote and row.cotrained else ''}"


def plain(text: str) -> str:
    """Return text on one line, without characters that Markdown or HTML interprets."""
    text = (
        " ".join(strip_control_characters(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    )
    return SPECIAL.sub(r"\\\1", text)


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def fenced(text: str) -> str:
    """Return text between more backticks than it has in a row, so that no part of it is markup."""
    most = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, most + 1)
    return f"{fence}text\n{strip_control_characters(text)}\n{fence}"


def sample_details(sample: Sample) -> str:
    """Return a prompt with its reference and all responses, folded away."""
    parts = []
    for text in sample.texts:
        score = f" (Rouge-L {text.rouge_l:.2f})" if text.rouge_l is not None else ""
        parts.append(f"**{plain(text.author)}**{score}\n\n{fenced(text.text)}")
    return "\n\n".join([f"<details><summary>Sample, prompt {sample.number}</summary>", *parts, "</details>"])


def section_lines(section: Section) -> str:
    """Return a section of a plug-in: its title, text and table."""
    table = [line([plain(cell) for cell in row]) for row in (section.columns, *section.texts)]
    rule = line([":--"] + ["--:"] * (len(section.columns) - 1))
    parts = [f"### {plain(section.title)}", plain(section.text), "\n".join([table[0], rule, *table[1:]])]
    return "\n\n".join(filter(None, parts if section.columns else parts[:2]))
