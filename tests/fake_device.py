"""Prove that a step reads nothing from the device, on a machine without one.

Fake tensors have shape, dtype and device but no data. On the device `lazy:0`, which every torch build can differentiate on and which
is not the CPU, a training step runs as it would on a GPU, and whatever needs a value on the host (`.item()`, a Python branch, a boolean
index) raises, except in functions that are allowed to read a number (they get a one); what silently copies between host and device, or draws
from a generator of the wrong device, is recorded here. What is allowed is counted.
Fake tensors run no kernels, so operations that wait for the device inside their own implementation are known by name (`WAITS`).
Not seen: branches on `is_cuda`.
"""
import collections
import contextlib
import linecache
import traceback
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("lazy:0")
# Operations that read their own result on the host before they return: an error code of the solver, or whether probabilities are valid.
WAITS = {"_linalg_eigh", "linalg_eig", "_linalg_svd", "_linalg_check_errors", "multinomial"}


def culprit():
    """Function and text of the innermost line outside torch and outside this file."""
    for frame, line in traceback.walk_stack(None):
        code = frame.f_code
        if "/torch/" not in code.co_filename and code.co_filename != __file__:
            return code.co_name, f"{code.co_filename.rsplit('/', 1)[-1]}:{line} `{linecache.getline(code.co_filename, line).strip()}`"
    return "", "unknown place"


class Watch(TorchDispatchMode):
    """Records the copies between host and device made while it is active; `readers` name the functions that may read a number.

    `reads` counts what they read, by function (a list that is read at once counts one), `waits` the operations of `WAITS`, and `copies` what the readers copy (an index made of
    Python numbers, for example).
    """

    def __init__(self, readers):
        super().__init__()
        self.found, self.readers = [], readers
        self.reads, self.waits, self.copies = collections.Counter(), collections.Counter(), collections.Counter()
        self.listing = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        places = {a.device.type for a in args if isinstance(a, torch.Tensor)}
        if name == "_to_copy" and kwargs.get("device") is not None:
            places.add(torch.device(kwargs["device"]).type)
        if name in ("_to_copy", "copy_") and len(places) > 1 and culprit()[0] in self.readers:
            self.copies[culprit()[0]] += 1
        elif name in ("_to_copy", "copy_") and len(places) > 1:
            self.found.append(f"copy between {' and '.join(sorted(places))} at {culprit()[1]}")
        if name in WAITS:
            self.waits[name] += 1
        if name == "_local_scalar_dense" and culprit()[0] in self.readers:
            self.reads[culprit()[0]] += not self.listing
            return True if args[0].dtype == torch.bool else 1.0
        return func(*args, **kwargs)

    def tolist(self, tensor):
        """`FakeTensor.tolist` of torch before 2.5 needs a symbolic shape environment; later ones read item by item, like this."""
        self.reads[culprit()[0]] += not self.listing
        outer, self.listing = self.listing, True
        try:
            return tensor.item() if tensor.dim() == 0 else [self.tolist(part) for part in tensor.unbind()]
        finally:
            self.listing = outer


class OneDevice:
    """Stands in for `torch.Generator`: a fake device has none, so a CPU generator serves if it was asked for on the fake device."""

    def __init__(self, watch):
        self.watch, self.real = watch, torch.Generator

    def __call__(self, device="cpu"):
        if torch.device(device).type != DEVICE.type:
            self.watch.found.append(f"a generator on {device} at {culprit()[1]}")
        return self.real()


@contextlib.contextmanager
def fake_device():
    """Inside, build everything under `with DEVICE:`."""
    with FakeTensorMode(), DEVICE:
        yield


@contextlib.contextmanager
def no_host_reads(readers=()):
    """Fails when something inside, other than the functions named `readers`, reads from the device, copies between devices or mixes them; yields the counts."""
    watch = Watch(readers)
    # under `with DEVICE` the default device would hide a tensor made on the CPU by mistake
    with torch.device("cpu"), mock.patch("torch.Generator", OneDevice(watch)), mock.patch.object(FakeTensor, "tolist", lambda tensor: watch.tolist(tensor)), watch:
        yield watch
    assert not watch.found, watch.found
