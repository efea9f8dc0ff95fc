"""Stores of teacher logits on the command line.

python -m kd.store write [the words of train.py]   write the store that such a run with logits=offline would read
python -m kd.store info|verify PATH                what it is; whether its bytes and numbers are right
python -m kd.store merge PATH PART [PART …]        join what several machines wrote with part=1/2, part=2/2
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

from kd.system.launchers import forget_ranks

if __name__ == "__main__":  # before a library that reads them is loaded
    forget_ranks(os.environ)

from rich.table import Table

from kd.config import grammar
from kd.config.compose import config_of
from kd.config.groups import TruncationConfig
from kd.config.secrets import check_secrets
from kd.errors import MISTAKES, UserError, for_people
from kd.experiment import store_check, stores
from kd.experiment.dependencies import Plan
from kd.experiment.prerequisites import prepare, teacher_model
from kd.launch import command_line
from kd.launch.training import train
from kd.store.reader import Store
from kd.store.spec import FULL, describe
from kd.system import files, programs
from kd.system.console import console, counted, exit_with_error, styled
from kd.system.remote import default_root, is_url, local_root


def write_store(words: list[str]) -> Store | None:
    """Write the store that `python train.py logits=offline WORDS` reads; return None for one part of several."""
    command_line.register()
    words = files.expanded_words(words)
    check_secrets(words)
    part = next((word for word in words if word.startswith("part=")), "part=1/1")
    numbers = re.fullmatch(r"part=(\d+)/(\d+)", part)
    if not numbers or not 1 <= int(numbers[1]) <= int(numbers[2]):
        raise UserError(option=part, need="the number of the part and of all parts", hint="type e.g. part=1/2")
    words = [word for word in words if word != part]
    config = config_of(["logits=offline", *words])
    if config.record:  # whatever a student asks for
        truncation = {"_target_": config.record.target, **config.record.args}
        truncation.pop("path", None)
        config = config.derive(truncation=TruncationConfig.from_node(truncation, "truncation"))
    packed, components = prepare(config)
    if store := stores.opened(config, packed):
        return store
    share = int(numbers[1]), int(numbers[2])
    teacher = teacher_model(config, packed, components, train)
    if share[1] == 1:
        return stores.write(config, packed, components.truncate, teacher)
    stores.write_part(config, packed, components.truncate, teacher, share)
    folder = Plan.from_config(config).store_place.folder
    console.print(f"Part {share[0]} of {share[1]} is in {folder}. When all parts are on one disk, type\n"
                  f"  {programs.command('store')} merge STORE {folder} …", soft_wrap=True)  # fmt: skip
    return None


def compare_with_teacher(store: Store, root: str) -> str:
    """Recompute some rows of a store with its teacher, if the teacher is available; return the result as a sentence."""
    command_line.register()
    return store_check.compare_with_teacher(store, root, train)


def info(store: Store) -> Table:
    """Print a description of a store, on one screen."""
    m, spec = store.manifest, store.spec
    tokens = m["count"] * m["seq_len"]
    positions = m.get("positions", tokens)  # target positions
    table = Table(box=None, show_header=False, pad_edge=False)
    recorded = f", recorded over {m['steps']:,} steps of its training" if "steps" in m else ""
    rows = {
        "teacher": f"{spec['teacher']}{recorded}",
        "holds": f"{describe(store.truncation)}, computed in {spec['precision']}",
        "of": f"{m['count']:,} rows of {m['seq_len']} tokens, {tokens:,} in all; vocabulary {m['vocab']:,}",
    }
    if store.truncation != FULL:
        each = f"{m['entries'] / positions:.1f} entries, {m['mass'] / positions:.4f} of the probability"
        rows["each position"] = each + (f"; {positions:,} positions, the responses" if positions < tokens else "")
    rest = sum(file["size"] for name, file in m["files"].items() if not name.startswith("shard-"))
    rows |= {
        "size": f"{files.format_bytes(m['size'])} in {counted(len(store.shards), 'shard', 'shards')}, "
        f"{m['size'] / tokens:.1f} bytes per token",
        "beside": f"{files.format_bytes(rest)} of output layer and {m['validation']} validation rows, stored whole",
        "written with": store.words,
        "at": store.path,
    }
    for name, value in rows.items():
        table.add_row(styled(name, "dim"), value)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog=programs.command("store"), description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    about = (
        f"write the store that {programs.command('train')} logits=offline WORDS would read; "
        "run it in several processes to share"
    )
    write = commands.add_parser("write", help=about, description=about)
    write.add_argument("words", nargs="*", help="as for train.py, and part=1/2 to write one of two machines' shares")
    for name, help_ in (
        ("info", "what a store is, on one screen"),
        ("verify", "digest every file, and compare some rows with the teacher if it is at hand"),
    ):
        command = commands.add_parser(name, help=help_, description=help_)
        command.add_argument("path", help="folder or URL")
        command.add_argument("--root", default=default_root(), help="where runs and packed data are")
    merge = commands.add_parser("merge", help="join in PATH what several machines wrote")
    merge.add_argument("path")
    merge.add_argument("part", nargs="+")
    from kd.store import transfer

    try:
        if sys.argv[1:2] == ["write"]:
            grammar.check_switches(sys.argv[2:], ("-h", "--help"), ["part"])
            given = parser.parse_args()
        else:
            given = parser.parse_args(programs.root_as_switch(sys.argv[1:]))
        for name in {"path", "root"} & vars(given).keys():
            setattr(given, name, files.expanded(getattr(given, name)))
        if given.command == "write":
            store = write_store(given.words)
        elif given.command == "merge":
            for path in (given.path, *given.part):
                if is_url(path):
                    hint = "copy the parts to this machine, merge them, and copy the store"
                    raise UserError(option=path, why="merge joins folders", hint=hint)
            transfer.merge(Path(given.path), [Path(files.expanded(p)) for p in given.part])
            store = Store(given.path, Path())
        else:
            store = Store(given.path, local_root(given.root) / "stores")
        if store and given.command == "verify":
            store.verify()
            console.print(f"{counted(len(store.manifest['files']), 'file is', 'files are all')} what was written.")
            console.print(compare_with_teacher(store, given.root), soft_wrap=True)
        elif store:
            console.print(info(store))
    except MISTAKES as error:
        exit_with_error(for_people(error))


if __name__ == "__main__":
    main()
