"""Two tiny models: student and teacher."""

import pytest

from tests.rollout.test_generate import model


@pytest.fixture(scope="module")
def models():
    return {"student": model("llama", 0), "teacher": model("gpt2", 1)}
