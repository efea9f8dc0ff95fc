"""Names of runs, and of the teachers, starts and stores that they need, are those of earlier versions of kd.

A name that moves has every finished run of it trained again. The digest of the data is the same for all here, since the
standard library differs from one Python to the next. After a change that has to rename:
  python -m tests.test_golden
"""

import json
import os
import shlex
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import hydra
import pytest
from omegaconf import OmegaConf

import train  # noqa: F401, registers the sizes
from kd.config import options
from kd.config.components import CONF, SWEEPS
from kd.config.compose import hydra_ready
from kd.config.schema import ExperimentConfig
from kd.data import packing
from kd.experiment.dependencies import Plan
from kd.launch.sweeper import SweepFileSweeper, at_scale

GOLDEN = Path(__file__).parent / "golden"
REPOSITORY = Path(__file__).parent.parent  # a line names a file in it
LINES = """
logits=none teacher=none
seed=1
loss=rkl temperature.tau=2
loss=akl truncation=top_k truncation.k=50
loss=jsd loss.beta=0.1
loss=tvd alpha=linear_decreasing
loss=mse lr=cosine
truncation=top_p truncation.p=0.9
truncation=random loss=fkl
truncation=top_p_k target=rest
target=leftover truncation=top_k
target=revise truncation=top_k
temperature=normkd
temperature=std
temperature=entropy
temperature=wttm
routing=entropy
alpha=wsd lr=wsd
alpha=cosine lr=period
alpha=linear_increasing lr=linear_increasing
lr=linear_decreasing
optim=adamw
optim=adamw8
trainer.attention=eager
trainer.gradient_checkpointing=true
teacher.dtype=int8
logits=offline truncation=top_k truncation.k=50 teacher.dtype=int8
student=1m teacher=3m
start=teacher start.layers=1
start=teacher student=teacher start.layers=[0,1] start.ffn=64 logits=none
start=teacher start.layers=1 start.keep=influence data=instructions logits=offline
start=teacher start.layers=1 start.keep=random seed=1
logits=cotrained
logits=offline truncation=top_k truncation.k=50
logits=offline truncation=random truncation.draws=20
logits=recorded truncation=top_k truncation.k=5
logits=offline record=full truncation=top_p
logits=offline record=top_p_k truncation=top_k truncation.k=5
logits=offline record=top_p truncation=top_p truncation.p=0.5
logits=none teacher=none record=top_k
logits=none teacher=none record=random
trainer.precision=bf16
trainer=pretrain
trainer=debug
trainer.tokens=100000
trainer.keep=best trainer.patience=3
trainer.keep=all
trainer=ddp trainer.batch=4
trainer=fsdp trainer.batch=4
data=markov data.states=16 data.branching=4
data.tokens=100000
data.seq_len=64 data.vocab=512
data=hub data.name=roneneldan/TinyStories data.special=tokens
data=hub data.name=roneneldan/TinyStories
data=text data.files=README.md
data=mixture data.parts={code:{source:python,weight:0.7},readme:{source:text,files:README.md,weight:0.3}}
data.isolate=true
data=instructions logits=none
data=instructions logits=none data.pack=true
data=instructions start=sft alpha.peak=0.5
data=instructions start=sft rollout=student rollout.share=1 loss=rkl alpha.peak=1
data=instructions start=sft rollout=mixed loss=minillm lm=plain alpha.peak=0.5
data=instructions start=sft rollout=mixed_code loss=minillm lm=plain alpha.peak=0.5
data=instructions start=sft rollout=adaptive loss=skl lm=plain alpha.peak=0.5
data=instructions start=sft rollout=pairs loss=distillm2 alpha.peak=1
data=instructions start=sft loss=atkd routing=uncertainty alpha.peak=1
data=instructions start=sft logits=none rollout=teacher
data=instructions start=pretrained loss=srkl
data=instructions data.template=alpaca responses.samples=2
data=instructions data.name=tatsu-lab/alpaca data.turns=all teacher=hub teacher.name=openai-community/gpt2 teacher.sft=true
data=instructions plain=text plain.files=README.md start=pretrained logits=none teacher=none
student=hub student.name=openai-community/gpt2 teacher=hub teacher.name=openai-community/gpt2-medium data.tokenizer=gpt2
student=hub student.name=openai-community/gpt2 teacher=hub teacher.name=openai-community/gpt2-medium adapter=lora
student=hub student.name=openai-community/gpt2 teacher=hub teacher.name=openai-community/gpt2-medium adapter=lora adapter.rank=4 adapter.alpha=8 adapter.targets=[c_attn] adapter.rslora=true
student=hub student.name=openai-community/gpt2 teacher=hub teacher.name=openai-community/gpt2-medium adapter=lora adapter.export=both
data=instructions start=sft adapter=lora adapter.head=true
method=sft
method=kd
method=seqkd
method=gkd
method=opd
method=opd_token
method=minillm
method=minillm_code
method=distillm
method=distillm2
method=atkd
method=akl
experiment=c4_330m
experiment=c4_100m
method=minillm experiment=dolly_gpt2
""".strip().splitlines()  # noqa: E501


