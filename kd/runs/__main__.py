"""Runs of a root, and what they take of the disk.

python -m kd.runs list                      every run with its state and size, and what is kept beside the runs
python -m kd.runs show RUN                  one run: config, results, files, and what needs it
python -m kd.runs clean [RUN …]             what could be removed; yes=true removes it
"""

from __future__ import annotations

import argparse
import difflib
import os
import shlex
import sys
from pathlib import Path

from kd.system.launchers import forget_ranks

if __name__ == "__main__":  # before a library that reads them is loaded
    forget_ranks(os.environ)

from rich.table import Table

from kd.errors import MISTAKES, UserError, for_people
from kd.experiment import cleanup, disk
from kd.experiment.cleanup import DEFAULT, KINDS, Leftover, Root
from kd.launch import command_line
from kd.runs.identity import readable
from kd.system import files, programs
from kd.system.console import Terminal, console, counted, exit_with_error, styled
from kd.system.files import format_bytes
from kd.system.remote import default_root

SETTINGS = {  # of each command
    "list": ("root",),
    "show": ("root",),
    "clean": ("root", "what", "needed", "yes"),
}
out = Terminal(highlight=False)


def parse_words(command: str, words: list[str]) -> tuple[list[str], dict[str, str]]:
    """Return the names and the settings among the words of a command; raise UserError for an unknown setting."""
    names = [word for word in words if "=" not in word]
    settings: dict[str, str] = {}
    for word in files.expanded_words([word for word in words if "=" in word]):
        key, _, value = word.partition("=")
        if key not in SETTINGS[command]:
            close = difflib.get_close_matches(key, SETTINGS[command], 1)
            why, need = f"no setting of {command}", " or ".join(f"{name}=" for name in SETTINGS[command])
            raise UserError(option=word, why=why, need=need, hint=f"type {close[0]}={value}" if close else "")
        settings |= {key: value}
    return names, settings


def switch(settings: dict[str, str], key: str) -> bool:
    """Return a setting that is true or false."""
    value = settings.get(key, "false")
    if value not in ("true", "false"):
        raise UserError(option=key, got=value, need="true or false", hint=f"type {key}=true, or leave {key} out")
    return value == "true"


def kinds_of(what: str | None) -> tuple[str, ...]:
    """Return the kinds of leftovers that were typed as what=KIND,KIND."""
    if what is None:
        return DEFAULT
    kinds = tuple(KINDS) if what == "all" else tuple(what.split(","))
    for kind in kinds:
        if kind not in KINDS:
            need = f"all, or some of {', '.join(KINDS)}"
            raise UserError(option="what", got=what, need=need, hint=f"type what={','.join(DEFAULT)}")
    return kinds


def table_of(*columns: str) -> Table:
    """Return a table without lines, with sizes aligned to the right."""
    table = Table(box=None, pad_edge=False, title_justify="left")
    for column in columns:
        right = column in ("size", "checkpoints")
        table.add_column(column, justify="right" if right else "left", overflow="fold", no_wrap=right)
    return table


def list_runs(root: Path) -> None:
    """Print every run with its state and size, the largest first, and what is kept beside the runs."""
    contents = Root(root)
    runs = sorted(contents.runs.values(), key=lambda use: -use.size)
    table = table_of("run", "state", "size", "checkpoints", "sweeps")
    for use in runs:
        checkpoints = format_bytes(use.checkpoints) if use.checkpoints else ""
        sweeps = " ".join(contents.sweeps_with(use.run.name))
        table.add_row(use.run.name, use.state, format_bytes(use.size), checkpoints, sweeps)
    if runs:
        out.print(table)
        out.print()
    summary = table_of("folder", "size", "holds")
    summary.add_row(str(root), format_bytes(sum(use.size for use in runs)), counted(len(runs), "run", "runs"))
    for name, meaning in disk.PLACES.items():
        if (root / name).is_dir():
            summary.add_row(str(root / name), format_bytes(disk.disk_use(root / name)), meaning)
    cache = files.cache()
    if size := disk.disk_use(cache):
        summary.add_row(str(cache), format_bytes(size), "digests, compiled code, and copies of roots under URLs")
    out.print(summary)


