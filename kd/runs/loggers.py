"""Options of the group `logger`: views of metrics.jsonl in W&B and TensorBoard, each a list of Lightning loggers.

A sweep checks them before its first run. So nothing here imports Lightning, which takes 2 s, before it is needed.
"""

from __future__ import annotations

import os
import secrets
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kd.config.schema import ExperimentConfig
from kd.config.secrets import SECRET, redacted
from kd.errors import MISTAKES, UserError, first_line
from kd.runs import wandb_agent
from kd.runs.identity import WandbMetadata, sizes_of, wandb_metadata
from kd.runs.run import Run
from kd.system import files
from kd.system.console import console
from kd.system.files import read_metrics

ANSWER = "KD_WANDB"  # environment variable: online or offline, as W&B's server answered when it was asked
WAIT = 10  # seconds, timeout of W&B's server
PERFORMANCE = "perf"  # metrics that depend on the clock


def check(name: str) -> None:
    """Raise UserError if a logger's library is missing, or does not accept the settings of the environment."""
    with _explained(name):
        if name == "tensorboard":
            _need_tensorboard()
        elif name == "wandb":
            wandb_mode()


def views(make: Callable[..., list], folder: Path, about: WandbMetadata) -> list:
    """Return the started loggers of a config. Raises UserError for any error of their library."""
    with _explained(getattr(make, "func", make).__name__):
        return make(folder=folder, about=about)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Raise UserError for any error of a logger's library."""
    try:
        yield
    except MISTAKES:
        raise
    except Exception as error:
        why, hint = f"could not start: {_reason(error)}", "correct that, or type logger=none"
        raise UserError(option="logger", got=name, why=why, hint=hint) from error


def _reason(error: Exception) -> str:
    """Return an error as one line. An error of W&B's settings names the environment variables that they come from."""
    errors = getattr(error, "errors", None)
    if type(error).__name__ != "ValidationError" or errors is None:  # of pydantic
        return f"{type(error).__name__}: {first_line(error)}"
    wrong = []
    for item in errors():
        option = f"WANDB_{'_'.join(map(str, item['loc'])).upper()}"
        wrong.append(f"{option}={os.environ.get(option, item['input'])}: {item['msg']}")
    return "; ".join(wrong)


def none(folder: Path, about: WandbMetadata) -> list:
    """No view beside metrics.jsonl."""
    return []


def tensorboard(folder: Path, about: WandbMetadata) -> list:
    """Event files in the run's folder."""
    _need_tensorboard()
    from lightning.pytorch.loggers import TensorBoardLogger

    class TensorBoardView(TensorBoardLogger):
        def close(self, final: dict[str, float] | None, responses: bool = True) -> None:
            self.log_hyperparams(about.config, {f"final/{k}": v for k, v in (final or {}).items()})
            super().finalize("success" if final else "failed")

    return [TensorBoardView(folder, name="", version="tensorboard")]


def _need_tensorboard() -> None:
    try:
        import tensorboard  # noqa: F401
    except ModuleNotFoundError as error:
        hint = "type pip install 'kd[tensorboard]'"
        raise UserError(option="logger", got="tensorboard", need="the package TensorBoard", hint=hint) from error


def wandb(folder: Path, about: WandbMetadata, project: str = "kd", entity: str | None = None) -> list:
    """Weights & Biases; offline without a key or a network, so that nothing prompts, blocks or stops the training.

    WANDB_MODE (online, offline, disabled) is obeyed. `wandb sync runs/*/wandb/offline-run-*` uploads later.
    """
    from kd.runs.wandb_view import WandbView

    _, new = _id(folder, about)
    run = _begin(folder, about, project, entity)
    for axis in ("tokens", "flops"):
        run.define_metric(axis)
    for metrics in ("train/*", "val/*", f"{PERFORMANCE}/*"):
        run.define_metric(metrics, step_metric="tokens")
    view = WandbView(run, folder)
    for line in read_metrics(folder / "metrics.jsonl") if new else ():  # metrics older than this W&B run
        step = line.pop("step")
        view.log_metrics(line, step)
    return [view]


def _begin(folder: Path, about: WandbMetadata, project: str, entity: str | None):
    """Start the W&B run of a run, or continue it."""
    return wandb_run(
        project=project, entity=entity, dir=str(folder), id=_id(folder, about)[0], name=about.name, group=about.group,
        job_type=about.job_type, tags=about.tags, config=about.config | {"settings": redacted(about.settings)},
        resume="allow",
    )  # fmt: skip


