"""Commands of Python without seconds of imports: each is forked from a process that has done them, the zygote.

To a test, `Forked` is the Popen that a cold start would give: a child of the process of the test, in its process group,
with the command in /proc/PID/cmdline, the same code path from the first line of the program on, the same signals, exit
codes and output. Commands of Python that a sweep starts are forked as well, from a process beside it.

Three things are not the same. The forked processes share the seed of hash(), and a sitecustomize.py of PYTHONPATH is
run after the imports; so at least one test of exact resume, and one of a sweep, starts cold. And libraries have read
the environment, so a command with another environment starts cold.
"""

import atexit
import fcntl
import gc
import importlib
import importlib.util
import inspect
import json
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy

from kd.system.forking import exit_after, fork_children, request_child, show_words

ROOT = Path(__file__).parent.parent
ROOM = " " * 8192  # an argument of the zygote, for the command lines of what is forked from it
# Environment variables that nothing reads while it is loaded; train.py sets OMP_WAIT_POLICY as the zygote does.
READ_LATE = {"KD_CACHE", "KD_PARENT", "OMP_WAIT_POLICY", "PYTHONPATH"}


class Server:
    """A process to fork commands from, as the process sees it that starts them."""

    def __init__(self, channel: socket.socket, environment: dict[str, str]):
        self.owner, self.channel, self.environment = os.getpid(), channel, dict(environment)

    def does(self, words: list[str], environment: dict[str, str]) -> bool:
        """Return whether a command can be forked here: of this Python, with the server's environment as it is read."""
        ours = words[0] == sys.executable and (words[1] == "-m" or words[1].endswith(".py"))
        other = {name for name, _ in environment.items() ^ self.environment.items()}
        return ours and os.getpid() == self.owner and other <= READ_LATE


def start_zygote(environment: dict[str, str]) -> Server | None:
    """Start the process that has done all imports; None, with a warning, where it cannot be forked."""
    channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "tests.zygote", str(theirs.fileno()), ROOM]
    process = subprocess.Popen(
        command, env=environment, cwd=ROOT, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    theirs.close()
    threads = channel.recv(32)
    if not threads:
        raise RuntimeError(f"The zygote ended with {process.wait()}; its stderr says why.")
    if int(threads) > 1:
        warnings.warn(f"Commands start cold: libraries have started {int(threads) - 1} threads, which no fork has.")
        channel.close()
        process.wait()
        return None
    server = Server(channel, environment)

    def end() -> None:
        if os.getpid() == server.owner:
            channel.close()
            process.wait()

    atexit.register(end)
    return server


class Forked(subprocess.Popen):
    """A command that is forked from `server` where that can be, and starts cold elsewhere."""

    server: Server

    def _execute_child(self, *arguments):
        given = inspect.signature(super()._execute_child).bind(*arguments).arguments
        environment = os.environ if given["env"] is None else given["env"]
        if not isinstance(given["args"], list) or not self.server.does(given["args"], environment):
            return super()._execute_child(*arguments)
        streams = [given["p2cread"], given["c2pwrite"], given["errwrite"]]
        files = [number if stream < 0 else stream for number, stream in enumerate(streams)] + [*given["pass_fds"]]
        command = {
            "words": list(map(str, given["args"][1:])), "folder": str(given["cwd"] or os.getcwd()),
            "environment": dict(environment), "numbers": [0, 1, 2, *given["pass_fds"]],
            "session": given["start_new_session"],
        }  # fmt: skip
        self.pid = request_child(self.server.channel, json.dumps(command).encode(), files)
        self._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(given[end] for end in ends))


def preload() -> int:
    """Import what train.py imports, short of train.py, and fill caches of libraries; return the number of threads."""
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import kd
    from kd.config import compose
    from kd.launch import command_line

    for module in pkgutil.walk_packages(kd.__path__, "kd."):
        if not module.name.endswith("__main__") and not module.name.startswith("kd.bench"):
            importlib.import_module(module.name)
    command_line.register()
    compose.composed("loss=fkl", "trainer.steps=1")  # the parsers of Hydra
    get_checkpoint_conversion_mapping("llama")  # hundreds of regular expressions
    return len(os.listdir("/proc/self/task"))


def serve(channel: socket.socket, environment: dict[str, str]) -> list[str]:
    """Fork at each request; return in the forked process alone, with the words of its command."""
    request, files = fork_children(channel)
    command = json.loads(request)
    if is_sweep(command["words"]):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork() == 0:  # a server for what the sweep starts, which ends with it
            for end in (ours.detach(), *files):
                os.close(end)
            return serve(theirs, environment)
        theirs.close()
        Forked.server = Server(ours, environment)
        subprocess.Popen = Forked
    become(command, files)
    path = command["environment"].get("PYTHONPATH")
    if path and path != environment.get("PYTHONPATH"):
        customise(path)
    return command["words"]


def is_sweep(words: list[str]) -> bool:
    """Return whether a command is train.py for many runs."""
    return words[0].endswith("train.py") and any(word == "-m" or word.startswith("sweeps=") for word in words)


def become(command: dict, files: list[int]) -> None:
    """Take over what a process is given when it starts."""
    if command["session"]:
        os.setsid()
    spare = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 1 + max(command["numbers"])) for file in files]
    for file in files:
        os.close(file)
    for number, file in zip(command["numbers"], spare, strict=True):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(command["environment"])
    os.chdir(command["folder"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    numpy.random.seed()
    sys.orig_argv = sys.orig_argv[:1] + command["words"]
    show_words(sys.orig_argv)


def customise(path: str) -> None:
    """Run the sitecustomize.py of the first folder of PYTHONPATH, if it has one."""
    file = Path(path.split(os.pathsep)[0], "sitecustomize.py")
    if file.exists():
        spec = importlib.util.spec_from_file_location("sitecustomize", file)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def execute(words: list[str]) -> None:
    if words[0] == "-m":
        sys.path[0] = os.getcwd()
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(words[0]).parent)
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal, which the tests' process answers
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as train.py, before torch is loaded
    tests = socket.socket(fileno=int(sys.argv[1]))
    environment = dict(os.environ)
    threads = preload()
    gc.collect()
    gc.freeze()
    tests.send(str(threads).encode())
    exit_after(partial(execute, serve(tests, environment)))
