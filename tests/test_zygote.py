"""A forked command is to its test what one is that starts cold."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small import popen, python


@pytest.fixture(autouse=True, scope="module")
def warm():
    if popen() is subprocess.Popen:
        pytest.skip("commands start cold")


REPORT = """
import json, os, signal, sys, threading

print(json.dumps({
    "name": __name__, "file": __file__, "argv": sys.argv, "path": sys.path, "orig_argv": sys.orig_argv,
    "folder": os.getcwd(), "parent": os.getppid(), "group": os.getpgrp(), "session": os.getsid(0),
    "environment": dict(os.environ), "threads": len(os.listdir("/proc/self/task")),
    "files": sorted(os.listdir("/proc/self/fd")),
    "signals": {str(n): str(signal.getsignal(n)) for n in signal.valid_signals() - {9, 19}},
    "command": [w for w in open("/proc/self/cmdline").read().split(chr(0)) if w],
    "thread": threading.current_thread().name, "tty": sys.stdout.isatty(), "encoding": sys.stdout.encoding,
}))
"""
ENDS = {
    "done": ("", 0),
    "exit": ("import sys; sys.exit(3)", 3),
    "message": ("raise SystemExit('no')", 1),
    "error": ("raise ValueError('wrong')", 1),
    "os-exit": ("import os; os._exit(143)", 143),
    "killed": ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL),
    "interrupted": ("import os; os.kill(os.getpid(), 2)", -signal.SIGINT),
    "at-exit": ("import atexit; atexit.register(print, 'last words')", 0),
}


def started(folder: Path, source: str, *words: str, cold: bool = False):
    (folder / "program.py").write_text(source)
    return python([sys.executable, str(folder / "program.py"), *words], folder, cold)


def test_it_starts_as_a_cold_one(tmp_path):
    warm, cold = (json.loads(started(tmp_path, REPORT, "a b", "-m", cold=c).communicate()[0]) for c in (False, True))
    assert warm["parent"] == cold["parent"] == os.getpid() and warm["threads"] == 1
    assert warm["argv"][1:] == ["a b", "-m"]
    # A cold start does not have what torch and others put into the environment, which a run has soon after.
    more = {name for name in warm["environment"] if name not in cold["environment"]}
    assert {k: v for k, v in warm.pop("environment").items() if k not in more} == cold.pop("environment")
    assert warm == cold


@pytest.mark.parametrize("cold", [False, True], ids=["forked", "cold"])
@pytest.mark.parametrize("name", ENDS)
def test_it_ends_as_a_cold_one(name, cold, tmp_path):
    source, code = ENDS[name]
    process = started(tmp_path, source, cold=cold)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == code
    assert {"message": "no\n", "at-exit": "last words\n", "done": ""}.get(name, output) == output
    assert ("Traceback" in output) == (name in ("error", "interrupted"))


def test_a_module_is_a_program(tmp_path):
    (tmp_path / "program.py").write_text("import sys\nprint(__name__, sys.argv[1:])\n")
    process = python([sys.executable, "-m", "program", "word"], tmp_path)
    assert process.communicate()[0] == "__main__ ['word']\n" and process.returncode == 0


SIGNALLED = """
import signal, sys, time

def end(*_):
    print("asked")
    sys.exit(5)

signal.signal(signal.SIGTERM, end)
print("here", flush=True)
while True:
    time.sleep(0.01)
"""


def test_a_signal_reaches_the_command_itself(tmp_path):
    process = started(tmp_path, SIGNALLED)
    assert process.stdout.readline() == "here\n" and process.poll() is None
    process.terminate()
    assert process.communicate(timeout=60)[0] == "asked\n" and process.returncode == 5


def test_another_environment_starts_cold(tmp_path):
    source = "import os, sys\nprint('torch' in sys.modules, os.environ.get('MINE'))"
    (tmp_path / "program.py").write_text(source)
    command = [sys.executable, str(tmp_path / "program.py")]
    assert python(command, tmp_path).communicate()[0] == "True None\n"
    assert python(command, tmp_path, MINE="x").communicate()[0] == "False x\n"
