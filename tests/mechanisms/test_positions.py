"""Recorded keys at other places: against the host's own rotations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from comfy.ldm.flux.math import apply_rope1
from comfy.ldm.krea2.model import SingleStreamDiT
from comfy.ldm.lumina.model import pos_ids_x
from comfy.ldm.wan.model import WanModel
from comfy.quant_ops import ck
from subject_patches.patches.engine.call import PLACES, AttentionCall
from subject_patches.patches.engine.chunk import Chunk
from subject_patches.patches.engine.engine import add_edit
from subject_patches.patches.engine.streams import NoisedReference
from subject_patches.patches.families import attention_sites, family_of
from subject_patches.patches.families.rope import Rope, frequencies
from subject_patches.patches.mechanisms.positions import (
    BESIDE,
    CENTRED,
    DAMPED,
    SAME,
    Positions,
    corners,
    damping,
    placed_keys,
)
from subject_patches.patches.mechanisms.recycled_attention import RecycledSelfAttention
from subject_patches.patches.parts.window import Window
from subject_patches.tests.shared.dit_models import dit_model
from subject_patches.tests.shared.look import Look
from subject_patches.tests.shared.models import (
    difference,
    frames_of,
    prompt,
    randn,
    recycled,
    reference,
    routed,
    sample,
    small_model,
    subject,
)
from torch import Tensor

# Latents of the reference and of the picture, of odd sizes.
THEIRS, OURS = (6, 9), (7, 13)


@pytest.fixture(scope="module", params=["FLUX.1", "FLUX.2", "Qwen-Image", "Z-Image", "Lumina 2", "Krea 2", "Wan"])
def model(request: Any) -> Any:
    return dit_model(request.param)


def rotated(network: Any, key: Tensor, ids: Tensor) -> Tensor:
    """Keys (1, heads, n, width) at places (1, n, axes), as the host's attention gets them: (1, n, channels)."""
    return apply_rope1(key, embedder_of(network)(ids)).transpose(1, 2).flatten(2)


def embedder_of(network: Any) -> Any:
    return network.pe_embedder if hasattr(network, "pe_embedder") else network.rope_embedder


