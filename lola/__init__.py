"""LoLA: linear attention with a sliding window and a sparse cache (arXiv 2505.23666).

    attention                           prefill and decoding
    Config, Cache                       what is remembered, and the memory itself
    Hedgehog, HedgehogExp, EluPlusOne, Relu     feature maps
    kernels, self_recall_error, stats   the single steps
    reference                           the float64 oracle
    models, eval                        a small model that runs on it, and what it is good for
    torch                               the drop-in for PyTorch and Hugging Face (needs lola[torch])

Two variables are read at import: LOLA_NUM_THREADS, a number from 1, and LOLA_ISA, one of lola._lola.available_isas().
"""

from __future__ import annotations

import importlib
import os
from typing import Any

try:
    from . import _lola
except ImportError as error:
    raise ImportError(
        "lola's C extension is not beside its Python files. In a source tree, build it in place with 'pip install -e .', or run "
        "from another folder to import an installed lola"
    ) from error

from . import kernels, stats
from ._attention import attention
from ._cache import Cache
from ._config import Config
from ._maps import EluPlusOne, Hedgehog, HedgehogExp, Relu
from .kernels import score as self_recall_error

__version__ = "0.1.0"

__all__ = [
    "Cache",
    "Config",
    "EluPlusOne",
    "Hedgehog",
    "HedgehogExp",
    "Relu",
    "attention",
    "cuda_available",
    "cuda_unavailable_reason",
    "get_num_threads",
    "kernels",
    "self_recall_error",
    "set_num_threads",
    "stats",
]


def set_num_threads(threads: int) -> None:
    """Sets how many threads a call may use, at least 1. Results do not depend on it.

    Raises:
        TypeError, ValueError: No such number.
    """
    _lola.set_num_threads(threads)


def get_num_threads() -> int:
    """How many threads a call may use; as many as the process may run on, unless set."""
    return _lola.num_threads()


def cuda_available() -> bool:
    """Whether CUDA devices can be used. Asks the driver, which `import lola` does not."""
    return cuda_unavailable_reason() is None


def cuda_unavailable_reason() -> str | None:
    """Why `cuda_available()` is False; None where it is True."""
    return _lola.cuda_unavailable_reason()


def _read_environment() -> None:
    """Wrong values stop the import: who sets them wants to know."""
    threads = os.environ.get("LOLA_NUM_THREADS")
    if threads:
        try:
            _lola.set_num_threads(int(threads))
        except (ValueError, OverflowError) as error:
            raise ValueError(f"LOLA_NUM_THREADS must be a number of threads from 1, got {threads!r}") from error
    isa = os.environ.get("LOLA_ISA")
    if isa:
        try:
            _lola.set_isa(isa)
        except ValueError as error:
            names = ", ".join(_lola.available_isas())
            raise ValueError(f"LOLA_ISA must be one of {names} on this machine, got {isa!r}") from error


_read_environment()


def __getattr__(name: str) -> Any:
    # Loaded when first asked for: they are large, and import what the rest does not need.
    if name in ("eval", "models", "reference", "torch"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
