"""hydra/launcher=submitit_slurm and ray: the same runs as on one machine, whatever becomes of jobs and nodes.

submitit is real and SLURM is not (tests/slurm.py); Ray is real, with several nodes on this machine.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.plugins.environments import SLURMEnvironment
from omegaconf import OmegaConf

import train as product
from kd.launch import cluster
from kd.launch.cluster import NodePool, RemoteJob
from kd.launch.devices import gpus, max_parallel_runs, tasks
from kd.launch.job import Job
from kd.launch.local import LocalLauncher, LocalPool
from kd.launch.ray_launcher import Ray
from kd.launch.run_launcher import RunLauncher
from kd.launch.slurm import HERE, SlurmPool
from kd.parallel import collectives, ddp
from kd.runs.run import Run
from kd.system import launchers
from kd.system.checkpoint_files import newest
from tests.faults.injection import STEP, Fault, ended, processes, runs, state, states, table, until
from tests.refusals import refused
from tests.small import ENVIRONMENT, outcome, shared, small_config, start, train

SLURM = ("-m", "hydra/launcher=submitit_slurm")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A root with data, a teacher, and two runs of this machine."""
    return shared(tmp_path_factory, "two-runs", lambda root: train(root, "-m", "n_jobs=2", "seed=0,1"))


@pytest.fixture
def root(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "root", ignore=shutil.ignore_patterns("fkl*", "sweeps")))


class Slurm:
    """Commands of a SLURM that is made up, and its jobs."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        program = Path(__file__).parent.parent / "slurm.py"
        for name in ("sbatch", "srun", "scancel", "squeue", "sacct", "scontrol"):
            path = folder / "bin" / name
            path.write_text(f'#!/bin/sh\nexec {sys.executable} {program} {name} "$@"\n')
            path.chmod(0o755)
        self.environment = {"SLURM_FAKE": str(folder), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}

    def signal(self, name: str, job: str) -> None:
        """Signal a job's step, as SLURM does before it ends a job."""
        words = [self.folder / "bin" / "scancel", f"--signal={name}", job]
        subprocess.run(words, env=os.environ | self.environment, check=True)

    def jobs(self) -> dict[str, dict]:
        return json.loads((self.folder / "jobs.json").read_text())

    def change(self, name: str, **values) -> None:
        jobs = self.jobs()
        jobs[name].update(values)
        (self.folder / "jobs.json").write_text(json.dumps(jobs))


@pytest.fixture
def slurm(tmp_path) -> Slurm:
    pytest.importorskip("submitit")
    return Slurm(tmp_path / "slurm")


@pytest.fixture
def held(tmp_path) -> Fault:
    """A run that is in its step 7, and stays there."""
    return Fault(tmp_path / "held", "kd.training.module", STEP, only="seed=0", AT=7, ACT="hold()")


def same(root: Path, finished: Path) -> None:
    assert states(root) == {"seed=0": "done", "seed=1": "done"}
    for seed, path in runs(root).items():
        assert outcome(path) == outcome(runs(finished)[seed])


def is_requested(root: Path) -> bool:
    """Return True if the held run has received the signal to end."""
    return "the last whole step is saved" in (runs(root)["seed=0"] / "log.txt").read_text()


@pytest.mark.slow
def test_preempted_job_is_requeued_and_ends_bit_for_bit(finished, root, slurm, held):
    process = start(root, *SLURM, "n_jobs=2", "seed=0,1", **held.environment, **slurm.environment)
    held.wait(process)
    slurm.signal("USR2", "1_0")
    until(lambda: is_requested(root))
    held.go()
    output = ended(process, 0)
    assert [slurm.jobs()[name]["tries"] for name in ("1_0", "1_1")] == [2, 1]
    assert len(held.fired()) == 2  # the first try left its step 7 unfinished, so the second begins with it
    assert "run 1 of 2  seed=0  is queued as job 1_0" in output
    same(root, finished)
    script = (slurm.folder / "1.sh").read_text()
    assert "--array=0-1%2" in script and "--signal=USR2@120" in script and "gpu" not in script
    until(lambda: not processes(root))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_run_of_two_machines_is_preempted_and_ends_bit_for_bit(root, slurm, tmp_path):
    """Four tasks of SLURM, of which the first records and requeues, equal four processes that kd starts."""
    words = ("-m", "seed=0", "logits=none", "teacher=none", "trainer.micro_batch=1")
    alone = Path(shutil.copytree(root, tmp_path / "alone"))
    train(alone, *words, "trainer.devices=4")
    held = Fault(tmp_path / "held", "kd.training.module", STEP, AT=7, ACT="hold()")
    words = (*words, "hydra/launcher=submitit_slurm", "trainer.nodes=2", "trainer.devices=2")
    process = start(root, *words, **held.environment, **slurm.environment)
    until(lambda: len(held.fired()) >= 4, 900)
    slurm.signal("USR2", "1")
    until(lambda: is_requested(root), 900)
    held.go()
    output = ended(process, 0, 1800)
    assert slurm.jobs()["1"]["tries"] == 2 and "Traceback" not in output
    script = (slurm.folder / "1.sh").read_text()
    assert "#SBATCH --nodes=2" in script and "#SBATCH --ntasks-per-node=2" in script
    (run,), (other,) = runs(root).values(), runs(alone).values()
    assert outcome(run) == outcome(other) and state(run)["state"] == "done"
    assert (run / "log.txt").read_text().count("step 12/12") == 1
    until(lambda: not processes(root), 900)


