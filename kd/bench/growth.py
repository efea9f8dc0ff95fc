"""Growth of memory and time with the sizes of a step, rows of a store and runs of a sweep, as one page of HTML."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from kd.bench.work import GIB, ROUNDS, Shape, measured
from kd.config.sizes import Size
from kd.system import files
from kd.system.console import console
from kd.system.processes import most_resident

KD, ALL_LOGITS = "kd", "all logits at once"
BUFFERS = 12  # tensors of float32 logits that the obvious loop holds at once
STEPS = 3
SWEEPS = (10, 100, 1000)  # runs
# A sweep of runs so small that its time is that of the plan.
PLAN = (
    "-m", "plan=true", "data=markov", "data.tokens=4096", "data.seq_len=32", "data.val_rows=8", "teacher.size=100k",
    "student.size=100k", "teacher.steps=10", "trainer.steps=10", "trainer.batch=4",
)  # fmt: skip


@dataclass(frozen=True)
class Axis:
    """A size, and the cases that are measured along it: case -> the name of its line."""

    title: str
    unit: str  # that the seconds are per
    lines: dict[str, str]
    points: dict[int, Shape | int]  # by the position on the axis; a number: runs of a sweep


def axes_around(middle: Shape) -> list[Axis]:
    """Return the axes of the page. All but one size are those of `middle`."""
    training = {"online_fkl": KD, "full": ALL_LOGITS}

    def along(field: str, *factors: float) -> dict[int, Shape | int]:
        sizes = (int(factor * getattr(middle, field)) for factor in factors)
        return {size: Shape(**vars(middle) | {field: size}) for size in sizes}

    teachers = [wider(middle.teacher, factor) for factor in (1, 2, 4, 8)]
    stores = [replace(middle, rounds=ROUNDS * factor) for factor in (1, 8, 64)]
    return [
        Axis("rows per step", "step", training, along("batch", 0.25, 1, 4)),
        Axis("tokens per row", "step", training, along("seq_len", 0.25, 1, 4)),
        Axis("tokens in the vocabulary", "step", training, along("vocab", 0.25, 1, 4, 8)),
        Axis("width of the teacher", "step", training, {t.hidden: replace(middle, teacher=t) for t in teachers}),
        Axis("rows in a store", "batch", {"read_top_50": "reading 50 entries per token"},
             {shape.rounds * shape.batch: shape for shape in stores}),
        Axis("runs in a sweep", "command", {"plan": "train.py -m plan=true"}, {count: count for count in SWEEPS}),
    ]  # fmt: skip


def wider(size: Size, factor: int) -> Size:
    """Return a size with as many layers, and each of them wider by a factor."""
    return Size(size.hidden * factor, size.layers, size.heads * factor, size.kv_heads * factor, size.ffn * factor)


def write(folder: Path, middle: Shape, on_gpu: bool) -> None:
    """Measure around the shape `middle`, one size at a time; numbers go to growth.json and plots to growth.html."""
    axes = axes_around(middle)
    points = list(
        dict.fromkeys((case, point) for axis in axes for case in axis.lines for point in axis.points.values())
    )
    room = available()
    results: dict[tuple[str, Shape | int], dict] = {}

    def add(key: tuple[str, Shape | int], result: dict) -> None:
        results[key] = result
        console.print(f"{key[0]:<11} {described(key[1])}: {numbers(result)}")
        files.write_json(folder / "growth.json", [results[key] for key in points if key in results])

    for case, point in points:
        if case == "full" and isinstance(point, Shape) and (needed := BUFFERS * 4 * point.tokens * point.vocab) > room:
            add((case, point), {"case": case, "error": f"not tried: needs some {needed / GIB:.0f} GiB"})
    shapes = [(case, point) for case, point in points if isinstance(point, Shape) and (case, point) not in results]
    with console.status("") as status:
        measurements = measured([(case, shape, STEPS) for case, shape in shapes], on_gpu)
        for case, point in points:
            if (case, point) in results:
                continue
            status.update(f"{case}, {described(point)} ({len(results) + 1} of {len(points)})")
            add((case, point), next(measurements) if isinstance(point, Shape) else plan(point))
    (folder / "growth.html").write_text(page(middle, axes, results), encoding="utf-8")
    console.print(folder / "growth.html")


def plan(runs: int) -> dict:
    """Return the seconds and the peak memory of the command that plans a sweep, with its imports.

    The data are packed by a command before it, which is not counted.
    """
    with tempfile.TemporaryDirectory() as root:
        for count in (1, runs):
            words = [*PLAN, f"root={root}", f"seed=range({count})"]
            command = [sys.executable, "-c", "from kd.system.programs import train; train()", *words]
            started = time.perf_counter()
            with tempfile.TemporaryFile("w+") as log:
                process = subprocess.Popen(command, stdout=log, stderr=log)
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
                log.seek(0)
                lines = [line.strip() for line in log if line.strip()]
            seconds = time.perf_counter() - started
            if process.returncode:
                return {"case": "plan", "runs": count, "error": lines[-1] if lines else "no output"}
    return {"case": "plan", "runs": runs, "seconds": [seconds], "peak_memory": most_resident(usage)}


def numbers(result: dict) -> str:
    """Return the line of text of a result."""
    if error := result.get("error"):
        return error
    return f"{result['peak_memory'] / GIB:.2f} GiB, {statistics.median(result['seconds']):.3g} s"


def described(point: Shape | int) -> str:
    if isinstance(point, int):
        return f"{point:,} runs"
    rows = f", {point.rounds * point.batch:,} rows" if point.rounds != ROUNDS else ""
    return (
        f"batch {point.batch}, sequence {point.seq_len}, vocabulary {point.vocab:,}, "
        f"teacher {point.teacher.hidden} wide{rows}"
    )


def available() -> float:
    """Return the bytes that a process can still allocate."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), float("inf"))


