"""hydra/launcher=ray: runs of a sweep as tasks of Ray."""

from __future__ import annotations

import os
import socket

from kd.config.schema import ExperimentConfig
from kd.errors import UserError
from kd.launch.cluster import ClusterLauncher, ClusterPool, RemoteJob, needs
from kd.launch.job import Job
from kd.launch.pool import Pool
from kd.runs.outcome import GOES_ON, Outcome, RunState
from kd.system.console import console
from kd.system.signals import requests


class Ray(ClusterLauncher):
    """Launcher with a task of Ray per run. Dead nodes and workers cost no run: Ray continues it on another."""

    def __init__(self, address: str | None, num_cpus: float, num_gpus: float):
        super().__init__(locals())

    def check_place(self, config: ExperimentConfig) -> None:
        if config.trainer.nodes > 1:
            why, hint = "a task of Ray is on one machine", "type hydra/launcher=submitit_slurm"
            raise UserError(option="trainer.nodes", got=config.trainer.nodes, why=why, hint=hint)

    def pool(self, name: str, jobs: list[Job]) -> Pool:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        ray = needs("ray", "ray", "ray")
        self.check()
        address = self.parameters["address"]
        if not ray.is_initialized():
            self._connect(ray, address)
        requests.watch()  # Ray has taken the signals
        each = {"CPU": self.parameters["num_cpus"], "GPU": self.parameters["num_gpus"]}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(all(node.get(kind, 0) >= amount for kind, amount in each.items()) for node in nodes):
            requested = ", ".join(f"{amount:g} {kind}" for kind, amount in each.items() if amount)
            available = "; ".join(", ".join(f"{node.get(kind, 0):g} {kind}" for kind in each) for node in nodes)
            why = f"no node has what a run needs, {requested}: there is {available}"
            if address is None:
                hint = "type hydra.launcher.num_cpus=, or num_gpus="
                raise UserError(option="hydra/launcher", got="ray", why=why, hint=hint)
            console.print(f"{why.capitalize()}. The runs wait for a node that has it.", soft_wrap=True)
        return RayPool(self.program, jobs, self.at_once([job.gpus for job in jobs]), ray, each)

    def _connect(self, ray, address: str | None) -> None:
        started = {"include_dashboard": False, "object_store_memory": 10**8} if address is None else {}
        try:
            if address and ":" in address:  # Ray itself would try for minutes
                host, _, port = address.rpartition(":")
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **started)
            # What a raylet says of workers that died goes to the driver nevertheless, and Ray has no option for it.
            ray._private.worker._worker_logs_enabled = False
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                option="hydra.launcher.address",
                got=address,
                why=f"no Ray cluster answers there ({error})",
                hint="type HOST:PORT as ray start --head printed it, auto on a machine of the cluster, or leave the "
                "address out to start a cluster here",
            ) from None


class RayPool(ClusterPool):
    """Pool of Ray tasks, at most at_once at a time."""

    def __init__(self, program: str, jobs: list[Job], at_once: float, ray, each: dict[str, float]):
        super().__init__(program, jobs, at_once)
        self.ray = ray
        # Without limit what nodes and workers do to it; what the run does to itself never is an exception.
        options = {"num_cpus": each["CPU"], "num_gpus": each["GPU"], "max_retries": -1}
        self.perform = ray.remote(**options)(perform)

    def start(self) -> None:
        while self.waiting and len(self.running) < self.at_once:
            job = self._next(self.waiting[:])
            if job is None:
                break
            task = self.submit(job)
            self.submitted(job).number = self.perform.remote(task)
            self.submitted(job).waits = "Ray has no room for it yet"

    def over(self) -> list[Job]:
        for job in self.running:
            submitted = self.submitted(job)
            if submitted.why or not self.ray.wait([submitted.number], timeout=0)[0]:
                continue
            try:
                self.ray.get(submitted.number)
                state = RunState.PREEMPTED if self.stop_signals else RunState.FAILED
                submitted.why = Outcome(state, "it ended without a word")
            except self.ray.exceptions.TaskCancelledError:
                submitted.why = Outcome(RunState.PREEMPTED, f"asked to end; {GOES_ON}")
            except self.ray.exceptions.RayError as error:
                last = str(error).strip().splitlines()[-1]
                submitted.why = Outcome(RunState.FAILED, f"Ray says {type(error).__name__}: {last}")
        return super().over()

    def stop(self, jobs: list[Job], at_once: bool) -> None:
        for job in jobs:
            self.ray.cancel(self.submitted(job).number)  # the second one is passed on there too, and kills the run


def perform(task: RemoteJob) -> None:
    """Do a task on a node; Ray calls this."""
    task()
