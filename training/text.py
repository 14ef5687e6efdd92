"""A CLIP's encoding that autograd goes through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from comfy.clip_model import CLIPLayer
from torch import Tensor

from .copies import private_copy

# The host's tokens of a prompt: for each encoder its chunks of 77, each a list of (token, weight). A token is a number
# of the vocabulary or a vector of the encoder's width.
Tokens = Mapping[str, Sequence[Sequence[tuple[Any, float]]]]


class TextEncoder:
    """A private copy of a host CLIP, of SD 1.x, SD 2.x or SDXL. `patcher` is what `loaded` takes; encode only in there.

    The host's CLIP layers add to their input in place, which autograd refuses because their norms keep it. So each norm
    of the copy is given a copy of its input."""

    def __init__(self, clip: Any) -> None:
        self.clip = clip.clone()
        self.clip.patcher = self.patcher = private_copy(clip.patcher)
        self.clip.cond_stage_model = self.model = self.patcher.model
        for layer in self.model.modules():
            if isinstance(layer, CLIPLayer):
                layer.layer_norm1.register_forward_pre_hook(_keep_input)
                layer.layer_norm2.register_forward_pre_hook(_keep_input)

    def tokenize(self, text: str) -> Tokens:
        """The host's tokens of a prompt."""
        return self.clip.tokenize(text)

    def encode(self, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        """The context (1, 77 for each chunk, width) of a prompt, as the host's CLIP gives it, and the pooled output
        (1, width) where the family has one. Every chunk is encoded by itself.

        In float32 whatever autocast says, as the host encodes: a tuned encoder is compared with the one it was."""
        self.model.reset_clip_options()
        if self.clip.layer_idx is not None:
            self.model.set_clip_options({"layer": self.clip.layer_idx})
        self.model.set_clip_options({"execution_device": self.patcher.load_device})
        with torch.autocast(self.patcher.load_device.type, enabled=False):
            context, pooled = self.model.encode_token_weights(tokens)[:2]
        return context, pooled

    def encode_all(self, prompts: Sequence[Tokens]) -> Tensor:
        """The contexts (n, 77, width) of n prompts of one chunk each, in one pass."""
        together = {name: [chunk for tokens in prompts for chunk in tokens[name]] for name in prompts[0]}
        context, _ = self.encode(together)
        return context.unflatten(1, (len(prompts), -1))[0]

    def train_weights(self) -> dict[str, torch.nn.Parameter]:
        """Makes float32 master weights of all that the context depends on; gives them by name. Call it in `loaded`."""
        named = {name: each for name, each in self.model.named_parameters() if each.is_floating_point()}
        for parameter in named.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        context, _ = self.encode(self.tokenize("a"))
        reached = torch.autograd.grad(context.sum(), list(named.values()), allow_unused=True)
        trained = {}
        for (name, parameter), gradient in zip(named.items(), reached, strict=True):
            parameter.requires_grad_(gradient is not None)
            if gradient is not None:
                trained[name] = parameter
        return trained


def _keep_input(_module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].clone(), *inputs[1:])
