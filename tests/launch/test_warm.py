"""Runs that are forked from a server: each is a process as any other, with an end, a log and figures of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kd.launch.job import Job
from kd.launch.local import LocalPool
from kd.launch.warm import Warm
from kd.runs.run import Run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a process is given to another parent on Linux alone")

# A run here is the Python that it is given, which begins as train.py does.
PROGRAM = """
import os, sys
from kd.launch import warm
from kd.system.signals import end_with_parent

warm.MODULES = ("json",)
if sys.argv[1:2] == [warm.WORD]:
    sys.argv[1:] = warm.serve(sys.argv[2])
end_with_parent()
exec(sys.argv[1])
"""
MEMORY = "import json; from kd.system.processes import peak_memory; print(json.dumps(peak_memory()))"


@pytest.fixture
def program(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


@pytest.fixture
def warm(program):
    pool = Warm(str(program))
    yield pool
    pool.close()


def done(folder: Path, warm: Warm | None, *codes: str, at_once: int = 1, devices: tuple[str, ...] = ()) -> list[Job]:
    """Jobs of these programs, done one after another."""
    jobs = [Job(Run(folder / "runs", f"run{n}"), [code], str(n)) for n, code in enumerate(codes)]
    LocalPool(str(folder / "program.py"), jobs, at_once, list(devices), warm).work()
    return jobs


def wait(true, seconds: float = 60) -> None:
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds
        time.sleep(0.01)


ENDS = [
    ("sys.exit(3)", 3, "exit code 3"),
    ("os._exit(7)", 7, "exit code 7"),
    ("os.kill(os.getpid(), 9)", -9, "killed by SIGKILL"),
    ("os.abort()", -6, "killed by SIGABRT"),
    ("raise ValueError('of its own')", 1, "ValueError: of its own"),
    ("os.kill(os.getpid(), 15)", -15, "asked to end before its first step; the same command starts it"),
]


def test_each_end_is_told_as_that_of_a_process_and_harms_no_other(tmp_path, program, warm):
    codes = [code for code, _, _ in ENDS]
    forked, alone = done(tmp_path / "a", warm, *codes, at_once=2), done(tmp_path / "b", None, *codes, at_once=2)
    assert warm.server.poll() is None and not warm.failed
    for one, other, (_, code, reason) in zip(forked, alone, ENDS, strict=True):
        ends = [(job.state["state"], job.state["reason"], job.state["exit_code"]) for job in (one, other)]
        assert ends[0] == ends[1] and ends[0][1:] == (reason, code)
        assert one.state["log"] == str(one.log) and one.state["peak_memory"] > 1e6


@pytest.fixture(autouse=True)
def folders(tmp_path, program):
    """Put the program where done() finds it, for tests with two sets of runs."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "program.py").symlink_to(program)


def test_a_run_is_a_session_of_its_own_and_a_child_of_the_sweep_with_its_words(tmp_path, warm):
    code = "print(os.getppid(), os.getsid(0) == os.getpid(), open('/proc/self/cmdline').read().split(chr(0))[1:3])"
    (job,) = done(tmp_path, warm, code)
    assert job.log.read_text() == f"{os.getpid()} True {[str(tmp_path / 'program.py'), code]}\n"


def test_each_run_has_a_log_and_no_input(tmp_path, warm):
    jobs = done(tmp_path, warm, *(f"print({n}, repr(sys.stdin.read())); os.system('echo {n} >&2')" for n in range(3)))
    assert [sorted(job.log.read_text().split()) for job in jobs] == [sorted([str(n), "''", str(n)]) for n in range(3)]


def test_a_run_leaves_nothing_for_the_next(tmp_path, warm):
    first = "import json, signal; os.environ['LEFT'] = '1'; json.left = 1; os.chdir('/'); os.nice(1); sys.exit(1)"
    second = "import json; print(os.environ.get('LEFT'), hasattr(json, 'left'), os.getcwd(), os.nice(0))"
    (_, job) = done(tmp_path, warm, first, second)
    assert job.log.read_text().split() == ["None", "False", os.getcwd(), str(os.nice(0))]


