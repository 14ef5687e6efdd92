"""Multi-source attention swap: the numbers of the swap it follows, its equations, and what runs with it take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from comfy.ldm.modules.attention import attention_pytorch
from subject_patches.patches.engine.amendments import Extension
from subject_patches.patches.engine.call import AttentionCall
from subject_patches.patches.engine.chunk import Chunk
from subject_patches.patches.engine.engine import add_edit
from subject_patches.patches.engine.execution import execute
from subject_patches.patches.engine.streams import Trajectory
from subject_patches.patches.families import attention_sites
from subject_patches.patches.mechanisms.retouch import (
    Attended,
    MultiSourceSwap,
    ReferenceSwap,
    blended,
    path_of,
    swapped_early,
    swapped_late,
)
from subject_patches.patches.parts.sites import Site, select_sites
from subject_patches.patches.parts.window import Window
from subject_patches.tests.shared import dense
from subject_patches.tests.shared.golden_cases import Golden, cases_of
from subject_patches.tests.shared.look import Look
from subject_patches.tests.shared.models import difference, generator, prompt, randn, sample
from torch import Tensor

TOLERANCE = 2e-5
SITE = Site("self", "output", 3, 0)


# The authors' numbers of mutual self-attention


class Case(Golden):
    """One mutual self-attention."""

    def rows(self, name: str) -> Tensor:
        """(rows * heads, places, width of a head) to (rows, places, channels)."""
        return self.tensors[name].unflatten(0, (-1, self.case["heads"])).transpose(1, 2).flatten(2)

    @property
    def half(self) -> int:
        """Rows of one half of the batch: a source, then its targets."""
        return self.case["batch_rows"] // 2


CASES = cases_of("mutual", Case, lambda each: "q" in each.tensors)


def attend(heads: int) -> Callable[..., Tensor]:
    return lambda q, k, v, mask: attention_pytorch(q, k, v, heads, mask)


def swapped(golden: Case, half: int, where: Tensor | None = None) -> Tensor:
    """The output of a half's rows when they take key and value from its source's places `where`, through the edit."""
    rows = slice(half * golden.half, (half + 1) * golden.half)
    query, key, value = (golden.rows(name)[rows] for name in "qkv")
    chunk = Chunk(slice(0, golden.half), "positive", True, {}, (1, query.shape[1]))
    call = AttentionCall(query, key, value, golden.case["heads"], SITE, chunk, None)
    source = Trajectory(torch.tensor([1.0]), torch.zeros(1, 1, 4, 8, 8))
    side = int(key.shape[1] ** 0.5)
    path = path_of(source, None, both=False, mask=None if where is None else where.float().view(1, side, side))
    lent = {"key": key[:1].unflatten(1, (side, side)), "value": value[:1].unflatten(1, (side, side))}
    edit = ReferenceSwap(frozenset({SITE}), Window(), path, ("key", "value"), False, {})
    edit.amend(call, 1.0, lambda stream: lent if stream is path.conditioned else None)
    return execute([call], attend(golden.case["heads"]))[0]


@pytest.mark.parametrize("golden", [g for g in CASES if "mask_s" not in g.tensors], ids=lambda g: g.name)
def test_the_authors_swap(golden: Case) -> None:
    ours = torch.cat([swapped(golden, half) for half in (0, 1)])
    torch.testing.assert_close(ours, golden.tensors["out"], rtol=0, atol=TOLERANCE)
    assert (golden.tensors["out_plain"] - golden.tensors["out"]).abs().max() > 1000 * TOLERANCE


@pytest.mark.parametrize("golden", [g for g in CASES if "mask_s" in g.tensors], ids=lambda g: g.name)
def test_the_authors_masked_swap(golden: Case) -> None:
    """Theirs attends to the source's foreground and background apart and blends the two; ours blends outputs alike."""
    side = golden.case["N"] ** 0.5
    masks = [
        torch.nn.functional.interpolate(
            golden.tensors[name][None, None], (int(side), int(side)), mode="nearest"
        ).flatten()
        for name in ("mask_s", "mask_t")
    ]
    for half in (0, 1):
        foreground, background = swapped(golden, half, masks[0] == 1), swapped(golden, half, masks[0] == 0)
        ours = blended(foreground, background, masks[1][None])
        # Their first row of a half is the source, which attends to itself.
        rows = slice(half * golden.half + 1, (half + 1) * golden.half)
        torch.testing.assert_close(ours[1:], golden.tensors["out"][rows], rtol=0, atol=TOLERANCE)


