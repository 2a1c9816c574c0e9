"""Modes under which every torch operation is looked at: what it leaves in memory, and whether the host waits for it."""

import weakref

import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Live(TorchDispatchMode):
    """Follows each storage that an operation returns from its making to its end."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {}

    def _add(self, tensor):
        storage = tensor.untyped_storage()
        if tensor.device.type != "meta" and storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, key):
        self.now -= self.sizes.pop(key, 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        _pytree.tree_map_only(torch.Tensor, self._add, out)
        return out


class NoSync(TorchDispatchMode):
    """Raises on every operation that makes the host wait for the device: those that read a value or find a shape."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "item")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        boolean = name in ("index", "index_put_", "index_put") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        assert not boolean, f"{name} by a boolean mask"
        assert name.strip("_") not in [w.strip("_") for w in self.WAITS], name
        return function(*args, **(kwargs or {}))
