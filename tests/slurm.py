"""A SLURM of one machine, for tests: the commands that kd and submitit type, as `python slurm.py COMMAND …`.

As slurmstepd does, it signals every process of a job's step, in whatever session, and not the batch script.

Jobs and their states are in a file of a folder, $SLURM_FAKE; sbatch leaves a process behind that starts them, as many
of an array at once as it says. What a test wants to go wrong it does to that file and to the processes.
"""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

HERE = Path(os.environ.get("SLURM_FAKE", "."))


@contextmanager
def jobs():
    """All jobs by their ids, to read and to change."""
    with open(HERE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = HERE / "jobs.json"
        by_name = json.loads(path.read_text()) if path.exists() else {}
        yield by_name
        whole = path.with_suffix(".new")  # a test may read it at any time
        whole.write_text(json.dumps(by_name, indent=1))
        whole.replace(path)


def sbatch(words: list[str]) -> None:
    script = Path(words[-1]).read_text()
    flags = dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", script, re.M))
    if flags.get("partition") == "nowhere":
        sys.exit("sbatch: error: invalid partition specified: nowhere")
    with jobs() as by_name:
        number = str(len({name.partition("_")[0] for name in by_name}) + 1)
        last, _, limit = flags.get("array", "").removeprefix("0-").partition("%")
        names = [f"{number}_{n}" for n in range(int(last) + 1)] if last else [number]
        for name in names:
            by_name[name] = {"state": "PENDING", "reason": "Resources", "tries": 0}
        (HERE / f"{number}.sh").write_text(script)
    words = [sys.executable, __file__, "daemon", str(limit or 1), *names]
    subprocess.Popen(words, start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                     stderr=subprocess.DEVNULL)  # fmt: skip
    print(f"Submitted batch job {number}")


def daemon(words: list[str]) -> None:
    """Start the jobs that are pending, and see how they end, until all have."""
    limit, names, running = int(words[0]), words[1:], {}
    while True:
        with jobs() as by_name:
            for name, process in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    job = by_name[name]
                    if job.pop("requeue", False):
                        job.update(state="PENDING", reason="BeginTime")
                    elif job["state"] == "RUNNING":
                        job["state"] = "COMPLETED" if process.returncode == 0 else "FAILED"
            for name in names:
                if by_name[name]["state"] == "PENDING" and len(running) < limit and not (HERE / "hold").exists():
                    by_name[name].update(state="RUNNING", reason="None", tries=by_name[name]["tries"] + 1)
                    running[name] = start(name)
            if not running and all(by_name[name]["state"] not in ("PENDING", "RUNNING") for name in names):
                return
        time.sleep(0.1)


def start(name: str) -> subprocess.Popen:
    number, _, index = name.partition("_")
    flags = dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", (HERE / f"{number}.sh").read_text(), re.M))
    nodes, each = flags.get("nodes", "1"), flags.get("ntasks-per-node", "1")
    variables = {"SLURM_JOB_ID": number, "SLURM_NTASKS": str(int(nodes) * int(each)), "SLURM_NTASKS_PER_NODE": each,
                 "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_NUM_NODES": nodes,
                 "SLURM_NNODES": nodes, "SLURM_JOB_NAME": "kd", "SLURM_JOB_NODELIST": "one",
                 "SLURM_STEP_ID": "0", "SLURM_TASK": name}  # fmt: skip
    # Job ids are small here, and there may be several such SLURMs on this machine.
    variables["MASTER_PORT"] = str(20000 + (os.getpid() + int(index or 0)) % 10000)
    if index:
        variables |= {"SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": index}
    return subprocess.Popen(["bash", str(HERE / f"{number}.sh")], env=os.environ | variables, start_new_session=True)


def srun(words: list[str]) -> None:
    """Become the command, with its output where it is to be; of several tasks, start them and wait for all."""
    name, outputs = os.environ["SLURM_TASK"], {}
    count, each = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_NTASKS_PER_NODE"])
    os.environ.update(SLURM_STEP_NUM_TASKS=str(count), SLURM_STEP_NODELIST="127.0.0.1")
    task = next((rank for rank in range(count) if count > 1 and os.fork() == 0), None if count > 1 else 0)
    if task is None:
        sys.exit(any([os.wait()[1] for _ in range(count)]))
    os.environ.update(SLURM_PROCID=str(task), SLURM_LOCALID=str(task % each), SLURM_NODEID=str(task // each))
    while words[0].startswith("--"):
        flag = words.pop(0)
        if flag in ("--output", "--error"):
            outputs[flag] = words.pop(0)
    number, _, index = name.partition("_")
    for flag, descriptor in (("--output", 1), ("--error", 2)):
        path = outputs[flag].replace("%A", number).replace("%a", index).replace("%j", number).replace("%t", str(task))
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    if task == 0:
        with jobs() as by_name:
            by_name[name]["pid"] = os.getpid()
    os.execvpe(words[0], words, os.environ | {"SLURM_STEP": name})


def step(name: str) -> list[int]:
    """All processes of a job's step."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"SLURM_STEP={name}".encode() in path.read_bytes().split(b"\0"):
                pids.append(int(path.parent.name))
    return sorted(pids)


def scancel(words: list[str]) -> None:
    flags = dict(word.removeprefix("--").split("=") for word in words if "=" in word)
    with jobs() as by_name:
        for name in (word for word in words if not word.startswith("--")):
            job = by_name[name]
            if job["state"] == "PENDING" and "signal" not in flags:
                job["state"] = "CANCELLED"
            elif job["state"] == "RUNNING" and "state" not in flags and "pid" in job:
                for pid in step(name):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.Signals[f"SIG{flags.get('signal', 'TERM')}"])
                if "signal" not in flags:
                    job["state"] = "CANCELLED"


def squeue(words: list[str]) -> None:
    with jobs() as by_name:
        for name, job in by_name.items():
            if "forgotten" not in job:
                print(f"{name}|{job['state']}|{job['reason']}")


def sacct(words: list[str]) -> None:
    (name,) = (word.partition("=")[2] for word in words if word.startswith("--jobs="))
    with jobs() as by_name:
        print(by_name[name]["state"])


def scontrol(words: list[str]) -> None:
    assert words[0] == "requeue"
    with jobs() as by_name:
        by_name[words[1]]["requeue"] = True


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2:])
