"""Sections of reports: the report's numbers -> a title, a text and a table."""

from sweeps.report.report import Report
from sweeps.report.sections import Section, section


@section
def best_alpha(report: Report) -> Section | None:
    """Loss of each alpha, the smallest alpha first; None for a sweep with other losses."""
    groups = [group for group in report.groups if group.config.get("loss") == "alpha_divergence"]
    if not groups:
        return None
    groups.sort(key=lambda group: group.config["loss.alpha"])
    rows = [(group.config["loss.alpha"], group.required_mean().mean, len(group.runs)) for group in groups]
    best = min(rows, key=lambda row: row[1])
    return Section(
        "Loss by alpha",
        text=f"The lowest loss is that of alpha={best[0]}. Small differences may be chance: see the table of numbers.",
        columns=("alpha", "loss", "seeds"),
        rows=rows,
    )
