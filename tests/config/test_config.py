"""Every file of conf/ and sweeps/ is right, a wrong setting is refused by name, a config runs no foreign code."""

import importlib
import inspect
import pickle
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

import train  # noqa: F401, registers what Hydra knows
from kd.config import argument_types, components, declarations, nodes, options, security, token_info
from kd.config.compose import register
from kd.config.groups import LogitsConfig, RolloutConfig
from kd.config.schema import ExperimentConfig
from kd.config.sizes import SIZES
from kd.data import packing
from kd.errors import UserError
from kd.experiment import dependencies
from kd.experiment.dependencies import Plan
from kd.rollout.base import traits
from kd.runs import identity
from kd.training import schedules
from tests.cases import each, settings
from tests.refusals import refused

GROUPS = [group for group in components.GROUPS if group != "sweeps"]
OPTIONS = {f"{group}={name}": node for group in GROUPS for name, node in settings(group).items()}
PRESET = [option for option in OPTIONS if option.startswith(components.PRESETS)]  # see test_methods.py
SIZED = [f"{group}={size}" for group in ("student", "teacher") for size in SIZES]
CALLABLE = {option: node for option, node in OPTIONS.items() if "_target_" in node}
CHOSEN = [*(option for option in OPTIONS if option not in PRESET), *SIZED]


@pytest.fixture(scope="module", autouse=True)
def conf():
    register()
    with initialize_config_dir(str(components.CONF), version_base="1.3"):
        yield


# What an option cannot do without, beside what any config has.
NEEDED = {"teacher=none": "logits=none", "target=rest": "truncation=top_k"}


def config_of(*words: str) -> ExperimentConfig:
    """Return the config that these words make, with what they need; what is missing then is typed as x."""
    typed = list(words)
    for option, needed in NEEDED.items():
        groups = {word.partition("=")[0] for word in typed}
        if any(word.startswith(option) for word in typed) and needed.partition("=")[0] not in groups:
            typed.append(needed)
    composed = compose("config", typed)
    for missing in OmegaConf.missing_keys(composed):
        OmegaConf.update(composed, missing, "x")
    return ExperimentConfig.from_hydra(composed, typed)


def given(node: dict) -> dict:
    """Return the arguments of a component in a config. record.path is no argument of the truncation."""
    notes = ("_target_", *(["path"] if "truncation" in node["_target_"] else []))
    return {k: v for k, v in node.items() if k not in notes}


def defaults(function) -> dict:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def function_of(node: dict):
    module, _, name = node["_target_"].rpartition(".")
    return getattr(importlib.import_module(module), name)


# What is there is right.


@cache
def together(number: int) -> ExperimentConfig:
    """Return a config with one option of each group; rules between groups are not asked (see test_golden.py)."""
    by_group: dict[str, list[str]] = {}
    for option in CHOSEN:
        by_group.setdefault(option.partition("=")[0], []).append(option)
    config = compose("config", [options[number % len(options)] for options in by_group.values()])
    for missing in OmegaConf.missing_keys(config):
        OmegaConf.update(config, missing, {} if missing == "data.parts" else "x")
    return ExperimentConfig.from_node(nodes.to_node(config))


@pytest.mark.parametrize("option", CHOSEN)
def test_every_option_composes_and_its_function_binds_and_its_settings_are_listed(option):
    group, _, name = option.partition("=")
    chosen = getattr(together([o for o in CHOSEN if o.startswith(f"{group}=")].index(option)), group)
    node = chosen.to_dict()
    if option in CALLABLE:
        assert node["_target_"] == CALLABLE[option]["_target_"]
        function = components.load(node["_target_"], group)
        settings = argument_types.checked(function, node, group) if group in ("data", "plain") else given(node)
        argument_types.check_types(function, settings, group)
        inspect.signature(function).bind_partial(**settings)
    if option in SIZED:
        assert node["size"] == name and node["name"] is None
    assert options.options(group)[name].keys() - {*chosen.INPUT_ONLY} == node.keys() - {*options.NOTES}


