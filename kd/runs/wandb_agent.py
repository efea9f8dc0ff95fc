"""Runs that an agent of Weights & Biases (`wandb agent`) starts, with parameters of its choice, to read their metrics.

The environment of such a run has the id of the W&B run to use (wandb/wandb_agent.py). wandb.init() then takes id,
project and entity from the environment, whatever its arguments are, and keeps the agent's parameters.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from kd.config.schema import ExperimentConfig
from kd.errors import UserError
from kd.runs.identity import sizes_of, wandb_metadata
from kd.runs.run import Run
from kd.runs.seal import RESPONSES

WANTED = ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH")


def wandb_run_id() -> str | None:
    """Return the id of the W&B run that this process has to use; None if no agent started it."""
    return os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None


@contextmanager
def hidden(names: Iterable[str] = WANTED) -> Iterator[None]:
    """Remove environment variables in the block.

    A teacher, for example, is not the run that the agent started.
    """
    saved = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(saved)


def check_single() -> None:
    """Raise UserError if an agent started a sweep. All its runs would be the same W&B run."""
    if wandb_run_id():
        raise UserError(
            option="WANDB_SWEEP_ID",
            why="is set in the environment, and an agent of W&B asks for one run at a time",
            hint="leave -m and sweeps=… out of the command of its sweep, or unset WANDB_SWEEP_ID",
        )


def tell(run: Run, config: ExperimentConfig, result: dict) -> None:
    """Send the agent's W&B run the result of a run that was done before, or by another process."""
    if not wandb_run_id() or config.logger.name != "wandb":
        return
    id_file = run.copy("wandb-id")
    if id_file.exists() and id_file.read_text() == wandb_run_id():
        return  # it has all steps already
    from kd.runs.loggers import views  # takes a second, and imports this module

    run.copy("metrics.jsonl")
    run.check(result, "metrics.jsonl", RESPONSES)
    git = result.get("environment", {}).get("git")
    metadata = wandb_metadata(run.name, result["config"] | {"sweep": config.sweep}, sizes_of(result), git)
    for view in views(config.logger.build("logger"), run.folder, metadata):
        view.close(result["final"])


def end() -> None:
    """End this process by SIGTERM if an agent started it, as the agent expects after a request to end.

    To an agent, exit codes above 0 are failures, and a few failures in a row end it (wandb_agent.py, is_failing).
    """
    if wandb_run_id():
        sys.stdout.flush()
        sys.stderr.flush()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