SWEEP_FILES = sorted(SWEEPS.glob("*.yaml"))
NOWHERE = (f"root={GOLDEN / 'none'}", "logger=none")  # nothing is made there


def names(config: ExperimentConfig) -> list[str]:
    """Name of a run, and of all that is made for it, in the order of making."""
    planned = Plan.from_config(config)
    needed = [name for part in (planned.teacher, planned.start) if part for name in names(part)]
    return [planned.run.name, *([planned.store.key] if planned.store else []), *needed]


def config_of(words: Iterable[str]) -> ExperimentConfig:
    words = [*words, *NOWHERE]
    with hydra_ready():
        return ExperimentConfig.from_hydra(hydra.compose("config", words), words)


def runs_of(file: Path, scale: str) -> list[list[str]]:
    """The words of each run of a sweep; of several seeds, those of the first."""
    listed = []
    sweeper = SweepFileSweeper()
    sweeper.config = OmegaConf.create({"sweep": {"name": file.stem, **OmegaConf.load(file)}, "scale": scale})
    sweeper.hydra_context = SimpleNamespace(config_loader=None)
    sweeper.launcher = SimpleNamespace(launch=lambda jobs, **_: listed.extend(jobs) or [])
    sweeper.sweep([])
    return [words for words in listed if not any(w.startswith("seed=") and w != "seed=0" for w in words)]


def scales_of(file: Path) -> list[str]:
    return list(OmegaConf.load(file).get("scales") or ["cpu"])


def lines_of(file: Path, scale: str) -> list[str]:
    base, lines = at_scale(OmegaConf.load(file), scale)
    return [base, *(line for _, line in lines)]


def of_lines() -> dict[str, list[str]]:
    return {line: names(config_of(line.split())) for line in LINES}


def of_sweep(file: Path, every: bool = True) -> dict[str, dict[str, list[str]]]:
    """Scale -> words of a run, without those of its scale -> names; unless `every`, of runs with a new word alone."""
    names_by_scale: dict[str, dict[str, list[str]]] = {}
    seen: set[str] = set()
    for scale in scales_of(file):
        common = shlex.split(lines_of(file, scale)[0])
        names_by_scale[scale] = {}
        for words in runs_of(file, scale):
            line = " ".join(w for w in words if w not in common)
            names_by_scale[scale][line] = []
            if every or set(words) - seen:
                config = config_of(words)
                assert reads_new_text(config)
                names_by_scale[scale][line] = names(config)
                seen.update(words)
    return names_by_scale


def reads_new_text(config: ExperimentConfig) -> bool:
    """Tell whether the text of a hub, as far as a run takes it, suffices for all steps."""
    read = config.trainer.steps * config.trainer.batch * config.data.seq_len
    return config.data.name != "hub" or (config.data.tokens or read) >= read


@pytest.fixture
def same_data(monkeypatch):
    """One digest of all data."""
    monkeypatch.setattr(packing, "key", lambda *_, **__: "0" * 16)
    monkeypatch.chdir(REPOSITORY)


def golden(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def test_no_name_has_moved(same_data):
    assert of_lines() == golden("names")


@pytest.mark.parametrize("every", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize("sweep", SWEEP_FILES, ids=lambda file: file.stem)
def test_no_name_of_a_sweep_has_moved(same_data, sweep, every):
    """The words are for who reads the file: a sweep may come to say the same in other words."""
    now, before = of_sweep(sweep, every), golden("sweeps")[sweep.stem]
    assert list(now) == list(before)
    for scale, runs in now.items():
        for new, old in zip(runs.values(), before[scale].values(), strict=True):
            assert new == old or not (new or every)
    assert any(map(any, (runs.values() for runs in now.values())))


def test_every_sweep_that_has_names_is_a_file():
    assert list(golden("sweeps")) == [file.stem for file in SWEEP_FILES]


def test_every_option_has_a_name_here():
    """But for where metrics go, which names no run."""
    with hydra_ready():
        usual = hydra.compose("config", return_hydra_config=True).hydra.runtime.choices
    named = {f"{group}={option}" for group, option in usual.items()}
    lines = [*LINES, *(line for file in SWEEP_FILES for scale in scales_of(file) for line in lines_of(file, scale))]
    words = [word for line in lines for word in line.split()]
    for preset in ("method", "experiment"):
        named |= {f"{preset}={name}" for group, _, name in (word.partition("=") for word in words) if group == preset}
        words += [word for file in (CONF / preset).glob("*.yaml") for word in options.words_of(preset, file.stem)]
    for word in words:
        group, _, values = word.partition("=")
        named |= {f"{group}={value}" for value in values.split(",")}
    with_file = {f"{file.parent.name}={file.stem}" for file in CONF.glob("*/*.yaml") if file.parent.name != "logger"}
    assert with_file and not with_file - named


if __name__ == "__main__":
    os.chdir(REPOSITORY)
    pytest.MonkeyPatch().setattr(packing, "key", lambda *_, **__: "0" * 16)
    current = {"names": of_lines(), "sweeps": {file.stem: of_sweep(file) for file in SWEEP_FILES}}
    for kind, content in current.items():
        (GOLDEN / f"{kind}.json").write_text(json.dumps(content, indent=1) + "\n")
