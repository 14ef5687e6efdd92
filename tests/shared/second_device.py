"""A second device for machines that have none: tensors "on" it lie on the CPU, and mixing the two is an error.

While a `SecondDevice` is entered, `.to(DEVICE)` and `device=DEVICE` make tensors that say they are there. Every
function of torch that Python calls is held to the rules of an accelerator: no tensor of the CPU beside one of the
device, unless it has no dimensions, and none of the device is read as numpy. So a run of the host shows what a GPU
would refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_flatten, tree_map

# The host asks such a device for no driver.
DEVICE = torch.device("mps")
CPU = torch.device("cpu")
_MOVES = {"to", "cpu", "type_as", "copy_", "__set__", "__setitem__"}
_OF_MODULES = {"_parse_to", "_has_compatible_shallow_copy_type"}
_READS = {"numpy", "__array__"}


class SecondDevice(TorchFunctionMode):
    """Which storages lie on DEVICE."""

    def __init__(self) -> None:
        super().__init__()
        # Kept, so that no other storage takes the place of one that is gone.
        self.there: dict[int, Any] = {}

    def holds(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.there

    def put(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.there[storage._cdata] = storage

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        owner = getattr(function, "__self__", None)
        if name in _OF_MODULES:
            return function(*args, **kwargs)
        if name == "__get__":
            if owner is Tensor.device and args and isinstance(args[0], Tensor):
                return DEVICE if self.holds(args[0]) else CPU
            result = function(*args, **kwargs)
            if isinstance(result, Tensor) and self.holds(args[0]):
                # A gradient was made where Python does not see it.
                self.put(result)
            return result
        tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
        target = self._target(name, args, kwargs)
        if name in _READS and any(map(self.holds, tensors)):
            raise TypeError(f"{name} of a tensor on {DEVICE}; copy it to the CPU first.")
        if name not in _MOVES:
            self._check(function, name, tensors)
        args, kwargs = tree_map(_on_the_cpu, args), tree_map(_on_the_cpu, kwargs)
        result = function(*args, **kwargs)
        if name in ("__set__", "copy_", "__setitem__"):
            return result
        if target is None:
            target = DEVICE if any(map(self.holds, tensors)) else CPU
        return self._moved(result, target, tensors)

    def _target(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
        """The device that a call names."""
        if name == "cpu":
            return CPU
        if name in ("to", "type_as") and len(args) > 1 and isinstance(args[1], Tensor):
            return DEVICE if self.holds(args[1]) else CPU
        named: Iterable[Any] = [kwargs.get("device"), *(args[1:] if name == "to" else ())]
        for each in named:
            if isinstance(each, str | torch.device):
                return torch.device(each)
        return None

    def _check(self, function: Callable[..., Any], name: str, tensors: list[Tensor]) -> None:
        there = [each for each in tensors if self.holds(each)]
        here = [each for each in tensors if not self.holds(each)]
        # An index may lie on the CPU.
        if name == "__getitem__" and there and there[0] is tensors[0]:
            return
        if there and any(each.ndim for each in here):
            shapes = [(tuple(each.shape), str(DEVICE if self.holds(each) else CPU)) for each in tensors]
            raise RuntimeError(f"{resolve_name(function) or name} was given tensors on two devices: {shapes}.")

    def _moved(self, result: Any, target: torch.device, tensors: list[Tensor]) -> Any:
        def move(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if target.type == "cpu":
                return value.clone() if self.holds(value) else value
            if not self.holds(value):
                # A copy, since what it was made of stays where it is.
                value = value.clone() if any(_shared(value, each) for each in tensors) else value
                self.put(value)
            return value

        return tree_map(move, result)


def _on_the_cpu(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == DEVICE.type:
        return CPU
    return "cpu" if isinstance(value, str) and value == DEVICE.type else value


def _shared(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata
