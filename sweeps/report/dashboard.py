"""Sweep in Weights & Biases: a saved view of the runs' project, and a report in it.

Both have the table of the runs, parallel coordinates over what the sweep varies, and losses over tokens and FLOPs.
"""

from __future__ import annotations

import os
from pathlib import Path

from kd.errors import UserError
from kd.evaluation.catalog import LOSS, Metric, metrics
from kd.experiment.results import Entry
from kd.runs.identity import axes, sizes_of
from kd.runs.loggers import logged_in
from kd.runs.run import Run
from sweeps.report.artifact import wandb_place
from sweeps.report.report import Report

REDUNDANT_AXES = (
    "seed", "teacher_seed", "student", "teacher", "student_params_non_embedding", "teacher_params_non_embedding",
    "micro_batch", "steps",  # tokens have them
)  # fmt: skip


def varying_axes(entries: list[Entry]) -> list[str]:
    """Return the axes in which the runs differ, that with most values first; sizes as numbers of parameters."""
    values: dict[str, set] = {}
    for entry in entries:
        for key, value in axes(entry.result["config"], sizes_of(entry.result)).items() if entry.result else ():
            values.setdefault(key, set()).add(value)
    return sorted(
        (k for k in values if len(values[k]) > 1 and k not in REDUNDANT_AXES), key=lambda k: (-len(values[k]), k)
    )


def wandb_ids(root: str | Path, entries: list[Entry]) -> list[str]:
    """Return the ids of the W&B runs of the finished runs; raise UserError if there are none."""
    paths = [Run(root, e.folder.name).copy("wandb-id") for e in entries if e.result]
    ids = [path.read_text() for path in paths if path.exists()]
    if not ids:
        why, hint = "none of the runs that are done was logged to W&B", "run the sweep with logger=wandb"
        raise UserError(option="logger", why=why, hint=hint)
    return ids


def panels(keys: list[str], metric: Metric) -> list:
    """Return the panels: axes with the final metric, and losses on the way, a line per value of the first axis."""
    import wandb_workspaces.reports.v2 as wr

    columns = [wr.ParallelCoordinatesPlotColumn(wr.Config(key), log=key.endswith("_params") or None) for key in keys]
    columns.append(wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(metric.final_key)))
    by = wr.Config(keys[0]) if keys else None
    title, wide = "loss on held-out text", wr.Layout(w=24, h=9)
    curves = [
        wr.LinePlot(f"{title} over {x}", x, [LOSS.key], groupby=by, title_y="nats per token", max_runs_to_show=100)
        for x in ("tokens", "flops")
    ]
    return [wr.ParallelCoordinatesPlot(columns, title=f"axes and final {metric.label}", layout=wide), *curves]


def pinned_columns(keys: list[str], metric: Metric) -> list[str]:
    """Return the columns of the table: the axes, and the final metrics, that of the sweep first."""
    shown = [metric, *(m for m in metrics() if m.column and m.name != "acceptance")]  # not sent to W&B
    return [*(f"config:{key}.value" for key in keys), *dict.fromkeys(f"summary:{m.final_key}" for m in shown)]


def view(name: str, keys: list[str], ids: list[str], place: dict[str, str | None], metric: Metric):
    """Return the view of the project to save: these runs, the best first."""
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces import expr

    runs = ws.RunsetSettings(
        filters=expr.And(expr.Metric("ID").isin(ids)), pinned_columns=pinned_columns(keys, metric),
        order=[expr.Ordering(expr.Summary(metric.final_key), ascending=metric.sign < 0)],
    )  # fmt: skip
    sections = [ws.Section(name, panels=panels(keys, metric), is_open=True)]
    settings = ws.WorkspaceSettings(max_runs=100)
    return ws.Workspace(**place, name=f"kd {name}", sections=sections, runset_settings=runs, settings=settings)


def document(report: Report, text: str, keys: list[str], ids: list[str], place: dict[str, str | None]):
    """Return the W&B report to save: the report's Markdown, and panels over these runs."""
    import wandb_workspaces.reports.v2 as wr
    from wandb_workspaces import expr

    metric = report.metric
    runs = wr.Runset(
        **place, name=report.name, filters=expr.And(expr.Metric("ID").isin(ids)),
        pinned_columns=pinned_columns(keys, metric),
        order=[wr.OrderBy(wr.SummaryMetric(metric.final_key), ascending=metric.sign < 0)],
    )  # fmt: skip
    blocks = [wr.MarkdownBlock(text), wr.PanelGrid(runsets=[runs], panels=panels(keys, metric))]
    return wr.Report(**place, title=f"kd {report.name}"[:128], description=report.verdict, blocks=blocks)


def check_package() -> None:
    """Raise UserError if the package for views and reports is not installed."""
    try:
        import wandb_workspaces  # noqa: F401
    except ModuleNotFoundError as error:
        need, hint = "the package wandb-workspaces for views and reports of W&B", "type pip install 'kd[workspaces]'"
        raise UserError(option="--wandb", need=need, hint=hint) from error


def save_dashboard(root: str | Path, report: Report, paths: list[Path]) -> list[str]:
    """Save view and report and return their addresses.

    paths: of the written report, HTML and Markdown first. Raises UserError without an account, or if W&B does not
    accept them.
    """
    import wandb

    page, text = paths[:2]
    if os.environ.get("WANDB_MODE", "online") != "online" or not logged_in():
        raise UserError(
            "views and reports are kept by W&B itself, and this machine has no key, or WANDB_MODE is not online. The "
            f"report of this machine is {page}",
            hint="type wandb login, and the same command again",
        )
    keys, ids, place = varying_axes(report.entries), wandb_ids(root, report.entries), wandb_place(report.entries)
    try:
        place["entity"] = place["entity"] or wandb.Api().default_entity
        both = (
            view(report.name, keys, ids, place, report.metric),
            document(report, text.read_text(encoding="utf-8"), keys, ids, place),
        )
        return [item.save().url for item in both]
    except (wandb.Error, ValueError, OSError) as error:
        why, hint = f"W&B did not take the view or the report ({error})", f"see the report of this machine, {page}"
        raise UserError(why, hint=hint) from None
