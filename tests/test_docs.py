"""Commands of the README, CONTRIBUTING and docs: each is parsed as it stands, and run at a tiny size.

The slow test runs all commands of a page in turn, with settings that make them small. Names of the Hub
are folders there with tiny models and texts, so names stay as typed. A bucket is a folder, and SLURM is tests/slurm.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from torch.distributed.run import get_args_parser

import train  # noqa: F401, registers the sizes
from kd.config import security
from kd.config.components import option_names
from kd.config.compose import config_of
from kd.config.options import option_of
from kd.errors import UserError
from kd.evaluate import RUN_WORDS, evaluation_words
from kd.launch.sweeper import at_scale, without_unused
from kd.runs import __main__ as runs_program
from kd.runs.identity import identity
from sweeps.fit.__main__ import argument_parser
from sweeps.report.arguments import add_wandb_switch, sweep_parser
from tests import words as words_check
from tests.small import TRAIN, python
from tests.sweeps.fake import Sweep
from tests.sweeps.planted import finished, planted

ROOT = TRAIN.parent
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))]


# Commands of a page


@dataclass(frozen=True)
class Command:
    """Command of a fenced block `sh`, without comments, as words."""

    page: str
    line: int
    words: tuple[str, ...]

    @property
    def program(self) -> str:
        """The program, without its words: train.py, kd.store, make."""
        return self.words[2] if self.words[1:2] == ("-m",) else self.words[1] if self.is_python else self.words[0]

    @property
    def arguments(self) -> list[str]:
        """All words behind the program."""
        return list(self.words[3 if self.words[1:2] == ("-m",) else 2 if self.is_python else 1 :])

    @property
    def is_python(self) -> bool:
        return self.words[0].rpartition("/")[2] == "python"

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {shlex.join(self.words)}"


def commands(page: str) -> Iterator[Command]:
    """Yield the commands of a page in their order."""
    text = (ROOT / page).read_text()
    for block in re.finditer(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        line = text[: block.start(1)].count("\n") + 1
        for typed in re.split(r"(?<!\\)\n", block[1]):
            words: list[str] = []
            for word in [*shlex.split(typed.replace("\\\n", " "), comments=True), "&&"]:
                if word != "&&":
                    words.append(word)
                elif words:
                    yield Command(page, line, tuple(words))
                    words = []
            line += typed.count("\n") + 1


ALL = [command for page in PAGES for command in commands(page)]


def test_every_page_of_the_site_is_in_its_navigation():
    class Loader(yaml.SafeLoader):
        pass

    site = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)
    pages = set(re.findall(r"[\w/]+\.md", str(site["nav"])))
    assert pages == {str(path.relative_to(ROOT / "docs")) for path in ROOT.glob("docs/**/*.md")}


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_to_files(page):
    for link in re.findall(r"\]\((?!https?://)([^)#]+)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(link).exists(), link


def test_readme_names_all_options():
    rows = dict(re.findall(r"^\| (`[\w`, ]+) \| (.*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE))
    for groups, row in rows.items():
        for group in re.findall(r"\w+", groups):
            if group not in ("student", "teacher", "start", "optim", "experiment", "sweeps"):  # in words, or elsewhere
                missing = set(option_names(group)) - set(re.findall(r"`(\w+)`", row))
                assert not missing, f"{group}: {missing}"
    assert {"loss", "rollout", "method"} <= {group for groups in rows for group in re.findall(r"\w+", groups)}


# Parsed as they stand


def jobs(words: list[str]) -> list[list[str]]:
    """Return the words of each run of a command, as the sweeper makes them; an interval of a search is left out."""
    typed = [word for word in words if not word.startswith(("-", "hydra", "sweeps=", "scale=", "~"))]
    lines = [""]
    if name := option_of("sweeps", words):
        file = yaml.safe_load((ROOT / "sweeps" / f"{name}.yaml").read_text())
        base, named = at_scale(file, next((w.partition("=")[2] for w in words if w.startswith("scale=")), "cpu"))
        lines = [f"{base} {line}" for _, line in named]
    jobs_of_line = []
    for line in lines:
        parsed = OverridesParser.create().parse_overrides([*shlex.split(line), *typed])
        for job in BasicSweeper.split_arguments([o for o in parsed if not o.is_interval_sweep()], None)[0]:
            jobs_of_line.append(job)
    return without_unused(jobs_of_line, typed)


def check_train(arguments: list[str]) -> None:
    if "--help" not in arguments:
        security.check_command_line(arguments)
        for job in jobs(arguments):
            config_of(job)


def check_store(arguments: list[str]) -> None:
    action, *words = arguments
    if action == "write":
        config_of(["logits=offline", *(word for word in words if not re.fullmatch(r"part=\d+/\d+", word))])
    else:
        assert (action == "merge" and len(words) > 2) or (action in ("info", "verify") and len(words) == 1)


def check_data(arguments: list[str]) -> None:
    assert arguments[0] == "show"
    config_of(arguments[1:])


def check_evaluate(arguments: list[str]) -> None:
    if arguments[0].startswith("runs="):
        assert {word.partition("=")[0] for word in arguments} <= set(RUN_WORDS)
        return
    for job in jobs(evaluation_words([word for word in arguments if word != "-m"])):
        config_of(job)


def check_report(arguments: list[str]) -> None:
    parser = sweep_parser("report", "")
    add_wandb_switch(parser)
    parser.parse_args(arguments)


def check_fit(arguments: list[str]) -> None:
    if "--help" not in arguments:
        argument_parser().parse_args(arguments)


def check_runs(arguments: list[str]) -> None:
    action, *words = arguments
    runs_program.parse_words(action, words)


def check_make(arguments: list[str]) -> None:
    (target,) = arguments
    assert f"\n{target}: .venv/installed\n" in (ROOT / "Makefile").read_text()


def check_pip(arguments: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    action, requirement = arguments
    assert action == "install" and requirement.removeprefix("kd[").removesuffix("]") in extras


def check_wandb(arguments: list[str]) -> None:
    assert arguments[0] in ("login", "agent") or (arguments[0] == "sweep" and (ROOT / arguments[1]).exists())


def check_pytest(arguments: list[str]) -> None:
    assert (ROOT / arguments[0]).exists()


def check_torchrun(arguments: list[str]) -> None:
    typed = get_args_parser().parse_args(arguments)
    assert typed.training_script == "train.py"
    check_train(typed.training_script_args)
    trainer = config_of(typed.training_script_args).trainer
    assert (str(trainer.nodes), str(trainer.devices)) == (typed.nnodes, typed.nproc_per_node)


def check_srun(arguments: list[str]) -> None:
    program = arguments.index("python")
    assert arguments[program + 1] == "train.py"
    words = arguments[program + 2 :]
    check_train(words)
    trainer = config_of(words).trainer
    assert {f"--nodes={trainer.nodes}", f"--ntasks-per-node={trainer.devices}"} <= set(arguments[:program])


CHECKS: dict[str, Callable[[list[str]], object]] = {
    "train.py": check_train,
    "kd.store": check_store,
    "kd.data": check_data,
    "kd.evaluate": check_evaluate,
    "kd.runs": check_runs,
    "sweeps.report": check_report,
    "sweeps.fit": check_fit,
    "sweeps.dashboard": sweep_parser("dashboard", "").parse_args,
    "make": check_make,
    "pip": check_pip,
    "wandb": check_wandb,
    "pytest": check_pytest,
    "torchrun": check_torchrun,
    "srun": check_srun,
    "lm_eval": lambda arguments: None,  # its package is in an extra that the tests do not install
    ".": lambda arguments: None,  # .venv/bin/activate, which python -m venv makes
}


@pytest.mark.parametrize("command", ALL, ids=str)
def test_command_is_understood(command):
    CHECKS[command.program](command.arguments)


def test_run_that_is_recorded_is_no_run_of_another_command():
    """A reader of another page has no finished run in its place, which could not be recorded any more."""
    words = [command.arguments for command in ALL if command.program == "train.py" and "--help" not in command.words]
    every = [job for line in words for job in jobs(line) if option_of("logits", job) == "none"]
    recording = [job for job in every if option_of("record", job)]
    students = {option_of("student", job) for job in recording}
    rest = [job for job in every if job not in recording and option_of("student", job) in students]
    recorded, others = ({(c.root, identity(c.flat())) for c in map(config_of, part)} for part in (recording, rest))
    assert recorded and others and not recorded & others


# Run at a tiny size

# Commands that are not run, and why.
NOT_RUN = {
    "make": "installs packages of the network; its targets are what CI runs",
    "pip": "installs packages of the network",
    "pytest": "is what runs these tests",
    "lm_eval": "needs a package of an extra, and the benchmarks of the Hub",
    "wandb": "needs an account; tests/runs/test_wandb_agent.py plays an agent against a server of its own",
    "sweeps.dashboard": "needs an account; tests/sweeps/test_dashboard.py saves one on a server of its own",
    ".": "changes the shell",
    "torchrun": "needs several machines; tests/parallel/test_nodes.py has two agents on one",
    "srun": "needs SLURM; tests/launch/test_cluster.py has tasks of one that is made up",
}
PARSED = {"docs/results.md": "its commands are all sweeps of sweeps/, which are hundreds of runs even if each is small"}
SMALL = """trainer.steps=2 trainer.batch=4 trainer.micro_batch=2 trainer.val_every=2 trainer.checkpoint_every=2
trainer.log_every=1 teacher.steps=2 teacher.batch=2 start.steps=2 start.sft_steps=2 data.seq_len=64 data.val_rows=4
data.tokens=4000 data.template=plain rollout.max_tokens=4 responses.samples=1 logger=none""".split()  # noqa: SIM905
PARTLY = {
    "trainer.devices": "2",
    "trainer.nodes": "2",
    "n_jobs": "2",
    "hydra.sweeper.n_trials": "2",
    "rollout.capacity": "4",
    "start.layers": "1",
}
LISTS = {"trainer.steps": ("2", "4", "6"), "seed": ("0",)}


def shrunk(arguments: list[str]) -> list[str]:
    """Return the words of a command for a run of seconds: large values replaced, and small ones added where allowed."""
    if "--help" in arguments:
        return arguments
    small = dict(word.split("=", 1) for word in SMALL)
    words = []
    for word in arguments:
        name, _, value = word.partition("=")
        if name in LISTS and "," in value:
            word = f"{name}={','.join(LISTS[name][: value.count(',') + 1])}"
        elif name in PARTLY | small and name != "logger":
            word = f"{name}={(PARTLY | small)[name]}"
        words.append(word)
    typed = {word.partition("=")[0] for word in words}
    if not typed & {"data", "method", "experiment"} and option_of("sweeps", words) != "minillm":
        words += ["data=markov", "data.states=100", "data.branching=4"]  # the default takes seconds to be packed
    if "," in (option_of("method", words) or "") or option_of("sweeps", words) == "minillm":
        words += ["data=instructions", "start=sft"]  # as of each run, so that settings below them can be typed
    every = jobs(words)
    for word in SMALL:
        name = word.partition("=")[0]
        length = {"trainer.steps", "trainer.tokens"}
        everywhere = any if name.startswith("teacher.") else all  # a sweep leaves these out where no teacher is trained
        is_free = name not in typed and not (name in length and length & typed)
        if is_free and everywhere(accepted(job, word) for job in every):
            words.append(word)
    if option_of("sweeps", words):
        words.append("seed=0")
    return words


def accepted(job: list[str], word: str) -> bool:
    try:
        config_of([*(w for w in job if w.partition("=")[0] != word.partition("=")[0]), word])
    except UserError:
        return False
    return True


def put_models(root: Path) -> None:
    """Write tiny models under the names of the Hub that the documents use, all with one tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    for seed, name in enumerate(("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-360M", "openai-community/gpt2",
                                 "MiniLLM/teacher-gpt2-1.5B")):  # fmt: skip
        torch.manual_seed(seed)
        config = LlamaConfig(vocab_size=len(fast), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                             num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512,
                             bos_token_id=None, eos_token_id=0)  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(root / name)
        fast.save_pretrained(root / name)


