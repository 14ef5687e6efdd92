"""What is recorded of a run's attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from subject_patches.nodes.attention_inspector import RecordAttentionNode
from subject_patches.patches.engine.call import AttentionCall
from subject_patches.patches.engine.edit import Edit
from subject_patches.patches.engine.engine import add_edit
from subject_patches.patches.families import attention_sites
from subject_patches.patches.mechanisms.layout import at_grid
from subject_patches.patches.mechanisms.layout_regions import Layout, Region
from subject_patches.patches.parts.sites import Site
from subject_patches.patches.parts.window import Window
from subject_patches.patches.pictures.attention_record import (
    CROSS_ATTENTION,
    MOST_RUNS,
    AttentionRecord,
    AttentionRuns,
    Row,
    Shown,
)
from subject_patches.tests.shared import dense
from subject_patches.tests.shared.layouts import box
from subject_patches.tests.shared.look import Look
from subject_patches.tests.shared.mechanisms import Mechanism, over_mechanisms
from subject_patches.tests.shared.models import (
    generator,
    laid_out,
    prompt,
    recycled,
    routed,
    sample,
    subject,
)
from subject_patches.tests.shared.records import recorded

LAYOUT = Layout(80, 64, (Region("subject", box(80, 64, 0, 0, 40, 64)), Region("scene", box(80, 64, 50, 0, 80, 64))))


def all_sites(model: Any) -> frozenset[Site]:
    return frozenset(attention_sites(model))


@over_mechanisms
def test_recording_changes_no_bit(mechanism: Mechanism, model: Any) -> None:
    """Before a mechanism's node or behind it."""
    right = sample(mechanism.on(model))
    before, _ = RecordAttentionNode.execute(model).args
    assert torch.equal(sample(mechanism.on(before)), right)
    record, result = recorded(mechanism.on(model))
    assert torch.equal(result, right)
    assert record.maps


def test_recording_a_bare_model_changes_no_bit(model: Any) -> None:
    assert torch.equal(recorded(model)[1], sample(model))


@pytest.mark.parametrize("picture", [1, 2])
def test_maps_are_those_of_the_picture_asked_for(picture: int, model: Any) -> None:
    biased = laid_out(model, LAYOUT, negative_weight=-3.0)
    look = Look(all_sites(model), Window())
    record, _ = recorded(add_edit(biased, look), {"batch": 2, "size": (6, 10)}, picture=picture)
    seen = [each for each in look.of("positive") if each.call.site.kind == "cross"]
    expected = 0
    for each in seen:
        call = each.call
        shares = dense.shares(call.query, call.key, call.heads, call.bias_of()).mean(1)[picture - 1]
        for shown, tokens in (
            (Shown(CROSS_ATTENTION, "subject"), [2, 3]),
            (Shown(CROSS_ATTENTION, "subject", 1), [2]),
            (Shown(CROSS_ATTENTION, "subject", 2), [3]),
            (Shown(CROSS_ATTENTION, "scene"), [5]),
        ):
            right = shares[:, tokens].sum(-1).view(call.grid)
            kept = record.maps[shown, call.site, each.sigma]
            torch.testing.assert_close(kept.value.double(), right, rtol=0, atol=1e-5)
            assert kept.count == 1
            expected += 1
    assert expected == sum(shown.kind == CROSS_ATTENTION for shown, _, _ in record.maps)


def test_only_the_phrases_asked_for(model: Any) -> None:
    record, _ = recorded(model, phrases="Scene")
    assert {str(shown) for shown, _, _ in record.maps} == {"scene"}


@pytest.mark.parametrize("picture", [1, 2])
def test_share_and_distance_of_references(picture: int, model: Any) -> None:
    look = Look(all_sites(model), Window())
    record, _ = recorded(add_edit(recycled(model), look), {"batch": 2}, picture=picture)
    calls = [each for each in look.of("positive") if each.call.extensions]
    assert len(calls) == len(record.rows) == 2 * 5
    for row, each in zip(record.rows, calls, strict=True):
        call = each.call
        (extension,) = call.extensions
        shares = dense.shares(call.query, call.key, call.heads, None, [extension])[picture - 1]
        assert (row.site, row.sigma) == (call.site, each.sigma)
        assert row.asa == pytest.approx(float(shares[..., call.key.shape[1] :].sum(-1).mean()), abs=1e-5)
        distance = extension.value[0].mean(0) - call.value[picture - 1].mean(0)
        assert row.sld == pytest.approx(float(distance.abs().mean()), rel=1e-4)


