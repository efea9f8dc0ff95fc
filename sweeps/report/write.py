"""Files of a report: NAME.html, NAME.md, NAME.csv and NAME.axes.csv in the root's folder of sweeps."""

from __future__ import annotations

from pathlib import Path

from kd.system import files
from kd.system.remote import Remote, is_url, local_root, publish
from sweeps.report.csv_table import axes_table, csv_table
from sweeps.report.html_page import html_page
from sweeps.report.markdown import markdown
from sweeps.report.report import Report

RENDERERS = {"html": html_page, "md": markdown, "csv": csv_table}
AXES = {"axes.csv": axes_table}  # of a report with marginal means


def write_report(root: str | Path, report: Report) -> list[Path]:
    """Write all files of a report and return their paths, the page first."""
    paths = []
    for kind, render in (RENDERERS | (AXES if report.axes else {})).items():
        path = local_root(root) / "sweeps" / f"{report.name}.{kind}"
        text = render(report)
        with files.atomic(path) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="")
        publish(root, f"sweeps/{report.name}.{kind}")
        paths.append(path)
    if not report.axes:
        remove_axes(root, report.name)
    return paths


def remove_axes(root: str | Path, name: str) -> None:
    """Remove the marginal means that an earlier report of the sweep wrote."""
    for kind in AXES:
        (local_root(root) / "sweeps" / f"{name}.{kind}").unlink(missing_ok=True)
        if is_url(root):
            Remote(str(root), local_root(root)).remove(f"sweeps/{name}.{kind}")
