"""Peak memory against batch, sequence and vocabulary: kd beside the obvious loop, as one page of HTML."""

from __future__ import annotations

from pathlib import Path

from kd.bench.work import GIB, Shape, measured
from kd.system import files
from kd.system.console import console

SHOWN = {"online_fkl": "kd", "full": "all logits at once"}
FACTORS = {"batch": (0.25, 1, 4), "seq_len": (0.25, 1, 4), "vocab": (0.25, 1, 4, 8)}
TITLES = {"batch": "rows per step", "seq_len": "tokens per row", "vocab": "tokens in the vocabulary"}
BUFFERS = 12  # tensors of float32 logits that the obvious loop holds at once


def write(folder: Path, middle: Shape, on_gpu: bool) -> None:
    """Measure around the shape `middle`, one size at a time; numbers go to memory.json and a plot to memory.html."""
    shapes = {size: [Shape(**(vars(middle) | {size: int(f * getattr(middle, size))})) for f in factors]
              for size, factors in FACTORS.items()}  # fmt: skip
    cases = list(dict.fromkeys((case, shape) for case in SHOWN for line in shapes.values() for shape in line))
    room = available()
    results: dict[tuple[str, Shape], dict] = {}
    for case, shape in cases:
        needed = BUFFERS * 4 * shape.tokens * shape.vocab if case == "full" else 0
        if needed > room:
            results[case, shape] = {"case": case, "error": f"not tried: needs some {needed / GIB:.0f} GiB"}
    tried = [key for key in cases if key not in results]
    with console.status("") as status:
        measurements = measured([(case, shape, 1) for case, shape in tried], on_gpu)
        for case, shape in tried:
            status.update(f"{case}, {described(shape)} ({len(results) + 1} of {len(cases)})")
            results[case, shape] = next(measurements)
    for case, shape in cases:
        result = results[case, shape]
        says = result.get("error") or f"{result['peak_memory'] / GIB:.2f} GiB"
        console.print(f"{case:<11} {described(shape)}: {says}")
    files.write_json(folder / "memory.json", [results[key] for key in cases])
    (folder / "memory.html").write_text(page(middle, shapes, results), encoding="utf-8")
    console.print(folder / "memory.html")


def described(shape: Shape) -> str:
    return f"batch {shape.batch}, sequence {shape.seq_len}, vocabulary {shape.vocab:,}"


def available() -> float:
    """Return the bytes that a process can still allocate."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), float("inf"))


def page(middle: Shape, shapes: dict[str, list[Shape]], results: dict[tuple[str, Shape], dict]) -> str:
    """Return the page: one plot per size, with a line per case, all on one scale."""
    from plotly.subplots import make_subplots

    plot = make_subplots(1, len(shapes), shared_yaxes=True, horizontal_spacing=0.03)
    for column, (size, line) in enumerate(shapes.items(), 1):
        for (case, label), color in zip(SHOWN.items(), ("#3b78d8", "#d9772f")):
            points = [
                (getattr(s, size), results[case, s]["peak_memory"]) for s in line if "error" not in results[case, s]
            ]
            plot.add_scatter(
                x=[x for x, _ in points], y=[y / GIB for _, y in points], name=label, legendgroup=label,
                showlegend=column == 1, mode="lines+markers", line={"color": color},
                hovertemplate="%{x:,}: %{y:.2f} GiB", row=1, col=column,
            )  # fmt: skip
        ticks = {"tickvals": [getattr(s, size) for s in line], "tickformat": ","}
        plot.update_xaxes(title=TITLES[size], type="log", col=column, **ticks)
    plot.update_yaxes(title="peak memory, GiB", col=1)
    plot.update_yaxes(rangemode="tozero")
    title = f"Peak memory of a training process; where not on the axis: {described(middle)}"
    plot.update_layout(title=title, template="plotly_white", height=480, legend={"orientation": "h", "y": -0.2})
    return plot.to_html(include_plotlyjs=True, config={"displayModeBar": False, "responsive": True})