def places(network: Any, latent: tuple[int, int]) -> Tensor:
    """The places (1, n, axes) that the host gives a picture's tokens."""
    in_frames = network.__class__.__name__.startswith("Qwen")
    if not hasattr(network, "process_img"):
        # Lumina's pictures stand behind the prompt, Wan's at the first frame.
        height, width = (-(-side // 2) for side in latent)
        return pos_ids_x(0 if isinstance(network, WanModel) else 33, height, width, 1, "cpu")
    channels = 16 if isinstance(network, SingleStreamDiT) else network.in_channels // network.patch_size**2
    picture = torch.zeros(1, channels, *((1,) if in_frames else ()), *latent)
    return network.process_img(picture)[1]


def call_at(model: Any, grid: tuple[int, int], heads: int) -> AttentionCall:
    empty = torch.zeros(1, grid[0] * grid[1], 1)
    chunk = Chunk(slice(0, 1), "positive", True, {}, OURS)
    return AttentionCall(empty, empty, empty, heads, attention_sites(model)[0], chunk, grid)


def test_keys_beside_the_picture_are_those_of_the_places_there(model: Any) -> None:
    family, network = family_of(model), model.model.diffusion_model
    positions = Positions(BESIDE, family, family.rope(network))
    theirs, ours = places(network, THEIRS), places(network, OURS)
    grid = family.grid(THEIRS)
    heads, width = 2, sum(embedder_of(network).axes_dim)
    lent = [NoisedReference(torch.zeros(1, 4, *THEIRS), 0) for _ in range(2)]
    keys = [randn(1, heads, grid[0] * grid[1], width, seed=seed) for seed in range(2)]
    given = [(each, rotated(network, key, theirs)) for each, key in zip(lent, keys, strict=True)]
    found = placed_keys(positions, call_at(model, family.grid(OURS), heads), given)
    edge = ours[..., 2].min()
    for number, (key, made) in enumerate(zip(keys, found, strict=True)):
        moved = theirs.clone()
        # The last column of the first touches the picture's first, and the second goes on from there.
        moved[..., 2] += edge - 1 - theirs[..., 2].max() - number * grid[1]
        assert difference(made, rotated(network, key, moved)) < 1e-5
        assert difference(made, given[number][1]) > 0.1


def test_centred_keys_are_those_of_the_middle_of_their_places(model: Any) -> None:
    """Of two rows that see a reference in different places each gets its own."""
    family, network = family_of(model), model.model.diffusion_model
    positions = Positions(CENTRED, family, family.rope(network))
    theirs, ours = places(network, THEIRS), places(network, OURS)
    grid, (height, width) = family.grid(THEIRS), family.grid(OURS)
    heads, channels = 2, sum(embedder_of(network).axes_dim)
    lent = NoisedReference(torch.zeros(1, 4, *THEIRS), 0)
    key = randn(1, heads, grid[0] * grid[1], channels)
    given = [(lent, rotated(network, key, theirs))]
    route = torch.zeros(2, height, width, dtype=torch.bool)
    route[0, -1, -1] = route[1, 0, 0] = True
    (made,) = placed_keys(positions, call_at(model, (height, width), heads), given, route.flatten(1))
    assert made.shape == (2, *given[0][1].shape[1:])
    for row, corner in zip(made, ((height - 1, width - 1), (0, 0)), strict=True):
        moved = theirs.clone()
        for axis, at, side in zip((1, 2), corner, grid, strict=True):
            moved[..., axis] += ours[..., axis].min() + at - side // 2 - theirs[..., axis].min()
        assert difference(row[None], rotated(network, key, moved)) < 1e-5


def test_a_reference_begins_so_that_the_middles_meet() -> None:
    """In whole steps: where a half is left over, the one before. Nothing that sees it leaves it where it begins."""
    assert corners((8, 8), (6, 4), None) == [(1, 2)]
    assert corners((8, 8), (7, 8), None) == [(0, 0)]
    seen = torch.zeros(2, 6, 8, dtype=torch.bool)
    seen[0, 3:6, 5:8] = True
    assert corners((6, 8), (2, 3), seen.flatten(1)) == [(3, 5), (0, 0)]


def test_damped_keys_weaken_what_turns_often(model: Any) -> None:
    family, network = family_of(model), model.model.diffusion_model
    rope = family.rope(network)
    weights = damping(rope.rates, 64)
    first = embedder_of(network).axes_dim[0] // 2
    # Pairs of the axis that is no side of the picture stay, and the fastest of a side turns 64 / 2 pi times.
    assert (weights[:first] == 1).all()
    assert float(weights[first]) == pytest.approx(2 * torch.pi / 64)
    assert weights.min() == weights[first]
    key = randn(1, 5, 2 * rope.rates.shape[1] * 2, seed=3)
    positions = Positions(DAMPED, family, rope)
    (made,) = placed_keys(positions, call_at(model, (64, 40), 2), [(NoisedReference(key[None], 0), key)])
    expected = key.view(1, 5, 2, -1, 2) * weights[:, None]
    torch.testing.assert_close(made, expected.flatten(2).float())


def test_cosmos_turns_the_halves_of_a_head_by_rates_of_their_own() -> None:
    """The host's rotations of a picture's right part, turned back by its left part's width, are those of the left."""
    model = dit_model("Cosmos-Predict2", model_channels=128, rope_h_extrapolation_ratio=3.0)
    network, (height, width) = model.model.diffusion_model, (3, 5)
    freqs = network.pos_embedder.generate_embeddings(torch.Size((1, 1, height, 2 * width, 128)))
    freqs = freqs.unflatten(0, (height, 2 * width))
    heads, key = 4, randn(height * width, 4, 32)

    def host(part: Tensor) -> Tensor:
        return ck.apply_rope_split_half1(key[None], part.flatten(0, 1)[None, :, None]).flatten(2)

    left, right = host(freqs[:, :width]), host(freqs[:, width:])
    rope = family_of(model).rope(network)
    torch.testing.assert_close(rope.rotated(right, heads, (0, 0, -width)), left, rtol=0, atol=1e-5)
    below = rope.rotated(left, heads, (0, 2, 0)).unflatten(1, (height, width))
    taller = network.pos_embedder.generate_embeddings(torch.Size((1, 1, height + 2, width, 128)))
    expected = host(taller.unflatten(0, (height + 2, width))[2:]).unflatten(1, (height, width))
    torch.testing.assert_close(below, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("halves", [False, True])
def test_turns_add_up(halves: bool) -> None:
    rope, key = Rope(frequencies((4, 6, 6), 100.0), halves), randn(1, 3, 32, seed=1)
    once = rope.rotated(rope.rotated(key, 2, (0, 1, -2)), 2, (1, 2, 5))
    torch.testing.assert_close(once, rope.rotated(key, 2, (1, 3, 3)))
    torch.testing.assert_close(rope.rotated(once, 2, (-1, -3, -3)), key)
    assert difference(once, key) > 0.1
    # A turn keeps the length of each pair.
    pair = (lambda t: t.unflatten(-1, (2, 2, -1))[0, 0, 0, :, 3]) if halves else (lambda t: t[0, 0, 6:8])
    torch.testing.assert_close(pair(once).norm(), pair(key).norm())


@pytest.mark.parametrize("name", ["Z-Image", "Lumina 2"])
def test_a_reference_stands_where_the_picture_does(name: str) -> None:
    """Its prompt may be longer than the picture's, from whose end these models count. The first layer's keys know no
    more of a prompt than that."""
    model, lent = dit_model(name), []
    first = attention_sites(model)[0]
    # As many tokens as Z-Image fills a picture up to: what fills it up would stand still.
    who = subject(reference(size=(8, 16), channels=16, masked=False))
    for length in (7, 40):
        look, place = Look(frozenset([first]), Window()), f"{first.block}.{first.number}"
        given = {"sites": "named", "named_sites": place, "reference_conditioning": prompt(3, length)}
        sample(add_edit(recycled(model, (who,), **given), look), steps=1)
        lent += [seen.call.extensions[0].key for seen in look.of("positive")]
    assert len(lent) == 2
    assert difference(*lent) < 1e-4


@pytest.mark.parametrize("mode", [BESIDE, DAMPED])
def test_keys_have_no_place_where_those_of_the_picture_are_unknown(mode: str) -> None:
    """In another pack's call of the model on latents that are not found in the picture."""
    model = dit_model("Qwen-Image")
    family = family_of(model)
    positions = Positions(mode, family, family.rope(model.model.diffusion_model))
    lent = NoisedReference(torch.zeros(1, 4, *THEIRS), 0)
    edit = RecycledSelfAttention(frozenset(), Window(), (lent,), positions=positions)
    call = call_at(model, (3, 5), 2)
    call.grid = None
    edit.amend(call, 1.0, lambda stream: {"key": torch.zeros(1, 2, 1), "value": torch.zeros(1, 2, 1)})
    assert call.left == [("Recycled Self-Attention", PLACES)]
    assert not call.amended


def test_the_nodes_choice_acts() -> None:
    """Usual is centred where a mask or a route says which places see a reference, else the reference's own places."""
    model = dit_model("FLUX.1")
    who = (subject(reference(channels=16, frames=frames_of(model))),)
    size, half = (24, 8), torch.zeros(1, 24, 8)
    half[:, 12:] = 1

    def pictures(patched: Callable[..., Any]) -> dict[str, Tensor]:
        choices = ("usual", SAME, CENTRED, BESIDE, DAMPED)
        return {choice: sample(patched(positions=choice), size=size, steps=1) for choice in choices}

    for usual, patched in (
        (SAME, partial(recycled, model, who)),
        (CENTRED, partial(recycled, model, who, region_mask=half)),
        (CENTRED, partial(routed, model, who)),
    ):
        found = pictures(patched)
        assert torch.equal(found.pop("usual"), found[usual])
        assert all(difference(found[usual], other) > 1e-3 for choice, other in found.items() if choice != usual)


@pytest.mark.parametrize("other", ["SD 1.x", "SD 3.5"])
def test_keys_without_places(other: str) -> None:
    model = small_model() if other == "SD 1.x" else dit_model(other)
    with pytest.raises(ValueError, match=rf"'beside', but the keys of {other} have no places .*; set it to 'usual'"):
        recycled(model, positions=BESIDE)
