"""A process that is forked after the first use of MLX gets an error, and does not wait for ever."""

import os

import pytest

SCRIPT = """
import multiprocessing, sys
import mlx.core as mx
from metalens import InterpretableModel
from metalens.ops import Weight, linear
from support.mocks import MockModel

def work(how):
    if how == "product":
        return linear(mx.ones((2, 3)), Weight(mx.ones((4, 3)))).tolist()[0][0]
    return InterpretableModel(MockModel(), accelerate=False).read([1, 2, 3]).tokens

if __name__ == "__main__":
    how, first = sys.argv[1:]
    if first == "used":
        work("product")
    with multiprocessing.get_context("fork").Pool(1) as pool:
        try:
            print(pool.apply_async(work, [how]).get(60))
        except Exception as error:
            print(type(error).__name__, error)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("how", ["product", "reading"])
def test_a_fork_after_the_first_use(run_script, how):
    assert run_script(how, "used").startswith("UnavailableError This process was forked from one that had used MLX, and would wait for ever")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_before_the_first_use(run_script):
    assert run_script("product", "unused").strip() == "3.0"


@pytest.fixture
def run_script(run_python, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    return lambda *arguments: run_python(f"import sys, runpy; sys.argv[1:] = {arguments!r}; runpy.run_path('script.py', run_name='__main__')")
