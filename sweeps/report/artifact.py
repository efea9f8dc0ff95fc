"""Files of a report or a fit as an artefact in Weights & Biases."""

from __future__ import annotations

import re
from pathlib import Path

from kd.errors import UserError
from kd.experiment.results import Entry
from kd.runs import loggers


def wandb_place(entries: list[Entry]) -> dict[str, str | None]:
    """Return project and entity of the runs, as they were given to the logger; kd if none was logged to W&B."""
    configs = [e.result["config"] for e in entries if e.result and e.result["config"].get("logger") == "wandb"]
    places = [{key: config.get(f"logger.{key}") for key in ("project", "entity")} for config in configs]
    return next(iter(places), {"project": "kd", "entity": None})


def keep_artifact(paths: list[Path], name: str, kind: str, notes: str, place: dict[str, str | None]) -> str:
    """Keep files in W&B as an artefact, and the page as media of a run of job type `kind`; return their address.

    paths: the page first. Without a key or a network the address is a folder of this machine, as for any run. Raises
    UserError if W&B does not accept the files.
    """
    import wandb

    try:
        run = loggers.wandb_run(**place, dir=str(paths[0].parent), name=f"{kind} {name}", group=name, job_type=kind,
                        tags=[kind], notes=notes)  # fmt: skip
        title = re.sub(r"[^\w.-]", "-", f"{name}.{kind}", flags=re.ASCII)
        artifact = wandb.Artifact(title, kind, description=notes)
        for path in paths:
            artifact.add_file(str(path))
        run.log_artifact(artifact)
        run.log({kind: wandb.Html(str(paths[0]), inject=False)})
        folder, url = run.settings.sync_dir, None if run.offline or run.disabled else run.url
        run.finish()
    except (wandb.Error, ValueError, OSError) as error:
        raise UserError(f"W&B did not take the {kind} ({error})", hint=f"see the {kind} in {paths[0]}") from None
    return url or ("nowhere, as W&B is disabled" if run.disabled else f"{folder}; to send it: wandb sync {folder}")