@each("file", {file.stem: file for file in components.SWEEPS.glob("*.yaml")})  # its runs: see test_golden.py
def test_every_sweep_is_registered_by_its_name(file):
    node = ConfigStore.instance().load(f"sweeps/{file.stem}.yaml").node
    assert node.sweep == {"name": file.stem, **OmegaConf.load(file)}


@pytest.mark.parametrize(
    ("words", "option", "fields"),
    [
        ("plain=text plain.files=a.txt", "plain", {"why": "would do nothing beside plain text"}),
        ("responses.samples=2", "responses.samples", {"why": "would do nothing beside plain text"}),
        ("data=instructions rollout=mixed", "rollout", {"conflict": "loss=fkl", "hint": "loss=minillm"}),
        ("data=instructions rollout=mixed loss=distillm2", "rollout", {"hint": "type loss=minillm, or rollout=none"}),
        (
            "data=instructions rollout=mixed loss=minillm loss.single_step=false",
            "loss.single_step",
            {"hint": "type rollout.exclude_own_reward=false"},
        ),
        ("routing=uncertainty", "routing", {"conflict": "loss=fkl", "hint": "loss=atkd"}),
        ("root=", "root", {"need": "a folder or a URL", "hint": "type root=runs"}),
    ],
)
def test_what_would_have_no_effect_is_refused(words, option, fields):
    words = words.split()
    with refused(option=option, **fields):
        ExperimentConfig.from_hydra(compose("config", words), words)


@pytest.mark.parametrize(
    ("words", "needed", "sources"),
    [
        ("loss=minillm", "student_logp, importance and advantage", "rollout=mixed"),
        ("loss=minillm data=instructions rollout=student", "student_logp, importance and advantage", "rollout=mixed"),
        ("loss=distillm2", "by_student", "rollout=student, rollout=pairs or rollout=adaptive"),
        ("loss=distillm2 data=instructions rollout=teacher", "by_student", "rollout=student, rollout=pairs or"),
        ("loss=atkd", "is_hard and weight", "routing=uncertainty"),
        ("loss=atkd routing=entropy", "is_hard and weight", "routing=uncertainty"),
    ],
)
def test_a_loss_without_its_token_information_is_refused_with_what_provides_it(words, needed, sources):
    words = words.split()
    with refused(option="loss", why=f"needs {needed} of each token, which only {sources}", hint=f"type {sources}"):
        ExperimentConfig.from_hydra(compose("config", words), words)


def test_declarations_in_the_source_are_those_of_the_functions():
    """The rules read them without importing the functions; every need has a provider."""
    pairs = (("loss", "needs"), ("rollout", "provides"), ("rollout", "traits"), ("routing", "provides"))
    for group, attribute in pairs:
        module = importlib.import_module(f"kd.{components.MODULES[group]}")
        functions = {name: getattr(module, name) for name in components.functions(components.MODULES[group])}
        real = {name: getattr(f, attribute) for name, f in functions.items() if hasattr(f, attribute)}
        read = declarations.of_module(components.MODULES[group], attribute)
        assert real and {name: declaration.names for name, declaration in read.items()} == real
    for module in components.modules_of("logits"):
        loaded = importlib.import_module(f"kd.{module}")
        real = {
            name: f.traits for name in components.functions(module) if hasattr(f := getattr(loaded, name), "traits")
        }
        assert {k: declaration.names for k, declaration in declarations.of_module(module, "traits").items()} == real
    assert LogitsConfig("kd.teachers.none.none").source.distils is False
    assert LogitsConfig("kd.teachers.stored.recorded").source.is_recorded
    for loss in declarations.of_group("loss", "needs"):
        assert all(token_info.providers_of(name, loss) for name in token_info.needs(loss))
    assert all(
        token_info.losses_for(provider) for provider in token_info.providers() if token_info.unique_fields(provider)
    )


