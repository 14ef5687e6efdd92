"""What the second stage of AnyStory's training (section 3.4) goes by: a router beside a subject encoder that stays.

A U-Net's pass in which every subject is shown in the places that the router gives it, with gradients through the choice
(Gumbel-softmax, Jang et al. 2017), and the loss of the maps (Eq. 4).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..encoders.router import RouterModules
from ..encoders.subject_encoder import SubjectModules
from ..patches.mechanisms.attention_maps import resized
from ..patches.parts.masks import tokens_inside
from ..patches.parts.sites import Site
from .symbiotic import ABSENT, Slots, attention

# The paper's lambda of Eq. 4.
WEIGHT = 0.1


def gumbel(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Noise for `chosen`; the generator is on the CPU."""
    uniform = torch.rand(logits.shape, generator=generator).to(logits.device)
    return -(-uniform.clamp(1e-6, 1 - 1e-6).log()).log()


def chosen(logits: Tensor, noise: Tensor) -> Tensor:
    """sigma(M): of logits (rows, n, places) one of the n a place, as 0 and 1, drawn by Gumbel-softmax with `gumbel`
    noise; the gradient is that of the softmax, at a temperature of 1: the paper does not say it."""
    soft = (logits + noise).softmax(1)
    hard = functional.one_hot(soft.argmax(1), soft.shape[1]).mT.to(soft)
    return hard + soft - soft.detach()


def routing_loss(logits: Tensor, truth: Tensor, present: Tensor) -> Tensor:
    """Eq. 4 of one layer without its lambda: the square distance of the subjects' maps, a softmax of `logits` (rows, n
    + 1, places), to `truth` (rows, n, places) of 0 and 1; the sum over the places, as it is printed, and the mean over
    those of a row's n subjects that are `present` (rows, n)."""
    maps = logits.softmax(1)[:, :-1]
    distance = (maps - truth).square().sum(-1) * present
    return distance.sum() / present.sum().clamp(min=1)


def spread(each: Tensor, present: Tensor) -> Tensor:
    """What belongs to all subjects in turn (subjects, ...) at the rows' places (rows, n, ...) that are `present` (rows,
    n); zeros at the others."""
    there = present.view(*present.shape, *(1,) * (each.ndim - 1))
    return each.new_zeros((*present.shape, *each.shape[1:])).masked_scatter(there, each)


