"""List of the runs of a sweep: ROOT/sweeps/NAME.json, which reports read."""

from __future__ import annotations

from pathlib import Path

from kd import former_names
from kd.errors import UserError
from kd.system import files, remote
from kd.system.console import console
from kd.system.files import read_json


def update(root: str, name: str, lines: list[dict], further: bool) -> None:
    """Write the list of a sweep, or add `further` lines to it, and print a line if runs leave the list."""
    path = remote.fetch(root, f"sweeps/{name}.json")
    before = _listed(path)
    listed = [*(before if further else []), *lines]
    # Several lists of words may describe one run: tau=1 and tau=1.0.
    listed = list({line["run"]: line for line in reversed(listed)}.values())[::-1]
    if gone := {line["run"] for line in before} - {line["run"] for line in listed}:
        console.print(
            f"{path} lists what this command makes. Of the runs that it listed before, {len(gone)} are of another "
            "command: they stay where they are. To keep both lists, give one a name of its own, e.g. sweep=mine.",
            soft_wrap=True,
        )  # fmt: skip
    if listed != before:  # a sweep that is done may be in a root that is read alone
        files.write_json(path, {"name": name, "runs": listed})
        remote.publish(root, f"sweeps/{name}.json")


def _listed(path: Path) -> list[dict]:
    """Return the runs in the list of a sweep; none if the list is damaged, since it is then written again."""
    try:
        runs = (read_json(path) or {"runs": []})["runs"]
        if not all(isinstance(line["run"], str) for line in runs):
            return []
        return [line | {"overrides": former_names.current_words(line["overrides"])} for line in runs]
    except (UserError, KeyError, TypeError, AttributeError):
        return []
