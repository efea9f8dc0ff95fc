"""python -m kd.bench                                     all cases in turn, a process each
python -m kd.bench only=lm,trl,online_fkl steps=5      some of them
python -m kd.bench growth                              memory and time against the sizes of all things, as plots

Other words: shape=cpu|gpu|tiny, precision=bf16|fp32 (default: bf16 where the processor computes in it), root=FOLDER
(default: $KD_ROOT, or runs). Results land in FOLDER/bench/.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path

from kd.system.launchers import forget_ranks

if __name__ == "__main__":  # before a library that reads them is loaded
    forget_ranks(os.environ)

from rich.table import Table

from kd import errors
from kd.bench import growth
from kd.bench.cases import CASES, CUDA_CASES, NEEDS
from kd.bench.work import GIB, SHAPES, Shape, measured
from kd.config.components import PRECISIONS
from kd.errors import UserError
from kd.system import files
from kd.system.console import console, exit_with_error
from kd.system.remote import default_root, is_url


def main(words: list[str]) -> None:
    given = dict(word.split("=", 1) for word in words if "=" in word)
    plain = [word for word in words if "=" not in word]
    if unknown := [w for w in plain if w != "growth"] + [
        k for k in given if k not in ("only", "steps", "shape", "precision", "root")
    ]:
        raise UserError(option=unknown[0], why=f"no such word here.\n\n{__doc__}")
    on_gpu = has_gpu()
    names = given["only"].split(",") if "only" in given else [*CASES, *(CUDA_CASES if on_gpu else ())]
    steps = given.get("steps", "5")
    errors.check("steps", steps, steps.isdecimal() and int(steps) >= 1, "a whole number of at least 1")
    shape = given.get("shape", "gpu" if on_gpu else "cpu")
    errors.check("shape", shape, shape in SHAPES, f"one of {', '.join(SHAPES)}")
    precision = given.get("precision") or ("bf16" if computes_in_bf16() else "fp32")
    errors.check("precision", precision, precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}")
    root = given.get("root") or default_root()
    if is_url(root):
        why, hint = "the benchmark writes its results to this machine alone", "type root=FOLDER"
        raise UserError(option="root", got=root, why=why, hint=hint)
    folder = Path(files.expanded(root)) / "bench"
    if not plain:
        check(names)
    folder.mkdir(parents=True, exist_ok=True)
    if plain:
        middle = "tiny" if shape == "tiny" else "gpu_memory" if on_gpu else "memory"
        growth.write(folder, replace(SHAPES[middle], precision=precision), on_gpu)
    else:
        compare(folder, names, replace(SHAPES[shape], precision=precision), int(steps), on_gpu)


def computes_in_bf16() -> bool:
    import torch

    from kd.system.hardware import slowdown_in_bf16

    return slowdown_in_bf16(torch.device("cuda" if has_gpu() else "cpu")) < 1.5


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def check(names: list[str]) -> None:
    """Raise UserError for an unknown case, or one whose package is missing."""
    for name in names:
        errors.check("only", name, name in CASES | CUDA_CASES, f"one of the cases {', '.join(CASES | CUDA_CASES)}")
        package = NEEDS.get(name)
        if package and not importlib.util.find_spec(package):
            hint = f"type pip install 'kd[bench]', or leave {name} out by only=…"
            raise UserError(option="only", got=name, need=f"the package {package}", hint=hint)


def compare(folder: Path, names: list[str], shape: Shape, steps: int, on_gpu: bool) -> None:
    """Measure the cases in turn and print a table. All numbers go to speed.json as soon as they are measured."""
    results: dict[str, dict] = {}
    with console.status("") as status:
        measurements = measured([(name, shape, steps) for name in names], on_gpu)
        for name in names:
            status.update(f"{name} ({len(results) + 1} of {len(names)})")
            results[name] = next(measurements)
            files.write_json(folder / "speed.json", results)
    console.print(table(results), width=110)
    for result in results.values():
        if parts := result.get("parts"):
            console.print(split(parts))
    for name, result in results.items():
        if "waited" in result:
            console.print(f"{name}: a step waits {1000 * result['waited']:.1f} ms for its batch.")
        if name.startswith("write_") and "forward" in results:
            bare = results["forward"]["tokens_per_second"]
            console.print(f"{name}: {ratio(result['tokens_per_second'], bare)} of the teacher's bare forward pass.")
    device = next((r["device"] for r in results.values() if "device" in r), "")
    console.print(f"{device}, {shape.precision}; {folder / 'speed.json'}")


def table(results: dict[str, dict]) -> Table:
    """Return a table with a line per case, relative to lm and to TRL; on-policy cases relative to on-policy TRL."""
    out = Table("case", *("tokens/s", "of lm", "of trl", "of the limit", "peak GiB", "of trl"), box=None)
    for column in out.columns[1:]:
        column.justify = "right"
    for name, result in results.items():
        if result.get("parts"):
            continue
        if error := result.get("error"):
            out.add_row(name, error)
            continue
        theirs = "trl_on_policy" if "on_policy" in name else "trl"
        baselines = [results.get(other, {}) for other in ("lm", theirs)]
        speed, most = result["tokens_per_second"], result["peak_memory"]
        out.add_row(
            name, f"{speed:,.0f}", *(ratio(speed, other.get("tokens_per_second")) for other in baselines),
            ratio(speed, result.get("limit")), f"{most / GIB:.2f}", ratio(most, baselines[1].get("peak_memory")),
        )  # fmt: skip
    return out


def ratio(value: float, other: float | None) -> str:
    return f"{value / other:.2f}" if other else "–"


def split(parts: dict[str, float]) -> Table:
    """Return a table of the times of a step's parts."""
    out = Table("part of online_fkl's step", "ms", "share", box=None)
    for part, seconds in parts.items():
        out.add_row(part, f"{1000 * seconds:,.0f}", f"{seconds / sum(parts.values()):.0%}")
    return out


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        exit_with_error(error)
