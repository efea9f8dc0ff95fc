"""Functions with wrong numbers are refused before training, by a trial on a small target."""

import pytest

from kd.experiment.prerequisites import prepare
from tests.refusals import refused
from tests.small import small_config


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("trial")


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        ("loss=mse truncation=top_k truncation.k=1", {"option": "loss", "why": "has no gradient on the tokens"}),
        ("truncation=top_k truncation.k=0", {"option": "truncation.k", "got": "0"}),
        ("logits=offline truncation=top_k truncation.k=1 record=top_k record.k=0", {"option": "record.k", "got": "0"}),
        ("optim.eps=-1", {"option": "optim", "why": "Invalid epsilon value"}),
    ],
)
def test_wrong_numbers_are_refused_by_their_option(words, fields, root):
    with refused(**fields):
        prepare(small_config(root, *words.split()))
    prepare(small_config(root))
