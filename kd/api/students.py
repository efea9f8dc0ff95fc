"""Trained students as models of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kd.errors import UserError
from kd.models.hub import from_hub
from kd.runs.run import Run
from kd.system import files


def load_student(run: str | Path) -> tuple[Any, Any]:
    """Return the trained student of a run and its tokenizer, as transformers has them, in evaluation mode.

    run: folder or URL of the run, e.g. runs/fkl-200k-0123456789ab, or the `folder` of a record of load_results().
    Weights are read from safetensors alone, and no code of the model is run. All files are first checked against the
    digests in result.json. Raises UserError for a run that is not done, or was changed.

        model, tokenizer = kd.load_student("runs/fkl-200k-0123456789ab")
        print(tokenizer.decode(model.generate(**tokenizer("def ", return_tensors="pt"), max_new_tokens=20)[0]))
    """
    root, _, name = files.expanded(str(run)).rstrip("/").removesuffix("/student").rpartition("/")
    trained_run = Run(root or ".", name)
    if (result := trained_run.result()) is None:
        raise UserError(
            option=run,
            why=f"is {trained_run.state()['state']}" if trained_run.folder.is_dir() else "does not exist",
            need="the folder of a run that is done",
            hint="see all runs by kd.load_results(root)",
        )
    trained_run.check(result, "student")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, what = str(trained_run / "student"), f"The student of {name}"
    model = from_hub(AutoModelForCausalLM, folder, what, use_safetensors=True)
    return model.eval(), from_hub(AutoTokenizer, folder, what)
