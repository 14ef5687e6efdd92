"""Dual-branch integration in sampling runs of the host, against both branches computed by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import comfy.sample
import pytest
import torch
from subject_patches.patches.engine.call import AttentionCall
from subject_patches.patches.engine.chunk import BRANCH, Chunk
from subject_patches.patches.engine.edit import Edit
from subject_patches.patches.engine.engine import add_edit
from subject_patches.patches.engine.streams import Features, Stream
from subject_patches.patches.families import attention_sites
from subject_patches.patches.mechanisms.dual_branch import auxiliary_noise
from subject_patches.patches.parts.window import Window
from subject_patches.tests.shared import dense
from subject_patches.tests.shared.models import (
    auxiliary_prompt,
    difference,
    integrated,
    known_prompt,
    latent_noise,
    levels,
    prompt,
    sample,
)
from torch import Tensor

SIZE = (7, 10)
SHARE = 0.5
Kept = dict[tuple[str, int, int], tuple[Tensor, Tensor, Tensor]]


@dataclass
class ByHand:
    """The host's Euler over both branches, straight from the equations: forwards of the bare model, and the mix as a
    replacement of every cross-attention. Prompts are `known_prompt()` and `auxiliary_prompt()`."""

    model: Any
    injection: float = 1.0
    strength: float = 1.0
    cfg: float = 3.0
    own: bool = False
    gain: float = 500.0
    sharpness: float = 10.0
    noise: Callable[[Tensor], Tensor] = auxiliary_noise
    bias: Callable[[int], Tensor | None] = lambda places: None
    grids: set[int] = field(default_factory=set)

    def run(self, noise: Tensor, sigmas: Tensor, latents: Tensor | None = None) -> Tensor:
        (concept, _), (other, _), (negative, _) = known_prompt()[0], auxiliary_prompt()[0], prompt(2)[0]
        timestep = self.model.model.model_sampling.timestep
        # A run from an image has no other schedule than what is left of it.
        whole = 1000 if latents is None else int(timestep(sigmas[0]))
        first = sigmas[0] if latents is not None else (1 + sigmas[0] ** 2).sqrt()
        x, beside = (each * first + (0 if latents is None else latents) for each in (noise, self.noise(noise)))
        for sigma, following in itertools.pairwise(sigmas):
            step, kept = following - sigma, {}
            if int(timestep(sigma)) / whole > 1 - SHARE:
                predicted = self.forward(beside, sigma, other, self.keeper(kept))
                mine = self.forward(x, sigma, concept, self.mixer(kept))
                without = x - self.forward(x, sigma, negative)
                shared = beside - self.forward(beside, sigma, negative) if self.own else without
                epsilon = (beside - predicted) if self.cfg == 1 else shared + self.cfg * (beside - predicted - shared)
                beside = beside + epsilon / sigma * step
            else:
                mine = self.forward(x, sigma, concept, self.keeper({}))
                without = x - self.forward(x, sigma, negative)
            x = x + (without + self.cfg * (x - mine - without)) / sigma * step
        return x / self.model.model.latent_format.scale_factor

    def forward(self, x: Tensor, sigma: Tensor, context: Tensor, patch: Callable[..., Tensor] | None = None) -> Tensor:
        options = {}
        if patch is not None:
            blocks = {site.key for site in attention_sites(self.model) if site.kind == "cross"}
            options = {"patches_replace": {"attn2": dict.fromkeys(blocks, patch)}}
        expanded = context.expand(len(x), -1, -1)
        return self.model.model.apply_model(x, sigma.expand(len(x)), c_crossattn=expanded, transformer_options=options)

    def keeper(self, kept: Kept) -> Callable[..., Tensor]:
        def keep(query: Tensor, key: Tensor, value: Tensor, extra: dict[str, Any]) -> Tensor:
            kept[(*extra["block"], extra["block_index"])] = (query, key, value)
            return dense.attention(query, key, value, extra["n_heads"], self.bias(query.shape[1])).to(query)

        return keep

    def mixer(self, kept: Kept) -> Callable[..., Tensor]:
        def spread(weights: Tensor) -> Tensor:
            self.grids.add(weights.shape[-1])
            return self.gain * (self.sharpness * weights).softmax(-1)

        def mix(query: Tensor, key: Tensor, value: Tensor, extra: dict[str, Any]) -> Tensor:
            heads, (q, k, v) = extra["n_heads"], kept[(*extra["block"], extra["block_index"])]
            bias = self.bias(query.shape[1])
            # The concept is tokens 2 and 3 of its prompt's 1 to 5, the auxiliary noun 2 of 1 to 4.
            mine = (self.sharpness * dense.shares(query, key, heads, bias)[..., 1:6]).softmax(-1)[..., 1:3].sum(-1)
            theirs = 1 - (self.sharpness * dense.shares(q, k, heads, bias)[..., 1:5]).softmax(-1)[..., 1]
            both = torch.stack([spread(mine), self.injection * spread(theirs)]).softmax(0)
            both = both.permute(0, 1, 3, 2).repeat_interleave(query.shape[-1] // heads, -1)
            own = dense.attention(query, key, value, heads, bias)
            mixed = own * both[0] + dense.attention(q, k, v, heads, bias) * both[1]
            return (own + self.strength * (mixed - own)).to(query)

        return mix


@dataclass(frozen=True, eq=False)
class Biased(Edit):
    """Adds a bias to the logits of the branch's own pass, and of the chunk that the concept conditions."""

    made: Callable[[int], Tensor]

    def wants(self, chunk: Chunk) -> bool:
        return chunk.name in ("positive", BRANCH)

    def amend(self, call: AttentionCall, sigma: float, recorded: Callable[[Stream], Features | None]) -> None:
        call.bias(self.made(call.query.shape[1]))


