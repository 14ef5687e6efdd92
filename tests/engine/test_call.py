"""Amended attention calls against plain dense attention in float64."""

from __future__ import annotations

import random

import pytest
import torch
from comfy.ldm.modules import attention as host
from subject_patches.patches.engine.amendments import Extension
from subject_patches.patches.engine.execution import Attend, execute
from subject_patches.tests.shared import dense
from subject_patches.tests.shared.calls import TOLERANCE, Counted, assert_exact, expected, make_call, with_heads_apart
from torch import Tensor


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_untouched_calls_take_one_attention_without_a_mask() -> None:
    calls = [make_call(), make_call()]
    attend = Counted(3)
    outputs = execute(calls, attend)
    assert attend.masks == [None]
    for call, output in zip(calls, outputs, strict=True):
        torch.testing.assert_close(output, expected(call), rtol=0, atol=TOLERANCE)
        assert not call.amended


def test_extended() -> None:
    call = make_call()
    call.extend(torch.randn(1, 5, 12), torch.randn(1, 5, 12))
    call.extend(torch.randn(2, 3, 12), torch.randn(2, 3, 12))
    attend = Counted(3)
    assert_exact(call, attend)
    assert attend.masks == [None]


@pytest.mark.parametrize("function", [host.attention_basic, host.attention_split, host.attention_sub_quad])
def test_strength_is_one_vector_over_keys_in_every_attention_of_the_host(function: Attend) -> None:
    call = make_call()
    call.extend(torch.randn(1, 5, 12), torch.randn(1, 5, 12), bias=torch.full((1, 1, 1), 0.7))
    attend = Counted(3, function)
    assert_exact(call, attend)
    assert attend.masks == [(1, 1, 12)]


def test_bias_of_named_tokens() -> None:
    call = make_call()
    call.bias(torch.randn(1, 9, 2), tokens=[4, 1])
    full = torch.zeros(1, 9, 7)
    call.bias(torch.tensor(0.3))
    full[..., [4, 1]] = call.bias_of()[..., [4, 1]] - 0.3
    torch.testing.assert_close(call.bias_of(), full + 0.3)
    assert_exact(call)


def test_extension_without_tokens_changes_nothing() -> None:
    call, same = make_call(), make_call()
    same.query, same.key, same.value = call.query, call.key, call.value
    call.extend(torch.randn(1, 0, 12), torch.randn(1, 0, 12), bias=torch.ones(1, 1, 1))
    assert_exact(call)
    torch.testing.assert_close(expected(call), expected(same))


def test_single_query_and_key() -> None:
    call = make_call(rows=1, queries=1, keys=1, heads=1, width=2)
    call.extend(torch.randn(1, 1, 2), torch.randn(1, 1, 2), bias=torch.randn(1, 1, 1), route=torch.tensor([[True]]))
    assert_exact(call)


def test_replaced() -> None:
    call = make_call()
    query, key, value = torch.randn(2, 9, 12), torch.randn(2, 4, 12), torch.randn(2, 4, 12)
    call.replace(query=query)
    call.replace(key=key, value=value)
    (output,) = execute([call], Counted(3))
    torch.testing.assert_close(output, dense.attention(query, key, value, 3).float(), rtol=0, atol=TOLERANCE)
    with pytest.raises(ValueError, match="5 keys cannot go with 4 values"):
        call.replace(key=torch.randn(2, 5, 12))


def test_blends_run_in_order() -> None:
    call = make_call()
    call.blend(lambda output: output * 2)
    call.blend(lambda output: output + 1)
    plain = dense.attention(call.query, call.key, call.value, 3)
    (output,) = execute([call], Counted(3))
    torch.testing.assert_close(output, (plain * 2 + 1).float(), rtol=0, atol=TOLERANCE)


