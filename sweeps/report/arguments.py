"""Command-line arguments of report, fit and dashboard."""

from __future__ import annotations

import argparse
import os

from kd.errors import UserError
from kd.system import files, programs


def path_argument(text: str) -> str:
    """Return a path of the command line with ~ expanded, for argparse."""
    try:
        return files.expanded(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def sweep_parser(program: str, description: str, nargs: str | None = None) -> argparse.ArgumentParser:
    """Return a parser of a sweep's name and --root. nargs: "?" where the name may be left out."""
    parser = argparse.ArgumentParser(prog=programs.command(program), description=description)
    parser.add_argument("name", nargs=nargs, help=f"of the sweep, as in {programs.command('train')} sweeps=NAME")
    root = os.environ.get("KD_ROOT") or "runs"
    help_ = "folder or URL where runs are kept (default: $KD_ROOT, or runs)"
    parser.add_argument("--root", default=root, type=path_argument, help=help_)
    return parser


def add_wandb_switch(parser: argparse.ArgumentParser) -> None:
    """Add --wandb, which also keeps the written files as an artefact."""
    parser.add_argument("--wandb", action="store_true", help="also keep it in Weights & Biases, with the runs")
