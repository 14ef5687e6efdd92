"""The judge with its shipped weights, on scenes that no training drew."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from subject_patches.toy.drawing import draw
from subject_patches.toy.judge import WEIGHTS, Finding, Judge, Reading, box_overlap, caption_score, load_judge
from subject_patches.toy.judge_train import accuracies, held_out, retrieval
from subject_patches.toy.scenes import SIZE, Background, Thing, sample_scene
from torch import Tensor
from torch.nn import functional


@pytest.fixture(scope="module")
def judge() -> Judge:
    return load_judge()


def thing(shape: str, colour: str, texture: str) -> Thing:
    return Thing(shape, colour, texture, 64, 64, 30)


def finding(shape: str, colour: str, texture: str) -> Finding:
    return Finding(shape, colour, texture, (34, 34, 94, 94), 0.9)


def pictures(count: int) -> Tensor:
    rng = np.random.default_rng(7)
    return torch.stack([torch.from_numpy(draw(sample_scene(rng)).image) for _ in range(count)]).float() / 255


def test_reads_held_out_scenes(judge: Judge) -> None:
    shares = accuracies(judge, held_out(200, seed=3))
    assert min(shares[name] for name in ("found", "true", "shape", "colour", "texture", "background")) > 0.95, shares


def test_reads_degraded_scenes(judge: Judge) -> None:
    shares = accuracies(judge, held_out(200, seed=4), degraded=True)
    assert min(shares[name] for name in ("found", "shape", "colour", "texture", "background")) > 0.85, shares


def test_finds_an_emblem_among_a_hundred(judge: Judge) -> None:
    assert retrieval(judge, rounds=1) >= 0.95


def test_same_pictures_same_answers_in_any_company(judge: Judge) -> None:
    images = pictures(6)
    together, again = judge.findings(images), judge.findings(images)
    assert together == again
    for number, reading in enumerate(together):
        alone = judge.findings(images[number : number + 1])[0]
        words = [[(f.shape, f.colour, f.texture) for f in r.objects] for r in (reading, alone)]
        assert words[0] == words[1]
        assert reading.background == alone.background


def test_boxes_are_in_the_pixels_of_the_picture_given(judge: Judge) -> None:
    image = pictures(1)
    enlarged = functional.interpolate(image.movedim(-1, 1), (2 * SIZE, 3 * SIZE), mode="bilinear").movedim(1, -1)
    small, large = judge.findings(image)[0], judge.findings(enlarged)[0]
    boxes = [torch.tensor([f.box for f in reading.objects]) for reading in (small, large)]
    overlap = box_overlap(boxes[0] * torch.tensor([3.0, 2.0, 3.0, 2.0]), boxes[1])
    assert overlap.amax(1).min() > 0.8


def test_identity_is_a_unit_vector_per_box(judge: Judge) -> None:
    vectors = judge.identity(pictures(3), torch.tensor([[10, 10, 60, 60], [0, 0, 128, 128], [40, 20, 40, 20]]))
    assert vectors.shape == (3, 96)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(3), atol=1e-5)


def test_weights_are_small() -> None:
    assert WEIGHTS.stat().st_size <= 3_000_000


def test_a_found_object_answers_once() -> None:
    red = ("star", "red", "striped")
    score = caption_score(Reading((finding(*red),), "grass"), (thing(*red), thing(*red)), Background("grass"))
    assert score.things == (True, False)
    assert not score.all_things
    assert score.background


def test_all_attributes_must_be_right() -> None:
    asked = (thing("star", "red", "striped"),)
    for wrong in (("circle", "red", "striped"), ("star", "blue", "striped"), ("star", "red", "plain")):
        assert not caption_score(Reading((finding(*wrong),), "grass"), asked, Background("sand")).all_things
    assert caption_score(Reading((finding("star", "red", "striped"),), "sand"), asked, Background("sand")).all_things


def test_an_emblem_is_asked_for_by_its_class_alone() -> None:
    found = (finding("emblem", "blue", "plain"), finding("square", "red", "plain"))
    score = caption_score(Reading(found, "sky"), (thing("emblem", "red", "plain"),), Background("sky"))
    assert score.all_things


def test_background_colours_count_apart_from_its_kind() -> None:
    reading = Reading((), "gradient", ("red", "blue"))
    right, turned = Background("gradient", ("red", "blue")), Background("gradient", ("blue", "red"))
    assert caption_score(reading, (), right).background_colours
    score = caption_score(reading, (), turned)
    assert score.background
    assert not score.background_colours


def test_overlap_of_boxes() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30], [3, 3, 3, 3]])
    overlap = box_overlap(boxes, boxes)
    assert overlap[0].tolist() == pytest.approx([1, 1 / 3, 0, 0])
    assert overlap[3, 3] == 0
