"""Prove that a step reads nothing from the device, on a machine without one.

Fake tensors have shape, dtype and device but no data. On the device `lazy:0`, which every torch build can differentiate on and which
is not the CPU, a training step runs as it would on a GPU, and whatever needs a value on the host (`.item()`, a Python branch, a boolean
index) raises; what silently copies between host and device, or draws from a generator of the wrong device, is recorded here.
Not seen: waits inside kernels (the error check of `cholesky`; use the `_ex` variants), and branches on `is_cuda`.
"""
import contextlib
import traceback
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("lazy:0")


def culprit():
    """The innermost line outside torch and outside this file."""
    for frame in reversed(traceback.extract_stack()):
        if "/torch/" not in frame.filename and frame.filename != __file__:
            return f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} `{frame.line}`"
    return "unknown place"


class Watch(TorchDispatchMode):
    """Records the copies between host and device made while it is active."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        places = {a.device.type for a in args if isinstance(a, torch.Tensor)}
        if name == "_to_copy" and kwargs.get("device") is not None:
            places.add(torch.device(kwargs["device"]).type)
        if name in ("_to_copy", "copy_") and len(places) > 1:
            self.found.append(f"copy between {' and '.join(sorted(places))} at {culprit()}")
        return func(*args, **kwargs)


class OneDevice:
    """Stands in for `torch.Generator`: a fake device has none, so a CPU generator serves if it was asked for on the fake device."""

    def __init__(self, watch):
        self.watch, self.real = watch, torch.Generator

    def __call__(self, device="cpu"):
        if torch.device(device).type != DEVICE.type:
            self.watch.found.append(f"a generator on {device} at {culprit()}")
        return self.real()


@contextlib.contextmanager
def fake_device():
    """Inside, build everything under `with DEVICE:`."""
    with FakeTensorMode(), DEVICE:
        yield


@contextlib.contextmanager
def no_host_reads():
    """Fails when something inside reads from the device, copies between devices or mixes them."""
    watch = Watch()
    # under `with DEVICE` the default device would hide a tensor made on the CPU by mistake
    with torch.device("cpu"), mock.patch("torch.Generator", OneDevice(watch)), watch:
        yield
    assert not watch.found, watch.found