def test_three_different_edits_in_one_layer() -> None:
    call = make_call(rows=2, queries=12, keys=6)
    other = make_call(rows=2, queries=12, keys=6)
    value = torch.randn(2, 6, 12)
    call.replace(value=value)
    call.bias(torch.randn(1, 12, 2), tokens=[0, 3])
    call.extend(torch.randn(1, 5, 12), torch.randn(1, 5, 12), bias=torch.tensor(0.5), route=torch.arange(12)[None] < 7)
    layout = torch.randn(2, 12, 12)
    call.blend(lambda output: 0.25 * output + 0.75 * layout)
    extension = call.extensions[0]
    reference = dense.attention(call.query, call.key, value, 3, call.bias_of(), [extension])
    outputs = execute([call, other], Counted(3))
    torch.testing.assert_close(outputs[0], (0.25 * reference + 0.75 * layout).float(), rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(outputs[1], expected(other), rtol=0, atol=TOLERANCE)


def test_probabilities() -> None:
    call = make_call()
    call.bias(torch.randn(2, 9, 7))
    reference = dense.shares(call.query, call.key, 3, call.bias_of())
    torch.testing.assert_close(call.probabilities(), reference.float(), rtol=0, atol=TOLERANCE)


def test_heads_apart_are_copied_once_an_edit_looks() -> None:
    """And once, however many look."""
    call = make_call()
    apart = with_heads_apart(call)
    assert len({id(each) for each in vars(apart).values() if isinstance(each, Tensor)}) == 3
    execute([apart], Counted(3))
    assert len({id(each) for each in vars(apart).values() if isinstance(each, Tensor)}) == 3
    for name in ("query", "key", "value"):
        assert torch.equal(getattr(apart, name), getattr(call, name))
        assert getattr(apart, name) is getattr(apart, name)


def test_extension_share() -> None:
    call = make_call()
    call.bias(torch.randn(1, 1, 7))
    call.extend(
        torch.randn(1, 5, 12), torch.randn(1, 5, 12), bias=torch.randn(1, 9, 5), route=torch.arange(9)[None] < 4
    )
    call.extend(torch.randn(2, 3, 12), torch.randn(2, 3, 12))
    shares = dense.shares(call.query, call.key, 3, call.bias_of(), call.extensions)
    torch.testing.assert_close(call.extension_share(), shares[..., 7:].sum(-1).float(), rtol=0, atol=TOLERANCE)


def test_notes_are_made_when_asked_for_and_amend_nothing() -> None:
    call = make_call()
    made = []

    def mask() -> Tensor:
        made.append(1)
        return torch.ones(2, 3, 3, dtype=torch.bool)

    call.note("mask", mask)
    call.note("maps", lambda: torch.zeros(1, 2, 3, 3, dtype=torch.float16), ["cat", "dog"])
    call.note("mask", lambda: torch.zeros(1, 3, 3))
    execute([call], Counted(3))
    assert not call.amended
    assert made == []
    assert [note.name for note in call.notes] == ["mask", "maps", "mask"]
    assert call.notes[1].labels == ("cat", "dog")
    first, second, third = (note.maps() for note in call.notes)
    torch.testing.assert_close(first, torch.ones(2, 1, 3, 3))
    assert (second.shape, second.dtype) == ((1, 2, 3, 3), torch.float32)
    assert third.shape == (1, 1, 3, 3)
    assert made == [1]


@pytest.mark.parametrize("labels", [(), ("one", "two", "three")])
def test_a_note_of_another_shape_is_refused(labels: tuple[str, ...]) -> None:
    call = make_call()
    call.note("mask", lambda: torch.ones(3, 3) if not labels else torch.ones(2, 2, 3, 3), labels)
    with pytest.raises(ValueError, match="The note 'mask' made a tensor of shape"):
        call.notes[0].maps()


def random_bias(rows: int, queries: int, keys: int) -> Tensor | None:
    shape = random.choice([None, (), (1, 1, 1), (1, 1, keys), (1, queries, keys), (rows, 1, keys), (rows, queries, 1)])  # noqa: S311
    return None if shape is None else torch.randn(shape)


@pytest.mark.parametrize("seed", range(40))
def test_random_calls_together(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    heads, width = random.choice([(1, 3), (2, 4), (5, 2)])  # noqa: S311
    channels = heads * width
    calls = []
    for _ in range(random.randint(1, 3)):  # noqa: S311
        rows, queries, keys = random.randint(1, 3), random.randint(1, 13), random.randint(1, 9)  # noqa: S311
        call = make_call(rows, queries, keys, heads, width)
        for _ in range(random.randint(0, 3)):  # noqa: S311
            count, own_rows = random.randint(0, 6), random.choice([1, rows])  # noqa: S311
            route = random.choice([None, torch.rand(1, queries) > 0.5, torch.rand(rows, queries) > 0.5])  # noqa: S311
            key, value = torch.randn(own_rows, count, channels), torch.randn(own_rows, count, channels)
            call.extend(key, value, random_bias(rows, queries, count), route)
        bias = random_bias(rows, queries, keys)
        if bias is not None:
            call.bias(bias)
        calls.append(call)
    for call, output in zip(calls, execute(calls, Counted(heads)), strict=True):
        torch.testing.assert_close(output, expected(call), rtol=0, atol=TOLERANCE)


def test_half_precision_keeps_the_dtype() -> None:
    call = make_call()
    call.query, call.key, call.value = call.query.bfloat16(), call.key.bfloat16(), call.value.bfloat16()
    call.extensions.append(
        Extension(torch.randn(1, 5, 12).bfloat16(), torch.randn(1, 5, 12).bfloat16(), torch.zeros(1, 1, 1))
    )
    (output,) = execute([call], Counted(3))
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected(call), rtol=0.05, atol=0.05)
