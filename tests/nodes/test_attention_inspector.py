"""Attention Inspector: what it shows of a run, and bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from host import ROOT
from subject_patches.nodes.attention_inspector import KINDS, AttentionInspectorNode, RecordAttentionNode
from subject_patches.patches.pictures.attention_pictures import (
    BY_LAYER,
    BY_STEP,
)
from subject_patches.patches.pictures.attention_record import (
    AttentionRecord,
    AttentionRuns,
)
from subject_patches.tests.shared.models import (
    generator,
    prompt,
    recycled,
    routed,
    subject,
)
from subject_patches.tests.shared.records import recorded
from torch import Tensor

PICTURE = torch.rand(2, 64, 80, 3, generator=generator(1))


def inspect(record: AttentionRecord, **values: Any) -> tuple[Tensor, Tensor, str, Tensor]:
    return AttentionInspectorNode.execute(AttentionRuns(kept={None: record}), PICTURE, **values).args


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
