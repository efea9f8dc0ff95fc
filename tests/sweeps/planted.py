"""Runs whose losses are those of scaling laws with known coefficients."""

import json
import math

import numpy as np

from sweeps.fit import laws
from sweeps.fit.observations import Observation
from tests.sweeps.fake import Sweep

ALONE = {"E": 1.7, "A": 60.0, "B": 400.0, "alpha": 0.35, "beta": 0.45, "gamma": 0.8}
TAUGHT = {"A": 45.0, "B": 250.0, "alpha": 0.3, "beta": 0.5, "gamma": 0.9, "c0": 1.5, "c1": 2.0, "f1": 0.3, "d1": 1.1}
SIZES, AMOUNTS = (1e5, 3e5, 1e6, 3e6), (1e5, 4e5, 1.6e6, 6.4e6, 2.56e7)
# Parameters, tokens: the weakest is worse than what most students reach alone, which is what shows d1.
TEACHERS = {"tiny": (1e5, 1e5), "small": (1e5, 2e6), "medium": (1e6, 8e6), "large": (1e7, 1e8)}


def repeated(alone: list[Observation], offset: float, noise: float, seed: int, seeds: int = 3) -> list[Observation]:
    """Runs of several seeds: noise of their own, and an offset that all seeds of a setting share."""
    rng = np.random.default_rng(seed)
    shifts = [(p, offset * rng.normal()) for p in alone]
    return [
        p._replace(loss=p.loss * math.exp(shift + noise * rng.normal())) for p, shift in shifts for _ in range(seeds)
    ]


def planted(noise: float, seed: int = 0, distilled: bool = True) -> list[Observation]:
    """Runs whose losses are those of the two laws, but for noise in their logarithms."""
    rng = np.random.default_rng(seed)
    runs = [
        Observation(f"lm-{n:g}-{d:g}", n, d, laws.supervised(ALONE, n, d) * math.exp(noise * rng.normal()), 2 * n)
        for n in SIZES
        for d in AMOUNTS
    ]
    for name, (size, tokens) in TEACHERS.items() if distilled else ():
        loss = laws.supervised(ALONE, size, tokens)
        for n in SIZES:
            for d in AMOUNTS:
                distilled_loss = laws.distilled(TAUGHT, n, d, loss, laws.supervised(ALONE, n, d)) * math.exp(
                    noise * rng.normal()
                )
                runs.append(
                    Observation(f"{name}-{n:g}-{d:g}", n, d, distilled_loss, 2 * n, name, loss, size, tokens, 2 * size)
                )
    return runs


def finished(sweep: Sweep, planted_points: list[Observation]) -> Sweep:
    """A sweep with the results of these points, as train.py writes them."""
    for p in planted_points:
        settings = {"trainer.steps": int(p.tokens / 4096), "student.size": f"{p.parameters:g}"}
        if p.teacher:
            settings |= {"teacher.size": p.teacher, "teacher.steps": int(p.teacher_tokens / 1024), "teacher.batch": 4}
        sweep.done("fkl" if p.teacher else "lm", 0, p.loss, entropy=1.7, **settings)
        path = sweep.root / sweep.runs[-1]["run"] / "result.json"
        result = json.loads(path.read_text())
        result |= {"non_embedding": p.parameters, "tokens": p.tokens, "flops_per_token": p.flops_per_token,
                   "teacher_non_embedding": p.teacher_parameters, "teacher_flops_per_token": p.teacher_flops_per_token,
                   "train_rows": 10**6}  # fmt: skip
        result["final"]["val/teacher_lm"] = p.teacher_loss or 1.9
        path.write_text(json.dumps(result))
    return sweep
