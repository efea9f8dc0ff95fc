"""Catalogue of metrics: name, label and meaning, for the terminal and for reports.

A value is logged as `val/NAME`; the same metric of the teacher as `val/teacher_NAME`. To add a metric per token, write
its function in metrics.py and an entry here that names it. In a plug-in, write a function with the decorator @metric.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from kd.config import plugins
from kd.errors import UserError
from kd.runs.loggers import PERFORMANCE as CLOCK

Function = TypeVar("Function", bound=Callable)

BENCHMARK = "bench/"  # prefix of a benchmark: bench/arc_easy/acc
EXACCERR_LENGTH = 16  # tokens over which the one number for it is taken, as in the log of MiniLLM's code


@dataclass(frozen=True)
class Metric:
    """Number that a validation gives, or that a report computes from one."""

    name: str
    label: str  # title of a column
    meaning: str
    better: Literal["lower", "higher"] | None = None
    unit: str = ""  # after a value in a sentence
    teacher: bool = False  # the terminal also shows the teacher's
    column: bool = True  # of a report's table
    plot: str = ""  # caption of a plot of its own in a report; empty: none
    function: str = ""  # dotted name: student log-probabilities [N, V], Target -> values [N], whose mean is logged

    @property
    def key(self) -> str:
        return self.name if self.name.startswith(BENCHMARK) else f"val/{self.name}"

    @property
    def teacher_key(self) -> str:
        return f"val/teacher_{self.name}"

    @property
    def sign(self) -> int:
        """1 where higher is better, -1 where lower is."""
        return 1 if self.better == "higher" else -1

    @property
    def final_key(self) -> str:
        """Name in W&B of the value at the end of a run."""
        return f"final/{self.name}"


METRICS = (
    Metric("lm", "loss", "mean negative log-likelihood of held-out text, nats per token", "lower",
           unit="nats per token on held-out text", teacher=True),
    Metric("rouge_l", "rouge-l", "Rouge-L F1 of responses to held-out prompts, stemmed; papers print it times 100",
           "higher", unit="Rouge-L on held-out prompts", teacher=True),
    Metric("exact_match", "exact", "share of responses that equal the reference but for white space", "higher"),
    Metric("perplexity", "perplexity", "of the references: the exponential of the loss", "lower"),
    Metric("bpb", "bits per byte", "the loss per byte of text, which can be compared where tokenizers differ", "lower"),
    Metric("fkl", "fkl", "KL(teacher || student), nats per token; 0 is a perfect copy of the teacher", "lower",
           plot="lower is closer to the teacher", function="kd.objective.losses.fkl"),
    Metric("rkl", "rkl", "KL(student || teacher), nats per token", "lower", function="kd.objective.losses.rkl"),
    Metric("tvd", "tvd", "total variation distance between student and teacher", "lower", column=False,
           function="kd.objective.losses.tvd"),
    Metric("acceptance", "acceptance", "1 - total variation distance: how often speculative decoding keeps a token",
           "higher", plot="higher is closer to the teacher"),
    Metric("agreement", "agreement", "share of positions where student and teacher rank the same token first",
           "higher", function="kd.evaluation.metrics.agreement"),
    Metric("accuracy", "accuracy", "share of held-out tokens that the student ranks first", "higher", teacher=True),
    Metric("ece", "ece", "expected calibration error: mean |confidence - accuracy| over 15 bins; 0 is calibrated",
           "lower", teacher=True, plot="lower is better calibrated"),
    Metric("exaccerr", "exaccerr", "excess accumulated error: how much further the student is from the teacher, by fkl "
           f"over the first {EXACCERR_LENGTH} tokens, after its own text than after the teacher's", "lower",
           plot="lower is less exposure bias"),
    Metric("on_policy_rkl", "on-policy rkl", "KL(student || teacher) on text that the student wrote, nats per token",
           "lower", plot="on its own text; lower is closer to the teacher"),
    Metric("on_policy_tvd", "on-policy tvd", "total variation distance between the two on that text", "lower"),
    Metric("on_policy_ece", "on-policy ece", "calibration error there, with the teacher's distribution as the truth",
           "lower"),
    Metric("distinct_4", "distinct-4", "distinct 4-grams of words in all responses together, as a share of all"),
    Metric("response_length", "length", "tokens of a response, without its end"),
    Metric("eos_rate", "eos rate", "share of responses that end by themselves, and not because their row is full"),
)  # fmt: skip


@dataclass(frozen=True)
class Measurement:
    """Number on the speed or the memory of a run, which depends on the machine. It is logged as `perf/NAME`."""

    name: str
    meaning: str
    unit: str

    @property
    def key(self) -> str:
        return f"{CLOCK}/{self.name}"


PERFORMANCE = (
    Measurement("tokens_per_second", "target tokens of all devices, per second of the steps", "tokens per second"),
    Measurement("seconds_per_step", "from a batch to its update, without validation and checkpoints", "seconds"),
    Measurement("data_seconds_per_step", "wait for the batch of a step, before it begins", "seconds"),
    Measurement("memory_gb", "memory after a step: allocated on a GPU, else resident", "GB of 10^9 bytes"),
    Measurement("peak_memory_gb", "the most of it since the process began", "GB of 10^9 bytes"),
    Measurement("gpu_utilisation", "share of the last moments in which the GPU computed, by NVML; needs the package "
                "nvidia-ml-py", "share from 0 to 1"),
)  # fmt: skip


BY_NAME = {metric.name: metric for metric in METRICS}
LOSS, ROUGE_L = BY_NAME["lm"], BY_NAME["rouge_l"]


def metric(
    *, label: str = "", better: Literal["lower", "higher"] | None = None, unit: str = "", column: bool = True,
    plot: str = "",
) -> Callable[[Function], Function]:  # fmt: skip
    """Declare a function of a plug-in as a metric per token, called as the function. Arguments: fields of Metric.

    The function takes the student's log-probabilities [N, V] and a Target, and returns values [N]. The first line of
    its docstring is the meaning. All arguments are literals, since they are read without importing the plug-in.
    """
    return lambda function: function


def metrics() -> tuple[Metric, ...]:
    """Return kd's metrics and those of allowed plug-ins; raise UserError for two of one name."""
    by_name = dict(BY_NAME)
    for target, function, (_, fields) in plugins.decorated("metric"):
        if function.name in by_name:
            other = by_name[function.name].function or "a metric of kd"
            hint = "give the function another name"
            raise UserError(option=target, why=f"has the name of {other}", hint=hint)
        by_name[function.name] = _of_plugin(
            target, function.name, plugins.first_docstring_line(function).rstrip("."), fields
        )
    return tuple(by_name.values())


