"""Scaling laws of a sweep: python -m sweeps.fit NAME writes ROOT/sweeps/NAME.fit.html, .fit.json and .points.csv."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser
from pathlib import Path

from kd.system.launchers import forget_ranks

if __name__ == "__main__":  # before a library that reads them is loaded
    forget_ranks(os.environ)

from kd.config.search_path import sweep_command
from kd.errors import MISTAKES, UserError, for_people
from kd.experiment.results import Entry, load_sweep
from kd.system.console import Terminal, strip_control_characters
from kd.system.remote import local_root, publish
from sweeps.fit.fitting import fit_all
from sweeps.fit.observations import Observation, from_csv, from_sweep
from sweeps.fit.output import print_fits, write_fits
from sweeps.fit.verdict import verdict
from sweeps.report.arguments import add_sweep_folder, add_wandb_switch, path_argument, sweep_parser
from sweeps.report.artifact import keep_artifact, wandb_place
from sweeps.report.question import question


def argument_parser() -> ArgumentParser:
    parser = sweep_parser("fit", "Scaling laws of a sweep or a CSV file.", "?")
    parser.add_argument("--bootstrap", type=int, default=200, help="resamples to make intervals from (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the resamples (default: 0)")
    columns = (
        "fit these points instead of a sweep; the answers are written beside it. Columns: "
        f"{', '.join(Observation._fields)}. Only parameters (without embeddings), tokens and loss (nats per token) are "
        "needed. FLOPs are of a forward pass, 2 per parameter where there are none; lines without a teacher are "
        "language modelling alone."
    )
    parser.add_argument("--csv", type=lambda text: Path(path_argument(text)), metavar="FILE", help=columns)
    add_wandb_switch(parser)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Fit the laws of a sweep or a CSV file, write and print them; return the exit code."""
    parser = argument_parser()
    options = parser.parse_args(arguments)
    if (options.name is None) is (options.csv is None):
        parser.error("need the name of a sweep, or --csv FILE")
    if options.bootstrap < 0:
        parser.error(f"--bootstrap {options.bootstrap}: need 0 (no intervals) or more")
    entries: list[Entry] = []
    notes: list[str] = []
    try:
        add_sweep_folder(options.config_dir, options.name)
        if options.csv:
            folder, name = options.csv.parent, options.csv.stem
            runs = from_csv(options.csv)
        else:
            folder, name, entries = (
                local_root(options.root) / "sweeps",
                options.name,
                load_sweep(options.root, options.name),
            )
            runs, notes = from_sweep(entries)
        if not runs:
            why = "; ".join(["has no run that can be used", *(note.rstrip(".") for note in notes)])
            raise UserError(option=name, why=why)
        fits = fit_all(name, runs, notes, options.bootstrap, options.seed)
        if not fits.fits:
            reasons = "\n".join(f"- {reason}" for reason in [*fits.not_fitted, *notes])
            hint = f"to run other sizes and numbers of tokens, type e.g. {sweep_command('scaling', options.root)}"
            raise UserError(option=name, why=f"has no runs that a law can be fitted to:\n{reasons}", hint=hint)
        line = verdict(fits)
        paths = write_fits(folder, fits, line, question(name) if options.name else "")
        for kind in ("html", "json") if options.name else ():
            publish(options.root, f"sweeps/{name}.fit.{kind}")
        print_fits(fits, Terminal(highlight=False))
        print(strip_control_characters(f"{paths[0]}: {line}"))
        if options.wandb:
            print(strip_control_characters(f"W&B: {keep_artifact(paths, name, 'fit', line, wandb_place(entries))}"))
    except MISTAKES as error:
        print(strip_control_characters(str(for_people(error))), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
