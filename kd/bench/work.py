"""Material of a measurement: shapes, fresh models, random ids and a clock.

On a CPU each case runs in a process of its own, since memory is measured per process. On a GPU torch measures memory.
So the cases of one library share a process there, which saves its start.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from kd.system.launchers import forget_ranks

if __name__ == "__main__":  # before a library that reads them is loaded
    forget_ranks(os.environ)

from kd.config.sizes import Size
from kd.errors import first_line

WARM_UP = 3  # steps before the measurement: first allocations, compilation
GIB = 2**30
ROUNDS = 8  # steps that the rows last for, if a shape says nothing else
HEAD = 512  # on a CPU, rows of the products that the limit is measured with


@dataclass(frozen=True)
class Shape:
    teacher: Size
    student: Size
    vocab: int
    batch: int  # rows per step
    seq_len: int
    response_len: int  # of a row, tokens that the student writes in the cases that are on-policy
    precision: str = "bf16"  # or fp32
    rounds: int = ROUNDS

    @property
    def tokens(self) -> int:
        return self.batch * self.seq_len


SHAPES = {
    "cpu": Shape(Size(512, 8, 8, 8, 1376), Size(256, 4, 8, 8, 640), 32_768, 8, 512, 256),
    # 1.5B to 0.5B, as Qwen2.5
    "gpu": Shape(Size(1536, 28, 12, 2, 8960), Size(896, 24, 14, 2, 4864), 151_936, 8, 1024, 64),
    "tiny": Shape(Size(32, 2, 2, 2, 64), Size(16, 2, 2, 2, 32), 512, 2, 32, 16),
    "memory": Shape(Size(64, 2, 2, 2, 128), Size(64, 2, 2, 2, 128), 32_768, 4, 256, 128),
    "gpu_memory": Shape(Size(512, 8, 8, 8, 1376), Size(256, 4, 8, 8, 640), 131_072, 8, 512, 256),
}


class Work:
    """Material of a case: fresh models, batches of random ids, and a clock."""

    def __init__(self, shape: Shape, steps: int):
        import torch

        self.shape, self.steps = shape, steps
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if shape.precision == "bf16" else torch.float32
        self.ticks: list[tuple[float, float]] = []  # seconds of the wall clock and of the processor, after each step
        self.models: list[tuple] = []  # model, and how many times its forward pass a step costs
        torch.manual_seed(0)

    def student(self):
        """Return a Hugging Face causal LM in float32, to train."""
        return self._model(self.shape.student, 3)

    def teacher(self):
        """Return a frozen Hugging Face causal LM."""
        return self._model(self.shape.teacher, 1).eval().requires_grad_(False)

    def _model(self, size: Size, passes: int):
        from transformers import LlamaConfig, LlamaForCausalLM

        with self.device:
            model = LlamaForCausalLM(LlamaConfig(
                vocab_size=self.shape.vocab, hidden_size=size.hidden, intermediate_size=size.ffn,
                num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.kv_heads,
                max_position_embeddings=self.shape.seq_len, tie_word_embeddings=True,
            ))  # fmt: skip
        self.models.append((model, passes))
        return model

    def rows(self):
        """Return random ids [R, T + 1], in the form of packed data on disk."""
        import numpy as np

        shape = (self.shape.rounds * self.shape.batch, self.shape.seq_len + 1)
        ids = np.random.default_rng(0).integers(0, self.shape.vocab, shape)
        return ids.astype(np.uint32)

    def batches(self) -> Iterator[tuple]:
        """Yield ids and labels [B, T] on the device, per step."""
        from kd.data.batches import Batches

        for batch in Batches(self.rows(), self.shape.batch, 0, 0, self.steps):
            yield batch.ids.to(self.device), batch.labels.to(self.device)

    def tick(self, *_) -> None:
        """Record the end of a step."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.ticks.append((time.perf_counter(), time.process_time()))

    def autocast(self):
        import torch

        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def limit(self) -> float:
        """Return the seconds that a step's matrix products take alone, at the rate of its own shapes."""
        import torch

        from kd.models.flops import cost

        flops = sum(passes * cost(model, self.shape.seq_len).flops_per_token for model, passes in self.models)
        done = spent = 0.0
        rows = HEAD if self.device.type == "cpu" else self.shape.tokens
        for model, passes in self.models:
            linear = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
            for (outputs, inputs), count in Counter(weight.shape for weight in linear).items():
                x = torch.randn(rows, inputs, device=self.device, dtype=self.dtype)
                weight = torch.randn(outputs, inputs, device=self.device, dtype=self.dtype).t()
                out = torch.empty(rows, outputs, device=self.device, dtype=self.dtype)
                spent += passes * count * fastest(partial(torch.mm, x, weight, out=out), self.device)
                done += passes * count * 2 * rows * inputs * outputs
        return flops * self.shape.tokens * spent / done


