"""Regions of a picture at the layers of a run: made once, and cut to what a call shows."""

from __future__ import annotations

import math

import torch
from subject_patches.patches.engine.call import AttentionCall
from subject_patches.patches.engine.chunk import Chunk
from subject_patches.patches.mechanisms.region import Regions, region_at
from subject_patches.patches.parts.sites import Site
from subject_patches.tests.shared.models import randn

CPU = torch.device("cpu")
LATENT = (8, 12)


def call_of(grid: tuple[int, int], area: tuple[int, int, int, int] | None = None) -> AttentionCall:
    query = torch.zeros(2, math.prod(grid), 4)
    chunk = Chunk(slice(0, 2), "positive", True, {}, LATENT, area)
    return AttentionCall(query, query, query, 1, Site("self", "middle", 0, 0), chunk, grid)


def test_a_region_is_made_once_for_each_place() -> None:
    regions, mask = Regions(), (randn(2, 16, 24) > 0).float()
    calls = [call_of(LATENT), call_of((4, 6)), call_of((4, 6), (4, 6, 2, 3))]
    made = [regions.at(mask, call, CPU) for call in calls]
    for call, region in zip(calls, made, strict=True):
        assert torch.equal(region, region_at(mask, call.chunk, call.grid, 2))
        assert regions.at(mask, call, CPU) is region
    assert not torch.equal(made[1], made[2])


def test_another_mask_takes_the_place_of_the_last() -> None:
    regions, call = Regions(), call_of(LATENT)
    first, second = (randn(1, *LATENT, seed=seed) for seed in (1, 2))
    before = regions.at(first, call, CPU)
    assert torch.equal(regions.at(second, call, CPU), region_at(second, call.chunk, call.grid, 2))
    assert regions.at(first, call, CPU) is not before
