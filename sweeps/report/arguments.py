"""Command-line arguments of report, fit and dashboard."""

from __future__ import annotations

import argparse
import sys

from kd.config import search_path
from kd.errors import UserError
from kd.system import files, programs
from kd.system.remote import default_root


def path_argument(text: str) -> str:
    """Return a path of the command line with ~ expanded, for argparse."""
    try:
        return files.expanded(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class SweepParser(argparse.ArgumentParser):
    """Parser that takes root=DIR, as train.py does, for --root DIR."""

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args(programs.root_as_switch(words), namespace)


def sweep_parser(program: str, description: str, nargs: str | None = None) -> argparse.ArgumentParser:
    """Return a parser of a sweep's name and --root. nargs: "?" where the name may be left out."""
    parser = SweepParser(prog=programs.command(program), description=description)
    parser.add_argument("name", nargs=nargs, help=f"of the sweep, as in {programs.command('train')} sweeps=NAME")
    help_ = "folder or URL where runs are kept (default: $KD_ROOT, or runs)"
    parser.add_argument("--root", default=default_root(), type=path_argument, help=help_)
    help_ = f"folder with sweeps/NAME.yaml, as for {programs.command('train')}"
    parser.add_argument("--config-dir", metavar="DIR", type=path_argument, help=help_)
    return parser


def add_sweep_folder(folder: str | None, name: str | None) -> None:
    """Add the folder of --config-dir to those with options.

    Raises UserError for a folder that train.py refuses, and for one without this sweep.
    """
    if folder is None:
        return
    if name is None:
        why, hint = "a CSV file has no sweep file", "leave one of the two out"
        raise UserError(option="--config-dir", got=folder, conflict="--csv", why=why, hint=hint)
    search_path.take([f"--config-dir={folder}"])
    names = [option.name for option in search_path.options() if option.group == "sweeps"]
    if name not in names:
        why = f"has no sweep {name}"
        need = f"a folder with sweeps/{name}.yaml"
        hint = f"type one of its sweeps: {', '.join(names)}" if names else "leave --config-dir out"
        raise UserError(option="--config-dir", got=folder, why=why, need=need, hint=hint)


def add_wandb_switch(parser: argparse.ArgumentParser) -> None:
    """Add --wandb, which also keeps the written files as an artefact."""
    parser.add_argument("--wandb", action="store_true", help="also keep it in Weights & Biases, with the runs")
