"""Runs the tests of this folder on a CUDA device, or skips them all and says why.

Many of them are the CPU's own: test_cuda_contract.py and test_cuda_steps.py import them, and `oracle.place` makes them
run on the device. A module chooses its arrays with ARRAYS = "torch" (the default) or "numpy".

    pytest -n 4 tests/cuda                                           all of them
    compute-sanitizer --tool memcheck --error-exitcode 1 \\
        python -m pytest -q -p no:xdist tests/cuda/test_cuda_small.py    each kernel at small sizes, without torch
                                                                     (and racecheck, synccheck, initcheck)
    python tests/cuda/disassembly.py lola/_cuda.*.so                 what nvcc made of the kernels; needs no GPU
"""

import importlib.util
import os
import pathlib
import sys

import pytest
from hypothesis import settings

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))

import lola                                                           # noqa: E402

import oracle                                                         # noqa: E402
import places                                                         # noqa: E402

settings.register_profile("cuda", settings.get_profile(os.environ.get("LOLA_HYPOTHESIS", "default")), max_examples=10)


def why_not():
    """Why nothing can run here; None where it can."""
    if not places.ON_CUDA:
        return None
    if not lola.cuda_available():
        return f"no CUDA device for lola: {lola.cuda_unavailable_reason()}"
    return None


def pytest_collection_modifyitems(config, items):
    here = [item for item in items if HERE in item.path.parents]
    reason = why_not() if here else None
    if reason:                                               # one skip that says why, in place of all
        here[0].add_marker(pytest.mark.skip(reason=reason))
        config.hook.pytest_deselected(items=here[1:])
        gone = set(here[1:])
        items[:] = [item for item in items if item not in gone]
        return
    for item in here:
        if getattr(item.module, "ARRAYS", "torch") == "torch" and importlib.util.find_spec("torch") is None:
            item.add_marker(pytest.mark.skip(reason="these tests take torch"))


@pytest.fixture(autouse=True)
def place(request, monkeypatch):
    """lola runs on the device, and hypothesis draws fewer examples."""
    chosen = places.PLACES[getattr(request.module, "ARRAYS", "torch")]
    monkeypatch.setattr(oracle, "place", chosen)
    if os.environ.get("LOLA_HYPOTHESIS") is not None:
        yield chosen
        return
    settings.load_profile("cuda")
    yield chosen
    settings.load_profile("default")


@pytest.fixture
def isa():
    """Tests of the CPU run on each instruction set in turn; here the device is the only one."""
    return "cuda"
