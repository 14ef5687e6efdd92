"""Routed extensions of attention calls: queries in groups of those that see the same, without a mask."""

from __future__ import annotations

import pytest
import torch
from subject_patches.patches.engine import execution
from subject_patches.tests.shared.calls import Counted, assert_exact, make_call


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("biased", [False, True])
def test_route_that_all_rows_share(biased: bool) -> None:
    call = make_call()
    route = torch.arange(9)[None] % 3 == 0
    call.extend(
        torch.randn(1, 5, 12), torch.randn(1, 5, 12), bias=torch.randn(1, 9, 5) if biased else None, route=route
    )
    call.extend(torch.randn(1, 4, 12), torch.randn(1, 4, 12), route=torch.arange(9)[None] > 4)
    attend = Counted(3)
    assert_exact(call, attend)
    # Both seen, either seen, none seen: four groups, and no mask where nothing is biased.
    assert len(attend.masks) == 4
    assert biased or attend.masks == [None] * 4


@pytest.mark.parametrize(("limits", "attentions"), [({}, 2), ({"_FILLED_UP": 0}, 4), ({"_HELD": 0}, 5)])
def test_groups_over_as_many_keys_run_as_one_while_they_are_small(
    limits: dict[str, int], attentions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in limits.items():
        monkeypatch.setattr(execution, name, value)
    call = make_call()
    owner = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 3, 4]])
    for number in range(4):
        call.extend(torch.randn(1, 5, 12), torch.randn(1, 5, 12), route=owner == number)
    attend = Counted(3)
    assert_exact(call, attend)
    # By how many keys; by that and by how many queries; each alone.
    assert attend.masks == [None] * attentions


def test_references_of_one_route_are_seen_together() -> None:
    call = make_call(rows=1)
    route = torch.arange(9)[None] > 4
    for _ in range(80):
        call.extend(torch.randn(1, 1, 12), torch.randn(1, 1, 12), route=route)
    attend = Counted(3)
    assert_exact(call, attend)
    assert len(attend.masks) == 2


@pytest.mark.parametrize("count", [31, 32, 70])
def test_any_number_of_routes(count: int) -> None:
    call = make_call(rows=1, queries=40)
    # Half of the queries are as one another, so that groups of several are there to be found.
    columns = torch.rand(count, 20) > 0.5
    for route in torch.cat([columns, columns], 1):
        call.extend(torch.randn(1, 1, 12), torch.randn(1, 1, 12), route=route[None])
    assert_exact(call)


def test_route_of_each_row() -> None:
    call = make_call(rows=3)
    route = torch.rand(3, 9) > 0.5
    call.extend(torch.randn(3, 5, 12), torch.randn(3, 5, 12), bias=torch.randn(3, 1, 5), route=route)
    call.extend(torch.randn(1, 4, 12), torch.randn(1, 4, 12))
    call.bias(torch.randn(3, 9, 7))
    assert_exact(call)


def test_routes_without_bias_never_cost_a_mask() -> None:
    call = make_call(rows=3)
    call.extend(torch.randn(1, 5, 12), torch.randn(1, 5, 12), route=torch.rand(3, 9) > 0.5)
    attend = Counted(3)
    assert_exact(call, attend)
    assert set(attend.masks) == {None}


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
def test_all_queries_routed_one_way(seen: bool, rows: int) -> None:
    call = make_call(rows=rows)
    call.extend(torch.randn(1, 5, 12), torch.randn(1, 5, 12), route=torch.full((rows, 9), seen))
    attend = Counted(3)
    assert_exact(call, attend)
    assert attend.masks == [None]


def test_a_row_that_sees_nothing_beside_one_that_sees_all() -> None:
    call = make_call()
    call.extend(torch.randn(1, 5, 12), torch.randn(1, 5, 12), route=torch.tensor([[True], [False]]).expand(2, 9))
    assert_exact(call)
