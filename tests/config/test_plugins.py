"""Code of other people runs if the person at the keyboard allows its package, whatever a config says."""

import pytest

from kd.config import components, compose, plugins, token_info
from kd.config.groups import LogitsConfig, RolloutConfig
from kd.config.help import axes
from kd.runs import identity
from tests.config.plugged import FILES, _forget, entry_point, write
from tests.refusals import refused

NOT_ALLOWED = "not something a config may call"


def test_a_package_that_is_not_allowed_is_refused_with_what_allows_it(package):
    with refused(option="loss._target_", got="mypkg.losses.mine", why=NOT_ALLOWED, hint=("KD_PLUGINS=mypkg", "trust")):
        components.locate("mypkg.losses.mine", "loss")
    with refused(option="loss._target_", hint="KD_PLUGINS=mypkg"):  # as of a manifest, or a result
        components.check_targets({"loss": {"_target_": "mypkg.losses.mine"}})
    assert "mine" not in components.option_names("loss")


def test_the_environment_allows_a_package_and_nothing_is_imported(allowed):
    assert components.locate("mypkg.losses.mine", "loss") == ("mypkg.losses", "mine")
    assert components.locate("mypkg.data.texts", "data") == ("mypkg.data", "texts")
    assert "mine" in components.option_names("loss")
    assert "loss=mine                Own loss [beta=0.5]" in axes()


def test_an_entry_point_allows_a_package(package):
    entry_point(package.parent, "mypkg")
    plugins._allowed.cache_clear()
    assert components.locate("mypkg.losses.mine", "loss") == ("mypkg.losses", "mine")
    (plugin,) = plugins.used(["mypkg.losses.mine"])
    assert plugin.to_dict() == {"name": "mypkg", "version": "1.2", "digest": plugin.digest}


@pytest.mark.parametrize("name", ["nowhere", "kd", "my-package", "mypkg.losses", "/tmp"])
def test_a_name_that_is_no_package_is_refused(name, package, monkeypatch):
    monkeypatch.setenv(plugins.VARIABLE, f"mypkg,{name}")
    with refused(option=plugins.VARIABLE, got=name):
        plugins.allowed()


def test_an_entry_point_of_what_is_gone_is_refused(package):
    entry_point(package.parent, "gone")
    plugins._allowed.cache_clear()
    with refused(option="the entry point any", got="gone", hint="uninstall the distribution my-gone"):
        plugins.allowed()


@pytest.mark.parametrize(
    ("group", "target"),
    [("loss", "mypkg.losses.helper"), ("loss", "mypkg.losses._hidden"), ("loss", "mypkg.losses.Loss"),
     ("loss", "mypkg.losses.nothing"), ("loss", "mypkg.mine"), ("loss", "mypkg.losses.giver"),
     ("data", "mypkg.data.run"), ("data", "mypkg.losses.helper")],
)  # fmt: skip
def test_only_a_function_that_takes_what_the_group_gives_is_an_option(group, target, allowed):
    others = {"loss": "mypkg.losses.mine", "data": "mypkg.data.texts"}[group]
    with refused(option=f"{group}._target_", got=target, need=others, hint=f"type {group}._target_={others}"):
        components.locate(target, group)


@pytest.mark.parametrize("path", ["student", "teacher", "trainer", "loss.student", "hydra.callbacks.x"])
def test_a_plugin_is_called_in_no_other_place(path, allowed):
    with refused(option=f"{path}._target_", why=NOT_ALLOWED, need="no function at all"):
        components.locate("mypkg.losses.mine", path)


def test_a_function_with_the_name_of_an_option_of_kd_is_refused(allowed):
    with refused(option="loss._target_", got="mypkg.losses.akl", why="name of loss=akl of kd", hint="rename"):
        components.locate("mypkg.losses.akl", "loss")


def test_a_plugin_whose_import_fails(allowed):
    command = "python -c 'import mypkg.losses'"
    why = "could not be imported: RuntimeError: imported"
    with refused(
        option="loss._target_", got="mypkg.losses.mine", why=why, hint="correct the package", commands=command
    ):
        components.build({"_target_": "mypkg.losses.mine"}, "loss")


def test_a_plugin_that_is_no_python(allowed):
    write(allowed, {"losses.py": "def mine(student, target:\n"})
    with refused(option=allowed / "losses.py", why="is no valid Python", hint="correct this file"):
        components.locate("mypkg.losses.mine", "loss")


