"""A sweep in Weights & Biases: python -m sweeps.dashboard NAME saves a view of the runs' project, and a report in it.

Both have the table of the runs, parallel coordinates over what the sweep varies, and losses over tokens and FLOPs. What
sweeps.report and sweeps.fit write is kept there by their --wandb.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from kd.launchers import forget_ranks

if __name__ == "__main__":  # before a library that reads them is loaded
    forget_ranks(os.environ)

from kd.errors import MISTAKES, UserError, for_people
from kd.identity import axes, sizes_of
from kd.loggers import logged_in, wandb_run
from kd.progress import harmless
from kd.run import Run
from sweeps import report
from sweeps.compare import Entry, Goal, goal, grouped, manifest, parser, read
from sweeps.table import MEASURES


def place(entries: list[Entry]) -> dict[str, str | None]:
    """Project and entity of the runs, as they were given to the logger; kd where none was logged to W&B."""
    configs = [e.result["config"] for e in entries if e.result and e.result["config"].get("logger") == "wandb"]
    found = [{key: config.get(f"logger.{key}") for key in ("project", "entity")} for config in configs]
    return next(iter(found), {"project": "kd", "entity": None})


def keep(paths: list[Path], name: str, kind: str, says: str, where: dict[str, str | None]) -> str:
    """Keep a page and its fellows in W&B, as an artefact and, the page, as media of a run of job type `kind`.

    paths: the page first. Returns where that is: on this machine without a key or a network, as of any run. Raises
    UserError where W&B does not take it.
    """
    import wandb

    try:
        run = wandb_run(
            **where, dir=str(paths[0].parent), name=f"{kind} {name}", group=name, job_type=kind, tags=[kind], notes=says
        )
        artefact = wandb.Artifact(re.sub(r"[^\w.-]", "-", f"{name}.{kind}", flags=re.ASCII), kind, description=says)
        for path in paths:
            artefact.add_file(str(path))
        run.log_artifact(artefact)
        run.log({kind: wandb.Html(str(paths[0]), inject=False)})
        folder, at = run.settings.sync_dir, None if run.offline or run.disabled else run.url
        run.finish()
    except (wandb.Error, ValueError, OSError) as error:
        raise UserError(f"W&B did not take the {kind} ({error}). It is in {paths[0]}.") from None
    return at or ("nowhere, as W&B is disabled" if run.disabled else f"{folder}; to send it: wandb sync {folder}")


def shown(entries: list[Entry]) -> list[str]:
    """The axes that tell the runs apart, that of the most values first; sizes as numbers of parameters."""
    told = [axes(e.result["config"], sizes_of(e.result)) for e in entries if e.result]
    values: dict[str, set] = {}
    for key, value in ((k, v) for of in told for k, v in of.items()):
        values.setdefault(key, set()).add(value)
    other = ("seed", "teacher_seed", "student", "teacher", "student_params_non_embedding")
    other += ("teacher_params_non_embedding", "micro_batch", "steps")  # tokens say it
    return sorted((k for k in values if len(values[k]) > 1 and k not in other), key=lambda k: (-len(values[k]), k))


def ids(root: str | Path, entries: list[Entry]) -> list[str]:
    """Of the W&B runs of those that are done; raises UserError where there are none."""
    kept = [Run(root, e.folder.name).copy("wandb-id") for e in entries if e.result]
    found = [path.read_text() for path in kept if path.exists()]
    if not found:
        raise UserError("None of the runs that are done was logged to W&B (logger=wandb), so there is nothing to show.")
    return found


def final(of: Goal) -> str:
    """What W&B calls the measure that a sweep is judged by, at the end of a run."""
    return of.key.replace("val/", "final/")


def panels(keys: list[str], of: Goal) -> list:
    """What is plotted: the axes and the measure that they end in; losses on the way, a line per value of the first."""
    import wandb_workspaces.reports.v2 as wr

    columns = [wr.ParallelCoordinatesPlotColumn(wr.Config(key), log=key.endswith("_params") or None) for key in keys]
    columns.append(wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(final(of))))
    by = wr.Config(keys[0]) if keys else None
    what, wide = "loss on held-out text", wr.Layout(w=24, h=9)
    curves = [
        wr.LinePlot(f"{what} over {x}", x, ["val/lm"], groupby=by, title_y="nats per token", max_runs_to_show=100)
        for x in ("tokens", "flops")
    ]
    return [wr.ParallelCoordinatesPlot(columns, title=f"axes and final {of.title}", layout=wide), *curves]


def columns(keys: list[str], of: Goal) -> list[str]:
    """Of the table: the axes, and what a run ends in, that by which the sweep is judged first."""
    finals = [final(of), "final/lm", *(key.replace("val/", "final/") for key in MEASURES if key != "val/acceptance")]
    return [*(f"config:{key}.value" for key in keys), *(f"summary:{key}" for key in dict.fromkeys(finals))]


def view(name: str, keys: list[str], runs: list[str], where: dict[str, str], of: Goal):
    """The saved view of the project: these runs, the best first."""
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces import expr

    shown = ws.RunsetSettings(
        filters=expr.And(expr.Metric("ID").isin(runs)), pinned_columns=columns(keys, of),
        order=[expr.Ordering(expr.Summary(final(of)), ascending=of.sign < 0)],
    )  # fmt: skip
    sections = [ws.Section(name, panels=panels(keys, of), is_open=True)]
    most = ws.WorkspaceSettings(max_runs=100)
    return ws.Workspace(**where, name=f"kd {name}", sections=sections, runset_settings=shown, settings=most)


def document(name: str, keys: list[str], runs: list[str], where: dict[str, str], of: Goal, says: str, text: str):
    """The report in W&B: the Markdown of sweeps.report, and panels over these runs."""
    import wandb_workspaces.reports.v2 as wr
    from wandb_workspaces import expr

    shown = wr.Runset(
        **where, name=name, filters=expr.And(expr.Metric("ID").isin(runs)), pinned_columns=columns(keys, of),
        order=[wr.OrderBy(wr.SummaryMetric(final(of)), ascending=of.sign < 0)],
    )  # fmt: skip
    blocks = [wr.MarkdownBlock(text), wr.PanelGrid(runsets=[shown], panels=panels(keys, of))]
    return wr.Report(**where, title=f"kd {name}"[:128], description=says, blocks=blocks)


def save(root: str | Path, name: str) -> list[str]:
    """Save both; their addresses. Raises UserError without an account, or where W&B does not take them."""
    import wandb

    try:
        import wandb_workspaces  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError("Views and reports of W&B need its package for them: pip install 'kd[workspaces]'.") from error
    page, says = report.write(root, name)
    if os.environ.get("WANDB_MODE", "online") != "online" or not logged_in():
        raise UserError(
            "Views and reports are kept by W&B itself, and there is no key here, or WANDB_MODE is not online. Type "
            f"wandb login, and the same command again. The report of this machine is {page}."
        )
    entries = [read(root, line) for line in manifest(root, name)]
    keys, runs, where, of = shown(entries), ids(root, entries), place(entries), goal(grouped(entries))
    try:
        where["entity"] = where["entity"] or wandb.Api().default_entity
        text = page.with_suffix(".md").read_text(encoding="utf-8")
        both = view(name, keys, runs, where, of), document(name, keys, runs, where, of, says, text)
        return [made.save().url for made in both]
    except (wandb.Error, ValueError, OSError) as error:
        raise UserError(f"W&B did not take it ({error}). The report of this machine is {page}.") from None


def main(arguments: list[str] | None = None) -> int:
    given = parser("dashboard", "A sweep as a saved view and a report in Weights & Biases.").parse_args(arguments)
    try:
        addresses = save(given.root, given.name)
    except MISTAKES as error:
        print(harmless(str(for_people(error))), file=sys.stderr)
        return 2
    print(harmless("\n".join(addresses)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
