"""A census of what the pack relies on in the host's transformers: which opening a new host has changed, and where."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import comfy.ldm.modules.attention
import pytest
import torch
from subject_patches.patches.families import Counts, Transformer, family_of
from subject_patches.patches.families.lumina import Lumina
from subject_patches.patches.parts.sites import Site
from subject_patches.tests.shared.dense_dit import arguments, forward
from subject_patches.tests.shared.dit_models import PATCHED, dit_model
from subject_patches.tests.shared.models import frames_of, known_prompt, latent_noise, second_context
from torch import Tensor

SIZE = (8, 10)


@dataclass
class Census:
    """What one forward of a model says in its openings, and what is expected of it."""

    model: Any
    family: Transformer
    length: int
    attentions: list[dict[str, Any]] = field(default_factory=list)
    slices: list[list[int]] = field(default_factory=list)
    replaced: list[tuple[str, int]] = field(default_factory=list)
    references: list[int] = field(default_factory=list)

    @property
    def of_blocks(self) -> list[dict[str, Any]]:
        """The attentions that are of a block; where blocks are numbered, others are not."""
        return [each for each in self.attentions if self.family.told != "index" or "block_index" in each]

    def filled(self, tokens: int) -> int:
        """As many tokens as a family makes of so many."""
        return self.family.filled(tokens) if isinstance(self.family, Lumina) else tokens

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.family.sites(self.model.model.diffusion_model)

    def override(self, function: Any, *args: Any, **named: Any) -> Tensor:
        query, key, value, heads = arguments(args, named)
        options = named.get("transformer_options", {})
        self.attentions.append({**options, "shape": (query.shape, key.shape, value.shape), "heads": heads})
        self.references.append(sum(options.get("reference_image_num_tokens", ())))
        result = function(*args, **named)
        assert torch.equal(function(query, key, value, heads, **_rest(named)), result)
        return result

    def patch(self, query: Tensor, *_: Any, extra_options: dict[str, Any], **__: Any) -> dict[str, Any]:
        self.slices.append(extra_options["img_slice"])
        return {}

    def replacement(self, place: tuple[str, int]) -> Callable[..., Any]:
        def replaced(given: Any, extra: Any) -> Any:
            self.replaced.append(place)
            return extra["original_block"](given)

        return replaced

    def options(self) -> dict[str, Any]:
        types = {
            (b.block_type, n) for b in self.family.blocks for n in range(len(b.of(self.model.model.diffusion_model)))
        }
        slots = {"dit": {place: self.replacement(place) for place in types}}
        return {
            "optimized_attention_override": self.override,
            "patches": {"attn1_patch": [self.patch]} if self.family.tells else {},
            "patches_replace": slots,
        }


def _rest(named: dict[str, Any]) -> dict[str, Any]:
    left = {"q", "k", "v", "heads", "query", "key", "value", "skip_reshape"}
    return {name: value for name, value in named.items() if name not in left}


def census(model: Any, **values: Any) -> Census:
    positive = known_prompt(**second_context(model, 1), **values)
    latents = latent_noise(1, SIZE, 3, model.model.latent_format.latent_channels, frames_of(model))
    taken = Census(model, family_of(model), 0)
    with torch.inference_mode():
        taken.length = _context(model, latents, positive)
        forward(model, latents, 0.5, positive, taken.options())
    return taken


def _context(model: Any, latents: Tensor, positive: Any) -> int:
    (tokens, values), *_ = positive
    made = model.model.extra_conds(noise=latents, device="cpu", cross_attn=tokens, **values)
    return family_of(model).context_length(made["c_crossattn"].cond, {name: each.cond for name, each in made.items()})


@pytest.fixture(scope="module", params=PATCHED)
def taken(request: Any) -> Census:
    return census(dit_model(request.param))


def test_every_attention_passes_through_the_override(taken: Census) -> None:
    """One function for all, whatever shape its arguments come in, told the options of the forward."""
    expected = [str(site) for site in taken.sites]
    assert len(taken.of_blocks) == len(expected), f"{len(taken.of_blocks)} attentions, not those of {expected}"
    assert hasattr(comfy.ldm.modules.attention.optimized_attention, "__wrapped__"), "attention is not wrapped any more"


def test_an_attention_says_of_which_block_it_is(taken: Census) -> None:
    if taken.family.told == "index":
        of = {b.word: b.block_type for b in taken.family.blocks}
        expected = [(of[site.block], site.number) for site in taken.sites]
        said = [(each.get("block_type", ""), each.get("block_index")) for each in taken.of_blocks]
        assert said == expected, "block_type or block_index in the options of an attention is another"
    if taken.family.told == "replacement":
        (blocks,) = taken.family.blocks
        expected = list(dict.fromkeys((blocks.block_type, site.number) for site in taken.sites))
        assert taken.replaced == expected, "patches_replace['dit'] is asked for other blocks"


def test_the_picture_lies_where_it_is_said_to(taken: Census) -> None:
    grid = taken.family.grid(SIZE)
    count = math.prod(grid)
    joint = taken.filled(count) + taken.filled(taken.length)
    expected = {"joint": (joint, joint), "self": (count, count), "cross": (count, taken.length)}
    for site, each in zip(taken.sites, taken.of_blocks, strict=True):
        queries, keys = (shape[1] for shape in each["shape"][:2])
        assert (queries, keys) == expected[site.kind], f"{site} has other tokens than prompt and picture"
        assert taken.family.tokens(site.kind, Counts(queries, keys, count, taken.length)) is not None
    if taken.family.tells:
        assert taken.slices == [[taken.length, taken.length + count]] * len(taken.sites), "img_slice is another"


@pytest.mark.parametrize("name", ["FLUX.1", "FLUX.2", "Qwen-Image", "Krea 2"])
def test_the_host_says_how_many_tokens_its_reference_latents_have(name: str) -> None:
    model = dit_model(name)
    latent = latent_noise(1, (6, 8), 9, model.model.latent_format.latent_channels, frames_of(model))
    taken = census(model, reference_latents=[latent], reference_latents_method="index")
    count, more = math.prod(taken.family.grid(SIZE)), math.prod(taken.family.grid((6, 8)))
    assert set(taken.references) == {more}, "reference_image_num_tokens is another"
    assert [begins for begins, _ in taken.slices] == [taken.length] * len(taken.sites)
    for each in taken.of_blocks:
        assert each["shape"][1][1] == taken.length + count + more, "reference latents do not follow the picture"
