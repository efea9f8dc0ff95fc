"""Names that components declare by decorators: unknown ones are refused where they are written."""

import re

import pytest

from kd.objective import token_info
from kd.rollout import base as rollouts
from kd.teachers import base as teachers

DECORATORS = {
    "needs": (token_info.needs, "weight"), "provides": (token_info.provides, "by_student"),
    "traits": (rollouts.traits, "by_teacher"), "traits of a teacher": (teachers.traits, "recorded"),
}  # fmt: skip


@pytest.mark.parametrize("name", DECORATORS)
def test_a_declared_name_is_an_attribute_of_the_function_itself(name):
    decorator, allowed = DECORATORS[name]

    def function():
        pass

    assert decorator(allowed)(function) is function
    assert getattr(function, name.partition(" ")[0]) == (allowed,)


@pytest.mark.parametrize("name", DECORATORS)
def test_an_unknown_name_is_refused_with_those_that_are_allowed(name):
    decorator, allowed = DECORATORS[name]
    message = rf"@{name.partition(' ')[0]} takes .*\b{re.escape(allowed)}\b.*, and not unheard$"
    with pytest.raises(TypeError, match=message):
        decorator(allowed, "unheard")


def test_a_trait_of_another_kind_of_component_is_refused():
    with pytest.raises(TypeError, match=r"not recorded$"):
        rollouts.traits("recorded")
    with pytest.raises(TypeError, match=r"not by_teacher$"):
        teachers.traits("by_teacher")
