"""Sweeps whose run folders are written by the test, and their reports."""

import json
import math
import re

from plotly.offline import get_plotlyjs

from kd.experiment.results import read_run
from sweeps.report.groups import group_runs
from sweeps.report.report import Report, build_report
from sweeps.report.verdict import verdicts_of
from sweeps.report.write import write_report

CONFIG = {
    "seed": 0, "root": "runs", "sweep": None, "logger": "none", "data": "python", "data.seq_len": 256,
    "data.val_rows": 64, "data.tokens": None, "teacher.size": "1m", "teacher.name": None, "teacher.steps": 600,
    "student.size": "200k", "student.name": None, "logits": "online", "temperature": "fixed", "temperature.tau": 1.0,
    "loss": "fkl", "alpha": "constant", "alpha.peak": 0.9, "trainer.steps": 300, "trainer.batch": 16,
}  # fmt: skip
PARTS = {"akl": {"loss.mu": 0.5}, "jsd": {"loss.beta": 0.5}}
TEACHER = 1.9
EVIL = "</script><img src=x onerror=alert(1)>|`*[a](b)"


def packed_counts(config):
    """Return counts as a run records them, with as many held-out rows as the config allows."""
    rows = {"train": 4000, "val": config["data.val_rows"]}
    unit = "examples" if config["data"] == "instructions" else "documents"
    counts = {"left_out": {}, "unlearned": {}, "unused": {}, "cut": 0, "special_as_text": 0, "prompts_only": 0}
    return {"unit": unit, "read": sum(rows.values()), "used": rows, "rows": rows, **counts}


class Sweep:
    """Run folders as train.py leaves them."""

    def __init__(self, root, name="s"):
        self.root, self.name, self.runs = root, name, []

    def done(self, method, seed, loss, git="abc", entropy=None, **config):
        """Add a finished run with this loss on held-out text; method lm is language modelling alone."""
        part = {"logits": "none"} if method == "lm" else {"loss": method} | PARTS.get(method, {})
        config = CONFIG | part | {"seed": seed} | config
        far = 0.1 if method == "lm" else 0.0
        final = {
            "val/lm": loss, "val/bpb": loss / math.log(2) / 3, "val/fkl": 0.4 + far, "val/rkl": 0.5 + far,
            "val/tvd": 0.25 + far, "val/agreement": 0.625 - far, "val/ece": 0.0321,
            "val/teacher_lm": TEACHER, "val/teacher_ece": 0.0123,
        }  # fmt: skip
        if config["teacher.size"] is None:
            final = {k: final[k] for k in ("val/lm", "val/bpb", "val/ece")}
        result = {
            "state": "done", "config": config, "final": final, "environment": {"git": git, "torch": "2"},
            "parameters": 418_272, "teacher_parameters": 1_278_912, "bytes_per_token": 3.0, "entropy": entropy,
            "tokens": 1_228_800, "flops": 1e12, "seconds": 60.0, "data": packed_counts(config),
        }  # fmt: skip
        curve = [{"step": s, "tokens": s * 4096, "flops": s * 1e9, "val/lm": loss + 300 - s} for s in (100, 200, 300)]
        lines = [{"step": 10, "train/loss": 5.0, "tokens": 40960, "flops": 1e10}, *curve]
        self.add(
            [f"loss={method}", f"seed={seed}"],
            {
                "result.json": json.dumps(result),
                "metrics.jsonl": "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 30',
            },
        )
        return self

    def wrote(self, method, seed, rouge, loss=2.5, curve=(0.0, 0.1), prompts=7, text="a", fields=None, **config):
        """Add a finished run on instructions, whose responses have this Rouge-L; two samples of each prompt."""
        self.done(method, seed, loss, **{"data": "instructions", "responses.seed": 0} | config)
        folder = self.root / f"run-{len(self.runs) - 1}"
        result = json.loads((folder / "result.json").read_text())
        result["final"] |= {"val/rouge_l": rouge, "val/teacher_rouge_l": 0.5, "val/exaccerr": 0.25}
        lines = [
            {"row": row, "sample": sample, "prompt": f"p{row}", "reference": f"r{row}", "rouge_l": rouge,
             "response": f"{text}{row}.{sample}",
             "teacher": f"t{row}.{sample}", "teacher_rouge_l": 0.5} | (fields or {})
            for sample in (0, 1) for row in range(prompts)
        ]  # fmt: skip
        (folder / "result.json").write_text(json.dumps(result))
        (folder / "responses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "exaccerr.json").write_text(json.dumps({"exaccerr": list(curve)}))
        return self

    def began(self, **initial):
        """Give the last run these values before its training."""
        path = self.root / self.runs[-1]["run"] / "result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"initial": initial}))
        return self

    def losses(self, **methods):
        """Add runs with seeds 0, 1, … of each method."""
        for method, values in methods.items():
            for seed, loss in enumerate(values):
                self.done(method, seed, loss)
        return self

    def add(self, overrides, files=None):
        folder = self.root / f"run-{len(self.runs)}"
        self.runs.append({"run": folder.name, "overrides": overrides})
        for name, text in (files or {}).items():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        return self

    def groups(self):
        return group_runs([read_run(self.root, line) for line in self.runs])

    def verdict(self):
        """The verdict on a sweep of one task."""
        (verdict,) = verdicts_of(self.groups())
        return verdict

    def report(self) -> Report:
        (self.root / "sweeps").mkdir(exist_ok=True)
        (self.root / "sweeps" / f"{self.name}.json").write_text(json.dumps({"name": self.name, "runs": self.runs}))
        return build_report(self.root, self.name)

    def page(self) -> str:
        """The HTML without plotly's own code; the other files are written too."""
        path, *_ = write_report(self.root, self.report())
        return path.read_text().replace(get_plotlyjs(), "")

    def file(self, kind: str) -> str:
        return (self.root / "sweeps" / f"{self.name}.{kind}").read_text()


def cells(page, label):
    """Texts of the row of the table of numbers that begins with label."""
    table = page[page.index('<table class="numbers">') : page.index("<dl>")]
    for row in re.findall(r"<tr[^>]*>(.*?)</tr>", table, re.S):
        texts = [
            " ".join(re.sub(r"<[^>]+>", " ", c).split()) for c in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S)
        ]
        if texts and texts[0] == label:
            return texts
    raise AssertionError(f"no row {label}")
