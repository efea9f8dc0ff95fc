"""Folder of a run: its lock, its state, its result, and the exported student."""

from __future__ import annotations

import shlex
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock

from kd import former_names
from kd.config.schema import ExperimentConfig
from kd.config.secrets import redacted
from kd.errors import UserError
from kd.runs.claim import CLAIM, Claim
from kd.runs.outcome import Outcome, RunState, classify
from kd.runs.seal import EXACCERR, RESPONSES, SEALED, STUDENTS, digest_of_result, digests, is_sealed, is_whole
from kd.system import files, remote, retries
from kd.system.console import console
from kd.system.files import read_json
from kd.system.lease import lease
from kd.system.processes import is_alive, is_same_process, peak_memory, process_info
from kd.system.remote_checkpoints import RemoteCheckpoints
from kd.system.retries import Unreachable


class Run:
    """Folder of one run.

    config.json  resolved settings    metrics.jsonl  metrics per step    checkpoints/  to resume from
    result.json  written when the run is done, with digests of the other files and of itself
    student/  the trained model    students/  those of all validations, with trainer.keep=all
    log.txt  console output, if a sweep started the run
    responses.jsonl, exaccerr.json  responses to the validation prompts, see kd/evaluation/responses.py
    performance.jsonl  speed and memory    state.json  state: running and where, or how it ended

    For a root under a URL this is the folder on this machine; the files under the URL are what counts.
    """

    def __init__(self, root: str | Path, name: str):
        self.name = name
        self.root = str(root) if remote.is_url(root) else str(Path(root).absolute())
        self.folder = remote.local_root(root) / name
        self.remote = remote.Remote(f"{root}/{name}", self.folder) if remote.is_url(root) else None
        self.claim = Claim(self.folder, self.remote)
        self.begun = time.monotonic()

    def __truediv__(self, name: str | Path) -> Path:
        return self.folder / name

    @property
    def location(self) -> str:
        """URL or folder of the run."""
        return self.remote.url if self.remote else str(self.folder)

    def copy(self, name: str) -> Path:
        """Return a file of the run, on this machine; it may not exist."""
        if self.remote:
            self.remote.get(name)
        return self / name

    def result(self, wait: float | None = None) -> dict | None:
        """Return the result; None if the run is not done.

        A result of an older version has today's names of settings and metrics.
        Raises UserError if the file has changed since it was written. wait: seconds for a URL that is away, see
        kd/system/retries.py.
        """
        try:
            recorded = self.remote.read_cached("result.json", wait) if self.remote else read_json(self / "result.json")
        except remote.Damaged:
            recorded = {"digest": None}
        if recorded is not None and not is_whole(recorded):
            why = "is damaged: its content is not what was written"
            raise UserError(option=f"{self.location}/result.json", why=why, **self._made_anew())
        return None if recorded is None else former_names.current_result(recorded)

    def is_done(self) -> bool:
        """Return True if there is a result, damaged or not."""
        try:
            return self.result() is not None
        except Unreachable:
            raise
        except UserError:
            return True

    def forget(self) -> None:
        """Read result and state from the URL at the next look, not from a cache of some seconds."""
        if self.remote:
            self.remote.forget()

    def discard(self) -> None:
        """Remove all files of the run, the result first. The caller has to hold the lock."""
        if self.remote:
            self.remote.remove("result.json")
            self.remote.remove(*{name.partition("/")[0] for name in self.remote.names()} - {"lease.json", CLAIM})
            self.remote.forget()
        (self / "result.json").unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if path.name not in (".lock", CLAIM):
                files.remove(path)

    @contextmanager
    def lock(self, wait: bool) -> Iterator[None]:
        """Hold the lock of the folder, so that only one process works in it.

        A second process waits if `wait` is true. Else it gets a UserError that names the first.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self / ".lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            owner = read_json(self / "state.json") or {}
            used = (
                f"is being used by another process ({owner.get('pid', 'unknown')} on "
                f"{owner.get('host', 'this machine')}, since {owner.get('since', 'now')})"
            )
            if not wait:
                hint = "wait for that process to end: the same command then shows the run's result"
                raise UserError(option=self.folder, why=used, hint=hint) from None
            console.print(f"{self.folder} {used}; waiting for it.", soft_wrap=True)
            lock.acquire()
        try:
            with self._beyond_this_machine(wait):
                yield
        finally:
            lock.release()

    @contextmanager
    def _beyond_this_machine(self, wait: bool) -> Iterator[None]:
        """Hold the lease of a run under a URL; after the work, copy the changed files to the URL."""
        if not self.remote:
            yield
            return
        with lease(self.remote, process_info(), is_alive, wait):
            self.remote.forget()
            began = time.time()
            try:
                yield
            finally:
                others = [p for p in self.folder.iterdir() if p.name not in ("checkpoints", "student", "result.json")]
                self.remote.put_best_effort(*(p.name for p in others if p.is_dir() or p.stat().st_mtime >= began))

    def start(self, config: ExperimentConfig) -> None:
        """Prepare for work: write the resolved config, and reset the state of an earlier try.

        Half-written files of killed processes are removed. A checkpoint that is further at the URL is copied here. With
        force=true a run that is done is removed first.
        """
        if config.force and self.is_done():
            self.discard()
        for folder in (self.folder, self / "checkpoints", self / STUDENTS):
            files.clear(folder)
        if self.remote:
            self._pull(self.remote)
        files.write_json(self / "config.json", redacted(config.to_dict()))
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        files.write_json(self / "state.json", {"state": RunState.RUNNING, **process_info(), "since": since})
        if self.remote:
            self.remote.put("config.json", "state.json")
        self.begun = time.monotonic()

    def _pull(self, source: remote.Remote) -> None:
        """Copy from the URL the files that the work continues from, if they are further there than here."""
        from kd.system.checkpoint_files import latest_step

        RemoteCheckpoints(source).pull(latest_step(self / "checkpoints"))
        if not (self / "wandb-id").exists():
            source.get("wandb-id")

    def end(self, outcome: Outcome) -> Path:
        """Write the outcome of a process's work on the run, with wall time and peak memory; return the file."""
        if outcome.state != RunState.DONE and (self / "result.json").exists():
            return self / "state.json"  # the run was done before the error
        report = {"seconds": round(time.monotonic() - self.begun, 2), **process_info(), **outcome.to_json()}
        report.setdefault("peak_memory", peak_memory())
        report = {name: value for name, value in report.items() if value is not None}
        files.write_json(self / "state.json", report)
        if self.remote:
            self.remote.put_best_effort("state.json", "log.txt")
        return self / "state.json"

    @contextmanager
    def records_failure(self) -> Iterator[None]:
        """Record an error that ends this process's work in the block, unless an end is recorded already."""
        try:
            yield
        except BaseException as error:
            if not self.ended_here():
                self.end(classify(error))
            raise

    def ended_here(self) -> bool:
        """Return True if this process wrote how its work ended.

        Reads no URL, since the URL may be the cause of the end.
        """
        try:
            last = read_json(self / "state.json") or {}
        except UserError:
            return False
        return last.get("state") != RunState.RUNNING and last.get("pid") == process_info()["pid"]

    def state(self, wait: float | None = None) -> dict:
        """Return the content of state.json, or what is known without it: {"state": a RunState, "reason": …, …}."""
        return self.result_and_state(wait)[1]

    def result_and_state(self, wait: float | None = None) -> tuple[dict | None, dict]:
        """Return result() and state(), which agree: the state is done exactly if there is a result."""
        if (result := self.result(wait)) is not None:
            return result, _done(result)
        state = self._recorded_state(wait)
        if state["state"] != RunState.DONE:
            return None, state
        self.forget()
        if (result := self.result(wait)) is not None:  # written after the first look
            return result, _done(result)
        return None, {"state": RunState.NOT_BEGUN, "reason": "its result.json is gone; the same command makes it anew"}

    def _recorded_state(self, wait: float | None) -> dict:
        """Return the state of a run without a result."""
        try:
            state = read_json(self / "state.json")
        except UserError as error:
            reason = f"{error.option} {error.why}; the same command begins the run anew"
            return {"state": RunState.NOT_BEGUN, "reason": reason}
        if self.remote and not (state and state["state"] == RunState.RUNNING and is_alive(state)):
            remote_state = self.remote.read_cached("state.json", wait)
            state = state if state and remote_state and is_same_process(state, remote_state) else remote_state or state
        if state is None:
            return {"state": RunState.NOT_BEGUN, "reason": ""}
        if state["state"] == RunState.RUNNING and not is_alive(state):
            gone = f"its process {state['pid']} is gone; the same command goes on with it"
            return state | {"state": RunState.STALE, "reason": gone}
        return {"reason": "", **state}

    def weights(self) -> dict[str, str]:
        """Return the digests of the trained model's weight files, by name."""
        return {p.name: files.digest(p) for p in sorted((self / "student").glob("*.safetensors"))}

    def check(self, result: dict, *names: str) -> None:
        """Raise UserError if files or folders have changed since the run ended.

        Without names, all of SEALED are checked. A run from before there were seals has digests of its weights only.
        """
        names, sealed = names or SEALED, is_sealed(result)
        expected = result["files"] if sealed else {f"student/{k}": v for k, v in result.get("weights", {}).items()}
        expected = {name: digest for name, digest in expected.items() if name.partition("/")[0] in names}
        actual = digests(self.folder, names)
        if self.remote and not expected.items() <= actual.items():
            for name in expected if sealed else self.remote.names("student"):
                self.remote.get(name)
            actual = digests(self.folder, names)
        if not sealed:
            actual = {name: digest for name, digest in actual.items() if name in expected}
        for name, digest in expected.items():
            if actual.get(name) != digest:
                first, _, inner = name.partition("/")
                state = "not what was written" if name in actual else "gone"
                why = f"is damaged: {inner or first} is {state}"
                raise UserError(option=f"{self.location}/{first}", why=why, **self._made_anew())
        if strange := sorted(actual.keys() - expected.keys()):
            raise UserError(
                option=f"{self.location}/{strange[0]}",
                why="was not written by the run, and could change what is loaded from its folder",
                hint="move this file to another folder",
            )

    def removal_command(self, name: str = "") -> str:
        """Return the command that removes the run, or a folder in it, so that it is made again."""
        if not self.remote:
            return shlex.join(["rm", "-r", str(self / name)])
        # There is no rm for every protocol.
        program = f"from kd.system.remote import Remote; Remote({self.remote.url!r}, None).remove({name!r})"
        return f"{shlex.join(['python', '-c', program])}\n  {shlex.join(['rm', '-rf', str(self / name)])}"

    def _made_anew(self) -> dict:
        """Return the fields of an error that advise how to make the run again."""
        hint = "to make the run anew, remove the run and type the same command again"
        return {"hint": hint, "commands": [self.removal_command()]}

    def finish(self, result: dict) -> dict:
        """Write the sealed result, which makes the run done, and remove the checkpoints that are no longer needed.

        Returns the result. Under a URL the run is done when all files are there; raises UserError if that fails.
        """
        if (self / "metrics.jsonl").exists():  # the others were synced when they were written
            files.sync(self / "metrics.jsonl")
        result = result | {"weights": self.weights(), "files": digests(self.folder, SEALED)}
        result["digest"] = digest_of_result(result)
        if self.remote:
            try:
                self.remote.put("config.json", "metrics.jsonl", "student", RESPONSES, EXACCERR)
                self.remote.write("result.json", result)
            except Unreachable as error:
                raise UserError(
                    option=error.option,
                    why=f"{error.why}. The student is in {self.folder}, and the run is done when it is copied too",
                    hint="type the same command again, on this machine, when the URL answers",
                ) from None
        files.write_json(self / "result.json", result)
        self.clean_up()
        return result

    def clean_up_if_done(self) -> None:
        """Finish the clean-up of a completed run that was killed before it could do so."""
        try:
            state = (read_json(self / "state.json") or {}).get("state")
        except UserError:
            state = None
        if not self.remote and (state != RunState.DONE or (self / "checkpoints").exists()):
            # A read-only root cannot be cleaned up.
            with suppress(filelock.Timeout, OSError), filelock.FileLock(self / ".lock", timeout=0):
                self.clean_up()

    def clean_up(self) -> None:
        self.end(Outcome(RunState.DONE, exit_code=0))
        shutil.rmtree(self / "checkpoints", ignore_errors=True)
        if self.remote:
            try:
                self.remote.remove("checkpoints", wait=retries.SOON)
            except UserError as error:
                warnings.warn(f"{error} The run is done; its checkpoints there are of no use any more.")


def _done(result: dict) -> dict:
    """Return the state of a run with this result."""
    return {
        "state": RunState.DONE,
        "reason": "",
        **{k: v for k, v in result.items() if k in ("seconds", "peak_memory")},
    }


def check_student(name: str | None) -> None:
    """Raise UserError if a folder is the student of a finished run, and has changed since that run ended."""
    folder = Path(name or "").resolve()  # also of a link to it
    if folder.name == "student" and folder.is_dir():
        run = Run(folder.parent.parent, folder.parent.name)
        if (result := run.result()) is not None:
            run.check(result, "student")