def show_run(root: Path, names: list[str]) -> None:
    """Print one run: its state, config, results, files and what needs it."""
    if len(names) != 1:
        hint = f"type {programs.command('runs')} show RUN"
        raise UserError(option="show", why=f"got {len(names)} names", need="the name of one run", hint=hint)
    contents = Root(root)
    use = contents.find(names[0])
    name = use.run.name
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    rows = {
        "run": name,
        "state": f"{use.state}  {use.reason}".strip(),
        "size": format_bytes(use.size),
        "at": use.run.location,
    }
    result = use.run.result() if use.is_done else None
    if result:
        rows["settings"] = readable(name, result["config"])
        rows["done"] = f"{result.get('date', 'at an unknown time')}, {result['tokens']:,} tokens"
        rows |= {key: f"{value:.4f}" for key, value in result["final"].items() if "/" in key}
        for role, origin in result.get("origins", {}).items():
            rows[role] = origin["run"]
    rows["in sweeps"] = " ".join(contents.sweeps_with(name)) or "none"
    rows["needed by"] = " ".join(contents.users_of(name)) or "no other run"
    for path in sorted(use.run.folder.iterdir()):
        if path.name[0] != ".":
            rows[path.name + "/" * path.is_dir()] = format_bytes(disk.disk_use(path))
    for key, value in rows.items():
        table.add_row(styled(key, "dim"), value)
    out.print(table)


def clean(root: Path, names: list[str], settings: dict[str, str]) -> None:
    """Print what could be removed. With yes=true remove it, except what other runs need unless needed=true."""
    contents, yes, needed = Root(root), switch(settings, "yes"), switch(settings, "needed")
    what = settings.get("what")
    if names and what is not None:
        raise UserError(option="what", got=what, conflict=names[0], need="runs by name, or kinds")
    kinds = kinds_of(what)
    chosen = cleanup.named_runs(contents, names) if names else cleanup.leftovers(contents, kinds)
    free = [leftover for leftover in chosen if needed or not leftover.needed]
    held = [leftover for leftover in chosen if leftover not in free]
    if yes:
        removed = [leftover for leftover in free if cleanup.remove(leftover)]
        _print_leftovers("removed", removed)
        _print_leftovers("left, as a process works on it", [leftover for leftover in free if leftover not in removed])
    else:
        _print_leftovers("can be removed", free)
    _print_leftovers("left, as it is needed; needed=true removes it too", held)
    if not chosen:
        console.print(f"Nothing to remove in {root}.")
    elif free and not yes:
        words = [*names, *(f"{key}={value}" for key, value in settings.items() if key != "yes"), "yes=true"]
        command = f"{programs.command('runs')} clean {shlex.join(words)}"
        console.print(f"Nothing was removed. To remove it, type:\n  {command}", soft_wrap=True)
    if not names and not yes:
        _print_other_kinds(contents, kinds)


def _print_leftovers(title: str, leftovers: list[Leftover]) -> None:
    if not leftovers:
        return
    total = sum(leftover.size for leftover in leftovers)
    out.print(styled(f"{title}: {format_bytes(total)}", "bold"))
    table = table_of("kind", "size", "path", "why")
    for leftover in leftovers:
        why = f"needed by {leftover.needed}" if leftover.needed else leftover.why
        table.add_row(leftover.kind, format_bytes(leftover.size), str(leftover.path), why)
    out.print(table)


def _print_other_kinds(root: Root, kinds: tuple[str, ...]) -> None:
    """Print what other kinds of leftovers would free."""
    others = tuple(kind for kind in KINDS if kind not in kinds)
    free = [leftover for leftover in cleanup.leftovers(root, others) if not leftover.needed]
    table = table_of("kind", "size", "holds")
    for kind in others:
        if size := sum(leftover.size for leftover in free if leftover.kind == kind):
            table.add_row(f"what={kind}", format_bytes(size), KINDS[kind])
    if table.row_count:
        out.print(styled("also, by name:", "bold"))
        out.print(table)


def main() -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(prog=programs.command("runs"), description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    about = {
        "list": ("every run with its state and size, and what is kept beside the runs", "root=FOLDER"),
        "show": ("one run: config, results, files, and what needs it", "RUN, root=FOLDER"),
        "clean": (
            "what could be removed; yes=true removes it",
            f"RUN …, or what=KIND,KIND of {', '.join(KINDS)} (default: {','.join(DEFAULT)}); needed=true, yes=true",
        ),
    }
    for name, (meaning, words) in about.items():
        command = commands.add_parser(name, help=meaning, description=meaning)
        command.add_argument("words", nargs="*", metavar="WORD", help=f"{words} (root: $KD_ROOT, or runs)")
    given = parser.parse_args(programs.root_as_word(sys.argv[1:]))
    try:
        names, settings = parse_words(given.command, given.words)
        root = disk.local_folder(settings.get("root") or default_root())
        command_line.register()
        if given.command == "list":
            if names:
                hint = f"type {programs.command('runs')} show {names[0]}"
                raise UserError(option=names[0], why="list takes no name", hint=hint)
            list_runs(root)
        elif given.command == "show":
            show_run(root, names)
        else:
            clean(root, names, settings)
    except MISTAKES as error:
        exit_with_error(for_people(error))


if __name__ == "__main__":
    main()