@pytest.mark.parametrize(
    ("option", "changes", "writes_all", "by_teacher"),
    [
        ("none", {}, False, False),
        ("student", {}, False, False),
        ("student", {"share": 1}, True, False),
        ("student", {"share": 1.0}, True, False),
        ("teacher", {}, True, True),
        ("pairs", {}, True, False),
        ("mixed", {}, True, False),
        ("mixed_code", {}, True, False),
        ("adaptive", {}, False, False),
    ],
)
def test_a_rollout_declares_who_writes(option, changes, writes_all, by_teacher):
    rollout = RolloutConfig.from_node(OPTIONS[f"rollout={option}"] | changes)
    assert (rollout.writes_all, rollout.by_teacher) == (writes_all, by_teacher)
    assert identity.written_by_teacher(components.flat({"rollout": rollout.to_dict()})) == by_teacher


def test_a_trait_that_does_not_exist_is_an_error():
    with pytest.raises(TypeError, match="write_all"):
        traits("write_all")


NOT_AS_THE_FUNCTION = ("alpha", "lr", "optim", "data", "record")
OTHER_VALUES = {"rollout=mixed_code": "mixed"}  # options that are another one's function


@each("option", {k: k for k in CALLABLE if k.partition("=")[0] not in NOT_AS_THE_FUNCTION})
def test_yaml_and_signature_have_the_same_defaults(option):
    node, function = given(CALLABLE[option]), defaults(function_of(CALLABLE[option]))
    assert (node.keys() == function.keys() and node != function) if option in OTHER_VALUES else node == function


@each("node", {k: v for k, v in CALLABLE.items() if k.startswith(("alpha=", "lr="))})
def test_yaml_of_a_schedule_has_every_parameter(node):
    assert given(node).keys() == defaults(function_of(node)).keys()


@each("node", {k: v for k, v in CALLABLE.items() if k.startswith("data=")})
def test_yaml_of_a_corpus_has_every_parameter_with_its_default(node):
    function = components.load(node["_target_"], "data")
    assert given(node).items() >= defaults(function).items()
    assert given(node).keys() | {"seq_len"} >= inspect.signature(function).parameters.keys()


def test_data_settings_are_those_of_pack():
    given = {k: v for k, v in defaults(packing.pack).items() if k in packing.OPTIONS}
    assert OmegaConf.load(components.CONF / "config.yaml").data == given
    assert set(given) == set(packing.OPTIONS)


# A function is an option if it takes what the group's options take.
@pytest.mark.parametrize(
    ("group", "takes"),
    [
        ("loss", ["student", "target"]),
        ("truncation", ["target"]),
        ("target", ["target"]),
        ("temperature", ["student", "target"]),
        ("routing", ["measured"]),
        ("logits", ["origin"]),
        ("rollout", ["samplers"]),
        ("logger", ["folder", "about"]),
        ("alpha", ["progress"]),
        ("lr", ["progress"]),
    ],
)
def test_functions_and_yamls_have_the_same_names(group, takes):
    modules = [importlib.import_module(f"kd.{module}") for module in components.modules_of(group)]
    members = [member for module in modules for member in inspect.getmembers(module, inspect.isfunction)]
    public = {n: f for n, f in members if f.__module__ in {m.__name__ for m in modules} and not n.startswith("_")}
    functions = {n: f for n, f in public.items() if list(inspect.signature(f).parameters)[: len(takes)] == takes}
    names = {name: OTHER_VALUES.get(f"{group}={name}", name) for name in settings(group)}
    assert functions.keys() == set(names.values())
    for name, node in settings(group).items():
        assert node["_target_"] == f"{functions[names[name]].__module__}.{names[name]}"


def test_help_names_and_explains_every_group_and_option():
    text = compose("config", return_hydra_config=True).hydra.help.template
    assert [g for g in GROUPS if f"\n  {g}: " not in text] == []
    said = {words[0]: words[1:] for line in text.splitlines() if (words := line.split())}
    sweeps = [f"sweeps={p.stem}" for p in components.SWEEPS.glob("*.yaml")]
    assert [option for option in [*OPTIONS, *SIZED, *sweeps] if len(said.get(option, [])) < 2] == []


def test_flat_names_an_option_and_joins_keys():
    node = {
        "loss": {"_target_": "kd.objective.losses.akl", "mu": 0.5},
        "data": {"a": {"b": None}},
        "seed": 0,
    }
    assert components.flat(node) == {"loss": "akl", "loss.mu": 0.5, "data.a.b": None, "seed": 0}