def benchmarks(results: Iterable[dict]) -> tuple[Metric, ...]:
    """Return the benchmarks that results have as metrics, which report neither a plot nor a column of their own."""
    by_name: dict[str, Metric] = {}
    directions: dict[bool, Literal["lower", "higher"]] = {True: "higher", False: "lower"}
    for result in results:
        for benchmark in result.get("benchmarks", {}).values():
            for task, row in benchmark["tasks"].items():
                for key in row["values"]:
                    better = directions.get(row["higher_is_better"].get(key))
                    meaning = f"{row['samples']} examples with {row['shots']} shots" if row["samples"] else "of a group"
                    name = f"{BENCHMARK}{task}/{key}"
                    by_name.setdefault(name, Metric(name, f"{task} {key}", meaning, better, column=False))
    return tuple(by_name.values())


def standard_error(result: dict, metric: Metric) -> float | None:
    """Return the standard error that lm-eval gives a benchmark of a result, over its examples."""
    _, task, key = metric.name.split("/", 2)
    rows = [
        benchmark["tasks"][task] for benchmark in result.get("benchmarks", {}).values() if task in benchmark["tasks"]
    ]
    return rows[-1]["stderr"].get(key) if rows else None


def with_parts(keys: Iterable[str]) -> tuple[Metric, ...]:
    """Return all metrics, and the loss on each part of a mixture that the keys of results name (val/lm/PART)."""
    names = dict.fromkeys(key.removeprefix(f"{LOSS.key}/") for key in keys if key.startswith(f"{LOSS.key}/"))
    meaning = "loss on the held-out text of {} alone"
    parts = [Metric(f"{LOSS.name}/{n}", f"loss on {n}", meaning.format(n), "lower", teacher=True) for n in names]
    loss, *others = metrics()
    return (loss, *parts, *others)


def _of_plugin(target: str, name: str, meaning: str, fields: dict[str, Any]) -> Metric:
    try:
        label = fields.pop("label", "") or name
        return Metric(name, label, meaning, function=target, **fields)
    except TypeError as error:
        raise UserError(option=f"@metric of {target}", why=str(error), hint="correct its arguments") from None
