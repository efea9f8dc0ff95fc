"""Report of a sweep: python -m sweeps.report NAME writes ROOT/sweeps/NAME.html, .md and .csv.

The page needs no network. The Markdown, for a paper or an issue, and the CSV, a line per run, have the same numbers.
"""

from __future__ import annotations

import os
import sys

from kd.system.launchers import forget_ranks

if __name__ == "__main__":  # before a library that reads them is loaded
    forget_ranks(os.environ)

from kd.errors import MISTAKES, for_people
from kd.system.console import strip_control_characters
from sweeps.report.arguments import add_sweep_folder, add_wandb_switch, sweep_parser
from sweeps.report.artifact import keep_artifact, wandb_place
from sweeps.report.report import build_report
from sweeps.report.write import write_report


def main(arguments: list[str] | None = None) -> int:
    """Write the report of a sweep; return the exit code."""
    parser = sweep_parser("report", "A sweep as one page of HTML, as Markdown and as CSV.")
    add_wandb_switch(parser)
    options = parser.parse_args(arguments)
    try:
        add_sweep_folder(options.config_dir, options.name)
        report = build_report(options.root, options.name)
        paths = write_report(options.root, report)
        print(strip_control_characters(f"{paths[0]}: {report.verdict}"))
        if options.wandb:
            place = keep_artifact(paths, report.name, "report", report.verdict, wandb_place(report.entries))
            print(strip_control_characters(f"W&B: {place}"))
    except MISTAKES as error:
        print(strip_control_characters(str(for_people(error))), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