def fastest(call: Callable[[], object], device, times: int = 5) -> float:
    """Return the seconds of the fastest of several calls."""
    import torch

    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measure(name: str, shape: Shape, steps: int) -> dict:
    """Run a case in this process.

    Return seconds per step, peak memory in bytes, and the seconds that its matrix products take alone.
    """
    import torch

    from kd.bench.cases import CASES, CUDA_CASES
    from kd.system.console import silence_libraries
    from kd.system.processes import peak_memory

    silence_libraries()
    work = Work(shape, steps + WARM_UP)
    if work.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    also = (CASES | CUDA_CASES)[name](work) or {}
    memory = peak_memory()  # before the limit is measured, which takes some itself
    counted = list(itertools.pairwise(work.ticks))[WARM_UP - 1 :]
    seconds, busy = ([after[i] - before[i] for before, after in counted] for i in (0, 1))
    return {
        "case": name, "shape": asdict(shape), "seconds": seconds, "processor_seconds": busy,
        "tokens_per_second": shape.tokens / statistics.median(seconds),
        "limit": shape.tokens / work.limit() if work.models else None,
        "peak_memory": memory, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if work.device.type == "cuda" else processor(), **also,
    }  # fmt: skip


Case = tuple[str, Shape, int]  # name, shape, and steps that are counted


def measured(cases: Iterable[Case], on_gpu: bool) -> Iterator[dict]:
    """Yield the result of each case as soon as it is measured; an error as `error`."""
    from kd.bench.cases import NEEDS

    def process(item: tuple[int, Case]):
        number, (name, *_) = item
        return NEEDS.get(name) if on_gpu and name != "breakdown" else number  # breakdown leaves its clocks behind

    for _, group in itertools.groupby(enumerate(cases), process):
        yield from _in_a_process([case for _, case in group])


def _in_a_process(cases: list[Case]) -> Iterator[dict]:
    """Yield results of cases that share a process. If it dies, its case gets an error, and a new process continues."""
    # Waiting threads sleep, as train.py has it, and for all cases alike.
    environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ
    while cases:
        words = [[name, asdict(shape), steps] for name, shape, steps in cases]
        command = [sys.executable, "-m", "kd.bench.work", json.dumps(words)]
        done = 0
        with tempfile.TemporaryFile("w+") as log:
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment) as process:
                for line in process.stdout or ():
                    done += 1
                    yield json.loads(line)
            log.seek(0)
            lines = [line.strip() for line in log if line.strip()]
        if done < len(cases):
            name, shape, _ = cases[done]
            reason = lines[-1] if lines else f"exit code {process.returncode}"
            yield {"case": name, "shape": asdict(shape), "error": reason}
            done += 1
        cases = cases[done:]


def processor() -> str:
    """Return the name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(named, platform.machine())}, {os.cpu_count()} cores"


def main(cases: list) -> None:
    """Measure cases in this process, and print a line of JSON for each."""
    import torch

    out, sys.stdout = sys.stdout, sys.stderr  # libraries print too
    for name, fields, steps in cases:
        sizes = {role: Size(*fields[role]) for role in ("teacher", "student")}
        try:
            result = measure(name, Shape(**fields | sizes), steps)
        except Exception as error:  # that of one case ends no other
            traceback.print_exc()
            result = {"case": name, "shape": fields, "error": first_line(error)}
        print(json.dumps(result), file=out, flush=True)
        gc.collect()
        torch.compiler.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