@pytest.mark.parametrize(
    ("values", "by_hand"),
    [
        ({}, {}),
        ({"guidance": "own"}, {"own": True}),
        ({"injection_strength": -1.5, "strength": 0.6}, {"injection": -1.5, "strength": 0.6}),
        ({"gain_mode": "by resolution"}, {"gain": 500 * 70 / 4096}),
        ({"gain": 60.0, "injection_strength": 2.0}, {"gain": 60.0, "injection": 2.0}),
        ({"sharpness": 3.0}, {"sharpness": 3.0}),
        ({"noise": "the concept's"}, {"noise": lambda noise: noise}),
        ({"seed": 4}, {"noise": lambda noise: auxiliary_noise(noise, 4)}),
        ({}, {"cfg": 1.0}),
        ({"guidance": "own"}, {"cfg": 1.0, "own": True}),
    ],
    ids=[
        "default",
        "own guidance",
        "lambda, strength",
        "by resolution",
        "gain",
        "sharpness",
        "same noise",
        "seed",
        "CFG 1",
        "own, 1",
    ],
)
def test_a_run_by_hand(values: dict[str, Any], by_hand: dict[str, Any], model: Any) -> None:
    hand = ByHand(model, **by_hand)
    with torch.inference_mode():
        right = hand.run(latent_noise(2, SIZE, 5), levels(model, 4))
    run = {"size": SIZE, "batch": 2, "steps": 4, "cfg": hand.cfg}
    result = sample(integrated(model, end_percent=SHARE, **values), **run)
    assert difference(result, right) < 1e-4
    assert hand.grids == {70, 20}
    assert difference(result, sample(model, **run)) > 0.001


def test_a_run_that_begins_with_a_picture(model: Any) -> None:
    latents, steps = latent_noise(2, SIZE, 50), 8
    sigmas = levels(model, steps)[2:]
    hand = ByHand(model)
    with torch.inference_mode():
        right = hand.run(latent_noise(2, SIZE, 5), sigmas, latents * model.model.latent_format.scale_factor)
        result = comfy.sample.sample(
            integrated(model, end_percent=SHARE), latent_noise(2, SIZE, 5), steps, 3.0, "euler", "normal",
            known_prompt(), prompt(2), latents, start_step=2, disable_pbar=True, seed=5,
        )  # fmt: skip
    assert difference(result, right) < 1e-4


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("rows", [(), (1,)], ids=["of places and tokens", "of rows, too"])
def test_a_bias_in_both_branches(last: bool, rows: tuple[int, ...], model: Any) -> None:
    """The auxiliary branch's mask is of its attention with the bias that it really had."""

    def bias(places: int) -> Tensor:
        generator = torch.Generator().manual_seed(places)
        return 3 * torch.randn((*rows, places, known_prompt()[0][0].shape[1]), generator=generator)

    cross = frozenset(site for site in attention_sites(model) if site.kind == "cross")
    biased = Biased(cross, Window(), bias)
    both = integrated(add_edit(model, biased) if not last else model, end_percent=SHARE)
    hand = ByHand(model, bias=bias)
    with torch.inference_mode():
        right = hand.run(latent_noise(2, SIZE, 5), levels(model, 4))
    run = {"size": SIZE, "batch": 2, "steps": 4}
    assert difference(sample(add_edit(both, biased) if last else both, **run), right) < 1e-4
