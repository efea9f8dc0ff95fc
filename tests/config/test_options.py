"""Every file of conf/ and sweeps/ is right."""

import importlib
import inspect
from functools import cache

import pytest
import torch
from hydra import compose
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

import train  # noqa: F401, registers what Hydra knows
from kd.config import argument_types, components, declarations, nodes, options, token_info
from kd.config.groups import LogitsConfig, RolloutConfig
from kd.config.schema import ExperimentConfig
from kd.data import packing
from kd.rollout.base import traits
from kd.runs import identity
from kd.training import schedules
from tests.cases import each, settings
from tests.config.options import CALLABLE, CHOSEN, GROUPS, OPTIONS, SIZED, defaults, fill, function_of, given

pytestmark = pytest.mark.usefixtures("conf")


@cache
def together(number: int) -> ExperimentConfig:
    """Return a config with one option of each group; rules between groups are not asked (see test_golden.py)."""
    by_group: dict[str, list[str]] = {}
    for option in CHOSEN:
        by_group.setdefault(option.partition("=")[0], []).append(option)
    config = compose("config", [options[number % len(options)] for options in by_group.values()])
    fill(config)
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
    explanations = {words[0]: words[1:] for line in text.splitlines() if (words := line.split())}
    sweeps = [f"sweeps={p.stem}" for p in components.SWEEPS.glob("*.yaml")]
    assert [option for option in [*OPTIONS, *SIZED, *sweeps] if len(explanations.get(option, [])) < 2] == []


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
    optimizer_defaults = make([torch.zeros(2, requires_grad=True)], lr=0.1).defaults
    assert {k: optimizer_defaults[k] for k in settings} == settings