def test_runs_of_several_machines_go_to_arrays_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr("kd.launch.slurm.ask", lambda words: subprocess.CompletedProcess([], 0, "", ""))
    jobs = [Job(Run(tmp_path, f"run{n}"), [], "run", tasks=(n % 2 + 1, 4 * (n % 2) or 1)) for n in range(4)]
    arrays = []

    class Executor:
        def update_parameters(self, **parameters) -> None:
            self.parameters = parameters

        def submit_array(self, tasks) -> list:
            arrays.append((self.parameters, [task.run for task in tasks]))
            return [SimpleNamespace(job_id=f"{len(arrays)}_{n}") for n in range(len(tasks))]

    pool = SlurmPool("", jobs, math.inf, Executor(), tmp_path / "jobs.json")
    pool.start()
    pool.start()
    assert not pool.waiting
    assert arrays == [
        ({"nodes": 1, "ntasks_per_node": 1}, ["run0", "run2"]), ({"nodes": 2, "ntasks_per_node": 4}, ["run1", "run3"])
    ]  # fmt: skip
    assert pool.submitted(jobs[3]).number == "2_1"


def test_only_the_first_task_of_slurm_records_and_requeues(tmp_path, monkeypatch):
    task = partial(RemoteJob, "train.py", ".", str(tmp_path), "run", [], "run", 0)
    for rank, first in (("0", True), ("3", False)):
        monkeypatch.setenv("SLURM_PROCID", rank)
        assert task(tasks=(2, 2)).is_first() == first
        assert task().is_first()  # a task of Ray, whose nodes srun may have started
    pool = NodePool("", [], 1, [])
    assert "SLURM_PROCID" not in pool._environment([])
    pool.is_rank, pool.records = True, False
    assert pool._environment([])["SLURM_PROCID"] == "3"
    assert pool.record(Job(Run(tmp_path, "run"), [], "run")).keys() == {"seconds"}
    assert not list(tmp_path.rglob("state.json"))


def test_several_machines_are_refused_where_they_cannot_be(tmp_path, monkeypatch):
    several = small_config(tmp_path, "trainer.nodes=2", "trainer.micro_batch=1")
    assert (tasks(several.trainer), tasks(small_config(tmp_path, "trainer.devices=2").trainer)) == ((2, 1), (1, 1))
    for launcher in (LocalLauncher(), Ray(None, 1, 4)):
        with refused(option="trainer.nodes", got=2, hint="submitit_slurm"):
            launcher.check_place(several)
    RunLauncher.check_place(object(), several)  # nothing is known of other machines
    monkeypatch.setattr(launchers, "by_torchrun", lambda: True)
    launcher = LocalLauncher()
    launcher.config = SimpleNamespace(sweep="s")
    with refused(option="torchrun", hint="python train.py"):
        launcher._launch([[]], False, [""], None, [""])


@pytest.mark.slow
def test_job_that_vanishes_is_recorded_with_what_slurm_says_and_made_again(finished, root, slurm, held):
    process = start(root, *SLURM, "seed=0,1", **held.environment, **slurm.environment)
    (pid,) = held.wait(process)
    slurm.change("1_0", state="NODE_FAIL", forgotten=True)
    for number in (slurm.jobs()["1_0"]["pid"], pid):
        os.kill(number, signal.SIGKILL)
    output = ended(process, 1)
    assert states(root) == {"seed=0": "preempted", "seed=1": "done"}
    record = state(runs(root)["seed=0"])
    assert "SLURM says NODE_FAIL of its job 1_0" in record["reason"] and "peak_memory" not in record
    assert "NODE_FAIL" in table(output)["seed=0"]
    held.go()
    output = train(root, *SLURM, "seed=0,1", **slurm.environment)
    assert output.count("done before") == 1 and "is queued as job 2" in output
    same(root, finished)


