"""Where these tests run lola: `oracle.place` for CUDA tensors of torch, and for NumPy arrays that lola copies.

LOLA_TEST_DEVICE=cpu runs what it can on the CPU instead, to try the tests themselves where there is no GPU.
"""

import os

import lola
import numpy as np
import pytest

import oracle
from oracle import DTYPES

DEVICE = os.environ.get("LOLA_TEST_DEVICE", "cuda")
ON_CUDA = DEVICE == "cuda"
only_on_cuda = pytest.mark.skipif(not ON_CUDA, reason="of the device itself")


def tensor(x, device=DEVICE):
    """A torch tensor of x's bits on the device."""
    import torch
    x = np.ascontiguousarray(x)
    if x.dtype == DTYPES["bfloat16"]:
        return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16).to(device)
    return torch.from_numpy(x.copy()).to(device)


def array(x):
    """The NumPy array of the same bits as a tensor, a cache's view, or anything else with DLPack."""
    if isinstance(x, np.ndarray) or not hasattr(x, "__dlpack__"):
        return np.asarray(x)
    if type(x).__module__.startswith("lola"):
        return x.numpy()
    import torch
    if not isinstance(x, torch.Tensor):
        x = torch.from_dlpack(x)
    x = x.detach().cpu()
    return x.view(torch.int16).numpy().view(DTYPES["bfloat16"]) if x.dtype == torch.bfloat16 else x.numpy()


class Torch:
    """lola on the device, with torch tensors. Memory that torch hands out for results is full of NaN."""

    name, device = "torch", DEVICE
    give, take = staticmethod(tensor), staticmethod(array)

    def attention(self, q, k, v, **more):
        import torch
        if q.numel() and v.ndim == 4:
            torch.full(q.shape[:3] + v.shape[3:], float("nan"), dtype=q.dtype, device=q.device)    # and freed at once
        return lola.attention(q, k, v, **more)

    def step(self, name, *arguments, **more):
        import torch
        arrays = {}

        def give(x):
            if not isinstance(x, np.ndarray):
                return x
            arrays[id(x)] = x, self.give(x)
            return arrays[id(x)][1]

        out = getattr(lola.kernels, name)(*map(give, arguments), **{n: give(x) for n, x in more.items()})
        if name == "fold":                                   # in place
            for x, given in arrays.values():
                x[...] = self.take(given)
        if isinstance(out, tuple):
            return tuple(map(self.take, out))
        return self.take(out) if isinstance(out, torch.Tensor) else out


class Numpy(oracle.Cpu):
    """lola on the device, with NumPy arrays that it copies there and back. Needs no torch."""

    name, device = "numpy", DEVICE
    take = staticmethod(array)

    def step(self, name, *arguments, **more):
        return getattr(lola.kernels, name)(*arguments, **more, **({"device": DEVICE} if ON_CUDA else {}))


PLACES = {place.name: place for place in (Torch(), Numpy())}