# The equations


def attended(seed: int, rows: int = 2, keys: int = 6) -> Attended:
    return Attended(randn(rows, 6, 8, seed=seed), *(randn(rows, keys, 8, seed=seed + turn) for turn in (1, 2)))


def test_early_all_is_the_layouts() -> None:
    given = swapped_early(attended(0), attended(10, rows=1))
    assert all(
        torch.equal(one, other.expand(2, -1, -1)) for one, other in zip(given, attended(10, rows=1), strict=True)
    )


def test_late_only_the_query_is_the_targets() -> None:
    given = swapped_late(attended(0), attended(10, keys=9))
    assert torch.equal(given.query, attended(0).query)
    assert torch.equal(given.key, attended(10, keys=9).key)
    assert torch.equal(given.value, attended(10, keys=9).value)


def test_blending() -> None:
    target, layout, mask = randn(2, 3, 4), randn(2, 3, 4, seed=1), torch.tensor([[0.0, 0.25, 1.0]])
    result = blended(target, layout, mask)
    assert torch.equal(result[:, 0], layout[:, 0])
    assert torch.equal(result[:, 2], target[:, 2])
    torch.testing.assert_close(result[:, 1], layout[:, 1] + 0.25 * (target[:, 1] - layout[:, 1]))


@pytest.mark.parametrize("extends", [False, True])
@pytest.mark.parametrize("pictures", [1, 2])
def test_only_tokens_inside_a_mask_lend(pictures: int, extends: bool) -> None:
    """As a dense attention over all of the reference's keys, with minus infinity outside of its own picture's mask."""
    query, key, value = randn(2, 5, 12), randn(2, 5, 12, seed=1), randn(2, 5, 12, seed=2)
    lent = {"key": randn(pictures, 4, 6, 12, seed=3), "value": randn(pictures, 4, 6, 12, seed=4)}
    masks = torch.zeros(pictures, 8, 12)
    masks[0, 2:6, :7] = 1
    masks[-1, 4:, 5:] = 1
    path = path_of(Trajectory(torch.tensor([1.0]), torch.zeros(1, pictures, 4, 4, 6)), None, both=False, mask=masks)
    chunk = Chunk(slice(0, 2), "positive", True, {}, (1, 5))
    call = AttentionCall(query, key, value, 3, SITE, chunk, None)
    edit = ReferenceSwap(frozenset({SITE}), Window(), path, ("key", "value"), extends, {})
    edit.amend(call, 1.0, lambda stream: lent if stream is path.conditioned else None)
    (output,) = execute([call], attend(3))
    # Cell by cell of 2 x 2: at least half inside.
    inside = torch.nn.functional.avg_pool2d(masks[:, None], 2)[:, 0].flatten(1) >= 0.5
    bias = torch.zeros(inside.shape).masked_fill(~inside, -torch.inf)[:, None].expand(2 if pictures == 2 else 1, 1, -1)
    other = Extension(lent["key"].flatten(1, 2), lent["value"].flatten(1, 2), bias)
    if extends:
        right = dense.attention(query, key, value, 3, None, [other])
    else:
        right = dense.attention(
            query, other.key.expand(2, -1, -1), other.value.expand(2, -1, -1), 3, bias.expand(2, 5, -1)
        )
    torch.testing.assert_close(output.double(), right, rtol=0, atol=TOLERANCE)
    whole = AttentionCall(query, key, value, 3, SITE, chunk, None)
    unmasked = ReferenceSwap(frozenset({SITE}), Window(), replace(path, mask=None), ("key", "value"), extends, {})
    unmasked.amend(whole, 1.0, lambda stream: lent if stream is path.conditioned else None)
    assert difference(execute([whole], attend(3))[0], output) > 0.01


