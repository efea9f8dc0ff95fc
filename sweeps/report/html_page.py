"""Report as one page of HTML that needs no network."""

from __future__ import annotations

from pathlib import Path

import jinja2
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from kd.evaluation.catalog import LOSS, metrics
from kd.system.console import format_duration
from sweeps.report.axis_plots import heat_map, line_plots
from sweeps.report.marginals import COLUMNS, meaning
from sweeps.report.plots import dots, exposure_curves, learning_curves
from sweeps.report.report import Report
from sweeps.report.schedule_plots import schedule_plots
from sweeps.report.table import ReferenceLine, by_loss
from sweeps.report.wording import format_number

TEMPLATES = Path(__file__).parent / "templates"
MOST_LINES = 3  # reference lines that plots have room for


def html_page(report: Report) -> str:
    """Return the report as HTML."""
    rows, by_losses = report.shown, by_loss(report.rows)
    lines = [line for line in report.reference_lines if line.dash]
    lines = lines if len(lines) <= MOST_LINES else []
    figures = {"curves": learning_curves(rows, lines), "exposure": exposure_curves(rows)}
    main = list(dict.fromkeys((report.metric, LOSS)))
    for metric in main:
        bases = [g for g in report.groups if g.supervised]
        level = [ReferenceLine(g.label, "dash", {metric.key: g.required_mean(metric.key).mean}) for g in bases]
        figures[metric.name] = dots(rows, metric.key, lines + (level if len(level) == 1 else []))
    small = {metric: dots(rows, metric.key, width=16) for metric in metrics() if metric.plot}
    small = {metric: figure for metric, figure in small.items() if figure}
    entries = sorted(report.entries, key=lambda e: bool(report.extract) and e.state == "done")  # of many, these last
    plots = {
        "heat": [plot for plot in [heat_map(by_losses)] if plot], "over": line_plots(by_losses),
        "schedule": schedule_plots(by_loss(rows)),
    }  # fmt: skip
    ids = {f"{kind}-{i}": plot for kind, some in plots.items() for i, plot in enumerate(some)}
    figures |= {metric.key: figure for metric, figure in small.items()} | {key: p.figure for key, p in ids.items()}
    return render(
        "report.html", {key: figure for key, figure in figures.items() if figure}, folder=TEMPLATES,
        report=report, main=main, loss=LOSS, small=list(small), entries=entries,
        axes_meaning=meaning(report.metric, report.several_seeds), axes_columns=COLUMNS,
        plots_of={kind: {f"{kind}-{i}": plot for i, plot in enumerate(some)} for kind, some in plots.items()},
    )  # fmt: skip


def render(template: str, figures: dict[str, go.Figure], folder: Path, **values) -> str:
    """Return a template with its figures as a page that needs no network; jinja2 escapes text that comes from files."""
    options = {"full_html": False, "include_plotlyjs": False, "config": {"displayModeBar": False, "responsive": True}}
    plots = {key: figure.to_html(div_id=key.replace("/", "-"), **options) for key, figure in figures.items()}
    jinja = jinja2.Environment(
        loader=jinja2.FileSystemLoader(list(dict.fromkeys([folder, TEMPLATES]))), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    jinja.filters |= {"number": format_number, "clock": format_duration}
    return jinja.get_template(template).render(plots=plots, library=get_plotlyjs(), **values)
