"""What edits add to logits, and what an attention function that leaves masks away makes of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import comfy.ldm.modules.attention as host
import pytest
import torch
from subject_patches.patches.engine import call as calls
from subject_patches.patches.engine.bias import Bias, mask_of, summed
from subject_patches.patches.engine.call import AttentionCall
from subject_patches.patches.engine.chunk import Chunk
from subject_patches.patches.engine.heeding import Heeding
from subject_patches.patches.parts.sites import Site
from subject_patches.tests.shared import dense
from subject_patches.tests.shared.dit_models import dit_model
from subject_patches.tests.shared.mechanisms import MECHANISMS, Mechanism
from subject_patches.tests.shared.models import difference, generator, sample, small_model
from subject_patches.tests.shared.second_device import DEVICE, SecondDevice
from torch import Tensor
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
SHAPES = [(), (1,), (1, 1, 1), (1, 1, 3), (1, 4, 3), (2, 4, 3), (2, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_mask_is_the_sum_of_biases_at_their_keys(shape: tuple[int, ...]) -> None:
    source = generator(1)
    one, other = torch.randn(shape, generator=source), torch.randn(1, 4, 2, generator=source)
    full = torch.zeros(2, 4, 9)
    full[..., 2:5] += one
    full[..., 4:6] += other
    biases = (Bias(one, 2, 5), Bias(other, 4, 6))
    torch.testing.assert_close(summed(biases, 9, CPU).expand_as(full), full)
    places = torch.tensor([3, 1])
    mask = mask_of([(each, places) for each in biases], 9, torch.empty(0, dtype=torch.float16))
    assert mask.dtype == torch.float16
    # Kernels want rows of a mask that begin at a multiple of eight.
    assert mask.stride(1) % 8 == 0
    torch.testing.assert_close(mask.expand(2, 2, 9).float(), full[:, places], rtol=0, atol=4e-3)


def test_one_vector_over_keys_stays_one() -> None:
    assert mask_of([(Bias(torch.ones(()), 0, 5), None)], 70, torch.empty(0)).shape == (1, 1, 70)


class Copies(TorchFunctionMode):
    """Counts what is copied to a device."""

    count = 0

    def __torch_function__(self, function: Any, _: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") == "to" and torch.device in map(type, args):
            self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_number_is_not_copied_to_a_device(dtype: torch.dtype) -> None:
    """As the strength of references is: a copy waits until a GPU has done all that it was given."""
    number = torch.tensor(0.3).log().view(1, 1, 1)
    with SecondDevice(), Copies() as copies:
        mask = mask_of([(Bias(number, 2, 4), None)], 5, torch.empty(0, dtype=dtype, device=DEVICE))
        assert mask.device == DEVICE
        assert copies.count == 0
    right = torch.zeros(5, dtype=dtype)
    right[2:4] = number.flatten()
    assert torch.equal(mask.flatten(), right)


def test_keys_come_and_go_with_their_biases() -> None:
    bias = Bias(torch.arange(6.0), 1, 7)
    left = bias.without(3, 5, instead=4)
    assert summed(left, 10, CPU).flatten().tolist() == [0, 0, 1, 0, 0, 0, 0, 4, 5, 0]
    assert summed(bias.without(0, 9), 3, CPU) is None
    assert summed(bias.without(7, 9), 7, CPU).flatten().tolist() == [0, 0, 1, 2, 3, 4, 5]
    assert bias.part(0, 1) is None
    assert bias.part(4, 20).values.tolist() == [3, 4, 5]


def test_what_looks_at_an_attention_holds_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And finds the same."""
    source = generator(2)
    tensors = (torch.randn(2, count, 6, generator=source) for count in (11, 7, 7))
    chunk = Chunk(slice(0, 2), "positive", True, {}, (8, 8))
    call = AttentionCall(*tensors, 2, Site("self", "middle", 0, 0), chunk, None)
    call.bias(torch.randn(1, 11, 7, generator=source))
    more = torch.randn(2, 1, 5, 6, generator=source)
    call.extend(*more, bias=torch.randn(1, 11, 5, generator=source), route=torch.arange(11)[None] < 6)
    call.extend(*more, bias=torch.tensor(0.5))
    whole, share = call.probabilities(), call.extension_share()
    for limits in ({"_HELD": 2 * 2 * 7 * 3}, {"_CACHED": 0, "_FEWEST": 3}):
        with monkeypatch.context() as patch:
            for name, limit in limits.items():
                patch.setattr(calls, name, limit)
            parts = list(call.probabilities_in_parts(slice(0, 7)))
            assert max(part.numel() for part in parts) <= 2 * 2 * 7 * 3
            torch.testing.assert_close(torch.cat(parts, 2), whole)
            torch.testing.assert_close(call.extension_share(), share)