@pytest.mark.slow
def test_signals_to_a_sweep_reach_its_jobs(root, slurm, held):
    process = start(root, *SLURM, "n_jobs=1", "seed=0,1", **held.environment, **slurm.environment)
    held.wait(process)
    process.terminate()
    until(lambda: is_requested(root))
    assert slurm.jobs()["1_1"]["state"] == "CANCELLED"
    held.go()
    output = ended(process, 143)
    assert states(root) == {"seed=0": "preempted", "seed=1": "not begun"} and not processes(root)
    assert newest(runs(root)["seed=0"] / "checkpoints").stem == "step-00000007"
    assert table(output)["seed=1"].startswith("not begun") and "The same command goes on" in output


@pytest.mark.slow
def test_second_signal_kills_and_a_killed_sweep_is_taken_up_again(finished, root, slurm, held):
    words = (*SLURM, "n_jobs=1", "seed=0,1")
    process = start(root, *words, **held.environment, **slurm.environment)
    held.wait(process)
    process.kill()
    process.communicate()
    process = start(root, *words, **held.environment, **slurm.environment)
    list(iter(lambda: "since before" in process.stdout.readline(), True))
    time.sleep(1)
    process.terminate()
    until(lambda: is_requested(root))
    process.terminate()
    output = process.stdout.read()
    assert process.wait() == 143 and "is queued" not in output and len(slurm.jobs()) == 2
    assert states(root) == {"seed=0": "preempted", "seed=1": "not begun"} and not processes(root)
    assert "asked to end at once" in state(runs(root)["seed=0"])["reason"]
    held.go()
    train(root, *words, **slurm.environment)
    same(root, finished)


def test_nothing_is_queued_twice_while_slurm_does_not_answer(tmp_path, monkeypatch):
    silent = subprocess.CompletedProcess([], 1, "", "Unable to contact slurm controller")
    monkeypatch.setattr("kd.launch.slurm.ask", lambda words: silent)
    record, jobs = tmp_path / "jobs.json", [Job(Run(tmp_path, "run"), [], "run")]
    assert SlurmPool("", jobs, 1, None, record).waiting == jobs  # of a new sweep none can be queued
    record.write_text('{"run": "7_0"}')
    with refused(option="squeue", hint="when squeue answers"):
        SlurmPool("", jobs, 1, None, record)


@pytest.mark.slow
def test_failure_stops_what_is_queued(root, slurm, tmp_path):
    fault = Fault(
        tmp_path / "fault", "kd.training.module", STEP, only="seed=0", AT=7, ACT='fired(); raise RuntimeError("no")'
    )
    words = (*SLURM, "n_jobs=1", "seed=0,1,2", "on_failure=stop")
    output = train(root, *words, code=1, **fault.environment, **slurm.environment)
    assert states(root)["seed=0"] == "failed" and states(root)["seed=2"] == "not begun"
    assert slurm.jobs()["1_0"]["state"] == "FAILED" and slurm.jobs()["1_2"]["state"] == "CANCELLED"
    assert "RuntimeError: no" in table(output)["seed=0"]


@pytest.mark.slow
def test_what_slurm_refuses_is_said(root, slurm, tmp_path):
    (tmp_path / "empty").mkdir()
    output = train(root, *SLURM, "seed=0", code=2, PATH=str(tmp_path / "empty"))
    assert "there is no sbatch nor srun nor squeue nor scancel on this machine" in output and "Traceback" not in output
    words = (*SLURM, "seed=0", "hydra.launcher.partition=nowhere", "hydra.launcher.gpus_per_node=2")
    output = train(root, *words, code=2, **slurm.environment)
    assert "invalid partition specified: nowhere" in output and "Traceback" not in output
    (script,) = (root / "sweeps").glob("multirun-*.slurm/.submission_file_*")
    assert "#SBATCH --gpus-per-node=2" in script.read_text()
    output = train(root, *SLURM, "seed=0", "hydra.launcher.timeout_min=long", code=2, **slurm.environment)
    assert "hydra.launcher.timeout_min=long: got a text; need a whole number" in output