def test_build_binds_settings_and_waits_for_the_rest():
    schedule = components.build({"_target_": "kd.training.schedules.constant", "peak": 2}, "lr")
    assert schedule(0.5) == 2 and schedule.func is schedules.constant


@pytest.mark.parametrize(
    ("name", "settings"),
    [("AdamW", {"amsgrad": True, "foreach": True, "weight_decay": 0}), ("Adam", {"weight_decay": 0.1}),
     ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-4, "foreach": False})],
)  # fmt: skip
def test_every_optimizer_takes_its_settings(name, settings):
    make = components.build({"_target_": f"torch.optim.{name}", **settings}, "optim")
    made = make([torch.zeros(2, requires_grad=True)], lr=0.1).defaults
    assert {k: made[k] for k in settings} == settings


# What is wrong is refused, by name.


@pytest.mark.parametrize(
    "word",
    [
        "truncation.k=abc", "truncation.k=2.5", "truncation.k=true", "truncation.k=null", "truncation.k=[1]",
        "truncation.p='0.9'", "truncation.p=true", "routing.share=no", "target.eta=true",
        "temperature.tau=true", "temperature.tau=1+1", "temperature.tau2=1", "lr.peak=abc", "alpha.warmup=null",
        "logger.project=5", "logger.entity=[a]",
    ],
)  # fmt: skip
def test_value_of_another_type_is_refused_by_name(word):
    option = word.partition("=")[0]
    made = config_of("truncation=top_p_k", "target=revise", "routing=entropy", "logger=wandb", word)
    group = option.partition(".")[0]
    with refused(option=option, why="got ", need=" "):
        getattr(made, group).build(group)


@each(
    "case",
    {
        f"{option}.{key}": (option.partition("=")[0], node, key)
        for option, node in CALLABLE.items()
        for key in given(node)
        if not option.startswith("optim=")
    },
)
def test_no_setting_takes_just_anything(case):
    group, node, key = case
    for wrong in ({}, [["x"]]):
        with refused(option=f"{group}.{key}", got=wrong):
            argument_types.check_types(components.load(node["_target_"], group), {key: wrong}, group)


@pytest.mark.parametrize("word", ["data.seq_len=abc", "data.tokens=1.5", "data.val_share=true", "data.tokenizer=5"])
def test_data_setting_of_another_type_is_refused_by_name(word):
    with refused(option=word.partition("=")[0]):
        dependencies.corpus(config_of(word))


def test_numbers_of_the_trainer_without_meaning_are_refused_by_name():
    plain = config_of().to_dict()
    counts = ["trainer.steps", "trainer.batch", "trainer.micro_batch", "trainer.chunk", "trainer.log_every",
              "trainer.val_every", "trainer.checkpoint_every", "teacher.steps", "teacher.batch"]  # fmt: skip
    wrong = {option: [0, -1, 1.0, True, "8"] + [None] * (option != "trainer.chunk") for option in counts}
    wrong |= {option: [-1, 2**32, 0.5, True, "0", None] for option in ("seed", "teacher.seed")}
    wrong |= {option: ["fp16", 16, None] for option in ("trainer.precision", "teacher.precision")}
    wrong |= {"trainer.clip": [-1, float("nan"), "1", True, None]}
    for option, values in wrong.items():
        for value in values:
            changed = OmegaConf.create(plain)
            OmegaConf.update(changed, option, value)
            with refused(option=option, got=value):
                ExperimentConfig.from_dict(OmegaConf.to_container(changed))


@pytest.mark.parametrize("word", ["trainer.steps=0", "seed=-1", "trainer.precision=fp16", "trainer.clip=.nan"])
def test_numbers_of_the_command_line_are_checked(word):
    with refused(option=word.partition("=")[0]):
        config_of(word)


@pytest.mark.parametrize(
    "word",
    ["trainer.compile=no", "trainer.accelerator=abacus", "teacher.lr=abc", "teacher.size=7b", "student.size=7b",
     "student.size=null", "student.name=x", "teacher.name=x", "root=null", "root=5", "data.seed=-1"],
)  # fmt: skip
def test_every_other_setting_is_checked_by_name_too(word):
    with refused(option=word.partition("=")[0]):
        Plan.from_config(config_of("data=markov", word))


