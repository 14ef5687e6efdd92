"""AnyStory's equations: windows in whole steps, biases, routes, and that grouped queries equal the authors' matrix."""

from __future__ import annotations

import pytest
import torch
from subject_patches.patches.anystory.anystory import (
    attention_bias,
    mean_queries,
    reference_bias,
    routes,
    routing_logits,
    step_at,
    steps_of,
)
from subject_patches.patches.anystory.anystory_run import widened
from subject_patches.patches.engine.call import AttentionCall
from subject_patches.patches.engine.chunk import Chunk
from subject_patches.patches.engine.execution import execute, extended
from subject_patches.patches.parts.sites import Site
from torch import Tensor
from torch.nn import functional

from ..shared.models import randn

HEADS = 2


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (query, key, value))
    mask = None if mask is None else mask[:, None]
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("window", "steps", "expected"),
    [
        ((0.1, 0.3), 25, range(3, 8)),
        ((0.1, 0.3), 28, range(3, 8)),
        ((0.09, 1.0), 25, range(2, 25)),
        ((0.09, 1.0), 28, range(3, 28)),
        ((0.0, 1.0), 10, range(10)),
        ((0.5, 0.5), 4, range(2, 2)),
        ((0.0, 0.01), 10, range(0)),
    ],
)
def test_windows_are_the_authors_steps(window: tuple[float, float], steps: int, expected: range) -> None:
    """Shares times steps, rounded half up."""
    assert steps_of(*window, steps) == expected


def test_step_of_a_noise_level() -> None:
    """A level between two belongs to the step that is under way; above the first, to the first."""
    sigmas = (1.0, 0.9, 0.5, 0.0)
    assert [step_at(sigma, sigmas) for sigma in (2.0, 1.0, 0.95, 0.9, 0.7, 0.5, 0.1, 0.0)] == [0, 0, 0, 1, 1, 2, 2, 2]


def test_reference_bias() -> None:
    """Biases add up, and greys are between."""
    assert reference_bias(torch.tensor([0.0, 0.5, 1.0]), -0.5).tolist() == [-100.5, -50.5, -0.5]


def test_routes_have_no_background() -> None:
    """Every place has the subject that fits it best; queries and keys are means, and nothing is scaled."""
    query, keys = randn(2, HEADS, 6, 4, seed=1), randn(2, 5, 4, seed=2)
    queries = mean_queries(query, 3)
    assert torch.allclose(queries[1, 2], query[1, :, 4:6].mean((0, 1)))
    logits = routing_logits(queries, keys)
    assert torch.allclose(logits[1, 2, 3], queries[1, 2] @ keys[1, 3])
    found = routes(logits)
    assert (found.sum(1) == 1).all()
    assert torch.equal(found.float().argmax(1), logits.argmax(1))


@pytest.mark.parametrize("subjects", [1, 3])
@pytest.mark.parametrize("shift", [0.0, -0.5])
@pytest.mark.parametrize("masked", [False, True])
def test_grouped_queries_equal_the_authors_matrix(subjects: int, shift: float, masked: bool) -> None:
    """Taking keys away and extending each subject's places by its own equals the additive matrix over all keys, for a
    batch with maps of its own."""
    rows, places, text, tokens, size = 2, 12, 5, 4, 6
    width, own = 8, text + subjects * tokens + places
    query, key, value = (randn(rows, n, width, seed=n) for n in (places, own, own))
    more_key, more_value = (randn(1, subjects * size, width, seed=seed) for seed in (7, 8))
    maps = routes(randn(rows, subjects, places, seed=9))
    mask = (randn(1, subjects * size, seed=10) > 0).float() if masked else torch.ones(1, subjects * size)
    bias = reference_bias(mask, shift)
    # The authors' order of keys: text, the subjects' tokens, the picture, references.
    dense = attention_bias(maps, subjects, 0, tokens, bias)
    before, behind = dense.split([subjects * tokens, subjects * size], -1)
    zeros = torch.zeros(rows, places, 1)
    whole = torch.cat([zeros.expand(-1, -1, text), before, zeros.expand(-1, -1, places), behind], -1)
    expected = attend(
        query,
        torch.cat([key, more_key.expand(rows, -1, -1)], 1),
        torch.cat([value, more_value.expand(rows, -1, -1)], 1),
        whole,
    )
    chunk = Chunk(slice(0, rows), "positive", True, {}, (6, 8))
    call = AttentionCall(
        query, key, value, HEADS, Site("joint", "double", 0, 0), chunk, (3, 4), slice(0, text),
        slice(own - places, own),
    )  # fmt: skip
    taken = call.take(slice(text, text + subjects * tokens))
    assert (call.prompt, call.own) == (slice(0, text), slice(text, text + places))
    for number, mine in enumerate(maps.unbind(1)):
        part = slice(number * tokens, (number + 1) * tokens)
        call.extend(taken[0][:, part], taken[1][:, part], None, mine)
        part = slice(number * size, (number + 1) * size)
        call.extend(more_key[:, part], more_value[:, part], bias[:, None, part], mine)
    (found,) = execute([call], attend)
    assert (found - expected).abs().max() < 1e-5
    # The prompt's queries see everything.
    prompt = randn(rows, text, width, seed=11)
    flat = torch.cat([torch.zeros(1, 1, own), bias[:, None]], -1)
    call.extend_prompt(more_key, more_value, bias[:, None])
    expected = attend(
        prompt,
        torch.cat([key, more_key.expand(rows, -1, -1)], 1),
        torch.cat([value, more_value.expand(rows, -1, -1)], 1),
        flat,
    )
    found = extended(attend, prompt, key, value, None, call.prompt_extensions)
    assert (found - expected).abs().max() < 1e-5


def test_a_bias_goes_with_the_keys_that_are_taken() -> None:
    """What another edit added to them is given with them, and stays for the rest."""
    query, key = randn(1, 4, 8, seed=1), randn(1, 9, 8, seed=2)
    chunk = Chunk(slice(0, 1), "positive", True, {}, (4, 4))
    call = AttentionCall(query, key, key, HEADS, Site("joint", "double", 0, 0), chunk, (2, 2), slice(0, 3), slice(5, 9))
    call.bias(torch.arange(9.0).expand(1, 4, 9))
    *_, bias = call.take(slice(3, 5))
    assert bias[0, 0].tolist() == [3.0, 4.0]
    assert call.bias_of()[0, 0].tolist() == [0.0, 1.0, 2.0, 5.0, 6.0, 7.0, 8.0]
    assert torch.equal(call.key, torch.cat([key[:, :3], key[:, 5:]], 1))


@pytest.mark.parametrize("kind", [torch.float16, torch.bool])
def test_a_mask_over_tokens_is_widened(kind: torch.dtype) -> None:
    """The host's own mask says nothing of the subjects' tokens, and the same of all others."""
    mask = (randn(1, 7, 7, seed=3) > 0).to(kind)
    wide = widened(mask, 4, 2)
    assert wide.shape == (1, 9, 9)
    kept = [0, 1, 2, 3, 6, 7, 8]
    assert torch.equal(wide[:, kept][:, :, kept], mask)
    assert (wide[:, 4:6] == (1 if kind == torch.bool else 0)).all()
