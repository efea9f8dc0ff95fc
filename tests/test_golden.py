"""Names of runs, and of the teachers, starts and stores that they need, are those of earlier versions of kd.

A name that moves has every finished run of it trained again. The digest of the data is the same for all here, since the
standard library differs from one Python to the next. After a change that has to rename:
  python -m tests.test_golden
"""

import json
from pathlib import Path

import hydra
import pytest

import train  # noqa: F401, registers the sizes
from kd.config.components import CONF
from kd.config.rules import Settings, resolve
from kd.data import packing
from kd.experiment.dependencies import plan

NAMES = Path(__file__).parent / "golden" / "names.json"
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
alpha=linear_increasing
optim=adamw
student=1m teacher=3m
logits=cotrained
logits=offline truncation=top_k truncation.k=50
logits=offline truncation=random truncation.draws=20
logits=recorded truncation=top_k truncation.k=5
logits=none teacher=none record=top_k
trainer.precision=bf16
trainer=pretrain
trainer=debug
trainer.tokens=100000
trainer=ddp trainer.batch=4
trainer=fsdp trainer.batch=4
data=markov data.states=16 data.branching=4
data.tokens=100000
data.seq_len=64 data.vocab=512
data=hub data.name=roneneldan/TinyStories
data=instructions logits=none
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
student=hub student.name=openai-community/gpt2 teacher=hub teacher.name=openai-community/gpt2-medium data.tokenizer=gpt2
""".strip().splitlines()


def names(settings: Settings) -> list[str]:
    """Name of a run, and of all that is made for it, in the order of making."""
    planned = plan(settings)
    needed = [name for part in (planned.teacher, planned.start) if part for name in names(part)]
    return [planned.run.name, *([planned.store.key] if planned.store else []), *needed]


def golden(root: str) -> dict[str, list[str]]:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        words = [[*line.split(), f"root={root}", "logger=none"] for line in LINES]
        return {line: names(resolve(hydra.compose("config", w), w)) for line, w in zip(LINES, words, strict=True)}


def test_no_name_has_moved(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "key", lambda *_, **__: "0" * 16)
    assert golden(str(tmp_path)) == json.loads(NAMES.read_text())


if __name__ == "__main__":
    patch = pytest.MonkeyPatch()
    patch.setattr(packing, "key", lambda *_, **__: "0" * 16)
    NAMES.write_text(json.dumps(golden("runs"), indent=1) + "\n")
