"""An agent of Weights & Biases (`wandb agent`): it starts runs with parameters of its choice, to see their metrics.

What it wants is in the environment of a run that it starts (wandb/wandb_agent.py): the id of the W&B run to be. There,
wandb.init() takes id, project and entity from the environment, whatever it is given, and keeps the agent's parameters.
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


def asked() -> str | None:
    """Id of the W&B run that this process is to be, if an agent started it."""
    return os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None


@contextmanager
def hidden(names: Iterable[str] = WANTED) -> Iterator[None]:
    """Without these variables of the environment: a teacher, say, is not the run that an agent asked for."""
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def check_single() -> None:
    """Raise UserError where an agent started a sweep, whose runs would all be the same W&B run."""
    if asked():
        raise UserError(
            option="WANDB_SWEEP_ID",
            why="is set in the environment, and an agent of W&B asks for one run at a time",
            hint="leave -m and sweeps=… out of the command of its sweep, or unset WANDB_SWEEP_ID",
        )


def tell(run: Run, config: ExperimentConfig, result: dict) -> None:
    """Tell the agent's W&B run what came out of a run that was done before, or by another process."""
    if not asked() or config.logger.name != "wandb":
        return
    kept = run.copy("wandb-id")
    if kept.exists() and kept.read_text() == asked():
        return  # it was told step by step
    from kd.runs.loggers import views  # which takes a second, and imports this

    run.copy("metrics.jsonl")
    run.check(result, "metrics.jsonl", RESPONSES)
    git = result.get("environment", {}).get("git")
    told = wandb_metadata(run.name, result["config"] | {"sweep": config.sweep}, sizes_of(result), git)
    for view in views(config.logger.build("logger"), run.folder, told):
        view.close(result["final"])


def end() -> None:
    """Of a process that was asked to end: under an agent, die of SIGTERM, as it expects of what it stops.

    To an agent exit codes above 0 are failures, and a few of them in a row end it (wandb_agent.py, is_failing).
    """
    if asked():
        sys.stdout.flush()
        sys.stderr.flush()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
