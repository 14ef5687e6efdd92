"""The toys' optimiser is Muon for what it is told to take, AdamW for the rest, and goes on where it stopped."""

from __future__ import annotations

from typing import Any

import torch
from subject_patches.toy.optimisers import MuonAndAdamW
from subject_patches.toy.train_diffusion import Model, inside
from torch import nn


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.block, self.head, self.frozen = nn.Conv2d(3, 5, 3), nn.Linear(5, 2), nn.Linear(2, 2)
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(self.head(self.block(x).mean((2, 3)).tanh()))


def stepped(model: Small, optimiser: Any, steps: range) -> None:
    for step in steps:
        x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        optimiser.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimiser.step()


def made(model: Small) -> MuonAndAdamW:
    optimiser = MuonAndAdamW(model, 0.01, lambda name: name.startswith("block"))
    assert [group.get("times") for group in optimiser.param_groups] == [1.0, None]
    return optimiser


def test_a_convolution_is_a_matrix_of_its_output_channels() -> None:
    """Its weights go where Muon takes that matrix; its bias and the other layers go where AdamW takes them."""
    model, expected = Small(), Small()
    stepped(model, made(model), range(1))
    weight = nn.Parameter(expected.block.weight.detach().reshape(5, 27).clone())
    muon = torch.optim.Muon([weight], 0.01, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    others = [expected.block.bias, *expected.head.parameters()]
    adamw = torch.optim.AdamW(others, 0.01, (0.9, 0.99), weight_decay=1e-3)
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    (expected(x) - 1).square().mean().backward()
    weight.grad = expected.block.weight.grad.reshape(5, 27)
    muon.step()
    adamw.step()
    assert torch.equal(model.block.weight, weight.view(5, 3, 3, 3))
    assert all(torch.equal(a, b) for a, b in zip([model.block.bias, *model.head.parameters()], others, strict=True))
    assert torch.equal(model.frozen.weight, Small().frozen.weight)


def test_a_run_goes_on_as_if_it_had_not_stopped() -> None:
    whole, first = Small(), Small()
    stepped(whole, made(whole), range(6))
    optimiser = made(first)
    stepped(first, optimiser, range(3))
    again = Small()
    again.load_state_dict(first.state_dict())
    resumed = made(again)
    resumed.load_state_dict(optimiser.state_dict())
    stepped(again, resumed, range(3, 6))
    assert torch.equal(again.block.weight, whole.block.weight)
    assert torch.equal(again.head.weight, whole.head.weight)


def test_what_muon_takes_of_the_toy() -> None:
    """The matrices and convolutions of the U-Net's blocks, which are most of it; neither its first and last layer nor
    words, text encoder and labels."""
    model = Model()
    taken = {name for name, each in model.named_parameters() if inside(name) and each.ndim in (2, 4)}
    blocks = ("unet.input_blocks.", "unet.middle_block.", "unet.output_blocks.")
    assert all(name.startswith(blocks) for name in taken)
    assert "unet.input_blocks.1.0.in_layers.2.weight" in taken
    assert "unet.middle_block.1.transformer_blocks.0.attn1.to_q.weight" in taken
    assert "unet.input_blocks.0.0.weight" not in taken
    share = sum(model.get_parameter(name).numel() for name in taken) / sum(p.numel() for p in model.unet.parameters())
    assert 0.9 < share < 1