def test_peak_memory_is_of_the_run_alone(tmp_path, warm):
    large = f"kept = bytearray(400_000_000); {MEMORY}"
    before, inside, after = done(tmp_path, warm, MEMORY, large, MEMORY)
    (alone,) = done(tmp_path / "a", None, MEMORY)
    measured = [json.loads(job.log.read_text()) for job in (before, inside, after, alone)]
    for first, between, last, cold in (measured, [job.state["peak_memory"] for job in (before, inside, after, alone)]):
        assert between > first + 3e8 and abs(last - first) < 2e7 and last < 1.1 * cold


def test_a_changed_environment_reaches_the_next_run(tmp_path, warm, monkeypatch):
    code = "print(os.environ.get('WANDB_MODE'), os.environ.get('CUDA_VISIBLE_DEVICES'), 'KD_PARENT' in os.environ)"
    (one,) = done(tmp_path / "a", warm, code)
    monkeypatch.setenv("WANDB_MODE", "offline")
    (two,) = done(tmp_path / "b", warm, code, devices=("0", "1"))  # a run that asks for a GPU is not forked
    assert one.log.read_text().split() == ["None", str(os.environ.get("CUDA_VISIBLE_DEVICES")), "False"]
    assert two.log.read_text().split() == ["offline", "0", "False"]
    (three,) = done(tmp_path, warm, code)
    assert three.log.read_text().split() == ["offline", str(os.environ.get("CUDA_VISIBLE_DEVICES")), "False"]


def test_changed_code_is_what_the_next_run_runs(tmp_path, program, warm):
    (one,) = done(tmp_path, warm, "print(sys.modules['__main__'].__dict__.get('EDITED'))")
    server = warm.server.pid
    program.write_text(PROGRAM.replace("import os, sys", "import os, sys\nEDITED = 1"))
    (two,) = done(tmp_path / "a", warm, "print(sys.modules['__main__'].__dict__.get('EDITED'))")
    assert (one.log.read_text(), two.log.read_text()) == ("None\n", "1\n") and warm.server.pid != server


def test_without_the_server_runs_go_on_and_start_by_themselves(tmp_path, warm, capsys):
    kill = f"import time; os.kill({os.getpid()}, 0); time.sleep(0.5); print('done')"
    jobs = [Job(Run(tmp_path / "runs", f"run{n}"), [kill], str(n)) for n in range(2)]
    pool = LocalPool(str(tmp_path / "program.py"), jobs, 1, [], warm)
    real = pool.over

    def over():
        if warm.is_ready:
            warm.server.kill()
            warm.server.wait()
        return real()

    pool.over = over
    pool.work()
    assert [(job.log.read_text(), job.state["exit_code"]) for job in jobs] == [("done\n", 0)] * 2
    assert warm.failed and "start by themselves" in capsys.readouterr().err


def test_a_server_that_cannot_begin_says_why_in_the_log_and_the_run_starts_by_itself(tmp_path, program, warm):
    program.write_text(PROGRAM.replace('("json",)', '("no_such_module",)'))
    (job,) = done(tmp_path, warm, "print('done')")
    assert "No module named 'no_such_module'" in job.log.read_text() and job.log.read_text().endswith("done\n")


SWEEP = """
import sys
from pathlib import Path
from kd.launch.job import Job
from kd.launch.local import LocalPool
from kd.launch.warm import Warm
from kd.runs.run import Run

folder = Path(sys.argv[1])
code = "print(os.getpid(), flush=True); import time; time.sleep(600)"
jobs = [Job(Run(folder / "runs", "run"), [code], "")]
LocalPool(str(folder / "program.py"), jobs, 1, [], Warm(str(folder / "program.py"))).work()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_sweep_that_ends_leaves_neither_runs_nor_server(tmp_path, program, number):
    sweep = subprocess.Popen([sys.executable, "-c", SWEEP, str(tmp_path)], stdout=subprocess.DEVNULL)
    log = tmp_path / "runs" / "run" / "log.txt"
    wait(lambda: log.exists() and log.read_text().strip())

    def processes() -> list[str]:
        pids = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if str(program).encode() in path.read_bytes().split(b"\0"):
                    pids.append(path.parent.name)
            except (FileNotFoundError, ProcessLookupError):
                pass
        return pids

    assert log.read_text().strip() in processes() and len(processes()) == 2
    sweep.send_signal(number)
    sweep.wait()
    wait(lambda: not processes())
