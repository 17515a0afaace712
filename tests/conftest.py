"""Fixtures: every instruction set and dtype of this machine; deterministic hypothesis profiles.

LOLA_HYPOTHESIS=thorough runs many more examples, drawn afresh each time.
LOLA_FORBID_SKIPS=1 makes a skipped test a failure, except those in tests/cuda.
"""

import os
import pathlib
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(pathlib.Path(__file__).parent))

# A child started with -c or -m would find the source tree in the working directory before the installed package.
os.environ.setdefault("PYTHONSAFEPATH", "1")

from oracle import DTYPES                                             # noqa: E402

try:
    import lola
    from lola import _lola
except ImportError:                      # then test_reference.py still runs; every other file fails, as it should
    _lola = None

_COMMON = dict(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow,
                                                     HealthCheck.data_too_large])
settings.register_profile("default", derandomize=True, max_examples=30, **_COMMON)
settings.register_profile("thorough", max_examples=300, **_COMMON)
settings.load_profile(os.environ.get("LOLA_HYPOTHESIS", "default"))

FORBID_SKIPS = os.environ.get("LOLA_FORBID_SKIPS") == "1"


def _refuse_skips(report):
    if FORBID_SKIPS and report.skipped and not hasattr(report, "wasxfail") and "tests/cuda" not in report.nodeid:
        report.outcome, report.longrepr = "failed", f"skipped, which LOLA_FORBID_SKIPS forbids: {report.longrepr}"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    _refuse_skips((yield).get_result())


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector):
    _refuse_skips((yield).get_result())


ISAS = list(_lola.available_isas()) if _lola else []


@pytest.fixture(params=ISAS)
def isa(request):
    """Run the test on each instruction set in turn."""
    before = _lola.isa()
    _lola.set_isa(request.param)
    yield request.param
    _lola.set_isa(before)


@pytest.fixture(params=list(DTYPES))
def dtype(request):
    return request.param


@pytest.fixture
def threads():
    """A function that sets the number of threads; the number found is put back."""
    before = lola.get_num_threads()
    yield lola.set_num_threads
    lola.set_num_threads(before)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