# In a run


def small_path(seed: int, size: tuple[int, int] = (8, 8), rows: int = 1, top: float = 14.7) -> Trajectory:
    sigmas = torch.tensor([top, 5.0, 1.0, 0.3, 0.0])
    clean, noise = randn(rows, 4, *size, seed=seed), randn(rows, 4, *size, seed=seed + 1)
    return Trajectory(sigmas, clean + sigmas.view(-1, 1, 1, 1, 1) * noise)


def swap(model: Any, layout: Trajectory | None, reference: Trajectory | None, **values: Any) -> Any:
    sites = attention_sites(model)
    given = {"switch": 0.4, "crossing": select_sites(sites, "cross", "decoder"), **values}
    paths = [None if t is None else path_of(t, prompt(31 + n), True) for n, t in enumerate((layout, reference))]
    return add_edit(model, MultiSourceSwap(select_sites(sites, "self", "decoder"), Window(), *paths, **given))


def test_another_size_than_the_layouts_is_refused(model: Any) -> None:
    with pytest.raises(
        ValueError, match=r"picture of 9 x 8 latent pixels but this one has 8 x 8; sample at the layout"
    ):
        sample(swap(model, small_path(1, (8, 9)), None))
    # The reference lends no places: any size.
    assert sample(swap(model, None, small_path(1, (5, 9)), switch=0.0)).isfinite().all()


def test_a_path_that_begins_too_low_is_refused(model: Any) -> None:
    with pytest.raises(
        ValueError, match=r"The layout trajectory runs from sigma 7 to 0 but is needed at 14\.6\d; invert the picture"
    ):
        sample(swap(model, small_path(1, top=7.0), None))


def test_an_area_takes_its_part_of_the_layout(model: Any) -> None:
    """Over the whole picture, an area is none."""
    patched = swap(model, small_path(1, (8, 12)), small_path(5), mask=torch.rand(1, 8, 12, generator=generator(3)))
    whole = sample(patched, size=(8, 12), steps=4)
    area = sample(patched, size=(8, 12), steps=4, positive=prompt(1, area=(8, 12, 0, 0)))
    assert difference(area, sample(patched, size=(8, 12), steps=4, positive=prompt(1))) < TOLERANCE
    part = sample(patched, size=(8, 12), steps=4, positive=prompt(1, area=(8, 6, 0, 4)))
    assert part.isfinite().all()
    assert difference(part, whole) > 0.003


def test_two_references_are_attended_to_together(model: Any) -> None:
    one, other = small_path(1), small_path(5)
    first = swap(model, None, one, switch=0.0)
    both = swap(first, None, other, switch=0.0)
    results = [sample(m) for m in (first, swap(model, None, other, switch=0.0), both)]
    assert min(difference(results[2], result) for result in results[:2]) > 0.003


def test_cond_only_leaves_the_negative_chunk(model: Any) -> None:
    sites = attention_sites(model)
    path = path_of(small_path(1), prompt(31), both=False)
    assert path.streams == (path.conditioned,)
    acting = select_sites(sites, "self", "decoder")
    look = Look(acting, Window())
    patched = add_edit(model, MultiSourceSwap(acting, Window(), None, path, switch=0.0))
    sample(add_edit(patched, look))
    assert {frozenset(seen.call.replaced) for seen in look.of("positive")} == {frozenset({"key", "value"})}
    assert {frozenset(seen.call.replaced) for seen in look.of("negative")} == {frozenset()}
