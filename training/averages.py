"""What a training averages: its weights over the steps, and gradients over the processes that train together."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class Average:
    """Exponential moving average of a module's parameters; its memory grows with the steps up to `decay`."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        mine = list(self.module.parameters())
        torch._foreach_lerp_(mine, [p.detach() for p in module.parameters()], 1 - decay)


def shared(gradients: Sequence[Tensor], number: float, mean: Callable[[Tensor], Tensor]) -> float:
    """Makes the gradients their `mean` over some processes, and gives that of the `number`s: all in one exchange."""
    flat = mean(torch.cat([*(g.flatten() for g in gradients), gradients[0].new_full((1,), number)]))
    for gradient, part in zip(gradients, flat[:-1].split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
    return float(flat[-1])