def test_devices_are_counted_where_a_run_is_done(tmp_path, monkeypatch):
    """Not on the login node that a sweep is started on."""
    monkeypatch.setattr(collectives, "cpu_group", lambda accelerator: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = small_config(tmp_path, "trainer.devices=4", "teacher.steps=1")
    monkeypatch.setattr(RunLauncher, "_run_config", lambda self, words: config)
    monkeypatch.setattr(RunLauncher, "config", SimpleNamespace(force=False), raising=False)
    ray, local = Ray(None, 1, 4), LocalLauncher()
    ray.config = local.config = SimpleNamespace(force=False)
    assert ray._run([], set())[1] == 4
    for work in (lambda words: local._run(words, set()), lambda words: product.train(config)):
        with refused(option="trainer.devices", got=4, why="this machine has 1", hint="trainer.devices=1"):
            work([])


@pytest.mark.parametrize("package, extra", [("submitit", "slurm"), ("ray", "ray")])
def test_what_to_type_without_a_package(package, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with refused(option="hydra/launcher", need=package, hint=f"pip install 'kd[{extra}]'"):
        cluster.needs(package, extra, "x")


def test_lightning_does_not_take_a_job_of_slurm_for_its_own(monkeypatch):
    for name, value in {"NTASKS": "2", "JOB_NAME": "kd", "JOB_ID": "7", "PROCID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert SLURMEnvironment.detect()
    trainer = lightning.Trainer(accelerator="cpu", logger=False, **ddp.lightning_arguments(1, False))
    assert type(trainer._accelerator_connector.cluster_environment) is LightningEnvironment


NODE = """
import os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace

from kd.launch.slurm import SlurmTask

folder = Path(sys.argv[1])
signal.signal(signal.SIGUSR2, lambda *_: (folder / "requeued").touch() or sys.exit(1))  # submitit's
SlurmTask(str(folder / "program.py"), str(folder), str(folder), "run", [], "run", 1)()
"""
SAVES = """
import signal, sys, time
from pathlib import Path
from types import SimpleNamespace

signal.signal(signal.SIGTERM, lambda *_: time.sleep(1) or Path("saved").touch() or sys.exit(143))
Path("begun").touch()
time.sleep(60)
"""


@pytest.mark.parametrize(
    "signals, saved, requeued",
    [("USR2", 1, 1), ("TERM USR2", 1, 1), ("USR2 TERM", 1, 1), ("TERM TERM", 0, 0), ("USR2 TERM TERM", 0, 1)],
)
def test_signals_on_the_node(signals, saved, requeued, tmp_path):
    (tmp_path / "program.py").write_text(SAVES)
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    process = subprocess.Popen([sys.executable, "-c", NODE, str(tmp_path)], env=environment)
    until(lambda: (tmp_path / "begun").exists())
    for name in signals.split():
        process.send_signal(signal.Signals[f"SIG{name}"])
        time.sleep(0.3)
    assert process.wait(30) == (1 if requeued else 143)
    assert ((tmp_path / "saved").exists(), (tmp_path / "requeued").exists()) == (saved, requeued)


STEPS = """
import sys, time
from pathlib import Path
from types import SimpleNamespace

from kd.system.signals import requests

requests.watch()
with requests.in_steps():
    Path(sys.argv[1], "begun").touch()
    for _ in range(300):
        time.sleep(0.01)
        if Path(sys.argv[1], "go").exists():
            Path(sys.argv[1], "saved" if requests.pending else "done").touch()
            break
"""


@pytest.mark.parametrize(
    "in_sweep, signals, saved",
    [
        (True, "USR2 TERM", True),  # of SLURM, and what its sweep passes on
        (True, "TERM pause TERM", True),
        (True, "INT pause USR2 pause TERM", True),
        (False, "TERM TERM", True),  # of `timeout`, and of SLURM to a command of several processes
        (False, "USR2 TERM", True),
        (False, "TERM pause TERM", False),  # of a person
        (False, "INT pause INT", False),
    ],
)
def test_one_request_that_comes_by_several_ways_is_one(in_sweep, signals, saved, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(HERE)} | ({"KD_PARENT": str(os.getpid())} if in_sweep else {})
    log = open(tmp_path / "log", "w+")
    process = subprocess.Popen([sys.executable, "-c", STEPS, str(tmp_path)], env=environment, stderr=log)
    until(lambda: (tmp_path / "begun").exists())
    for name in signals.split():
        if name == "pause":  # from when the signal before is answered: two that wait are one to the kernel
            until(lambda: "whole step is saved" in (tmp_path / "log").read_text())
            time.sleep(0.3)
        else:
            process.send_signal(signal.Signals[f"SIG{name}"])
    time.sleep(0.05)
    (tmp_path / "go").touch()
    assert process.wait(30) == (0 if saved else 143)
    assert (tmp_path / "saved").exists() == saved


def test_a_sweep_takes_signals_at_one_moment_for_one_request():
    pool = LocalPool("", [], 1, [])
    for name in ("SIGTERM", "SIGTERM", "SIGUSR2"):
        pool._ask(name)
    assert len(pool.stop_signals) == 1
    time.sleep(0.15)
    pool._ask("SIGTERM")
    assert len(pool.stop_signals) == 2


# Ray


@pytest.fixture
def nodes(held, monkeypatch):
    """A Ray cluster of four nodes with room for one run each, and the head with room for none."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    for name, value in {**ENVIRONMENT, **held.environment, "RAY_USAGE_STATS_ENABLED": "0"}.items():
        monkeypatch.setenv(name, value)
    small = {"object_store_memory": 10**8, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    for _ in range(4):
        nodes.add_node(num_cpus=1, wait=False, **small)
    nodes.wait_for_nodes()
    yield nodes
    nodes.shutdown()


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.slow
def test_node_of_ray_that_dies_costs_a_sweep_no_run(finished, root, nodes, held):
    """The judge's case: eight runs, and a node killed in the middle of one."""
    words = ("-m", "hydra/launcher=ray", f"hydra.launcher.address={nodes.address}", "seed=0,1,2,3,4,5,6,7")
    process = start(root, *words, **held.environment)
    (pid,) = held.wait(process)
    worker = parent(pid)
    raylet = parent(worker)
    assert b"raylet" in Path(f"/proc/{raylet}/cmdline").read_bytes()
    for number in (raylet, worker):
        os.kill(number, signal.SIGKILL)
    held.go()
    output = ended(process, 0, seconds=250)
    assert states(root) == {f"seed={n}": "done" for n in range(8)} and not processes(root)
    assert "raylet" not in output
    assert all(row.startswith("done") for row in table(output).values())
    assert (runs(root)["seed=0"] / "log.txt").read_text().count("on ") >= 2  # on one node, and then on another
    for seed in ("seed=0", "seed=1"):
        assert outcome(runs(root)[seed]) == outcome(runs(finished)[seed])


# GPUs of one machine

PROGRAM = """
import os, sys, time
print("gets", os.environ["CUDA_VISIBLE_DEVICES"], time.time(), flush=True)
time.sleep(0.3)
print("ends", "", time.time())
"""


@pytest.mark.parametrize(
    "asks, n_jobs, devices, most",
    [
        ([1, 1, 1, 1], None, "0123", 4),  # as many as fit
        ([2, 2, 2, 2], None, "0123", 2),
        ([3, 3], None, "0123", 1),
        ([2, 2, 2], 4, "0123", 2),  # no more than fit, unless there are to be more runs than GPUs
        ([2, 1, 1], None, "01", 2),
        ([1, 1, 1, 1], 4, "01", 4),
        ([8], None, "01", 1),  # what there is
        ([0, 0], 2, "01", 2),
    ],
)
def test_every_run_has_the_gpus_it_asks_for(asks, n_jobs, devices, most, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    jobs = [Job(Run(tmp_path, f"run{n}"), [], str(n), count) for n, count in enumerate(asks)]
    at_once = n_jobs or max_parallel_runs(list(devices), min(asks))
    LocalPool(str(tmp_path / "program.py"), jobs, at_once, list(devices)).work()
    spans = []
    for job, count in zip(jobs, asks):
        gets, ends = (line.split(" ") for line in job.log.read_text().splitlines()[:2])
        got = [x for x in gets[1].split(",") if x]
        assert len(got) == len(set(got)) == min(count, len(devices)) and set(got) <= set(devices)
        spans.append((float(gets[2]), float(ends[2]), got))
    at = [[s for s in spans if s[0] <= begun < s[1]] for begun, _, _ in spans]
    assert max(map(len, at)) <= most and (most == 1 or max(map(len, at)) > 1)
    if at_once <= len(devices):
        used = [[device for span in together for device in span[2]] for together in at]
        assert all(len(devices) == len(set(devices)) for devices in used)


def test_as_many_runs_as_fit_by_what_they_ask_for(monkeypatch):
    """Not by what stands in the config that their words change."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    here, elsewhere = LocalLauncher(), Ray(None, 1, 0)
    here.config = elsewhere.config = OmegaConf.create(
        {"n_jobs": None, "trainer": {"accelerator": "auto", "devices": 1}}
    )
    assert [here.at_once(counts) for counts in ([1, 1], [2, 2], [4, 2], [])] == [4, 2, 2, 4]
    assert elsewhere.at_once([1]) == math.inf
    here.config.n_jobs = 3
    assert here.at_once([2]) == 3


def test_runs_on_a_processor_ask_for_no_gpu():
    assert gpus(SimpleNamespace(accelerator="auto", devices=4)) == 4
    assert gpus(SimpleNamespace(accelerator="cpu", devices=4)) == 0
