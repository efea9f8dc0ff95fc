"""Two agents of torchrun on this machine, as on two machines: one run, with exact resume and one error for all."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.injection import ended, until
from tests.small import SMALL, TRAIN, folder, outcome, python, result

pytestmark = pytest.mark.slow

SECONDS = 900  # for what takes half a minute on a machine that does nothing else
NODES = ("trainer.nodes=2", "trainer.devices=2", "trainer.micro_batch=1")


class Agents:
    """Agents of torchrun, each with two ranks, that find each other on this machine."""

    def __init__(self, root: Path, *words: str, restarts: int = 0, second: tuple[str, ...] = ()):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.root, self.restarts, self.words = root, restarts, [words, (*words, *second)]
        self.processes = [self.start(node) for node in range(2)]

    def __enter__(self) -> "Agents":
        return self

    def __exit__(self, *error) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def start(self, node: int) -> subprocess.Popen:
        """Start the agent of a node. That of node 0 has the store of all, since it has the smaller process id."""
        flags = [
            "--nnodes=2",
            "--nproc-per-node=2",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint=127.0.0.1:{self.port}",
            f"--max-restarts={self.restarts}",
            "--local-addr=127.0.0.1",
            f"--rdzv-conf=is_host={1 - node}",
        ]
        command = [sys.executable, "-m", "torch.distributed.run", *flags, str(TRAIN), *SMALL, f"root={self.root}"]
        # Agents that share their store do not start again on it: github.com/pytorch/pytorch/issues/135712
        alone = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if self.restarts else {}
        return python([*command, *NODES, *self.words[node]], self.root, **alone)

    def wait_for(self, lines: int) -> None:
        """Wait until the run has measured something so many times."""
        count = lambda: sum(p.read_bytes().count(b"\n") for p in self.root.glob("fkl*/metrics.jsonl"))  # noqa: E731
        until(lambda: count() >= lines or self.processes[0].poll() is not None, SECONDS)
        assert count() >= lines, self.processes[0].communicate()[0]

    def end(self, *codes: int) -> str:
        """Wait for both, and return what they printed. codes: their exit codes."""
        return "".join(ended(process, code, SECONDS) for process, code in zip(self.processes, codes, strict=True))


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("strategy, restarts", [("ddp", 1), ("fsdp", 0)])
def test_killed_agent_is_started_again_and_the_run_ends_bit_for_bit(root, strategy, restarts):
    """The other agent waits for it, or is started again too."""
    words = (f"trainer.strategy={strategy}",)
    whole = Path(shutil.copytree(root, root.parent / "whole"))
    with Agents(whole, *words) as agents:
        output = agents.end(0, 0)
    assert output.count("step 12/12") == output.count("All of it:") == 1  # of rank 0 alone
    with Agents(root, *words, restarts=restarts) as agents:
        agents.wait_for(9)
        agents.processes[1].kill()
        agents.processes[1].communicate()
        if restarts:
            agents.processes[1] = agents.start(1)
            agents.end(0, 0)
        else:
            assert "by peer" in ended(agents.processes[0], 1, SECONDS)  # closed or reset
    if not restarts:
        assert json.loads((folder(root, "fkl") / "state.json").read_text())["state"] == "failed"
        with Agents(root, *words) as agents:
            agents.end(0, 0)
    assert outcome(folder(root, "fkl")) == outcome(folder(whole, "fkl"))
    config = result(folder(root, "fkl"))["config"]
    assert (config["trainer.nodes"], config["trainer.devices"]) == (2, 2)


@pytest.mark.timeout(3600)
def test_agent_that_ends_by_a_signal_has_all_ranks_save_a_checkpoint(root):
    with Agents(root, "trainer.steps=3000") as agents:
        agents.wait_for(3)
        agents.processes[1].send_signal(signal.SIGTERM)
        output = agents.end(1, 1)
    assert output.count("the last whole step is saved") <= 1
    state = json.loads((folder(root, "fkl") / "state.json").read_text())
    step = int(re.search(r"step (\d+) of 3000", state["reason"])[1])
    assert state["state"] == "preempted"
    assert (folder(root, "fkl") / "checkpoints" / f"step-{step:08}.ckpt").exists()


@pytest.mark.timeout(3600)
def test_other_words_on_one_machine_are_refused_once(root):
    with Agents(root, second=("trainer.steps=13",)) as agents:
        output = agents.end(1, 1)
    assert re.findall(r"rank \d of 4 has 1[23]", output) in (["rank 2 of 4 has 13"], ["rank 2 of 4 has 12"])
    assert not list(root.glob("fkl*"))
