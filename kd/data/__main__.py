"""python -m kd.data show [the words of train.py]   pack the data of such a run, and print some rows of it"""

from __future__ import annotations

import argparse
import os
import sys

from kd.system.launchers import forget_ranks

if __name__ == "__main__":  # before a library that reads them is loaded
    forget_ranks(os.environ)

from kd.config import grammar
from kd.config.compose import config_of
from kd.config.schema import ExperimentConfig
from kd.data import packing
from kd.data.batches import Packed
from kd.errors import UserError
from kd.experiment.dependencies import corpus
from kd.launch import command_line
from kd.system import files, programs
from kd.system.console import silence_libraries
from kd.system.remote import create_root


def pack_data(words: list[str]) -> tuple[ExperimentConfig, Packed]:
    """Return the config of `python train.py WORDS`, and its data, packed."""
    command_line.register()
    config = config_of(files.expanded_words(words))
    silence_libraries()
    source, options = corpus(config)
    return config, packing.pack(source, create_root(config.root) / "data", **options, announce=False)


def main() -> None:
    """Run the command line."""
    about = (
        f"pack the data of {programs.command('train')} WORDS and print a few rows: "
        "what is prompt, what is learned, what is not used"
    )
    parser = argparse.ArgumentParser(prog=programs.command("data"))
    command = parser.add_subparsers(dest="command", required=True).add_parser("show", help=about, description=about)
    command.add_argument("words", nargs="*", help="as for train.py, and rows=3 for another number of rows")
    command.add_argument("--json", action="store_true", help="text, ids, labels (-100: not learned) and counts")
    from kd.errors import MISTAKES, for_people
    from kd.system.console import exit_with_error

    try:
        from kd.data import preview
        from kd.data.tokenizer import load_tokenizer

        grammar.check_switches(sys.argv[1:], ("-h", "--help", "--json"), ["rows"])
        given = parser.parse_args(sorted(sys.argv[1:], key="--json".__eq__))  # argparse takes no option between words
        rows = next((word for word in reversed(given.words) if word.startswith("rows=")), "rows=3")
        if not rows.removeprefix("rows=").isdecimal():
            raise UserError(option=rows, need="a number of rows", hint="type e.g. rows=3")
        config, packed = pack_data([word for word in given.words if not word.startswith("rows=")])
        tokenizer = load_tokenizer(str(packed.tokenizer), "The tokenizer of the packed data")
        arguments = packed, tokenizer, int(rows.removeprefix("rows=")), config.data.args.get("date")
        if given.json:
            print(preview.as_json(*arguments))
        else:
            preview.show(*arguments)
    except MISTAKES as error:
        exit_with_error(for_people(error))


if __name__ == "__main__":
    main()
