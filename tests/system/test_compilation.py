import os

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.runtime import cache_dir_utils

from kd.system import compilation


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """$KD_CACHE, in an environment that names no folder of compiled code."""
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(compilation.CACHE, "")  # so that the end of the test restores what there was
    monkeypatch.delenv(compilation.CACHE)
    return tmp_path / "cache"


def test_where_compiling_fails_the_function_itself_computes_and_that_is_said_once(monkeypatch, capsys):
    def fails(*_, **__):
        raise TorchDynamoException("no C compiler\nin many lines")

    monkeypatch.setattr(torch, "compile", lambda function: fails)
    monkeypatch.setattr(compilation, "_failed", False)
    for number in (1, 2):
        assert compilation.compile_if_possible(lambda x, y: x + y)(number, y=1) == number + 1
    printed = capsys.readouterr().err
    assert printed.count("no C compiler") == 1 and "trainer.compile=false" in printed and "many lines" not in printed


def test_errors_of_the_function_itself_are_raised(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    with pytest.raises(ZeroDivisionError):
        compilation.compile_if_possible(lambda x: 1 // x)(0)


def test_compiled_code_is_kept_beside_other_caches(cache):
    compilation.keep_compiled_code()
    assert os.environ[compilation.CACHE] == str(cache / "compiled")
    assert (cache / "compiled").is_dir()


def test_the_folder_that_torch_sets_when_it_is_loaded_is_replaced(cache, monkeypatch, tmp_path):
    for module in (cache_dir_utils, compilation):
        monkeypatch.setattr(module, "default_cache_dir", lambda: str(tmp_path / "torch"))
    cache_dir_utils.cache_dir()  # as on import of torch's compiler
    assert os.environ[compilation.CACHE] == str(tmp_path / "torch")
    compilation.keep_compiled_code()
    assert cache_dir_utils.cache_dir() == str(cache / "compiled")


def test_a_folder_that_the_environment_names_is_left(cache, monkeypatch, tmp_path):
    monkeypatch.setenv(compilation.CACHE, str(tmp_path / "mine"))
    compilation.keep_compiled_code()
    assert os.environ[compilation.CACHE] == str(tmp_path / "mine")


def test_without_a_cache_of_its_own_torch_chooses_the_folder(cache):
    cache.write_text("a file in place of the folder")
    compilation.keep_compiled_code()
    assert compilation.CACHE not in os.environ