def page(middle: Shape, axes: list[Axis], results: dict[tuple[str, Shape | int], dict]) -> str:
    """Return the page: for each axis a plot of memory and below it one of time, with a line per case."""
    from plotly.subplots import make_subplots

    columns = 3
    rows = 2 * -(-len(axes) // columns)
    plot = make_subplots(rows, columns, horizontal_spacing=0.07, vertical_spacing=0.07)
    colors = dict(zip(dict.fromkeys(name for axis in axes for name in axis.lines.values()),
                      ("#3b78d8", "#d9772f", "#2f9e64", "#8a5cc7"), strict=False))  # fmt: skip
    shown = set()
    for number, axis in enumerate(axes):
        row, column = 1 + 2 * (number // columns), 1 + number % columns
        for case, name in axis.lines.items():
            points = [(x, r) for x, point in axis.points.items() if "error" not in (r := results[case, point])]
            values = ([r["peak_memory"] / GIB for _, r in points], [statistics.median(r["seconds"]) for _, r in points])
            for offset, (y, text) in enumerate(zip(values, ("%{y:.2f} GiB", "%{y:.3g} s"), strict=True)):
                plot.add_scatter(
                    x=[x for x, _ in points], y=y, name=name, legendgroup=name, showlegend=name not in shown,
                    mode="lines+markers", line={"color": colors[name]}, hovertemplate="%{x:,}: " + text,
                    row=row + offset, col=column,
                )  # fmt: skip
                shown.add(name)
        for offset, title in enumerate(("peak memory, GiB", f"seconds per {axis.unit}")):
            ticks = {"tickvals": list(axis.points), "tickformat": ","}
            plot.update_xaxes(title=axis.title, type="log", row=row + offset, col=column, **ticks)
            plot.update_yaxes(title=title, rangemode="tozero", row=row + offset, col=column)
    title = f"Where not on the axis: {described(middle)}, {middle.precision}"
    plot.update_layout(title=title, template="plotly_white", height=300 * rows, legend={"orientation": "h", "y": -0.06})
    return plot.to_html(include_plotlyjs=True, config={"displayModeBar": False, "responsive": True})
