"""What is recorded of a run's attention, and how it is shown."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from host import ROOT
from subject_patches.nodes.attention_inspector import KINDS, AttentionInspectorNode, RecordAttentionNode
from subject_patches.patches.engine.call import AttentionCall
from subject_patches.patches.engine.edit import Edit
from subject_patches.patches.engine.engine import add_edit
from subject_patches.patches.families import attention_sites
from subject_patches.patches.mechanisms.layout import at_grid
from subject_patches.patches.mechanisms.layout_regions import Layout, Region
from subject_patches.patches.parts.sites import Site
from subject_patches.patches.parts.window import Window
from subject_patches.patches.pictures.attention_pictures import (
    BY_LAYER,
    BY_STEP,
    Selection,
    draw_sheets,
    heat,
    mean_map,
    overlay,
    plot,
    sheets,
)
from subject_patches.patches.pictures.attention_record import (
    CROSS_ATTENTION,
    MOST_RUNS,
    AttentionRecord,
    AttentionRuns,
    Row,
    Shown,
    table,
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
from torch import Tensor

LAYOUT = Layout(80, 64, (Region("subject", box(80, 64, 0, 0, 40, 64)), Region("scene", box(80, 64, 50, 0, 80, 64))))
PICTURE = torch.rand(2, 64, 80, 3, generator=generator(1))


def recorded(model: Any, run: dict[str, Any] | None = None, **values: Any) -> tuple[AttentionRecord, Tensor]:
    patched, runs = RecordAttentionNode.execute(model, **values).args
    result = sample(patched, **(run or {}))
    return runs.last, result


def inspect(record: AttentionRecord, **values: Any) -> tuple[Tensor, Tensor, str, Tensor]:
    return AttentionInspectorNode.execute(AttentionRuns(kept={None: record}), PICTURE, **values).args


def all_sites(model: Any) -> frozenset[Site]:
    return frozenset(attention_sites(model))


# What is recorded


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
        shares = dense.shares(call.query, call.key, call.heads, call.own_bias).mean(1)[picture - 1]
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


def test_a_prompt_that_knows_no_phrase(model: Any) -> None:
    record, _ = recorded(recycled(model), {"positive": prompt(1)})
    assert record.maps == {}
    assert record.rows
    with pytest.raises(ValueError, match="The prompt of the recorded run knows none of the phrases, so there are no"):
        inspect(record)
    grid, maps, lines, _ = inspect(record, show="all")
    assert torch.equal(grid, PICTURE[:1])
    assert torch.equal(maps, PICTURE[:1])
    assert len(lines.splitlines()) == 1 + len(record.rows)


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


# How it is shown


def test_heat_runs_from_dark_to_light() -> None:
    colours = heat(torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0]))
    assert colours.shape == (5, 3)
    assert torch.equal(colours[0], colours[1])
    assert torch.equal(colours[3], colours[4])
    assert bool((colours.sum(-1).diff() >= 0).all())


def test_an_overlay_is_a_mix() -> None:
    picture = torch.rand(6, 8, 3, generator=generator(3))
    values = torch.tensor([[0.0, 1.0]])
    assert torch.equal(overlay(values, picture, 0.0), picture)
    alone = overlay(values, picture, 1.0)
    torch.testing.assert_close(alone[:, :4], heat(torch.zeros(6, 4)))
    torch.testing.assert_close(alone[:, 4:], heat(torch.ones(6, 4)))
    torch.testing.assert_close(overlay(values, picture, 0.25), picture * 0.75 + alone * 0.25)


def made_record() -> AttentionRecord:
    """Two subjects in two layers at three steps: the value says which."""
    record = AttentionRecord((Site("self", "middle", 0, 0), Site("self", "output", 3, 1)))
    for step, sigma in enumerate((9.0, 4.0, 1.0)):
        for layer, site in enumerate(record.sites):
            for number, label in enumerate(("red dog", "cat")):
                size = (2 + layer, 3)
                record.add(Shown("mask", label), site, sigma, torch.full(size, step / 4 + layer / 8 + number / 2))
    return record


def test_subjects_by_steps_average_the_layers() -> None:
    record = made_record()
    (sheet,) = sheets(Selection().of(record, "mask"), record.sigmas, BY_STEP)
    assert (sheet.title, sheet.rows, sheet.columns) == ("mask", ("red dog", "cat"), ("step 1", "step 2", "step 3"))
    for (down, across), values in sheet.cells.items():
        assert values.shape == (3, 3)
        torch.testing.assert_close(values, torch.full((3, 3), across / 4 + 1 / 16 + down / 2))
    assert len(sheet.cells) == 6


def test_layers_by_steps_are_a_block_for_each_subject() -> None:
    record = made_record()
    made = sheets(Selection().of(record, "mask"), record.sigmas, BY_LAYER)
    assert [sheet.title for sheet in made] == ["mask: red dog", "mask: cat"]
    for number, sheet in enumerate(made):
        assert sheet.rows == ("middle.0.0", "output.3.1")
        for (down, across), values in sheet.cells.items():
            assert values.shape == (2 + down, 3)
            assert values[0, 0] == across / 4 + down / 8 + number / 2


def test_selections() -> None:
    record = made_record()

    def places(**values: Any) -> set[tuple[str, str, float]]:
        return {(str(a), str(b), c) for a, b, c in Selection(**values).of(record, "mask")}

    assert places(first_step=2, last_step=2, labels=("DOG",)) == {
        ("red dog", "middle.0.0", 4.0),
        ("red dog", "output.3.1", 4.0),
    }
    assert places(sites=frozenset({record.sites[1]}), first_step=3) == {
        ("red dog", "output.3.1", 1.0),
        ("cat", "output.3.1", 1.0),
    }
    assert Selection().of(record, "other") == {}


def test_the_mean_is_at_the_finest_size() -> None:
    mean = mean_map([torch.zeros(2, 2), torch.ones(4, 4)])
    torch.testing.assert_close(mean, torch.full((4, 4), 0.5))


def test_a_cell_lies_where_its_row_and_column_say() -> None:
    record = made_record()
    sheet = sheets(Selection().of(record, "mask"), record.sigmas, BY_STEP)[0]
    del sheet.cells[1, 2]
    picture = torch.zeros(64, 80, 3)
    drawn = draw_sheets([sheet], picture, 1.0)
    assert drawn.ndim == 4
    pixels = (drawn[0] * 255).round()
    for (down, across), values in sheet.cells.items():
        colour = (heat(values[0, 0]) * 255).round()
        y, x = 42 + down * (115 + 3) + 50, 150 + across * (144 + 3) + 70
        assert torch.equal(pixels[y, x], colour)
    assert pixels[42 + 118 + 50, 150 + 2 * 147 + 70].tolist() == [90, 90, 90]


def test_the_plot_shows_the_largest_value_in_white() -> None:
    one, other = Site("self", "middle", 0, 0), Site("self", "output", 3, 0)
    rows = [Row(9.0, one, 0.2, 0.1), Row(9.0, other, 0.4, 0.3), Row(1.0, one, 0.1, 0.2)]
    pixels = (plot(rows)[0] * 255).round()
    assert pixels[34 + 28 + 10, 110 + 10].tolist() == [255, 255, 240]
    assert pixels[34 + 28 + 10, 110 + 28 + 10].tolist() == [90, 90, 90]
    assert pixels[34 + 10, 110 + 10].tolist() == (heat(torch.tensor(0.5)) * 255).round().tolist()
    assert table(rows).splitlines()[:2] == ["sigma,layer,asa,sld", "9.0000,middle.0.0,0.20000,0.10000"]
    assert plot([]).shape[0] == 1


@pytest.mark.parametrize("arrange", [BY_STEP, BY_LAYER])
@pytest.mark.parametrize("show", ["cross-attention", "routing map", "all"])
def test_the_node_shows_a_run(show: str, arrange: str, model: Any) -> None:
    record, _ = recorded(routed(model, (subject(),)), {"batch": 2}, picture=2)
    grid, maps, lines, drawn = inspect(record, show=show, arrange=arrange, tokens=True, opacity=0.0)
    labels = {"cross-attention": 4, "routing map": 1, "all": 5}[show]
    assert torch.equal(maps, PICTURE[1:].expand(labels, -1, -1, -1))
    assert grid.shape[0] == drawn.shape[0] == 1
    assert float(grid.std()) > 0.05
    assert len(lines.splitlines()) == 1 + 2 * 5
    one = inspect(record, show=show, arrange=arrange, layers="middle", first_step=2, subjects="subject")
    assert one[0].shape[2] < grid.shape[2]
    assert len(one[1]) == {"cross-attention": 1, "routing map": 1, "all": 2}[show]


# Bad input


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"show": "mask"}, "show is 'mask'; choose one of cross-attention, routing map"),
        ({"arrange": "rows"}, "arrange is 'rows'; choose one of subjects by steps, layers by steps"),
        ({"opacity": 1.2}, r"The opacity is 1\.2; give a number from 0 to 1"),
        ({"first_step": 3, "last_step": 2}, "The steps go from 3 to 2; give the first one first, from 1"),
        ({"show": "blend mask"}, r"nothing called 'blend mask'; choose one of those it has \(cross-attention\)"),
        ({"layers": "output.99"}, "The block 'output.99' names no attention of this model; it has input"),
        ({"first_step": 3}, "None of the recorded maps is of these layers, steps and subjects; the run has 2 steps"),
        ({"subjects": "bird"}, "maps of subject, scene: choose among those, or leave the choice empty"),
    ],
)
def test_bad_choices(values: dict[str, Any], message: str, model: Any) -> None:
    record, _ = recorded(model)
    with pytest.raises(ValueError, match=message):
        inspect(record, **values)


def test_nothing_recorded(model: Any) -> None:
    _, runs = RecordAttentionNode.execute(model).args
    with pytest.raises(ValueError, match="Nothing was recorded: connect the model of Record Attention to the sampler"):
        AttentionInspectorNode.execute(runs, PICTURE)
    with pytest.raises(ValueError, match="The picture is number 0; the first one of a batch is 1"):
        RecordAttentionNode.execute(model, picture=0)


def test_the_help_page_names_every_kind() -> None:
    text = (ROOT / "web" / "docs" / "SubjectPatchesAttentionInspector.md").read_text(encoding="utf-8")
    assert all(f"`{kind}`" in text for kind in KINDS)