@pytest.mark.parametrize(
    "words",
    ["rollout.capacity=null rollout=adaptive data=instructions", "logits.seed=null logits=offline",
     "data.seq_len=null trainer.tokens=1000", "data.seq_len=0 trainer.tokens=1000", "logits.path=5 logits=offline",
     "record.path=5 record=top_k logits=offline", "~teacher.steps", "~trainer.batch", "~root",
     "~loss.single_step loss=minillm rollout=mixed data=instructions"],
)  # fmt: skip
def test_what_is_looked_at_before_functions_are_loaded_is_checked_first(words):
    words = words.split()
    with pytest.raises(UserError, match=f"^{words[0].partition('=')[0]}.*need"):
        Plan.from_config(ExperimentConfig.from_hydra(compose("config", words), words))


@pytest.mark.parametrize("root", ["s3://bucket/kd", "runs", "/"])
def test_a_root_with_a_slash_at_its_end_is_the_same_place(root):
    assert config_of(f"root={root}/").root == config_of(f"root={root}").root == root


@pytest.mark.parametrize("word", ["optim.weight_decay=abc", "optim.betas=3", "optim.eps=null"])
def test_setting_of_the_optimizer_of_another_type_is_refused_by_name(word):
    with refused(option=word.partition("=")[0]):
        config_of(word).optim.build("optim")


@pytest.mark.parametrize("word", ["+loss.beta=0.5", "+truncation.k=5", "+lr.decay=0.1", "+optim.rho=1"])
def test_setting_that_an_option_does_not_have_is_refused_by_name(word):
    group, name = word[1:].partition("=")[0].split(".")
    with refused(option=f"{group}.{name}", why="no such option here"):
        getattr(config_of(word), group).build(group)


@pytest.mark.parametrize("word", ["+data.beta=1", "+trainer.beta=1", "+student.beta=1", "+teacher.beta=1", "+beta=1"])
def test_setting_that_nothing_reads_is_refused_by_name(word):
    with refused(option=word[1:].partition("=")[0], got=1):
        Plan.from_config(config_of(word))


@pytest.mark.parametrize("word", ["+alpha.progress=0.5", "+lr.progress=0.5", "+optim.lr=1", "+optim.params=1"])
def test_argument_that_is_not_the_users_is_refused_by_name(word):
    group = word[1:].partition(".")[0]
    with refused(option=word[1:].partition("=")[0], why="no such option here"):
        getattr(config_of(word), group).build(group)


def test_missing_setting_is_named():
    for word, needed in (("data=text", "data.files"), ("data=hub", "data.name"), ("student=hub", "student.name")):
        with refused(option=needed, why="is needed here", hint=f"{needed}=VALUE"):
            ExperimentConfig.from_hydra(compose("config", [word]), [word])


@pytest.mark.parametrize("word", ["loss=akl", "truncation=top_k", "temperature.tau=2", "alpha=wsd", "alpha.peak=1",
                                  "target=rest", "routing=entropy"])  # fmt: skip
def test_setting_without_a_signal_to_apply_to_is_refused(word):
    config_of("teacher=none")
    option, _, got = word.partition("=")
    with refused(option=option, got=got, conflict="logits=none", why="would do nothing"):
        config_of("teacher=none", word)


@pytest.mark.parametrize("word", ["teacher.steps=5", "teacher.batch=4", "teacher.lr=1e-3", "teacher.precision=bf16"])
@pytest.mark.parametrize(
    ("more", "why", "hint"),
    [
        ("", "as this teacher is pretrained", "out"),
        ("data=instructions data.files=x", "as this teacher is pretrained", "type teacher.sft=true"),
        ("logits=cotrained optim=adamw", "a cotrained teacher has the steps, batches and rate of the run", "out"),
    ],
)
def test_settings_of_training_are_refused_for_a_pretrained_teacher(word, more, why, hint):
    option, _, got = word.partition("=")
    words = ("teacher=hub", "teacher.name=org/big", *more.split())
    config_of("teacher.seed=1", *words)  # the seed of responses that a teacher writes
    with refused(option=option, got=got, conflict="teacher.name=org/big", why=why, hint=hint) as caught:
        config_of(*words, word)
    assert ("teacher.sft" in caught.value.hint) == ("instructions" in more)
    with refused(option=f"++{word}", why=why):
        config_of(*words, f"++{word}")


