"""Stores of teacher logits on the command line.

python -m kd.store write [the words of train.py]   write the store that such a run with logits=offline would read
python -m kd.store info|verify PATH                what it is; whether its bytes and numbers are right
python -m kd.store merge PATH PART [PART …]        join what several machines wrote with part=1/2, part=2/2
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from kd.system.launchers import forget_ranks

if __name__ == "__main__":  # before a library that reads them is loaded
    forget_ranks(os.environ)

from rich.table import Table

from kd.errors import MISTAKES, UserError, for_people
from kd.store.reader import FULL, Store, said
from kd.system import files
from kd.system.console import console, counted, end_with, styled
from kd.system.remote import home


def info(store: Store) -> Table:
    """What a store is, on one screen."""
    m, of = store.manifest, store.of
    tokens = m["count"] * m["seq_len"]
    positions = m.get("positions", tokens)  # those that count
    table = Table(box=None, show_header=False, pad_edge=False)
    recorded = f", recorded over {m['steps']:,} steps of its training" if "steps" in m else ""
    rows = {
        "teacher": f"{of['teacher']}{recorded}",
        "holds": f"{said(store.truncation)}, computed in {of['precision']}",
        "of": f"{m['count']:,} rows of {m['seq_len']} tokens, {tokens:,} in all; vocabulary {m['vocab']:,}",
    }
    if store.truncation != FULL:
        each = f"{m['entries'] / positions:.1f} entries, {m['mass'] / positions:.4f} of the probability"
        rows["each position"] = each + (f"; {positions:,} positions, the responses" if positions < tokens else "")
    rest = sum(file["size"] for name, file in m["files"].items() if not name.startswith("shard-"))
    rows |= {
        "size": f"{files.amount(m['size'])} in {counted(len(store.shards), 'shard', 'shards')}, "
        f"{m['size'] / tokens:.1f} bytes per token",
        "beside": f"{files.amount(rest)} of output layer and {m['validation']} validation rows, stored whole",
        "written with": store.words,
        "at": store.path,
    }
    for name, value in rows.items():
        table.add_row(styled(name, "dim"), value)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kd.store", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    about = "write the store that python train.py logits=offline WORDS would read; run it in several processes to share"
    write = commands.add_parser("write", help=about, description=about)
    write.add_argument("words", nargs="*", help="as for train.py, and part=1/2 to write one of two machines' shares")
    for name, help_ in (
        ("info", "what a store is, on one screen"),
        ("verify", "digest every file, and compare some rows with the teacher if it is at hand"),
    ):
        command = commands.add_parser(name, help=help_, description=help_)
        command.add_argument("path", help="folder or URL")
        command.add_argument("--root", default=os.environ.get("KD_ROOT", "runs"), help="where runs and packed data are")
    merge = commands.add_parser("merge", help="join in PATH what several machines wrote")
    merge.add_argument("path")
    merge.add_argument("part", nargs="+")
    given = parser.parse_args()
    from kd.store import writer

    try:
        for name in {"path", "root"} & vars(given).keys():
            setattr(given, name, files.expanded(getattr(given, name)))
        if given.command == "write":
            import train

            store = train.write_store(given.words)
        elif given.command == "merge":
            for path in (given.path, *given.part):
                if "://" in path:
                    raise UserError(
                        f"{path}: merge joins folders. Copy the parts here, merge them, and copy the store."
                    )
            writer.merge(Path(given.path), [Path(files.expanded(p)) for p in given.part])
            store = Store(given.path, Path())
        else:
            store = Store(given.path, home(given.root) / "stores")
        if given.command == "verify":
            store.verify()
            console.print(f"{counted(len(store.manifest['files']), 'file is', 'files are all')} what was written.")
            import train

            console.print(train.compare_with_teacher(store, given.root), soft_wrap=True)
        elif store:
            console.print(info(store))
    except MISTAKES as error:
        end_with(for_people(error))


if __name__ == "__main__":
    main()