SENTENCES = [f"The {a} {b} has number {n}.\n" for n in range(40) for a in ("red", "old", "new") for b in ("box", "cup")]


def put_texts(root: Path) -> None:
    """Write small texts under the names of the documents."""
    texts = [{"text": "".join(SENTENCES[n : n + 20])} for n in range(200)]
    pairs = [{"prompt": f"{n} + 1?", "response": f"It is {n + 1}."} for n in range(200)]
    dolly = [{"instruction": pair["prompt"], "context": "", "response": pair["response"]} for pair in pairs]
    for name, rows in {
        "notes/a.jsonl": texts, "chats/a.jsonl": pairs, "roneneldan/TinyStories/train.jsonl": texts,
        "Skylion007/openwebtext/train.jsonl": texts, "databricks/databricks-dolly-15k/train.jsonl": dolly,
    }.items():  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"task": "numbers", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "tasks/a.jsonl"}},
            "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{prompt}}", "doc_to_target": 0,
            "doc_to_choice": "{{[response, 'No.']}}", "metric_list": [{"metric": "acc"}]}  # fmt: skip
    (root / "tasks").mkdir(exist_ok=True)
    (root / "tasks" / "a.yaml").write_text(yaml.safe_dump(task))
    (root / "tasks" / "a.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs[:8]))
    (root / "notes" / "a.txt").write_text("\n\n".join(row["text"] for row in texts))


def put_scaling(root: Path) -> None:
    """Write the results of the sweep `scaling`, with losses of known laws: its runs take more than seconds."""
    (root / "runs" / "sweeps").mkdir(parents=True, exist_ok=True)
    sweep = finished(Sweep(root / "runs", "scaling"), planted(0.001))
    (root / "runs/sweeps/scaling.json").write_text(json.dumps({"name": "scaling", "runs": sweep.runs}))


@pytest.fixture
def cluster(tmp_path) -> dict[str, str]:
    """The environment of a SLURM of this machine."""
    folder = tmp_path / "slurm"
    (folder / "bin").mkdir(parents=True)
    for name in ("sbatch", "srun", "scancel", "squeue", "sacct", "scontrol"):
        path = folder / "bin" / name
        path.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT / "tests" / "slurm.py"} {name} "$@"\n')
        path.chmod(0o755)
    return {"SLURM_FAKE": str(folder), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}


