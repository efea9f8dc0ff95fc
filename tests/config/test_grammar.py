"""Words of a command line that are no overrides: each is refused with what to type, which is then accepted."""

from __future__ import annotations

import shlex

import pytest
from hydra._internal.utils import get_args_parser

from kd.config import grammar, overrides, security
from kd.errors import UserError
from tests.refusals import refused

TYPED = {  # words as they are typed, and the words that the hint names
    "loss fkl": "loss=fkl",
    "loss = fkl": "loss=fkl",
    "loss =fkl": "loss=fkl",
    "loss= fkl": "loss=fkl",
    "loss:fkl": "loss=fkl",
    "loss==fkl": "loss=fkl",
    "loss={fkl": "loss=fkl",
    "lr 1e-3": "lr.peak=1e-3",
    "loss jsd loss.beta 0.3": "loss=jsd",
    "loss=jsd loss.beta 0.3": "loss.beta=0.3",
    "trainer.steps 5": "trainer.steps=5",
    "trainer.steps:5": "trainer.steps=5",
    "trainer.steps.=5": "trainer.steps=5",
    "'trainer.steps =5'": "trainer.steps=5",
    "seed+=1": "seed=1",
    "plan": "plan=true",
    "force lr.peak=1e-3": "force=true",
    "fkl": "loss=fkl",
    "gkd": "method=gkd",
    "-m loss=fkl, rkl": "loss=fkl,rkl",
    "-m loss=fkl,": "loss=fkl",
    "data=text data.files=[a.txt, b.txt]": "'data.files=[a.txt,b.txt]'",
    "data=text data.files=[a.txt b.txt c.txt]": "'data.files=[a.txt,b.txt,c.txt]'",
    "data=text data.files=[a.txt , b.txt]": "'data.files=[a.txt,b.txt]'",
    "data=text data.files= [a.txt b.txt]": "'data.files=[a.txt,b.txt]'",
    "data=text data.files=[ a.txt b.txt ] seed=1": "'data.files=[a.txt,b.txt]'",
    "optim.betas=[0.9 0.95]": "'optim.betas=[0.9,0.95]'",
    "data=text data.files=[a.txt": "'data.files=[a.txt]'",
    "root=s3://x/y?z=1": "'root=\"s3://x/y?z=1\"'",
    '"root=it\'s"': "'root=\"it'\"'\"'s\"'",
    "'root=a\"\\b'": '\'root="a\\"\\b"\'',
    "lr.peak=1e-3,": "lr.peak=1e-3",
    "trainer.steps=5)": "trainer.steps=5",
    "teacher.sft": "teacher.sft=true",
    "plan force": "plan=true",
    "plan false": "plan=false",
    "trainer.steps : 10": "trainer.steps=10",
    "trainer.steps :10": "trainer.steps=10",
    "loss : fkl": "loss=fkl",
    "lr.peak -1": "lr.peak=-1",
    "lr.peak= -1e-3": "lr.peak=-1e-3",
    "--lr.peak -.5": "lr.peak=-.5",
    "--loss rkl": "loss=rkl",
    "--loss=rkl": "loss=rkl",
    "-lr 1e-3": "lr.peak=1e-3",
    "--trainer.steps 5": "trainer.steps=5",
    "--token-names any": "token_names=any",
    "--plan": "plan=true",
    "-plan=true": "plan=true",
    "--multi-run loss=fkl,rkl": "--multirun",
}


@pytest.mark.parametrize("line", TYPED)
def test_the_hint_names_what_was_meant_and_is_accepted(line):
    words = shlex.split(line)
    with refused(hint=f"type {TYPED[line]}") as caught:
        security.check_command_line(words)
    assert caught.value.hint == f"type {TYPED[line]}" and caught.value.need
    meant = shlex.split(TYPED[line])
    names = [word.partition("=")[0] for word in meant]
    others = [word for word in words if "=" in word and overrides.parsed(word) and word[0] not in "-="]
    security.check_command_line(["-m", *(word for word in others if word.partition("=")[0] not in names), *meant])


