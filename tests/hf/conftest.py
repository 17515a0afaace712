"""Which of these tests run.

LOLA_REQUIRE_HF=1 or LOLA_FORBID_SKIPS=1, as in CI, makes a missing torch, transformers, accelerate or lm-eval an error;
otherwise the tests that need them are left out, with a warning that says so.
"""

import importlib.util
import os
import warnings

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

collect_ignore, collect_ignore_glob = [], []


def _missing(names, required):
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing and required:
        raise ModuleNotFoundError(f"{', '.join(missing)} must be installed for these tests")
    if missing:
        warnings.warn(f"tests/hf leaves out tests that need {', '.join(missing)}", stacklevel=1)
    return missing


REQUIRED = "1" in (os.environ.get("LOLA_REQUIRE_HF"), os.environ.get("LOLA_FORBID_SKIPS"))
if _missing(["torch", "transformers"], REQUIRED):
    collect_ignore_glob.append("test_*.py")
else:
    import torch
    import transformers

    if _missing(["accelerate"], REQUIRED):
        collect_ignore.append("test_device_map.py")
    if _missing(["lm_eval"], REQUIRED):
        collect_ignore.append("test_lm_eval.py")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def no_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield
