"""The toys' optimiser: Muon for matrices and convolutions inside blocks, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class MuonAndAdamW:
    """Two optimisers as one: Muon (Jordan 2024) for the parameters that `inside` chooses by name, of those with two or
    four axes, AdamW for the rest. A convolution is a matrix of its output channels.

    Muon's rate, brought to AdamW's size of step, is `times` as high."""

    def __init__(self, model: nn.Module, rate: float, inside: Callable[[str], bool], times: float = 1.0) -> None:
        trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
        chosen = {name: each for name, each in trained.items() if inside(name) and each.ndim in (2, 4)}
        # Muon takes matrices only: each of these is its parameter seen as one, in the same memory.
        self.matrices = [(each, nn.Parameter(each.detach().flatten(1))) for each in chosen.values()]
        matrices = [{"params": [matrix for _, matrix in self.matrices], "times": times}]
        self.parts = (
            torch.optim.Muon(matrices, rate, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(
                [each for name, each in trained.items() if name not in chosen], rate, (0.9, 0.99), weight_decay=1e-3
            ),
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        for parameter, matrix in self.matrices:
            matrix.grad = parameter.grad.flatten(1)
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter, _ in self.matrices:
            parameter.grad = None
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {str(row): part.state_dict() for row, part in enumerate(self.parts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for row, part in enumerate(self.parts):
            part.load_state_dict(state[str(row)])