def test_settings_of_training_are_for_a_teacher_that_is_fine_tuned_first():
    words = ("data=instructions", "data.files=x", "teacher=hub", "teacher.name=org/big", "teacher.sft=true")
    assert config_of(*words, "teacher.steps=5").teacher.steps == 5


@pytest.mark.parametrize("truncation", ["full", "random"])
@pytest.mark.parametrize("target", ["rest", "leftover"])
def test_a_place_for_what_is_not_dropped_is_refused(truncation, target):
    words = [f"truncation={truncation}", f"target={target}"]
    with refused(option="target", got=target, conflict=f"truncation={truncation}"):
        ExperimentConfig.from_hydra(compose("config", words), words)


def test_signal_without_a_teacher_is_refused():
    with refused(option="logits", need="a teacher"):
        ExperimentConfig.from_hydra(compose("config", ["teacher=none"]), [])


# A config runs nothing but what it may.


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


def hostile(folder: Path) -> dict[str, dict]:
    """Return hostile nodes: if run, they create the file `canary`, end this process, or reach what is no option."""
    touch = {"command": f"touch {folder}/canary"}
    system = {"_target_": "os.system", **touch}
    unpickled = {"f": f"{folder}/evil.pt", "weights_only": False}
    return {
        "os.system": touch,
        "posix.system": touch,
        "logging.os.system": touch,
        "kd.system.files.os.system": touch,
        "kd.runs.loggers.os.system": touch,
        "subprocess.run": {"args": ["touch", f"{folder}/canary"]},
        "functools.partial": {"_args_": ["os.system"], **touch},
        "hydra.utils.call": {"config": system},
        "hydra.utils.instantiate": {"config": system},
        "kd.config.components.build": {"node": system, "path": ""},
        "builtins.open": {"file": f"{folder}/canary", "mode": "w"},
        "builtins.exec": {"source": f"open('{folder}/canary', 'w')"},
        "os._exit": {"status": 3},
        "torch.hub.load": {"repo_or_dir": str(folder), "model": "fkl", "source": "local", "trust_repo": True},
        "torch.load": unpickled,
        "kd.objective.losses.torch.load": unpickled,
        "joblib.load": {"filename": f"{folder}/evil.pkl"},
        "hubconf.fkl": {},
        "kd.system.files.write_json": {"path": f"{folder}/canary", "value": 1},
        "kd.runs.run.shutil.rmtree": {"path": str(folder)},
        "kd.objective.losses._check": {"option": "x", "got": 1, "good": True, "need": "x"},
        "torch.optim": {}, "torch.optim.AdamW.__init__": {}, "torch.optim.lr_scheduler.LambdaLR": {},
        "kd.objective.losses.Tensor": {}, "kd.objective.losses.UserError": {}, "kd.objective.losses.__builtins__": {},
        "kd.objective.losses.fkl.__globals__": {}, "kd.objective.losses.fkl.__call__": {}, "kd.objective.losses": {},
        "kd": {}, "fkl": {}, "": {}, "kd.losses.fkl": {},
        ".kd.objective.losses.fkl": {}, "kd..objective.losses.fkl": {}, "kd.objective.losses.fkl ": {},
        "Kd.objective.losses.fkl": {}, "kd/objective/losses.fkl": {},
    }  # fmt: skip


