"""A group takes the name of one option, and settings that this option has."""

import re
import shlex

import pytest

import train  # noqa: F401, registers what Hydra knows
from kd.config import components, security
from tests.cases import each
from tests.refusals import refused

pytestmark = pytest.mark.usefixtures("conf")

REFUSED = {
    # A list, of which Hydra would take the last option.
    "loss=[fkl,rkl]": "type -m loss=fkl,rkl.",
    "temperature=[normkd,fixed]": "type -m temperature=normkd,fixed.",
    "loss=[fkl]": "type -m loss=fkl.",
    "loss=[fkl,rkl],[jsd]": "type -m loss=fkl,rkl,jsd.",
    "trainer=[debug,ddp]": "type -m trainer=debug,ddp.",
    "student=[100k,200k]": "type -m student=100k,200k.",
    "lr=[1e-3,1e-2]": "type -m lr.peak=1e-3,1e-2.",
    "logger=[wandb,tensorboard]": "choose one of wandb,tensorboard.",
    "sweeps=[loss,demo]": "choose one of loss,demo.",
    "sweeps=loss,demo": "type sweeps=loss,",
    "hydra/launcher=[processes,slurm]": "choose one of processes,slurm.",
    # A number, which is meant for a setting.
    "temperature=2": "type temperature.tau=2.",
    "lr=1e-3": "type lr.peak=1e-3.",
    "lr=1e-3,3e-3": "type lr.peak=1e-3,3e-3.",
    "alpha=0.5": "type alpha.peak=0.5.",
    "truncation=50": "type truncation=top_k truncation.k=50, or truncation=random truncation.draws=50.",
    "truncation=0.9": "type truncation=top_p truncation.p=0.9.",
    "truncation=full,50": "type truncation=top_k truncation.k=50,",
    "record=20": "type record=top_k record.k=20,",
    "target=0.7": "type target=revise target.eta=0.7.",
    "routing=0.3": "type routing=entropy routing.share=0.3.",
    "loss=0.3": "loss=jsd loss.beta=0.3",
    "student=5": "choose one of 100k,",
    # A setting of another option, or of another group.
    "truncation.k=50": "truncation=full has no k; type truncation=top_k truncation.k=50",
    "truncation=full truncation.k=50": "truncation=full has no k; type truncation=top_k truncation.k=50",
    "+truncation.k=50": "type truncation=top_k truncation.k=50",
    "truncation.p=0.9": "type truncation=top_p truncation.p=0.9",
    "loss.mu=0.3": "type loss=akl loss.mu=0.3.",
    "loss=jsd loss.alpha=0.3": "type loss.beta=0.3, or loss=skl loss.alpha=0.3 (or alpha with srkl or distillm2).",
    "loss=akl loss.alpha=2": "type loss=skl loss.alpha=2 (or alpha with srkl or distillm2).",
    "loss=rkl loss.alpha=2": "loss=rkl has no alpha; type loss=skl loss.alpha=2",
    "truncation=top_k truncation.p=0.9": "type truncation=top_p truncation.p=0.9 (or p with top_p_k).",
    "truncation=top_p truncation.k=50": "type truncation=top_k truncation.k=50 (or k with top_p_k).",
    "alpha.decay=0.3": "type alpha=wsd alpha.decay=0.3.",
    "record.k=5": "type record=top_k record.k=5",
    "start.steps=5": "type start=pretrained start.steps=5",
    "student=hub optim.base_width=5": "optim=adamw has no base_width; type optim=mup optim.base_width=5.",
    "optim.lr=1e-3": "type lr.peak=1e-3.",
    "trainer.stepz=5": "type trainer.steps=5.",
    "responses.sample=5": "type responses.samples=5.",
    "batch=16": "type trainer.batch=16",
    "tau=2": "type temperature.tau=2.",
    "k=50": "type truncation=top_k truncation.k=50",
    "seeds=1": "type seed=1.",
    "loss._partial_=true": "loss=fkl has no _partial_",
    "method.loss=rkl": "method has no settings of its own; type loss=rkl.",
    "method.beta=1": "or loss=jsd loss.beta=1.",
    "method=gkd loss.mu=1": "loss=jsd has no mu; type loss=akl loss.mu=1.",
    "loss.mu=1 method=gkd loss.mu=1": "loss=jsd has no mu",
    # A name that no option has.
    "loss=forward_kl": "choose one of akl, atkd,",
    "loss=tvdd": "type loss=tvd,",
    "method=gdk": "method has no option gdk; type method=gkd, or another of akl,",
    "experiment=c4": "experiment has no option c4; choose one of c4_100m, c4_330m,",
    "student=gpt2": "student=hub student.name=gpt2.",
    "+loss=rkl": "type loss=rkl, without the +.",
    "+method=gkd": "type method=gkd, without the +.",
    "++loss=rkl": "type loss=rkl, without the +.",
    # null, true and false, which name no option.
    "logger=null": "type logger=none.",
    "routing=false": "type routing=none.",
    "teacher=null": "type teacher=none.",
    "loss=null": "choose one of akl, atkd,",
    "loss=true": "got true; choose one of akl, atkd,",
    "loss=fkl,null": "got null; choose one of akl, atkd,",
    "logger=true": "choose one of none, tensorboard, wandb.",
    "truncation=false": "choose one of full,",
    "student=null": "choose one of 100k,",
    "method=null": "leave method out for none, or choose one of akl,",
    "record=null": "leave record out for none, or choose one of full,",
    "record=null,full": "got null; leave record out",
    "sweeps=true": "got true; choose one of adaptive,",
    "hydra/launcher=null": "leave hydra/launcher out, or type hydra/launcher=processes.",
    "hydra/launcher=1": "got 1; leave hydra/launcher out, or type hydra/launcher=processes.",
    "hydra/sweeper=false": "leave hydra/sweeper out, or type hydra/sweeper=lines.",
    "~teacher": "teacher needs an option; type teacher=none.",
    "~loss=fkl": "loss needs an option; choose one of akl,",
    # A / before the name, or in it.
    "/loss=fkl": "type loss=fkl.",
    "/loss=[fkl,rkl]": "type 'loss=[fkl,rkl]'.",
    "//loss.mu=0.5": "type loss.mu=0.5.",
    "kd/loss=fkl": "type loss=fkl.",
    "+/seed=1": "type seed=1.",
    "data/seq_len=64": "type data.seq_len=64.",
    "loss/=fkl": "type loss=fkl.",
    "/hydra/launcher=ray": "type hydra/launcher=ray.",
}


