"""Dual-branch integration (DCI, section 3.3), as its authors' code computes it.

For the first part of the schedule a second branch denoises beside the generation, with the concept's words replaced by
another noun. In every cross-attention the two branches' outputs are mixed place by place (Eq. 3 to 5), so that the
concept's branch gives the concept and the auxiliary branch everything else.

Eq. 4 as printed does nothing: a softmax over h * w places gives numbers near 1 / (h * w), and the softmax over the two
branches of two such numbers is one half. The code sharpens, with the steps that follow here.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..engine.bias import Bias
from ..engine.call import AttentionCall
from ..engine.chunk import Chunk
from ..engine.denoising import Denoising
from ..engine.edit import Edit, Request, Start
from ..engine.streams import Features, Stream
from ..parts.prompt import Spans, positions_of
from ..parts.sites import Site
from ..parts.window import Window
from .region import tokens_at

# The key of a conditioning's dictionary under which its BranchTokens lie.
BRANCH_KEY = "subject_patches_branch"
TIMESTEPS = 1000
# The authors' models make pictures from latents of this many places, each so many pixels wide; their gain is made for
# them.
USUAL_PLACES, USUAL_CELL = 64 * 64, 8


@dataclass(frozen=True)
class BranchTokens:
    """Where in a branch's context its prompt's own tokens are, and those of the noun that stands for the concept in it:
    "V* backpack" in the concept's prompt, the auxiliary noun in the other, which is the `auxiliary` one."""

    prompt: Spans
    noun: Spans
    auxiliary: bool = False


# Equations. Tensors have the shape (..., places, tokens) or (..., places), for every row and head by itself.


def token_shares(probabilities: Tensor, own: Sequence[int], sharpness: float = 10.0) -> Tensor:
    """M_k of Eq. 3 for the prompt's own tokens: softmax over them of sharpness * P, (..., places, own tokens).

    P is the attention over the whole context. The paper takes its scores as they are; the code its probabilities, and
    a second softmax over the prompt's tokens, without the start token and the padding."""
    return (sharpness * probabilities[..., list(own)]).softmax(-1)


def noun_mask(shares: Tensor, own: Sequence[int], noun: Sequence[int]) -> Tensor:
    """M of Eq. 3 for the concept's branch: the share of the noun's tokens, (..., places)."""
    return shares[..., [list(own).index(position) for position in noun]].sum(-1)


def others_mask(shares: Tensor, own: Sequence[int], noun: Sequence[int]) -> Tensor:
    """M of Eq. 3 for the auxiliary branch: the share of all tokens but the noun's, (..., places)."""
    return shares.sum(-1) - noun_mask(shares, own, noun)


def spread(mask: Tensor, gain: float = 500.0, sharpness: float = 10.0) -> Tensor:
    """S_s of Eq. 4: gain * softmax over the places of sharpness * M. Its mean over the places is gain / places; the
    paper has neither factor."""
    return gain * (sharpness * mask).softmax(-1)


def concept_weight(concept: Tensor, auxiliary: Tensor, injection: float) -> Tensor:
    """S_c of Eq. 4, the softmax over the two branches: the concept's weight, 0 to 1. The auxiliary's is the rest.
    `injection` is lambda."""
    return (concept - injection * auxiliary).sigmoid()


def integrate(concept: Tensor, auxiliary: Tensor, weight: Tensor) -> Tensor:
    """Eq. 5: the branches' outputs (..., places, channels) mixed by the concept's weight (..., places)."""
    return torch.lerp(auxiliary, concept, weight[..., None])


def first_open(share: float) -> int | None:
    """The last timestep, of 999 to 1, at which the branches are still mixed when `share` of the schedule is (T_a / T):
    t / 1000 > 1 - share, as in the code. None is never."""
    return next((t for t in range(1, TIMESTEPS) if t / TIMESTEPS > 1 - share), None)