@pytest.fixture
def canary(tmp_path, monkeypatch) -> Path:
    torch.save(Payload(tmp_path / "canary"), tmp_path / "evil.pt")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Payload(tmp_path / "canary")))
    (tmp_path / "hubconf.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\ndef fkl(): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "canary"


@pytest.mark.parametrize("target", hostile(Path()))
def test_hostile_target_is_refused_before_it_runs(target, canary):
    node = {"_target_": target, **hostile(canary.parent)[target]}
    for tree in (
        {"loss": node},
        {"data": {"of": [[1, {"x": node}]]}},
        {"loss": {"_target_": "kd.objective.losses.fkl", "student": node}},
    ):
        with refused(why="not something a config may call"):
            components.check_targets(tree)
    with refused(why="not something a config may call"):
        components.build(node, "loss")
    assert not canary.exists() and canary.parent.exists()


@pytest.mark.parametrize(
    "target", [None, 1, True, ["os.system"], {"os.system": 1}, b"os.system", ["kd.objective.losses.fkl"]]
)
def test_target_that_is_no_text_is_refused(target):
    with refused(why="not something a config may call"):
        components.check_targets({"loss": {"_target_": target}})


@pytest.mark.parametrize(
    "words",
    [
        ["loss._target_=os.system", "+loss.command='touch {canary}'"],
        ["loss._target_=${evil}", "+evil=os.system", "+loss.command='touch {canary}'"],
        ["+trainer.hook={{_target_:os.system,command:'touch {canary}'}}"],
        ["+trainer.hooks=[{{_target_:os.system,command:'touch {canary}'}}]"],
        ["+student._target_=os.system", "+student.command='touch {canary}'"],
    ],
)
def test_hostile_command_line_is_refused_before_it_runs(words, canary):
    with refused(got="os.system", why="not something a config may call"):
        config_of(*(word.format(canary=canary) if "touch" in word else word for word in words))
    assert not canary.exists()


@pytest.mark.parametrize("key", ["trust_remote_code", "allow_pickle", "weights_only", "use_safetensors"])
def test_argument_that_lets_foreign_code_in_is_refused_anywhere(key):
    with refused(option=f"student.{key}", got=True, why="not accepted from a config"):
        config_of(f"+student.{key}=true")
    for tree in ({key: False}, {"data": {"a": {"b": {key: 1}}}}, {"trainer": {"a": [[{key: None}]]}}):
        with refused(why="not accepted from a config") as caught:
            components.check_targets(tree)
        assert caught.value.option.endswith(key)


def test_a_number_of_tokens_is_a_number_of_steps():
    words = ("trainer.batch=4", "data.seq_len=32")
    tokens, steps = config_of("trainer.tokens=257", *words), config_of("trainer.steps=3", *words)
    assert tokens.to_dict() == steps.to_dict()  # 128 a step, at least 257
    with refused(option="trainer.tokens", got=9, conflict="trainer.steps=3"):
        config_of("trainer.tokens=9", "trainer.steps=3")
    with refused(option="trainer.tokens", got=0, need="a number of at least 1"):
        config_of("trainer.tokens=0")


# A group takes the name of one option, and settings that this option has.


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


@pytest.mark.parametrize(
    ("word", "why", "need", "hint"),
    [
        ("trainer.clip=abc", "got a text", "a number", ""),
        ("trainer.steps=1.5", "got a number with a fraction", "a whole number", ""),
        ("trainer.steps=1e6", "got a number", "a whole number", "type trainer.steps=1_000_000"),
        ("plan=maybe", "got a text", "true or false", "type plan=true or plan=false"),
        ("student.name={a:1}", "got settings", "a text or null", ""),
    ],
)
def test_the_type_of_a_value_is_told_in_plain_words(word, why, need, hint):
    with refused(why=why, need=need, hint=hint):
        config_of(word)


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
    found = {match[1] for file in files for match in pattern.finditer(re.sub(r"\\\n\s*", " ", file.read_text()))}
    return sorted(re.split(r"\s#|&&|\s{3,}|[;|]", line)[0].strip() for line in found)


@pytest.mark.parametrize("line", documented())
def test_commands_in_documents_are_not_refused(line, monkeypatch):
    monkeypatch.setenv("KD_PLUGINS", "kd_example")  # whose options docs/extending.md types
    if any(mark in line for mark in ("…", "--help", "$", "...", "NAME", "WORDS", "[the words")):
        return
    words = [word for word in shlex.split(line) if not word.startswith("part=")]
    written = ["logits=offline"] if "record=" in line or "logits.path=" in line else []
    security.check_command_line([*written, *words])
