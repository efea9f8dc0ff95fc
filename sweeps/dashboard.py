"""Sweep in Weights & Biases: python -m sweeps.dashboard NAME saves a view of the runs' project, and a report in it."""

from __future__ import annotations

import os
import sys

from kd.system.launchers import forget_ranks

if __name__ == "__main__":  # before a library that reads them is loaded
    forget_ranks(os.environ)

from kd.errors import MISTAKES, for_people
from kd.system.console import strip_control_characters
from sweeps.report.arguments import add_sweep_folder, sweep_parser
from sweeps.report.dashboard import check_package, save_dashboard
from sweeps.report.report import build_report
from sweeps.report.write import write_report


def main(arguments: list[str] | None = None) -> int:
    """Write the report of a sweep and save its dashboard; return the exit code."""
    parser = sweep_parser("dashboard", "A sweep as a saved view and a report in Weights & Biases.")
    options = parser.parse_args(arguments)
    try:
        add_sweep_folder(options.config_dir, options.name)
        check_package()
        report = build_report(options.root, options.name)
        addresses = save_dashboard(options.root, report, write_report(options.root, report))
    except MISTAKES as error:
        print(strip_control_characters(str(for_people(error))), file=sys.stderr)
        return 2
    print(strip_control_characters("\n".join(addresses)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