def run(command: Command, folder: Path, cluster: dict[str, str]) -> None:
    """Run a command in a folder, small and with stand-ins; assert that it ends with 0."""
    words, environment = command.arguments, {}
    if not importlib.util.find_spec("lm_eval"):  # in an extra that the tests do not need
        if words[0].startswith("runs="):
            return
        words = [word for word in words if not word.startswith("benchmarks=")]
    words = ["benchmarks=[tasks/]" if word.startswith("benchmarks=") else word for word in words]  # no network
    if command.program == "train.py":
        if "scale=full" in words:
            return  # measures steps of models for GPUs, on a dataset of the Hub
        if "sweeps=scaling" in words:
            put_scaling(folder)
            return
        words = shrunk(words)
    elif command.program in ("kd.store", "kd.data") and words[0] in ("write", "show"):
        written = ["logits=offline"] if words[0] == "write" else []
        part = [word for word in words if word.startswith("part=")]
        rest = [word for word in words[1:] if word not in part]
        words = [words[0], *shrunk([*written, *rest])[len(written) :], *part]
    elif command.program == "kd.evaluate" and not words[0].startswith("runs="):
        typed = evaluation_words([word for word in words if word != "-m"])
        names = {word.partition("=")[0] for word in typed}
        every = jobs(typed)
        small = [word for word in SMALL if word.partition("=")[0] not in names]
        words += [word for word in small if all(accepted(job, word) for job in every)]
    elif command.program == "sweeps.fit" and "--help" not in words:
        words += ["--bootstrap", "2"]
    if "--wandb" in words:
        environment = {"WANDB_MODE": "offline", "HOME": str(folder)}
    words = [word.replace("s3://bucket", f"file://{folder}/bucket") for word in words]
    if any("hydra/launcher=submitit_slurm" in word for word in words):
        environment = cluster
        words = [word for word in words if "gpus_per_node" not in word]  # there is none
    if any("hydra/launcher=ray" in word for word in words):
        if not importlib.util.find_spec("ray"):
            return  # it is in an extra that the tests do not need; tests/launch/test_cluster.py has more of it
        words = [word for word in words if "address" not in word and "num_gpus" not in word]
    start = ["-m", command.program] if command.words[1] == "-m" else [str(TRAIN)]
    process = python([sys.executable, *start, *words], folder, KD_CACHE=str(folder / "cache"), **environment)
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, f"{command}\n{shlex.join(words)}\n{output}"


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """The folder of all commands, so that what several pages show is run once."""
    root = tmp_path_factory.mktemp("commands")
    put_models(root)
    put_texts(root)
    return root


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", sorted({c.page for c in ALL if c.program not in NOT_RUN} - PARSED.keys()))
def test_commands_of_a_page_run(page, folder, cluster):
    for command in commands(page):
        if command.program not in NOT_RUN:
            run(command, folder, cluster)


