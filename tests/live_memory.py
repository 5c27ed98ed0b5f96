"""Counts the memory of all tensors that are alive at once, whatever the machine."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Within it, `peak` is the most bytes that tensors made in it held at one time."""

    def __init__(self):
        super().__init__()
        self.sizes: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        old = {StorageWeakRef(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf)}
        result = func(*args, **(kwargs or {}))
        self.sizes = {storage: size for storage, size in self.sizes.items() if not storage.expired()}
        for leaf in filter(_is_tensor, tree_leaves(result)):
            storage = StorageWeakRef(leaf.untyped_storage())
            if storage not in old:  # a view or an in-place result holds nothing new
                self.sizes[storage] = leaf.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result


def _is_tensor(value) -> bool:
    return isinstance(value, torch.Tensor)
