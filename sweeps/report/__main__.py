"""A sweep as one page: python -m sweeps.report NAME writes ROOT/sweeps/NAME.html, which needs no network.

The same numbers are in NAME.md, for a paper or an issue, and, a line per run, in NAME.csv.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections import Counter
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path
from statistics import fmean

from kd.launchers import forget_ranks

if __name__ == "__main__":  # before a library that reads them is loaded
    forget_ranks(os.environ)

import jinja2
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from kd import files
from kd.errors import MISTAKES, UserError, for_people
from kd.identity import model_name, size_text
from kd.progress import clock, harmless
from kd.provenance import doubts_of_many
from kd.remote import home, publish
from sweeps import shapes, space
from sweeps.compare import (
    LOSS,
    Entry,
    Group,
    amount,
    goal,
    grouped,
    listed,
    manifest,
    parser,
    read,
    subset,
    task_of,
    varying,
)
from sweeps.export import as_csv, markdown
from sweeps.finding import by_task, finding
from sweeps.plots import SMALL, curves, dots, exposure
from sweeps.samples import samples
from sweeps.table import MEASURES, Mark, Row, by_loss, columns, marks, number, rows


def head(name: str) -> list[str]:
    """The comment at the head of a sweep file of this project, line by line; nothing of any other sweep."""
    path = Path(__file__).with_name(f"{name}.yaml")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [line[1:].strip() for line in takewhile(lambda line: line.startswith("#"), lines)]


def question(name: str) -> str:
    """What a sweep of this project asks."""
    return "".join(head(name)[:1]).partition(" (")[0]


def answers_to(name: str) -> str:
    """Where a paper asked the same, and what it found."""
    return " ".join(head(name)).partition("Answers to: ")[2]


def facts(entries: list[Entry], results: list[dict]) -> dict[str, str]:
    """What the sweep is made of."""

    def said(values: Iterable[str | None]) -> str:
        return " / ".join(dict.fromkeys(filter(None, values))) or "none"

    def model(role: str, prefix: str) -> Iterable[str | None]:
        for result in results:
            name, size = model_name(result["config"], role), result.get(f"{prefix}parameters")
            active = result.get(f"{prefix}active_parameters")
            yield f"{name} ({size_text(size, active)})" if name and size else name

    tokens = sorted({r.get("tokens", 0) for r in results})
    states = Counter({entry.folder: entry.state for entry in entries}.values())
    data = [[r["config"].get(k) for k in ("data", "data.name", "data.files")] for r in results]
    return {
        "runs": ", ".join(f"{number} {state}" for state, number in states.items()),
        "seeds": listed([str(seed) for seed in sorted({r["config"]["seed"] for r in results})]),
        "data": said(" ".join(map(str, filter(None, words))) for words in data),
        "teacher": said(model("teacher", "teacher_")),
        "student": said(model("student", "")),
        "tokens per run": said(f"{n:,}" for n in tokens) if len(tokens) < 5 else f"{tokens[0]:,} to {tokens[-1]:,}",
        "time": f"{clock(sum(r.get('seconds', 0) for r in results))} in all",
        "git": said(str(r["environment"]["git"] or "unknown") for r in results),
    }


def warnings(groups: list[Group]) -> list[str]:
    """Why rows of the table may not be comparable."""
    environments = [result["environment"] for g in groups for result in g.results]
    says = doubts_of_many(result for g in groups for result in g.results)
    for key in dict.fromkeys(k for e in environments for k in e):
        seen = Counter(str(e.get(key) or "unknown") for e in environments)
        if len(seen) > 1:
            what = "git revision, so the code may have changed on the way" if key == "git" else key
            says.append(f"Runs differ in {what} ({', '.join(f'{n} of {value}' for value, n in seen.most_common())}).")
    if any(str(e["git"]).endswith("+") for e in environments):
        says.append("A + behind a git revision: files were changed and not committed, so what ran is not on record.")
    texts = [json.loads(subset(g.config, "data")) for g in groups]
    if keys := [key for key in varying(texts) if key != "data.tokens"]:  # less text for training, the same held out
        says.append(f"Held-out text differs ({listed(keys)}): compare losses only where it is the same.")
    if keys := varying([json.loads(subset(g.config, "responses")) for g in groups]):
        says.append(
            f"Responses were written in different ways ({listed(keys)}): compare them only where they were not."
        )
    for some in by_task(groups):
        tokens = {g.label: fmean(r.get("tokens", 0) for r in g.results) for g in some}
        least, most = min(tokens, key=tokens.get), max(tokens, key=tokens.get)
        if tokens[most] > 1.05 * tokens[least]:
            says.append(
                f"Rows learn from different numbers of tokens in the same steps, {amount(tokens[least])} ({least}) to "
                f"{amount(tokens[most])} ({most}): a row that is better may be so because it learned from more."
            )
            break
    if len({frozenset(g.runs) for g in groups}) > 1:
        says.append("Rows differ in their seeds: compare by the paired difference rather than by the mean loss.")
    return says


def caveats(groups: list[Group], table: list[Row], beside: list[Mark], ranked: bool) -> list[str]:
    """What the intervals do not know of, with the numbers of this sweep."""
    found, configs = [], [result["config"] for g in groups for result in g.results]
    for count, length in sorted({(c.get("data.val_rows"), c.get("data.seq_len")) for c in configs}, key=str):
        if count and length:
            most = "at most " if configs[0]["data"] == "instructions" else ""
            found.append(
                f"The held-out text has {count} rows of {most}{length} tokens, {most}{count * length:,} in all."
            )
    teachers = sum(mark.dash == "solid" for mark in beside)
    if teachers == 1:
        found.append("One teacher was used: with another one the order of the rows may be another.")
    elif teachers:
        found.append(f"{teachers} teachers were used: with others the order of the rows may be another.")
    tests = sum(d is not None and d.half is not None for row in table for d in (
        row.change if row.base is not row.group else None, row.behind if ranked else None))  # fmt: skip
    if tests > 1:
        found.append(
            f"{tests} differences have intervals of 95% each, not corrected for their number: if none were real, "
            f"about {0.05 * tests:.2g} would still look beyond noise."
        )
    return found


def page(name: str, entries: list[Entry], groups: list[Group], told: dict) -> str:
    """The report as HTML. told: the words that it shares with the Markdown."""
    table, beside = told["table"], told["beside"]
    lines, losses = [mark for mark in beside if mark.dash], by_loss(table)
    few = lines if len(lines) <= 3 else []
    figures = {"curves": curves(table, few), "exposure": exposure(table)}
    for of in dict.fromkeys((told["of"], LOSS)):
        alone = [Mark(g.label, "dash", {of.key: g.mean(of.key).mean}) for g in groups if g.alone]
        figures[of.title] = dots(table, of.key, few + (alone if len(alone) == 1 else []))
    figures |= {key: dots(table, key, width=16) for key in SMALL}
    kinds = told["space"] | {"schedule": shapes.drawn(losses)}
    plots = {kind: {f"{kind}-{i}": plot for i, plot in enumerate(some)} for kind, some in kinds.items()}
    figures |= {key: plot.figure for some in plots.values() for key, plot in some.items()}
    return render(
        "report.html", {k: f for k, f in figures.items() if f}, name=name, entries=entries,
        **told | told["columns"]._asdict() | {"space": plots},
        several=any(len(g.runs) > 1 for g in groups), small={k: v for k, v in SMALL.items() if figures[k]},
        titles={k: title for k, (title, _) in MEASURES.items()},
    )  # fmt: skip


def render(template: str, figures: dict[str, go.Figure], **values) -> str:
    """A template of this folder as a page that needs no network; jinja2 escapes whatever comes from files."""
    how = {"full_html": False, "include_plotlyjs": False, "config": {"displayModeBar": False, "responsive": True}}
    plots = {k: f.to_html(div_id=k.replace("/", "-"), **how) for k, f in figures.items()}
    jinja = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    jinja.filters |= {"number": number, "clock": clock}
    return jinja.get_template(template).render(plots=plots, library=get_plotlyjs(), **values)


def write(root: str | Path, name: str) -> tuple[Path, str]:
    """Make the page and its fellows; where it is, and what it says. Raises UserError where no run is done."""
    entries = [read(root, line) for line in manifest(root, name)]
    groups = grouped(entries)
    if not groups:
        listing = "\n".join(f"  {e.state:<10}  {shlex.join(e.overrides)}  {e.says}".rstrip() for e in entries)
        raise UserError(f"No run of the sweep {name} is done yet. Type: python train.py sweeps={name}\n{listing}")
    states = {entry.folder: entry.state for entry in entries}
    left = sum(state != "done" for state in states.values())
    says = finding(groups) + (
        f" [{left} of {len(states)} runs {'is' if left == 1 else 'are'} not done and not counted]" if left else ""
    )
    table, beside, of = rows(groups), marks(groups), goal(groups)
    shown = columns(table, of, beside)
    told = {
        "question": question(name), "answers": answers_to(name), "says": says, "warnings": warnings(groups),
        "facts": facts(entries, [result for group in groups for result in group.results]),
        "table": table, "beside": beside, "of": of, "samples": samples(table), "space": space.plots(by_loss(table)),
        "task": task_of(groups), "columns": shown, "caveats": caveats(groups, table, beside, shown.ranked),
    }  # fmt: skip
    written = {
        "html": page(name, entries, groups, told), "md": markdown(name, entries=entries, **told),
        "csv": as_csv(entries, table, of),
    }  # fmt: skip
    for kind, text in written.items():
        with files.atomic(home(root) / "sweeps" / f"{name}.{kind}") as temporary:
            temporary.write_text(text, encoding="utf-8", newline="")
        publish(root, f"sweeps/{name}.{kind}")
    return home(root) / "sweeps" / f"{name}.html", says


def main(arguments: list[str] | None = None) -> int:
    words = parser("report", "A sweep as one page of HTML, as Markdown and as CSV.")
    words.add_argument("--wandb", action="store_true", help="also keep it in Weights & Biases, with the runs")
    given = words.parse_args(arguments)
    try:
        path, says = write(given.root, given.name)
        print(harmless(f"{path}: {says}"))
        if given.wandb:
            from sweeps import dashboard

            entries = [read(given.root, line) for line in manifest(given.root, given.name)]
            written = [path, path.with_suffix(".md"), path.with_suffix(".csv")]
            print(harmless(f"W&B: {dashboard.keep(written, given.name, 'report', says, dashboard.place(entries))}"))
    except MISTAKES as error:
        print(harmless(str(for_people(error))), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
