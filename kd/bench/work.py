"""What is measured with: shapes, fresh models, random ids and a clock; each case in a process of its own."""

from __future__ import annotations

import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from kd.sizes import Size

WARM_UP = 3  # steps that are not counted: first allocations, compilation
GIB = 2**30
ROUNDS = 8  # steps that the rows last for
HEAD = 512  # rows of the products that the limit is measured with


@dataclass(frozen=True)
class Shape:
    teacher: Size
    student: Size
    vocab: int
    batch: int  # rows per step
    seq_len: int
    precision: str = "bf16"  # or fp32

    @property
    def tokens(self) -> int:
        return self.batch * self.seq_len


SHAPES = {
    "cpu": Shape(Size(512, 8, 8, 8, 1376), Size(256, 4, 8, 8, 640), 32_768, 8, 512),
    "gpu": Shape(Size(1536, 28, 12, 2, 8960), Size(896, 24, 14, 2, 4864), 151_936, 8, 1024),  # 1.5B to 0.5B, as Qwen2.5
    "tiny": Shape(Size(32, 2, 2, 2, 64), Size(16, 2, 2, 2, 32), 512, 2, 32),
    "memory": Shape(Size(64, 2, 2, 2, 128), Size(64, 2, 2, 2, 128), 32_768, 4, 256),
}


class Work:
    """What a case works on: fresh models, batches of random ids, and a clock."""

    def __init__(self, shape: Shape, steps: int):
        import torch

        self.shape, self.steps = shape, steps
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if shape.precision == "bf16" else torch.float32
        self.ticks: list[tuple[float, float]] = []  # seconds of the wall clock and of the processor, after each step
        self.models: list[tuple] = []  # model, and how many times its forward pass a step costs
        torch.manual_seed(0)

    def student(self):
        """A Hugging Face causal LM in float32 that learns."""
        return self._model(self.shape.student, 3)

    def teacher(self):
        """One that only runs."""
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
        """Random ids [R, T + 1], as packed data is on disk."""
        import numpy as np

        shape = (ROUNDS * self.shape.batch, self.shape.seq_len + 1)
        ids = np.random.default_rng(0).integers(0, self.shape.vocab, shape)
        return ids.astype(np.uint32)

    def batches(self) -> Iterator[tuple]:
        """ids and labels [B, T] on the device, per step."""
        from kd.data import Batches

        for batch in Batches(self.rows(), self.shape.batch, 0, 0, self.steps):
            yield batch.ids.to(self.device), batch.labels.to(self.device)

    def tick(self, *_) -> None:
        """A step is done."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.ticks.append((time.perf_counter(), time.process_time()))

    def autocast(self):
        import torch

        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def limit(self) -> float:
        """Seconds that a step's matrix products would take alone, at the rate of its own shapes."""
        import torch

        from kd.models import cost

        flops = sum(passes * cost(model, self.shape.seq_len).flops_per_token for model, passes in self.models)
        done = spent = 0.0
        for model, passes in self.models:
            for layer in model.modules():
                if isinstance(layer, torch.nn.Linear):
                    x = torch.randn(HEAD, layer.in_features, device=self.device, dtype=self.dtype)
                    weight = layer.weight.detach().to(self.dtype).t()
                    out = torch.empty(HEAD, layer.out_features, device=self.device, dtype=self.dtype)
                    spent += passes * fastest(partial(torch.mm, x, weight, out=out), self.device)
                    done += passes * 2 * x.numel() * layer.out_features
        return flops * self.shape.tokens * spent / done


def fastest(call: Callable[[], object], device, times: int = 5) -> float:
    """Seconds of the fastest of several calls."""
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
    """Run a case in this process: seconds per step, peak memory in bytes, and what its matrix products take alone."""
    import torch

    from kd.bench.cases import CASES, CUDA_CASES
    from kd.run import peak_memory
    from train import quiet

    quiet()
    work = Work(shape, steps + WARM_UP)
    also = (CASES | CUDA_CASES)[name](work) or {}
    memory = peak_memory()  # before the limit is measured, which takes some itself
    steps = list(itertools.pairwise(work.ticks))[WARM_UP - 1 :]
    seconds, busy = ([after[i] - before[i] for before, after in steps] for i in (0, 1))
    return {
        "case": name, "shape": asdict(shape), "seconds": seconds, "processor_seconds": busy,
        "tokens_per_second": shape.tokens / statistics.median(seconds),
        "limit": shape.tokens / work.limit() if work.models else None,
        "peak_memory": memory, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if work.device.type == "cuda" else processor(), **also,
    }  # fmt: skip


def apart(name: str, shape: Shape, steps: int) -> dict:
    """The same in a process of its own, so that its memory is that of the case alone; an error as `error`."""
    command = [sys.executable, "-m", "kd.bench.work", json.dumps([name, asdict(shape), steps])]
    # As train.py has it, and for all cases alike: threads that wait sleep.
    done = subprocess.run(command, capture_output=True, text=True, env={"OMP_WAIT_POLICY": "PASSIVE"} | os.environ)
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return {"case": name, "shape": asdict(shape), "error": said[-1] if said else f"exit code {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def processor() -> str:
    """What the CPU calls itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(named, platform.machine())}, {os.cpu_count()} cores"


if __name__ == "__main__":
    name, shape, steps = json.loads(sys.argv[1])
    sizes = {role: Size(*shape[role]) for role in ("teacher", "student")}
    print(json.dumps(measure(name, Shape(**shape | sizes), steps)))
