"""Results of runs as flat records, for data frames."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from kd.config.schema import ExperimentConfig
from kd.errors import UserError
from kd.experiment.results import Entry, load_sweep, read_runs
from kd.system import files
from kd.system.files import read_json
from kd.system.remote import local_root

# Keys of a result that a record takes as they are.
NUMBERS = (
    "date", "parameters", "non_embedding", "active_parameters", "tokens", "flops", "seconds", "peak_memory",
    "bytes_per_token",
)  # fmt: skip


def load_results(root: str | Path = "runs", sweep: str | None = None) -> list[dict[str, Any]]:
    """Return a flat record per run: those of a sweep in the order of its list, or all runs of a root.

    A record has `run`, `folder`, `state`, `message` and `command`; the config under its full names (`loss`, `lr.peak`);
    the final metrics (`val/lm`) and those before training (`initial/val/lm`); tokens, FLOPs, seconds, parameters.
    A run that is not done, or is damaged, has another `state` than "done" and no metrics; a warning counts these.
    root: folder or URL. Raises UserError where there is no such root or sweep.

        table = pandas.DataFrame(kd.load_results("runs", sweep="loss"))
        table[table.state == "done"].groupby("loss")["val/lm"].agg(["mean", "std"])
    """
    root = files.expanded(str(root))
    entries = load_sweep(root, sweep) if sweep is not None else read_runs(root)
    states = Counter(entry.state for entry in entries if entry.result is None)
    if states:
        counts = ", ".join(f"{number} {state}" for state, number in sorted(states.items()))
        warnings.warn(
            f"{states.total()} of {len(entries)} runs in {local_root(root)} are not done ({counts}): their records "
            "have no metrics, and `message` has the reason.",
            stacklevel=2,
        )
    return [record(entry) for entry in entries]


def record(entry: Entry) -> dict[str, Any]:
    """Return the flat record of a run."""
    flat_record: dict[str, Any] = {
        "run": entry.folder.name, "folder": str(entry.folder), "state": str(entry.state), "message": entry.message,
        "line": entry.name, "command": entry.command if entry.overrides else None,
    }  # fmt: skip
    result = entry.result
    if result is None:
        return flat_record | _config(entry.folder)
    flat_record |= result["config"] | {"git": result["environment"]["git"]}
    flat_record |= {name: result.get(name) for name in NUMBERS}
    flat_record |= {f"perf/{name}": value for name, value in (result.get("performance") or {}).items()}
    flat_record |= {f"initial/{name}": value for name, value in (result.get("initial") or {}).items()}
    return flat_record | result["final"]


def _config(folder: Path) -> dict[str, Any]:
    """Return the flat config of a run that is not done; nothing of one that has none that can be read."""
    try:
        node = read_json(folder / "config.json")
        return ExperimentConfig.from_dict(node).flat() if node else {}
    except (UserError, KeyError, TypeError, AttributeError):  # `message` says what is wrong with the run
        return {}