HINTS = {  # words for which the hint is a choice
    "1m": "type student=1m, or teacher=1m",
    "loss": "type loss=NAME with one of akl,",
    "method": "leave method out, or type method=NAME",
    "seed": "type seed=… with its value",
    "loss.=3": "choose one of akl,",
    "--student gpt2": "student=hub student.name=gpt2",
    "--config-nam x": "see all settings by python train.py --help",
    "--name foo": "type student.name=foo, or teacher.name=foo",
    "-m -1": "see all settings by python train.py --help",
    "seed=1 -1": "see all settings by python train.py --help",
    "nosuch": "see all settings by python train.py --help",
    "nosuch 3": "see all settings by python train.py --help",
    "''": "see all settings by python train.py --help",
    "=fkl": "see all settings by python train.py --help",
    "--": "see all settings by python train.py --help",
    "lr.peak=choice()": "type lr.peak=…,… with its values",
    "data=text data.files=[a.txt b.txt seed=1": "type data.files=… with its value",
    "data=text 'data.files=[a b.txt, x(1).txt]'": "type data.files=… with its value",
    "lr.peak=choice(1,2": "type lr.peak=… with its value",
    "trainer.tokens=1e3x(": "type trainer.tokens=… with its value",
    "optim.betas=(0.9,0.95)": "type optim.betas=… with its value",
    "data.fils=x(1": "see all settings by python train.py --help",
    "data.files=x(1).txt": "type data=text 'data.files=\"x(1).txt\"' (or files with instructions)",
    "root=my(folder)": "for a text with brackets 'root=\"my(folder)\"'",
}


@pytest.mark.parametrize("line", HINTS)
def test_a_hint_for_what_may_be_meant_for_several_settings(line):
    with refused(hint=HINTS[line]):
        security.check_command_line(shlex.split(line))


def test_a_number_is_not_offered_as_a_text():
    with pytest.raises(UserError) as caught:
        security.check_command_line(["lr.peak=choise(1,2)"])
    assert caught.value.hint == "type lr.peak=…,… with its values"


@pytest.mark.parametrize("line", ["part 1/2", "part = 1/2", "part =1/2", "part: 1/2", "--part 1/2", "--part=1/2"])
def test_a_setting_of_another_program_is_offered_by_its_name(line):
    with refused(need="NAME=VALUE", hint="type part=1/2"):
        grammar.check_switches(["loss=fkl", *line.split()], [], ["part"])
    grammar.check_switches(["loss=fkl", "part=1/2"], [], ["part"])


def test_the_first_wrong_word_is_named():
    with refused(option="akl", need="NAME=VALUE"):
        security.check_words(["seed=1", "akl", "loss={fkl"])


def test_a_secret_after_a_switch_is_not_shown():
    secret = "hf_" + 30 * "a"
    with pytest.raises(UserError) as caught:
        security.check_command_line(["--hub-name", secret])
    assert secret not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "switches", "others"),
    [
        ("loss=fkl,rkl -m seed=1", {"multirun": True}, ["loss=fkl,rkl", "seed=1"]),
        ("loss=fkl --cfg job seed=1 --resolve", {"cfg": "job", "resolve": True}, ["loss=fkl", "seed=1"]),
        ("loss=fkl --info", {"info": "all"}, ["loss=fkl"]),
        ("--info config loss=fkl", {"info": "config"}, ["loss=fkl"]),
        ("-p loss=fkl loss=fkl", {"package": "loss=fkl"}, ["loss=fkl"]),
        ("loss=fkl --cfg job -p loss=fkl", {"cfg": "job", "package": "loss=fkl"}, ["loss=fkl"]),
    ],
)
def test_hydra_reads_switches_and_overrides_in_any_order(line, switches, others):
    words = overrides.deferred(security.check_command_line(shlex.split(line)))
    read = vars(get_args_parser().parse_args(words))
    assert {name: value for name, value in read.items() if value} == switches | {"overrides": others}


def test_what_hydra_can_parse_is_no_mistake_of_grammar():
    grammar.check(["loss=", "lr.peak=tag(log,interval(1e-3,3e-2))", "~record", "+optim.amsgrad=true", "a.b=[1,{c:2}]"])
    assert overrides.parsed("loss={fkl") is None
