"""What a cached feature depends on, as keys: contents where they are small, identity where they are not."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator, Mapping
from types import MethodType
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor

# What the host puts there for one run, and functions that act after the model.
_RUN_OPTIONS = frozenset(
    {
        "sample_sigmas",
        "sampler_post_cfg_function",
        "sampler_pre_cfg_function",
        "sampler_cfg_function",
        "registered_hooks",
        "denoise_mask_function",
        "multigpu_clones",
        "multigpu_thread_pool",
    }
)


def digest_of(model_conds: Mapping[str, Any]) -> str:
    """A digest of the contents of a conditioning as the host encoded it for its model."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(model_conds):
        for part in _bytes_of((name, model_conds[name].cond)):
            digest.update(part)
    return digest.hexdigest()


def _bytes_of(value: Any) -> Iterator[bytes]:
    """A value in bytes, tensors with all that they hold: they print few of their numbers, and rounded."""
    if isinstance(value, Tensor):
        yield str((value.dtype, tuple(value.shape))).encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, Mapping):
        yield from _bytes_of(list(value.items()))
    elif isinstance(value, list | tuple):
        yield str((type(value).__name__, len(value))).encode()
        for item in value:
            yield from _bytes_of(item)
    else:
        yield repr(value).encode()


class Same:
    """Equal to another of its kind for the same living object: a key's part that keeps nothing alive."""

    def __init__(self, value: Any) -> None:
        try:
            self.get = WeakMethod(value) if isinstance(value, MethodType) else weakref.ref(value)
        except TypeError:  # no weak reference to such an object: hold it, so that no other takes its identity
            self.get = lambda: value
        self.number = id(value.__self__) if isinstance(value, MethodType) else id(value)

    def __hash__(self) -> int:
        return self.number

    def __eq__(self, other: object) -> bool:
        mine, its = self.get(), other.get() if isinstance(other, Same) else None
        # A bound method is a new object each time it is asked for.
        return mine is not None and (mine is its or (isinstance(mine, MethodType) and bool(mine == its)))


def foreign_patches(value: Any, own_key: str) -> Any:
    """What other packs have put into the model's options, by identity: their patches may change the features."""
    if isinstance(value, Mapping):
        names = (n for n in value if not str(n).startswith(own_key) and n not in _RUN_OPTIONS)
        return tuple((str(name), foreign_patches(value[name], own_key)) for name in sorted(names, key=str))
    if isinstance(value, list | tuple):
        return tuple(foreign_patches(item, own_key) for item in value)
    return value if isinstance(value, str | int | float | bool | None) else Same(value)