def auxiliary_noise(noise: Tensor, seed: int = 0) -> Tensor:
    """The auxiliary branch's own noise, of the shape of the concept's (rows, channels, height, width).

    A row's is drawn by the seed and by the concept's noise in that row, so a picture has the same one alone and in a
    batch, and two pictures have different ones. A sampler that adds no noise gives the branch none either."""
    rows = []
    for row in noise.detach().float().cpu():
        digest = hashlib.blake2b(f"{seed} ".encode() + row.contiguous().numpy().tobytes(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        rows.append(torch.randn(row.shape, generator=generator) if bool(row.any()) else row)
    return torch.stack(rows).to(noise)


# The edit


@dataclass(frozen=True)
class BranchWindow(Window):
    """From the first step on, for `end_percent` of the schedule, by the code's own rule of timesteps."""

    def contains(self, sigma: float, sigma_at: Callable[[float], float]) -> bool:
        last = first_open(self.end_percent)
        if last is None:
            return False
        # The host's percent counts down from timestep 999, and a noise level belongs to the nearest timestep.
        return sigma >= sigma_at(1 - (last - 0.5) / (TIMESTEPS - 1))


@dataclass(eq=False)
class AuxiliaryBranch(Denoising):
    """The stream of the auxiliary branch; it remembers the (height, width) of its tokens at each site, which of its
    keys are the prompt's, and the bias that other edits gave its own attention to the prompt there; `chunk` is its
    own."""

    node: ClassVar[str] = "Dual-Branch Integration"

    grids: dict[Site, tuple[int, int]] = field(default_factory=dict)
    biases: dict[Site, Tensor | None] = field(default_factory=dict)
    prompts: dict[Site, slice] = field(default_factory=dict)
    chunk: Chunk | None = None

    def keep(self, site: Site, grid: tuple[int, int], features: Features) -> Features:
        self.grids[site] = grid
        return features


@dataclass(frozen=True, eq=False)
class DualBranchIntegration(Edit):
    """Mixes the auxiliary branch into the cross-attentions of the chunks that a concept's prompt conditions.

    `concept` and `auxiliary` say where the two prompts' tokens are, `conditioning` is the auxiliary's. `injection` is
    lambda; 0 still mixes. `strength` 0 to 1 blends the mix with the concept branch's own output. With `by_resolution`
    the gain is the authors' for latents of 64 x 64, of 8 x 8 pixels each, and grows with the pixels, so that a
    picture's mix does not depend on its size; `cell` is how many of them a latent is wide. `noise` makes the auxiliary
    branch's noise of the concept's. Neither the auxiliary branch nor the unconditional chunk is changed; the branch is
    looked at, since its mask is of its attention as others, such as Layout Bias, have amended it."""

    node: ClassVar[str] = AuxiliaryBranch.node

    concept: BranchTokens
    auxiliary: BranchTokens
    conditioning: Any
    injection: float = 1.0
    strength: float = 1.0
    gain: float = 500.0
    by_resolution: bool = False
    cell: int = 8
    sharpness: float = 10.0
    own_guidance: bool = False
    noise: Callable[[Tensor], Tensor] = auxiliary_noise
    _branch: list[AuxiliaryBranch] = field(default_factory=list, init=False, repr=False)

    def start(self, start: Start) -> None:
        noise = self.noise(start.noise)
        self._branch.append(
            AuxiliaryBranch(
                noise,
                partial(start.noised, noise),
                self.conditioning,
                own_guidance=self.own_guidance,
                kept=start.kept(noise),
                picture=(start.latents, start.mask),
            )
        )

    def check(self, prompts: Sequence[Mapping[str, Any]]) -> None:
        """Raises ValueError when no prompt of the run is the concept's."""
        known = [prompt[BRANCH_KEY] for prompt in prompts if BRANCH_KEY in prompt]
        if self.concept not in known:
            if any(tokens.auxiliary for tokens in known):
                raise ValueError(
                    "The sampler's positive prompt is the auxiliary conditioning of Dual-Branch Prompts, which knows "
                    "nothing of the concept; connect its concept output to the sampler."
                )
            raise ValueError(
                "The sampler's positive prompt is not the concept conditioning of Dual-Branch Integration; connect the "
                "concept output of Dual-Branch Prompts to both."
            )

    def requests(self, sigma: float) -> Iterable[Request]:
        return [(branch, self.sites, ("query", "prompt_key", "prompt_output")) for branch in self._branch]

    def wants(self, chunk: Chunk) -> bool:
        return chunk.stream in self._branch or self._is_of_the_concept(chunk)

    def _is_of_the_concept(self, chunk: Chunk) -> bool:
        return chunk.conditioned and chunk.conditioning.get(BRANCH_KEY) == self.concept

    def amend(self, call: AttentionCall, sigma: float, recorded: Callable[[Stream], Features | None]) -> None:
        if not self._is_of_the_concept(call.chunk):
            return
        (branch,) = self._branch
        features = recorded(branch)
        if call.grid is None or call.prompt is None:
            call.leave(self.node)
        if features is None or call.grid is None or not call.reads:
            return
        grid = branch.grids[call.site]
        query, output = (
            call.chunk.lent(crop(features[part], grid, call), len(call.query)) for part in ("query", "prompt_output")
        )
        if query.shape[:2] != call.query.shape[:2]:
            return
        bias = branch.biases.get(call.site)
        if bias is not None:
            bias = crop(bias.expand(torch.broadcast_shapes(bias.shape, (1, math.prod(grid), 1))), grid, call)
            bias = bias if len(bias) == 1 else call.chunk.lent(bias, len(call.query))
        key = call.chunk.lent(features["prompt_key"], len(call.query))
        known = branch.prompts.get(call.site)
        if call.site.kind == "cross" and known is not None:
            key = key[:, known]
        biases = () if bias is None else (Bias(bias, 0, key.shape[1]),)
        beside = replace(call, query=query, key=key, biases=biases)
        length = call.chunk.length

        @cache
        def weight() -> Tensor:
            # Asked after every edit has amended the call. The host may repeat a prompt; once is all of it.
            return self.weight(call, slice(call.prompt.start, call.prompt.start + length), beside)

        def mix(own: Tensor) -> Tensor:
            if not call.reads:
                return own
            split = [part.unflatten(-1, (call.heads, -1)).transpose(1, 2) for part in (own, output.to(own))]
            mixed = self.mix(*split, weight().to(own)).transpose(1, 2).flatten(2)
            return mixed if self.strength == 1 else torch.lerp(own, mixed, self.strength)

        call.blend_prompt(mix)

        def share() -> Tensor:
            if not call.reads:
                return torch.zeros(len(call.query), *call.grid)
            return 1 - weight().mean(1).unflatten(-1, call.grid)

        call.note("aggregation mask", share)

    def observe(self, call: AttentionCall, sigma: float, recorded: Callable[[Stream], Features | None]) -> None:
        for branch in self._branch:
            if call.chunk.stream is branch:
                branch.chunk = call.chunk
                prompt = call.prompt
                if prompt is not None and call.site.kind == "cross":
                    # Once is all of it.
                    prompt = slice(prompt.start, prompt.start + call.chunk.length)
                    branch.prompts[call.site] = prompt
                branch.biases[call.site] = None if prompt is None else call.bias_of(prompt)

    def weight(self, call: AttentionCall, once: slice, beside: AttentionCall) -> Tensor:
        """The concept's weight (rows, heads, places) from the attention of both branches, the concept's call to the
        keys `once` and the auxiliary's."""
        other = next((branch.chunk for branch in self._branch if branch.chunk is not None), None)
        gain, masks = self.gain_at(call.chunk), []
        for each, keys, tokens, chunk, mask in (
            (call, once, self.concept, call.chunk, noun_mask),
            (beside, slice(0, beside.key.shape[1]), self.auxiliary, other, others_mask),
        ):
            spans = (tokens.prompt, tokens.noun)
            own, noun = (positions_of(span if chunk is None else chunk.placed(span)) for span in spans)
            parts = [
                mask(token_shares(shares, own, self.sharpness), own, noun)
                for shares in each.probabilities_in_parts(keys)
            ]
            masks.append(spread(torch.cat(parts, -1), gain, self.sharpness))
        return concept_weight(*masks, self.injection)

    def mix(self, concept: Tensor, auxiliary: Tensor, weight: Tensor) -> Tensor:
        """The branches' outputs (rows, heads, places, channels) as one."""
        return integrate(concept, auxiliary, weight)

    def gain_at(self, chunk: Chunk) -> float:
        """The gain in a chunk's picture."""
        height, width = chunk.size
        places = height * width * (self.cell / USUAL_CELL) ** 2
        return self.gain * (places / USUAL_PLACES if self.by_resolution else 1.0)


def crop(tokens: Tensor, grid: tuple[int, int], call: AttentionCall) -> Tensor:
    """What of the whole picture's tokens (rows, places, channels) lies where a call's chunk is, whose latent area
    conditioning or a tile may have cropped."""
    return tokens_at(tokens.unflatten(1, grid), call) if tokens.shape[1] == math.prod(grid) else tokens
