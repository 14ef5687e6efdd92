"""Pictures of what was recorded of a run's attention: sheets of maps, and the plot."""

from __future__ import annotations

from typing import Any

import torch
from subject_patches.patches.parts.sites import Site
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
    AttentionRecord,
    Row,
    Shown,
    table,
)
from subject_patches.tests.shared.models import (
    generator,
)


def made_record() -> AttentionRecord:
    """Two subjects in two layers at three steps: the value says which."""
    record = AttentionRecord((Site("self", "middle", 0, 0), Site("self", "output", 3, 1)))
    for step, sigma in enumerate((9.0, 4.0, 1.0)):
        for layer, site in enumerate(record.sites):
            for number, label in enumerate(("red dog", "cat")):
                size = (2 + layer, 3)
                record.add(Shown("mask", label), site, sigma, torch.full(size, step / 4 + layer / 8 + number / 2))
    return record


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
        y, x = 60 + down * (115 + 3) + 50, 180 + across * (144 + 3) + 70
        assert torch.equal(pixels[y, x], colour)
    assert pixels[60 + 118 + 50, 180 + 2 * 147 + 70].tolist() == [90, 90, 90]


def test_the_plot_shows_the_largest_value_in_white() -> None:
    one, other = Site("self", "middle", 0, 0), Site("self", "output", 3, 0)
    rows = [Row(9.0, one, 0.2, 0.1), Row(9.0, other, 0.4, 0.3), Row(1.0, one, 0.1, 0.2)]
    pixels = (plot(rows)[0] * 255).round()
    assert pixels[34 + 28 + 10, 110 + 10].tolist() == [255, 255, 240]
    assert pixels[34 + 28 + 10, 110 + 28 + 10].tolist() == [90, 90, 90]
    assert pixels[34 + 10, 110 + 10].tolist() == (heat(torch.tensor(0.5)) * 255).round().tolist()
    assert table(rows).splitlines()[:2] == ["sigma,layer,asa,sld", "9.0000,middle.0.0,0.20000,0.10000"]
    assert plot([]).shape[0] == 1
