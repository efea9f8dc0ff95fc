"""Processes: which of them are alive."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from kd.system.processes import is_alive, process_info


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
def test_a_process_that_has_ended_is_not_alive_before_its_parent_asks_about_it():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    description = process_info() | {"pid": process.pid}
    assert is_alive(description)
    process.kill()
    deadline = time.monotonic() + 60
    while is_alive(description) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(description)
    process.communicate()
    assert not is_alive(description)