@each("words", {words: words.split() for words in REFUSED})
def test_what_is_meant_for_a_setting_is_refused_with_what_to_type(words):
    option, equals, got = words[-1].partition("=")
    with refused(option=option, got=got if equals else ...) as caught:
        security.check_words(words)
    assert REFUSED[" ".join(words)] in f"{caught.value.why}; {caught.value.hint}."


def test_the_settings_of_the_typed_option_come_first():
    with refused(option="loss.alpha", got="2", need="a setting of loss=akl: mu"):
        security.check_words(["loss=akl", "loss.alpha=2"])
    with refused(option="loss.alpha", got="2") as caught:
        security.check_words(["method=akl", "loss.alpha=2"])
    assert not caught.value.need


def test_a_message_names_some_of_many_options():
    with refused(option="student", got="null") as caught:
        security.check_words(["student=null"])
    assert caught.value.hint.count(", ") < 9 and caught.value.hint.endswith("in all: python train.py --help)")


@pytest.mark.parametrize(
    "words",
    ["loss=fkl,rkl", "loss=glob(*)", "loss=choice(fkl,rkl)", "truncation=full,top_k truncation.k=5",
     "sweeps=loss truncation.k=5", "truncation=top_k truncation.k=range(1,9)", "student=hub optim.weight_decay=0",
     "+optim.amsgrad=true", "optim=mup student=hub optim.base_width=5", "data=text data.files=[a.txt,b.txt]",
     "plain=text plain.files=a.txt", "hydra/launcher=slurm", "hydra.launcher.minutes=5",
     "temperature.tau=0.5,2", "method=gkd loss.beta=0.3", "loss.beta=0.3 method=gkd", "method=gkd,opd loss.beta=0.3",
     "method=gkd student=hub optim.betas=[0.9,0.99]", "method=gkd loss=akl loss.mu=1", "~method",
     "logits.window=[0.5,1.0] logits=recorded", "responses.samples=2", "sweep=mine",
     "lr.peak=tag(log,interval(1e-3,3e-2))", "~record"],
)  # fmt: skip
def test_what_hydra_understands_is_left_to_it(words):
    security.check_words(words.split())


def test_several_values_need_a_sweep():
    for words in (["loss=fkl,rkl"], ["loss=glob(*)"], ["temperature.tau=1,2"]):
        option, _, got = words[0].partition("=")
        with refused(option=option, got=got, hint="type -m first"):
            security.check_command_line(words)
        security.check_command_line(["-m", *words])
        security.check_command_line(["sweeps=demo", *words])


def documented() -> list[str]:
    """The commands that documents show, without what the shell does with them."""
    root = components.CONF.parent
    files = [
        root / "README.md",
        *root.glob("docs/*.md"),
        *root.glob("kd/**/*.py"),
        root / "train.py",
    ]
    pattern = re.compile(r"^[\s`]*(?:\w+=\S+ )*python (?:train\.py|-m kd\.store write) ([^`\n]*)", re.MULTILINE)
    commands = {match[1] for file in files for match in pattern.finditer(re.sub(r"\\\n\s*", " ", file.read_text()))}
    return sorted(re.split(r"\s#|&&|\s{3,}|[;|]", line)[0].strip() for line in commands)


@pytest.mark.parametrize("line", documented())
def test_commands_in_documents_are_not_refused(line, monkeypatch):
    monkeypatch.setenv("KD_PLUGINS", "kd_example")  # whose options docs/extending.md types
    if any(mark in line for mark in ("…", "--help", "$", "...", "NAME", "WORDS", "[the words")):
        return
    words = [word for word in shlex.split(line) if not word.startswith("part=")]
    written = ["logits=offline"] if "record=" in line or "logits.path=" in line else []
    security.check_command_line([*written, *words])