def test_a_function_that_is_none_once_imported(allowed):
    source = "import functools\n@functools.cache\ndef mine(student, target): ...\n"
    write(allowed, {"losses.py": source, "__init__.py": ""})
    with refused(option="loss._target_", why="is a _lru_cache_wrapper once it is imported", need="a plain function"):
        components.build({"_target_": "mypkg.losses.mine"}, "loss")
    _forget()


@pytest.mark.parametrize(("settings", "option"), [({"gamma": 1}, "loss.gamma"), ({"beta": "x"}, "loss.beta")])
def test_the_signature_is_the_schema(settings, option, allowed):
    write(allowed, {"losses.py": FILES["losses.py"], "__init__.py": ""})
    assert components.build({"_target_": "mypkg.losses.mine", "beta": 1}, "loss").keywords == {"beta": 1}
    with refused(option=option):
        components.build({"_target_": "mypkg.losses.mine", **settings}, "loss")
    _forget()


TYPED = "loss._target_=mypkg.losses.mine"


def test_settings_beside_a_typed_function_are_those_of_its_signature(allowed):
    for words, args in (
        ([TYPED], {}),
        ([TYPED, "+loss.beta=0.3"], {"beta": 0.3}),
        ([TYPED, "++loss.beta=0.3"], {"beta": 0.3}),
        (["loss=jsd", TYPED, "loss.beta=0.3"], {"beta": 0.3}),  # which has a setting of this name
    ):
        config = compose.config_of(words)
        assert (config.loss.name, config.loss.args) == ("mine", args)
    cut = "truncation._target_=kd.objective.truncation.top_k"
    assert compose.config_of([cut, "+truncation.k=3"]).truncation.args == {"k": 3}
    adam = compose.config_of(["optim=adamw", "optim._target_=torch.optim.Adam", "+optim.amsgrad=true"]).optim
    assert adam.build("optim").keywords["amsgrad"] is True


@pytest.mark.parametrize(
    ("word", "fields"),
    [
        ("loss.beta=0.3", {"got": "0.3", "why": "a setting of loss._target_", "hint": "type +loss.beta=0.3"}),
        ("loss.alpha=0.3", {"why": "mypkg.losses.mine has no alpha", "hint": "type +loss.beta=0.3"}),
        ("+loss.alpha=0.3", {"option": "loss.alpha", "why": "has no alpha", "hint": "type +loss.beta=0.3"}),
        ("loss.student=1", {"why": "has no student", "hint": "type +loss.beta=1"}),
    ],
)
def test_a_wrong_setting_beside_a_typed_function_is_answered_with_a_right_one(word, fields, allowed):
    with refused(**fields):
        compose.config_of([TYPED, word])


def test_a_setting_beside_a_function_that_is_not_allowed_names_the_function(package):
    with refused(option="loss._target_", got="mypkg.losses.mine", hint="KD_PLUGINS=mypkg"):
        compose.config_of([TYPED, "loss.beta=0.3"])


def test_declarations_are_read_from_the_source(allowed):
    assert token_info.needs("needy") == ("advantage",)
    assert token_info.providers()["rollout=giver"] == ("advantage",)
    assert token_info.providers_of("advantage", "needy") == ["rollout=giver"]  # mixed computes more
    assert LogitsConfig("mypkg.losses.source").source.trains_teacher
    early = RolloutConfig("mypkg.rollouts.early", {"until": 0.5})
    assert not early.writes_all and early.derive(until=1).writes_all and not early.derive(until=1).by_teacher
    assert RolloutConfig("mypkg.rollouts.usual", {}).writes_all  # by the default of its signature
    best = RolloutConfig("mypkg.rollouts.best", {"draws": 2})
    assert best.writes_all and best.by_teacher
    assert identity.written_by_teacher({"rollout": "best", "rollout.draws": 2})  # so that its seed names the run
    write(allowed, {"losses.py": "@needs(NAMES)\ndef mine(student, target): ...\n"})
    plugins.syntax_tree.cache_clear()
    with refused(option="@needs of mine", why="is no literal", hint="write the value itself"):
        list(plugins.decorated("needs"))


def test_a_decorator_without_brackets_has_no_arguments(allowed):
    write(allowed, {"losses.py": "import x\n@other.section\n@x.more\ndef mine(report): ...\n\ndef bare(report): ...\n"})
    plugins.syntax_tree.cache_clear()
    decorated = [(target, arguments) for target, _, arguments in plugins.decorated("section")]
    assert decorated == [("mypkg.losses.mine", ((), {}))]
