"""Speed and memory of a run: what is logged is what a clock says, and costs nothing that a step would notice."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kd.data.batches import Batches
from kd.evaluation.catalog import PERFORMANCE
from kd.runs.metrics_file import MetricsFile
from kd.system import hardware, processes
from kd.training.callbacks.throughput import StepSums, Throughput
from kd.training.report import StepReport
from tests.small import here, result

ON_A_CPU = {metric.key for metric in PERFORMANCE if metric.name != "gpu_utilisation"}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_logs_every_metric_to_a_file_of_its_own(trained_root, tmp_path):
    root = Path(tmp_path / "root")
    run = here(root, "logits=none", "teacher=none", "trainer.steps=4", "trainer.log_every=2")
    logged = lines(run / "performance.jsonl")
    assert [line["step"] for line in logged] == [2, 4]
    assert all(line.keys() == ON_A_CPU | {"step"} for line in logged)
    assert "perf/" not in (run / "metrics.jsonl").read_text()  # which does not depend on the clock
    last = logged[-1]
    assert last["perf/tokens_per_second"] * last["perf/seconds_per_step"] == pytest.approx(4 * 32)
    assert 1e-2 < last["perf/memory_gb"] <= last["perf/peak_memory_gb"] * 1.01
    finished = result(run)
    assert finished["performance"].keys() == {"tokens_per_second", "seconds_per_step", "data_seconds_per_step"}
    assert 4 * finished["performance"]["seconds_per_step"] < finished["seconds"] + 0.01
    assert finished["performance"]["tokens_per_second"] * finished["performance"]["seconds_per_step"] == pytest.approx(
        4 * 32
    )


def test_a_wait_for_data_is_counted():
    def slow(index: np.ndarray, ids: np.ndarray) -> None:
        time.sleep(0.03)

    batches = Batches(np.zeros((8, 5), np.uint32), 2, 0, 0, 5, read_teacher=slow)
    assert len(list(batches)) == 5 and 0.9 * 5 * 0.03 < batches.waited < 5


def test_data_that_is_ready_is_no_wait():
    batches = Batches(np.zeros((8, 5), np.uint32), 2, 0, 0, 4)
    for _ in batches:
        time.sleep(0.05)
    assert batches.waited < 0.1


def callback(steps: int, waited: float, counter: Throughput | None = None) -> Throughput:
    """Call a counter as so many steps of 10 tokens do, each after a wait."""
    counter = counter or Throughput(1.0, 3.0, 0.0, log_every=10**9)
    loader = SimpleNamespace(waited=0.0)
    trainer, module = SimpleNamespace(train_dataloader=loader, global_step=1), SimpleNamespace()
    module.last_step = StepReport({}, 0.0, None, tokens=10, positions=10, teacher_positions=0)
    for _ in range(steps):
        loader.waited += waited
        counter.on_train_batch_start(trainer, module, None, 0)
        counter.on_train_batch_end(trainer, module, None, None, 0)
    return counter


def test_rates_of_a_resumed_run_are_over_all_of_its_steps():
    first = callback(2, waited=1.0)
    second = Throughput(1.0, 3.0, 0.0, log_every=10**9)
    second.load_state_dict(first.state_dict())
    callback(2, waited=3.0, counter=second)
    assert second.rates()["data_seconds_per_step"] == pytest.approx((2 * 1.0 + 2 * 3.0) / 4)
    assert second.tokens == 40


def test_rates_by_hand():
    rates = StepSums(steps=4, tokens=100, seconds=2.0, data_seconds=1.0).rates()
    assert rates == {"tokens_per_second": 50.0, "seconds_per_step": 0.5, "data_seconds_per_step": 0.25}


def test_counting_costs_a_step_less_than_a_tenth_of_a_millisecond():
    begun = time.process_time()
    callback(2000, waited=0.0)
    assert (time.process_time() - begun) / 2000 < 1e-4


def test_lines_of_steps_that_run_again_are_removed(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    for step in (1, 2, 3):
        file.log_metrics({"perf/seconds_per_step": 1.0}, step)
    file.close({})
    MetricsFile(tmp_path / "metrics.jsonl", 2).close({})
    assert [line["step"] for line in lines(tmp_path / "performance.jsonl")] == [1, 2]


@pytest.mark.parametrize(("reading", "expected"), [(50, 0.5), (ModuleNotFoundError(), None), (Exception(), None)])
def test_utilisation_of_a_gpu_is_a_share_where_nvml_tells_it(monkeypatch, reading, expected):
    def utilization(device):
        if isinstance(reading, Exception):
            raise reading
        return reading

    monkeypatch.setattr(torch.cuda, "utilization", utilization)
    assert hardware.gpu_utilisation(torch.device("cuda")) == expected
    assert hardware.gpu_utilisation(torch.device("cpu")) is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_what_the_process_holds_now():
    held = torch.ones(2**24)  # 64 MiB
    now = processes.memory()
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS"))
    assert now == pytest.approx(1024 * int(line.split()[1]), rel=0.05) and now > 4 * held.numel()
    assert processes.peak_memory() >= 0.99 * now


def test_every_metric_is_in_the_documentation():
    page = (Path(__file__).parents[2] / "docs" / "axes" / "metrics.md").read_text()
    assert all(f"`{metric.key}`" in page for metric in PERFORMANCE)