def join(run: Run, result: dict, group: str) -> bool:
    """Put a run's W&B run into a group, if the run belongs to no sweep; return True if it was put there.

    The W&B run's summary is sent again with the group. No step is sent.
    """
    from kd.runs.wandb_view import WandbView

    config, note = result["config"], run / "wandb-group"
    if config.get("logger") != "wandb" or config.get("sweep") or os.environ.get("WANDB_MODE") == "disabled":
        return False
    if run.copy("wandb-group").exists() or not run.copy("wandb-id").exists():
        return False
    metadata = wandb_metadata(
        run.name, config | {"sweep": group}, sizes_of(result), result.get("environment", {}).get("git")
    )
    view = WandbView(
        _begin(run.folder, metadata, config.get("logger.project", "kd"), config.get("logger.entity")), run.folder
    )
    run.copy("metrics.jsonl")
    last: dict[str, float] = {}
    for line in read_metrics(run / "metrics.jsonl"):
        last |= line
    last.pop("step", None)
    view.summarise(last)
    view.close(result["final"], responses=False)
    note.write_text(group)
    if run.remote:
        run.remote.put_best_effort("wandb-group")
    return True


def add_final(run: Run, config: ExperimentConfig, result: dict) -> None:
    """Send the final metrics of a finished run to its logger again, with those that were added after its end."""
    git = result.get("environment", {}).get("git")
    metadata = wandb_metadata(run.name, result["config"], sizes_of(result), git)
    for name in ("wandb-id", "metrics.jsonl"):
        run.copy(name)
    for view in views(config.logger.build("logger"), run.folder, metadata):
        view.close(result["final"], responses=False)


def wandb_run(**what):
    """Return wandb.init(**what), without secrets of the environment; offline if the server is not reachable."""
    import wandb
    from pydantic import ValidationError  # which W&B needs

    forget()  # a run that died before its own finish; and the environment is read anew
    os.environ.setdefault("WANDB_INIT_TIMEOUT", "30")
    mode = wandb_mode()
    what["settings"] = wandb.Settings(
        silent=True, console="off", finish_timeout=60, x_disable_stats=True, disable_git=True
    )
    # W&B keeps all that SLURM says, which may hold the job's key; and of git the remote, which may hold a token.
    with wandb_agent.hidden([k for k in os.environ if k.startswith("SLURM_") and SECRET.search(k)]):
        try:
            return wandb.init(**what, mode=mode)
        except ValidationError:  # a mistyped variable fails offline too
            raise
        except Exception as error:  # no error of network or account stops the training
            if mode == "offline":
                raise
            warnings.warn(f"W&B is not reachable ({error}); this run is logged offline, to be sent with `wandb sync`.")
            _stay_offline()  # the failed try still holds the run's id
            return wandb.init(**what, mode="offline")


def wandb_mode() -> str:
    """Return the mode of W&B runs: WANDB_MODE, else offline if there is no key or the server does not answer.

    The server is tried once. The environment keeps the answer, also for the runs that a sweep starts.
    """
    mode = os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")
    if mode != "online":
        return mode
    if ANSWER not in os.environ:
        os.environ[ANSWER] = "online"
        if why := silent_server():
            _stay_offline()
            message = f"W&B does not answer ({why}); runs are logged offline, to be sent with `wandb sync`."
            console.print(message, soft_wrap=True)
    return os.environ[ANSWER]


def _stay_offline() -> None:
    """Keep W&B offline from now on, in this process and those that it starts."""
    os.environ[ANSWER] = os.environ["WANDB_MODE"] = "offline"  # the second for W&B's own requests
    forget()


def silent_server() -> str | None:
    """Return the reason why W&B's server counts as silent; None if it answers, with whatever content."""
    import requests
    import wandb

    settings = wandb.setup(wandb.Settings(silent=True)).settings
    proxies = {kind: proxy for kind in ("http", "https") if (proxy := getattr(settings, f"{kind}_proxy", None))}
    try:
        reply = requests.post(
            f"{settings.base_url.rstrip('/')}/graphql", json={"query": "query Viewer { viewer { id } }"},
            timeout=WAIT, proxies=proxies or None,
        )  # fmt: skip
    except requests.exceptions.SSLError:
        return None  # W&B may know other certificates
    except (requests.exceptions.RequestException, OSError) as error:
        return f"{settings.base_url}: {type(error).__name__}"
    return f"{settings.base_url}: HTTP status {reply.status_code}" if reply.status_code >= 500 else None


def logged_in() -> bool:
    """Return True if there is a W&B key, valid or not. Prints nothing and prompts for nothing."""
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    return wandb.login(prompt=False, verify=False)


def forget() -> None:
    """End W&B's part of this process, in whatever state it is."""
    import wandb

    try:
        wandb.teardown()
    except Exception as error:
        warnings.warn(f"W&B's process had died ({error}); what it had not sent or written yet is lost to W&B.")


def _id(folder: Path, about: WandbMetadata) -> tuple[str, bool]:
    """Return the id of the W&B run, and True if it is new to this folder.

    The id is that of the agent, if one started the run, else the previous one of this folder. So a run continues after
    a kill, and a run that is made again is a new W&B run.
    """
    path = folder / "wandb-id"
    previous = path.read_text() if path.exists() else None
    name = wandb_agent.wandb_run_id() or previous or f"{about.id}-{secrets.token_hex(3)}"
    if name != previous:
        with files.atomic(path) as temporary:
            temporary.write_text(name)
    return name, name != previous
