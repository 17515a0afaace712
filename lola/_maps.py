"""Feature maps: phi(x) >= 0, with which linear attention replaces the exponential."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Any

import numpy as np

from . import _lola


class FeatureMap(_lola.FeatureMap):
    """What the feature maps have in common: `name`, the weights `w_q` and `w_k`, their sizes and a fingerprint.

    Weights may come as any array of floats, torch tensors too; they are kept as read-only float32 copies. Two maps are
    equal when their kinds and weights are.
    """

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the kind and the weights, by which a cache knows its map again, in another process too."""
        digest = hashlib.sha256(self.name.encode())
        for weights in (self.w_q, self.w_k):
            if weights is not None:
                digest.update(repr(weights.shape).encode())
                digest.update(weights.astype("<f4", copy=False).data)
        return digest.hexdigest()

    def feature_dim(self, head_dim: int) -> int:
        """F, the size of the features of queries and keys of size `head_dim`."""
        if self.w_q is None:
            return head_dim
        if self.w_q.shape[1] != head_dim:
            raise ValueError(f"head_dim must be {self.w_q.shape[1]}, as the weights are, got {head_dim}")
        return int(self.w_q.shape[2]) * (1 if self.name == "relu" else 2)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FeatureMap) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        if self.w_q is None:
            return f"{type(self).__name__}()"
        return f"{type(self).__name__}(w_q=<float32 {self.w_q.shape}>, w_k=<float32 {self.w_q.shape}>)"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), () if self.w_q is None else (self.w_q, self.w_k)


class Hedgehog(FeatureMap):
    """phi(x) = [softmax(xW), softmax(-xW)], clamped at 1e-12: Hedgehog (arXiv 2402.04347), LoLCATs' `softmax_dim`.

    Args:
        w_q, w_k: (Hq, D, F/2) floats, the weights for queries and for keys of each query head.

    Raises:
        TypeError, ValueError: Weights of a wrong kind, shape or value, or that require grad.

    >>> w = np.zeros((4, 64, 64))
    >>> Hedgehog(w, w).feature_dim(64)
    128
    """

    def __new__(cls, w_q: Any, w_k: Any) -> Hedgehog:
        return super().__new__(cls, "hedgehog", w_q, w_k)


class HedgehogExp(FeatureMap):
    """phi(x) = [exp(xW - max), exp(-xW + min)], clamped at 1e-12: LoLCATs' `exp_dim`.

    Args:
        w_q, w_k: (Hq, D, F/2) floats, the weights for queries and for keys of each query head.

    Raises:
        TypeError, ValueError: Weights of a wrong kind, shape or value, or that require grad.
    """

    def __new__(cls, w_q: Any, w_k: Any) -> HedgehogExp:
        return super().__new__(cls, "hedgehog_exp", w_q, w_k)


class EluPlusOne(FeatureMap):
    """phi(x) = 1 + elu(x), without weights: F = D (Katharopoulos et al., arXiv 2006.16236).

    >>> EluPlusOne() == EluPlusOne()
    True
    """

    def __new__(cls) -> EluPlusOne:
        return super().__new__(cls, "elu_plus_one")


class Relu(FeatureMap):
    """phi(x) = relu(xW), clamped at 1e-12: T2R (arXiv 2103.13076). Without weights phi(x) = relu(x) and F = D.

    Args:
        w_q, w_k: (Hq, D, F) floats, the weights for queries and for keys of each query head; both or none.

    Raises:
        TypeError, ValueError: Weights of a wrong kind, shape or value, or that require grad.
    """

    def __new__(cls, w_q: Any = None, w_k: Any = None) -> Relu:
        return super().__new__(cls, "relu", w_q, w_k)
