"""Commands of Python without seconds of imports: each is forked from a process that has done them.

To a test, `Forked` is the Popen that a cold start would give: a child of the process of the test, in its process group,
with the command in /proc/PID/cmdline, the same code path from the first line of the program on, the same signals, exit
codes and output. Two things are not the same. The forked processes share the seed of hash(), so at least one test of
exact resume starts cold. And libraries have read the environment, so a command with another environment starts cold.
"""

import atexit
import ctypes
import gc
import importlib
import inspect
import json
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy

ROOT = Path(__file__).parent.parent
SIZE = 1 << 17  # bytes, of a request
ROOM = " " * 8192  # an argument of the zygote, for the command lines of what is forked from it
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER
READ_LATE = {"KD_CACHE"}  # environment variables that nothing reads while it is loaded


class Zygote:
    """Process to fork from, as seen from the tests."""

    def __init__(self, environment: dict[str, str]):
        self.owner, self.environment = os.getpid(), dict(environment)
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, __file__, str(theirs.fileno()), ROOM]
        self.process = subprocess.Popen(
            command, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        theirs.close()
        atexit.register(self.end)

    def does(self, environment: dict[str, str]) -> bool:
        """Return whether a process that is forked here can have this environment: all but what is read late is its."""
        other = {name for name, _ in environment.items() ^ self.environment.items()}
        return os.getpid() == self.owner and other <= READ_LATE

    def fork(self, words: list[str], folder: str, environment: dict[str, str], streams: list[int]) -> int:
        """Start `python WORDS` in a folder, with these files as stdin, stdout and stderr; return its process id."""
        adopt(True)
        try:
            command = {"words": words, "folder": folder, "environment": environment, "parent": self.owner}
            socket.send_fds(self.channel, [json.dumps(command).encode()], streams)
            answer = self.channel.recv(SIZE)
        finally:
            adopt(False)
        if not answer:
            raise RuntimeError(f"The zygote ended with {self.process.wait()}; its stderr says why.")
        return int(answer)

    def end(self) -> None:
        if os.getpid() == self.owner:
            self.channel.close()
            self.process.wait()


class Forked(subprocess.Popen):
    """A command of this Python, forked from the zygote."""

    def __init__(self, command: list[str], zygote: Zygote, **options):
        self.zygote = zygote
        super().__init__(command, **options)

    def _execute_child(self, *arguments):
        given = inspect.signature(subprocess.Popen._execute_child).bind(self, *arguments).arguments
        streams = [given["p2cread"], given["c2pwrite"], given["errwrite"]]
        streams = [number if stream < 0 else stream for number, stream in enumerate(streams)]
        words, folder = list(map(str, given["args"][1:])), str(given["cwd"] or os.getcwd())
        self.pid = self.zygote.fork(words, folder, dict(given["env"]), streams)
        self._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(given[end] for end in ends))


def adopt(on: bool) -> None:
    """Become the parent of what a process below this one leaves behind, or no longer."""
    ctypes.CDLL(None).prctl(SUBREAPER, int(on), 0, 0, 0)


def preload() -> None:
    """Import what train.py imports, short of train.py."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    import kd

    for module in pkgutil.walk_packages(kd.__path__, "kd."):
        if not module.name.endswith("__main__") and not module.name.startswith("kd.bench"):
            importlib.import_module(module.name)
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, "a library has started threads, which a fork would not have"


def serve(channel: socket.socket) -> list[str]:
    """Fork at each request; return in the forked process alone, with the words of its command."""
    while True:
        request, streams, _, _ = socket.recv_fds(channel, SIZE, 3)
        if not request:
            os._exit(0)
        reading, writing = os.pipe()
        between = os.fork()  # its child goes to the tests' process when it ends
        if not between:
            if child := os.fork():
                os.write(writing, str(child).encode())
                os._exit(0)
            for descriptor in (reading, writing, channel.detach()):
                os.close(descriptor)
            return become(json.loads(request), streams)
        os.waitpid(between, 0)
        channel.send(os.read(reading, SIZE))
        for descriptor in (reading, writing, *streams):
            os.close(descriptor)


def become(command: dict, streams: list[int]) -> list[str]:
    """Take over what a process is given when it starts."""
    while os.getppid() != command["parent"]:
        time.sleep(0.001)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(command["environment"])
    os.chdir(command["folder"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    numpy.random.seed()
    words = sys.orig_argv[:1] + command["words"]
    sys.orig_argv = words
    # What /proc/PID/cmdline reads: the memory where the system put the words of the zygote.
    start, end = map(int, Path("/proc/self/stat").read_text().rpartition(")")[2].split()[45:47])
    line = b"\0".join(map(os.fsencode, words))
    assert len(line) < end - start
    ctypes.memmove(start, line.ljust(end - start, b"\0"), end - start)
    return words[1:]


def run(words: list[str]) -> None:
    """Do what `python WORDS` does."""
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
    sys.path[0] = str(ROOT)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as train.py, before torch is loaded
    preload()
    gc.collect()
    gc.freeze()
    run(serve(socket.socket(fileno=int(sys.argv[1]))))