# Words


def test_words_of_documents_and_code_keep_the_rules():
    assert words_check.check() == []


def test_docstrings_of_tests_keep_the_rules_too(tmp_path, monkeypatch):
    monkeypatch.setattr(words_check, "ROOT", tmp_path)
    monkeypatch.setattr(words_check, "documents", list)
    (tmp_path / "tests").mkdir()
    for name in ("setup.py", "train.py", "tests/test_a.py"):
        (tmp_path / name).write_text('"""What it does."""\n')
    assert len(words_check.check()) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [("One two three. Four `a.b` five.", ["One two three.", "Four code five."]),
     ("See e.g. this. [A link](x.md) ends.", ["See e.g this.", "A link ends."]),
     ("- an item\n- another\n", ["an item", "another"]), ("```sh\nlong\n```\nShort.", ["Short."]),
     ("| a | b. C |\n|---|---|\n", [" a ", " b.", "C "])],
)  # fmt: skip
def test_sentences_of_a_document(text, expected):
    assert [s for _, paragraph in words_check.paragraphs(text) for s in words_check.sentences(paragraph)] == expected


@pytest.mark.parametrize(
    ("rule", "source", "expected"),
    [
        (words_check.name_faults, "def f(of): made = 1\n", ["of", "made"]),
        (words_check.name_faults, "softening = f()\n", []),
        (words_check.name_faults, "import re as said\n", ["said"]),
        (words_check.docstring_faults, '"""Whether so."""\n', ["Whether"]),
        (words_check.docstring_faults, 'def f():\n    """From here."""\n', ["From"]),
        (words_check.docstring_faults, '"""Return."""\n', []),
        (words_check.docstring_faults, '"""In-place sum."""\n', []),
    ],
)
def test_faults_of_code_are_found(rule, source, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(words_check, "ROOT", tmp_path)
    (tmp_path / "a.py").write_text(source)
    faults = list(rule(tmp_path / "a.py"))
    assert len(faults) == len(expected) and all(name in fault for name, fault in zip(expected, faults))
