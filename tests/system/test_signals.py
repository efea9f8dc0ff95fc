"""Requests to end: signals of one moment are one request, and a later one is a second."""

import signal
import subprocess
import sys
import time

# It prints nothing between two requests, since printing makes Python handle signals that it had left.
PROGRAM = """
import signal
import time
from kd.system.signals import Preempted, requests

count = 0
signal.signal(signal.SIGUSR1, lambda *_: None)
requests.watch()
print("ready", flush=True)
end = time.monotonic() + 3
while time.monotonic() < end:
    try:
        time.sleep(0.05)
    except Preempted:
        count += 1
print(count)
"""


def requests_of(*groups: tuple[signal.Signals, ...]) -> int:
    """Return how many requests to end a process counts that gets groups of signals, 0.5 s from each other."""
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    for group in groups:
        time.sleep(0.5)
        process.send_signal(signal.SIGSTOP)  # so that those of a group come at one moment
        for number in (*group, signal.SIGCONT):
            process.send_signal(number)
    return int(process.communicate(timeout=30)[0])


def test_signals_of_one_moment_are_one_request():
    assert requests_of((signal.SIGUSR2, signal.SIGTERM), (signal.SIGUSR1,)) == 1


def test_later_signal_is_a_second_request():
    assert requests_of((signal.SIGUSR2,), (signal.SIGTERM,)) == 2