def true_maps(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """M_gt (rows, n, places) of 0 and 1, of the subjects' masks in the picture (rows, n, height, width)."""
    return tokens_inside(masks.flatten(0, 1), grid).unflatten(0, masks.shape[:2]).float()


@dataclass(frozen=True)
class Shown:
    """What a batch's subjects are: `latents` (rows, n, channels, h, w) of them cut out, `inside` (rows, n, h, w) their
    masks, `features` (rows, n, tokens, channels) what a vision model sees of them and `nothing` (1, tokens, channels)
    what it sees of an empty picture; `present` (rows, n) says which a row has."""

    latents: Tensor
    inside: Tensor
    features: Tensor
    nothing: Tensor
    present: Tensor


@dataclass
class RoutedPass:
    """One pass of a U-Net: what stands in its slots, and once it is over the `maps` of each cross-attention, its
    coarse and refined logits (rows, n + 1, places) and their grid."""

    slots: Slots = field(default_factory=dict)
    maps: dict[Site, tuple[Tensor, Tensor, tuple[int, int]]] = field(default_factory=dict)

    def loss(self, masks: Tensor, present: Tensor) -> Tensor:
        """Eq. 4 without its lambda, the mean over the layers; of the coarse maps as of the refined, since no gradient
        comes to those through the mask that is made of them."""
        losses = []
        for coarse, refined, grid in self.maps.values():
            truth = true_maps(masks, grid)
            losses += [routing_loss(each, truth, present) for each in (coarse, refined)]
        return torch.stack(losses).mean()


def routing_pass(
    encoder: SubjectModules,
    router: RouterModules,
    shown: Shown,
    order: Iterable[Site],
    generator: torch.Generator | None = None,
) -> RoutedPass:
    """A pass in which the router decides (Eq. 5 to 8). `order` are the U-Net's sites as they run. The gradient of what
    it decides comes through Eq. 5 alone, minus infinity having none, and a layer's maps teach no other layer.

    A layer that is computed again in the backward pass (checkpointing) is shown what it was shown before."""
    made = RoutedPass()
    rows, count = shown.present.shape
    everyone = torch.cat([shown.features, shown.nothing.expand(rows, 1, -1, -1)], 1)
    with torch.no_grad():
        references = encoder.references(shown.latents.flatten(0, 1), shown.inside.flatten(0, 1))
        prompts = encoder.prompts(everyone.flatten(0, 1))
    features = router.features(everyone.flatten(0, 1)).unflatten(0, (rows, count + 1))
    there = torch.cat([shown.present, shown.present.new_ones(rows, 1)], 1)
    noise: dict[Site, Tensor] = {}
    misrouted: dict[Site, Tensor | None] = {}

    def elsewhere(grid: tuple[int, int]) -> Tensor | None:
        """Of each place (rows, places, subjects) what is said of the subjects that the last map does not give it."""
        if not made.maps:
            return None
        _, refined, own = made.maps[next(reversed(made.maps))]
        with torch.no_grad():
            logits = resized(refined.unflatten(-1, own), grid).flatten(2)
            sigma = chosen(logits, gumbel(logits, generator))[:, :-1]
            return sigma.new_zeros(sigma.shape).masked_fill(sigma < 0.5, ABSENT).mT

    def route(site: Site) -> Any:
        def attend(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
            grid = _grid(extra)
            with torch.autocast(q.device.type, enabled=False):
                coarse, refined = router.maps(site, q.detach().float(), features.float(), there)
            made.maps.setdefault(site, (coarse, refined, grid))
            if site not in noise:
                noise[site] = gumbel(refined, generator)
            sigma = chosen(refined, noise[site]).to(q)
            output = attention(q, k, v, extra["n_heads"])
            key, value = (each.to(q).unflatten(0, (rows, count + 1)) for each in prompts[site])
            for number in range(count + 1):
                term = attention(q, key[:, number], value[:, number], extra["n_heads"])
                output = output + sigma[:, number, :, None] * term
            return output

        return attend

    def lend(site: Site) -> Any:
        key, value, grid = references[site]
        key, value = (each.unflatten(0, (rows, count)).flatten(1, 2) for each in (key, value))
        inside = tokens_inside(shown.inside.flatten(0, 1), grid).unflatten(0, (rows, count))
        unseen = torch.zeros(inside.shape, device=key.device).masked_fill(~inside, ABSENT)

        def attend(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
            if site not in misrouted:
                misrouted[site] = elsewhere(_grid(extra))
            places = misrouted[site]
            if places is None:
                return attention(q, k, v, extra["n_heads"])
            # (rows, queries, subjects, tokens of each)
            bias = places.to(q)[..., None] + unseen.to(q)[:, None]
            bias = functional.pad(bias.flatten(2)[:, None], (k.shape[1], 0))
            both = torch.cat([k, key.to(k)], 1), torch.cat([v, value.to(v)], 1)
            return attention(q, *both, extra["n_heads"], bias)

        return attend

    sites = tuple(order)
    made.slots["attn2"] = {site.key: route(site) for site in sites if site.kind == "cross"}
    made.slots["attn1"] = {site.key: lend(site) for site in sites if site in references}
    return made


def intersection_over_union(
    maps: Mapping[Site, tuple[Tensor, Tensor, tuple[int, int]]], masks: Tensor, present: Tensor, sites: Sequence[Site]
) -> dict[Site, tuple[Tensor, Tensor]]:
    """How well the coarse and the refined maps of some layers fit the true masks (rows, n, height, width): of every
    subject that is `present` (rows, n) the places that both give it by those that either does, (subjects,) each."""
    found = {}
    for site in sites:
        coarse, refined, grid = maps[site]
        truth = true_maps(masks, grid).bool()
        routes = (functional.one_hot(each.argmax(1), each.shape[1]).mT[:, :-1].bool() for each in (coarse, refined))
        found[site] = tuple(overlap(route, truth)[present] for route in routes)
    return found


def overlap(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union of places (..., places) bool."""
    return (one & other).sum(-1) / (one | other).sum(-1).clamp(min=1)


def _grid(extra: Mapping[str, Any]) -> tuple[int, int]:
    height, width = extra["activations_shape"][-2:]
    return height, width
