"""The exported student: weights, tokenizer and model card for plain transformers."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from pathlib import Path

import kd
from kd.config.schema import ExperimentConfig
from kd.config.secrets import redacted
from kd.runs.identity import model_name, size_text
from kd.runs.run import Run
from kd.runs.seal import STUDENTS
from kd.system import files


def environment() -> dict[str, str | None]:
    """Return the code, libraries and machine that a result depends on beside its config."""
    here = Path(__file__).parent.parent.parent
    versions = {
        n: importlib.metadata.version(n) for n in ("torch", "lightning", "transformers", "datasets", "hydra-core")
    }
    return {"python": platform.python_version(), "machine": platform.machine(), **versions, "git": _git(here)}


def _git(folder: Path) -> str | None:
    """Return the commit of the checkout, with + if files differ from it; None without a checkout or git."""
    if not (folder / ".git").exists() or not shutil.which("git"):
        return None

    def ask(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True).stdout.strip()

    return ask("rev-parse", "--short=12", "HEAD") + ("+" if ask("status", "--porcelain", "-uno") else "")


MODEL_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [knowledge-distillation]
---
# {name}

A {student} student, {parameters}, trained on {tokens:,} tokens of `{data}` {training}.{step}

| measure, on held-out text | value |
|---|---|
{measures}

Settings: `config.json` of the run `{name}` (kept here as `kd.json`). Trained with kd {version}, git revision {git}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```
"""


def selected_step(result: dict) -> str:
    """Return a sentence, without its full stop, on the step that a result is of; empty for the last of all steps."""
    step, last, config = result.get("step"), result.get("steps"), result["config"]
    steps = config["trainer.steps"]
    if step is None or last is None or step == steps:
        return ""
    text = f"The result is of step {step:,} of {steps:,}" + (", the best by val/lm" if step != last else "")
    if last == steps:
        return text
    return (
        f"{text}; training ended at step {last:,}, after {config['trainer.patience']} validations without a better one"
    )


def export(run: Run, model, tokenizer, ends: list[int], config: ExperimentConfig, result: dict) -> None:
    """Write the student with its tokenizer and a model card, for plain transformers.

    ends: tokens that ended rows in training. generate() stops at these, and no longer at those that the model named
    before.
    """
    flat = result["config"]
    training = "by language modelling alone"
    if flat["logits"] != "none":
        teacher = f"a {name} teacher" if (name := model_name(flat, "teacher")) else "stored logits"
        training = f"from {teacher} with the loss `{flat['loss']}`"
    step = selected_step(result)
    measures = "\n".join(f"| {k.removeprefix('val/')} | {v:.4f} |" for k, v in result["final"].items() if "/" in k)
    card = MODEL_CARD.format(
        name=run.name, student=model_name(flat, "student"), tokens=result["tokens"],
        parameters=size_text(result["parameters"], result["active_parameters"], result["trainable_parameters"]),
        data=flat["data"], training=training, step=f" {step}." if step else "",
        measures=measures, version=kd.__version__, git=result["environment"]["git"] or "unknown",
    )  # fmt: skip
    with files.atomic(run / "student") as temporary:
        write_model(temporary, model, tokenizer, ends)
        (temporary / "README.md").write_text(card)
        files.write_json(temporary / "kd.json", redacted(config.to_dict()))


def export_step(run: Run, step: int, model, tokenizer, ends: list[int]) -> None:
    """Write the student of a step into the folder of all validations, without a card."""
    folder = run / STUDENTS / f"step-{step:08}"
    folder.parent.mkdir(exist_ok=True)
    with files.atomic(folder) as temporary:
        write_model(temporary, model, tokenizer, ends)


def write_model(folder: Path, model, tokenizer, ends: list[int]) -> None:
    """Write a model and its tokenizer. ends: see export()."""
    eos = ends[0] if len(ends) == 1 else ends or None
    for settings in filter(None, (model.config, model.config.get_text_config(), model.generation_config)):
        settings.eos_token_id = eos
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