# Attention functions of other packs


def deaf(function: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Any = None, **named: Any) -> Tensor:
    """As some fast ones do, it takes a mask and leaves it away."""
    return host.attention_basic(q, k, v, heads, **named)


def halving(function: Any, *args: Any, **named: Any) -> Tensor:
    return function(*args, **named) / 2


def with_override(model: Any, function: Callable[..., Tensor]) -> Any:
    clone = model.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = function
    return clone


LAYOUT = next(each for each in MECHANISMS if each.name == "soft layout bias")
WEAK = Mechanism("weakly recycled", lambda model, subjects, *_: MECHANISMS[0].patch(model, subjects, 0.3, (0.0, 1.0)))
MODELS = {"a U-Net": small_model, "FLUX.1": lambda: dit_model("FLUX.1")}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mechanism", [LAYOUT, WEAK], ids=lambda each: each.name)
def test_a_function_that_leaves_masks_away(name: str, mechanism: Mechanism, caplog: pytest.LogCaptureFixture) -> None:
    model = MODELS[name]()
    patched = mechanism.on(model)
    with caplog.at_level(logging.WARNING):
        result = sample(mechanism.on(with_override(model, deaf)))
        assert [record.getMessage()[:56] for record in caplog.records] == [
            "Another pack's attention function leaves masks away, so "
        ]
        caplog.clear()
        halved = sample(mechanism.on(with_override(model, halving)))
        assert caplog.records == []
    assert difference(result, sample(patched)) < 1e-5
    # One that heeds them goes on.
    assert difference(halved, result) > 0.01


def test_a_mask_of_few_places_and_rows() -> None:
    """Wherever it acts, it is looked at there: far from the diagonal of the picture, in the second row alone."""
    told: list[int] = []
    query, key, value = (torch.randn(2, 64 * 64, 8, generator=generator(seed)) for seed in range(3))
    key, value = key[:, :9], value[:, :9]
    mask = torch.zeros(2, 64, 64, 9)
    mask[1, 2:12, 54:62, 3:5] = -30.0
    mask = mask.flatten(1, 2)

    def deaf_to_it(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return dense.attention(q, k, v, 2).float()

    def hosts(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return dense.attention(q, k, v, 2, mask).float()

    heeding = Heeding(lambda: told.append(1))
    result = heeding.attend(deaf_to_it, hosts, 2)(query, key, value, mask)
    assert told == [1]
    assert torch.equal(result, hosts(query, key, value, mask))


@pytest.mark.parametrize("heeds", [False, True])
@pytest.mark.parametrize(("off", "asked"), [(0.0, 0), (0.001, 16)])
def test_nothing_is_told_of_a_mask_that_changes_nothing(heeds: bool, off: float, asked: int) -> None:
    """The same for all keys, or nearly so, which after some attentions counts as heeding."""
    told: list[int] = []
    heeding = Heeding(lambda: told.append(1))
    query, key, value = (torch.randn(1, 5, 4, generator=generator(seed)) for seed in range(3))

    def theirs(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return dense.attention(q, k, v, 2, mask if heeds else None).float()

    attend = heeding.attend(theirs, theirs, 2)
    mask = torch.full((1, 1, 5), 0.5)
    mask[..., 0] += off
    for _ in range(20):
        attend(query, key, value, mask)
    assert (heeding.heeds, heeding.asked, told) == (True if asked else None, asked, [])