def test_regions_and_routes_are_noted(model: Any) -> None:
    who = (subject(phrase="one"), subject(seed=1, phrase="two"))
    record, _ = recorded(laid_out(routed(model, who), LAYOUT))
    assert set(record.kinds) == {CROSS_ATTENTION, "routing map", "layout region"}
    for (shown, site, _), kept in record.maps.items():
        if shown.kind == "layout region":
            mask = LAYOUT.shown()[shown.label].float()
            right = at_grid(mask, tuple(kept.value.shape)).view(kept.value.shape)
            torch.testing.assert_close(kept.value, right)
            assert site.kind == "cross"
        if shown.kind == "routing map":
            assert site.kind == "self"
            assert set(kept.value.unique().tolist()) <= {0.0, 1.0}
    labels = {shown.label for shown, _, _ in record.maps if shown.kind == "routing map"}
    assert labels == {"one", "two"}


def test_another_run_is_another_record(model: Any) -> None:
    patched, runs = RecordAttentionNode.execute(recycled(model)).args
    sample(patched, steps=4)
    first = runs.last
    assert len(first.sigmas) == 4
    sample(patched, steps=2)
    assert len(runs.last.sigmas) == 2
    assert len(runs.last.rows) == 2 * 5
    # The first one's stays what it was.
    assert len(first.sigmas) == 4


def test_runs_are_kept_by_what_stands_for_them() -> None:
    runs = AttentionRuns()
    kept = {}
    for number in range(MOST_RUNS + 2):
        kept[number] = runs.begin(number)
        kept[number].rows.append(Row(1.0, Site("self", "middle", 0, 0), 0.0, 0.0))
    assert list(runs.kept) == list(range(2, MOST_RUNS + 2))
    assert runs.last is kept[MOST_RUNS + 1]
    again = runs.begin(5)
    assert again is not kept[5]
    assert list(runs.kept)[-1] == 5
    # A run inside another of the same sampler.
    assert runs.begin(5) is again


def test_a_step_that_calls_the_model_twice_gives_the_mean(model: Any) -> None:
    record, _ = recorded(model, {"sampler": "dpmpp_sde", "steps": 3})
    assert {kept.count for kept in record.maps.values()} == {1}
    kept = AttentionRecord()
    shown, site = Shown("mask", "one"), Site("self", "middle", 0, 0)
    for value in (1.0, 2.0, 6.0):
        kept.add(shown, site, 3.0, torch.full((2, 2), value))
    assert kept.maps[shown, site, 3.0].value.tolist() == [[3.0, 3.0], [3.0, 3.0]]


def test_fine_maps_are_averaged() -> None:
    kept = AttentionRecord()
    values = torch.rand(128, 192, generator=generator(2))
    kept.add(Shown("mask", "one"), Site("self", "middle", 0, 0), 1.0, values)
    ((found),) = (each.value for each in kept.maps.values())
    assert found.shape == (43, 64)
    assert float(found.mean()) == pytest.approx(float(values.mean()), abs=0.01)


def test_an_area_is_named(model: Any) -> None:
    positive = prompt(1, subject_patches_spans={"subject": ((2, 3),)}, area=(4, 6, 2, 1), strength=1.0)
    record, _ = recorded(model, {"positive": positive})
    assert {str(shown) for shown, _, _ in record.maps} == {"subject (area 48 x 32 at 8, 16)"}


class Unlabelled(Edit):
    """Notes two maps for each picture without a label."""

    def amend(self, call: AttentionCall, *_: Any) -> None:
        call.note("pair", lambda: torch.stack([torch.full((2, 2, 3), float(row)) for row in range(len(call.query))]))


def test_notes_of_other_edits(model: Any) -> None:
    sites = frozenset(site for site in attention_sites(model) if site.block == "middle")
    record, _ = recorded(add_edit(model, Unlabelled(sites, Window())), {"batch": 2}, picture=2)
    found = {str(shown): kept.value for (shown, _, _), kept in record.maps.items() if shown.kind == "pair"}
    assert set(found) == {"1", "2"}
    assert all(bool((values == 1).all()) for values in found.values())
