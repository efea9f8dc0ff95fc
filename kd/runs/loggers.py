"""Where metrics go. metrics.jsonl in the run's folder is the truth; W&B and TensorBoard are views of it."""

from __future__ import annotations

import json
import os
import secrets
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from kd.config.secrets import SECRET, redacted
from kd.errors import MISTAKES, UserError, first_line
from kd.runs import wandb_agent
from kd.runs.identity import WandbMetadata, sizes_of, wandb_metadata
from kd.runs.run import Run
from kd.runs.seal import RESPONSES
from kd.system import files
from kd.system.console import console
from kd.system.files import read_metrics

ANSWER = "KD_WANDB"  # environment variable: online or offline, as W&B's server answered when it was asked
WAIT = 10  # seconds for W&B's server to answer
PERFORMANCE = "perf"  # metrics that depend on the clock


class MetricsFile(Logger):
    """One JSON object per line: `step` and what was measured after that many steps; nothing that depends on the clock.

    On resume, lines after the checkpoint's step are cut off, as those steps are run again; without a checkpoint all
    are, of a validation before the first step too.
    """

    def __init__(self, path: Path, step: int):
        super().__init__()
        self.path = Path(path)
        kept = [line for line in read_metrics(self.path) if line["step"] <= step] if step else []
        with files.atomic(self.path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self.file = open(self.path, "a")

    name = version = None

    def log_hyperparams(self, params, *args, **kwargs) -> None:
        """The config has a file of its own."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        try:
            self.file.write(json.dumps({"step": step, **metrics}) + "\n")
            self.file.flush()
        except OSError as error:
            raise files.disk_full(self.path) from error

    def save(self) -> None:
        os.fsync(self.file.fileno())

    def close(self, final: dict[str, float] | None) -> None:
        """The run ended: with its final metrics, or without."""
        try:
            self.save()
            self.file.close()
        except OSError:  # a full disk, which was said when it was met
            if final is not None:
                raise


def check(name: str) -> None:
    """Raise UserError for a logger whose library is missing, or does not take the settings of the environment."""
    with _explained(name):
        if name == "tensorboard":
            _need_tensorboard()
        elif name == "wandb":
            wandb_mode()


def views(make: Callable[..., list[Logger]], folder: Path, about: WandbMetadata) -> list[Logger]:
    """The loggers that a config asks for, started; raises UserError for whatever their library raises."""
    with _explained(getattr(make, "func", make).__name__):
        return make(folder=folder, about=about)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Raise UserError for whatever the library of a logger raises."""
    try:
        yield
    except MISTAKES:
        raise
    except Exception as error:
        why, hint = f"could not start: {_reason(error)}", "correct that, or type logger=none"
        raise UserError(option="logger", got=name, why=why, hint=hint) from error


def _reason(error: Exception) -> str:
    """What an error says in one line; of W&B's settings, which variables of the environment they come from."""
    errors = getattr(error, "errors", None)
    if type(error).__name__ != "ValidationError" or errors is None:  # of pydantic
        return f"{type(error).__name__}: {first_line(error)}"
    wrong = []
    for item in errors():
        option = f"WANDB_{'_'.join(map(str, item['loc'])).upper()}"
        wrong.append(f"{option}={os.environ.get(option, item['input'])}: {item['msg']}")
    return "; ".join(wrong)


def none(folder: Path, about: WandbMetadata) -> list[Logger]:
    """No view beside metrics.jsonl."""
    return []


def tensorboard(folder: Path, about: WandbMetadata) -> list[Logger]:
    """Event files in the run's folder."""
    _need_tensorboard()
    from lightning.pytorch.loggers import TensorBoardLogger

    class TensorBoardView(TensorBoardLogger):
        def close(self, final: dict[str, float] | None) -> None:
            self.log_hyperparams(about.config, {f"final/{k}": v for k, v in (final or {}).items()})
            super().finalize("success" if final else "failed")

    return [TensorBoardView(folder, name="", version="tensorboard")]


def _need_tensorboard() -> None:
    try:
        import tensorboard  # noqa: F401
    except ModuleNotFoundError as error:
        hint = "type pip install 'kd[tensorboard]'"
        raise UserError(option="logger", got="tensorboard", need="the package TensorBoard", hint=hint) from error


def wandb(folder: Path, about: WandbMetadata, project: str = "kd", entity: str | None = None) -> list[Logger]:
    """Weights & Biases; offline without a key or a network, so that nothing asks, blocks or stops the training.

    WANDB_MODE (online, offline, disabled) is obeyed. `wandb sync runs/*/wandb/offline-run-*` uploads later.
    """
    _, new = _id(folder, about)
    run = _begin(folder, about, project, entity)
    for axis in ("tokens", "flops"):
        run.define_metric(axis)
    for metrics in ("train/*", "val/*", f"{PERFORMANCE}/*"):
        run.define_metric(metrics, step_metric="tokens")
    view = WandbView(run, folder)
    for line in read_metrics(folder / "metrics.jsonl") if new else ():  # of before there was this W&B run
        step = line.pop("step")
        view.log_metrics(line, step)
    return [view]


def _begin(folder: Path, about: WandbMetadata, project: str, entity: str | None):
    """Begin the W&B run of a run, or go on with it."""
    return wandb_run(
        project=project, entity=entity, dir=str(folder), id=_id(folder, about)[0], name=about.name, group=about.group,
        job_type=about.job_type, tags=about.tags, config=about.config | {"settings": redacted(about.settings)},
        resume="allow",
    )  # fmt: skip


def join(run: Run, result: dict, group: str) -> bool:
    """Put the W&B run of a run that was made outside of any sweep into a group; whether it had one and was put there.

    Its summary is sent once more with that, and no step.
    """
    config, note = result["config"], run / "wandb-group"
    if config.get("logger") != "wandb" or config.get("sweep") or os.environ.get("WANDB_MODE") == "disabled":
        return False
    if run.copy("wandb-group").exists() or not run.copy("wandb-id").exists():
        return False
    of = wandb_metadata(run.name, config | {"sweep": group}, sizes_of(result), result.get("environment", {}).get("git"))
    view = WandbView(
        _begin(run.folder, of, config.get("logger.project", "kd"), config.get("logger.entity")), run.folder
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


def wandb_run(**what):
    """What wandb.init(**what) makes, and nothing that it should not hold; offline where it is not reachable."""
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
        except ValidationError:  # a mistyped variable, which offline is no cure for
            raise
        except Exception as error:  # whatever is wrong with the network or the account, the training is worth more
            if mode == "offline":
                raise
            warnings.warn(f"W&B is not reachable ({error}); this run is logged offline, to be sent with `wandb sync`.")
            _stay_offline()  # the failed try still holds the run's id
            return wandb.init(**what, mode="offline")


def wandb_mode() -> str:
    """Return what to begin W&B runs as: WANDB_MODE, else offline without a key or where the server does not answer.

    The server is asked once: the answer is kept in the environment, for the runs that a sweep starts too.
    """
    mode = os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")
    if mode != "online":
        return mode
    if ANSWER not in os.environ:
        os.environ[ANSWER] = "online"
        if why := silent_server():
            _stay_offline()
            says = f"W&B does not answer ({why}); runs are logged offline, to be sent with `wandb sync`."
            console.print(says, soft_wrap=True)
    return os.environ[ANSWER]


def _stay_offline() -> None:
    """Have W&B ask no server any more, in this process and those that it starts."""
    os.environ[ANSWER] = os.environ["WANDB_MODE"] = "offline"  # the second for what W&B sends of itself
    forget()


def silent_server() -> str | None:
    """Return why W&B's server is taken not to answer, None where it answers, whatever it says."""
    import requests
    import wandb

    known = wandb.setup(wandb.Settings(silent=True)).settings
    proxies = {kind: proxy for kind in ("http", "https") if (proxy := getattr(known, f"{kind}_proxy", None))}
    try:
        reply = requests.post(
            f"{known.base_url.rstrip('/')}/graphql", json={"query": "query Viewer { viewer { id } }"},
            timeout=WAIT, proxies=proxies or None,
        )  # fmt: skip
    except requests.exceptions.SSLError:
        return None  # W&B may know other certificates
    except (requests.exceptions.RequestException, OSError) as error:
        return f"{known.base_url}: {type(error).__name__}"
    return f"{known.base_url}: HTTP status {reply.status_code}" if reply.status_code >= 500 else None


def logged_in() -> bool:
    """Whether there is a key of W&B's, which may not be valid; asks nobody for it, and says nothing."""
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    return wandb.login(prompt=False, verify=False)


def forget() -> None:
    """End W&B's part of this process, whatever became of it."""
    import wandb

    try:
        wandb.teardown()
    except Exception as error:
        warnings.warn(f"W&B's process had died ({error}); what it had not sent or written yet is lost to W&B.")


def _id(folder: Path, about: WandbMetadata) -> tuple[str, bool]:
    """Of the W&B run, and whether it is new to this folder: the agent's, if one asks, else the one it had before.

    So the same run goes on after a kill, and one made anew is a new run.
    """
    path = folder / "wandb-id"
    kept = path.read_text() if path.exists() else None
    name = wandb_agent.asked() or kept or f"{about.id}-{secrets.token_hex(3)}"
    if name != kept:
        with files.atomic(path) as temporary:
            temporary.write_text(name)
    return name, name != kept


COLUMNS = ("row", "sample", "prompt", "reference", "teacher", "response", "teacher_rouge_l", "rouge_l", "ended")


class WandbView(Logger):
    """A W&B run as a Lightning logger. folder: of the run of kd, where what its student wrote is found."""

    name = version = None

    def __init__(self, run, folder: Path):
        super().__init__()
        self.run, self.folder = run, folder

    def log_hyperparams(self, params, *args, **kwargs) -> None:
        """W&B was given the config when the run began."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._try(lambda: self.run.log(metrics, step=step))

    def close(self, final: dict[str, float] | None, responses: bool = True) -> None:
        """Final metrics get names of their own, final/…: W&B's own summary does not say which step it is of."""
        if final:
            self.summarise({f"final/{k.removeprefix('val/')}": v for k, v in final.items()})
        if final and responses:
            self._try(self._samples)
        self._try(lambda: self.run.finish(exit_code=0 if final else 1))

    def summarise(self, values: dict[str, float]) -> None:
        """Add values to the summary of the run."""
        self._try(lambda: self.run.summary.update(values))

    def _samples(self) -> None:
        """A table of prompts with the reference, and what teacher and student wrote."""
        import wandb

        path = self.folder / RESPONSES
        if path.exists():
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
            names = [name for name in COLUMNS if name in rows[0]]
            self.run.log({"responses": wandb.Table(names, [[row[name] for name in names] for row in rows])})

    def _try(self, send: Callable[[], object]) -> None:
        """W&B may lose its process or its disk; the training goes on without it, and says so once."""
        if self.run is not None:
            try:
                send()
            except Exception as error:
                warnings.warn(f"W&B stopped ({error}); metrics.jsonl goes on.")
                self.run = None
