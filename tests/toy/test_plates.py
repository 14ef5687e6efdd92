"""The rule that says whether an emblem's plate is one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from subject_patches.toy.drawing import draw
from subject_patches.toy.plates import ENOUGH, fit
from subject_patches.toy.scenes import TEXTURED_BACKGROUNDS, Background, Scene, sample_emblem, sample_scene, view


def _fit(scene: Scene) -> tuple[str, float]:
    picture = draw(scene)
    return fit(picture.image.astype(np.float32) / 255, picture.boxes[0].tolist())


def test_drawn_plates_are_plates_and_other_shapes_are_none() -> None:
    """Of drawn emblems nearly all outlines are a plate's, nearly always the right one; hearts and stars have none."""
    names, shares, others = [], [], []
    for number in range(20):
        rng = np.random.default_rng((6, number))
        ground = Background(TEXTURED_BACKGROUNDS[number % len(TEXTURED_BACKGROUNDS)])
        emblem = sample_emblem(rng)
        plate, share = _fit(view(emblem, rng, ground))
        names.append(plate == emblem.plate)
        shares.append(share)
        scene = sample_scene(rng, 1, 0.0, ground)
        others.append(_fit(replace(scene, things=(replace(scene.things[0], shape=("heart", "star")[number % 2]),)))[1])
    assert np.mean(names) >= 0.8
    assert np.mean([share >= ENOUGH for share in shares]) >= 0.9
    assert np.mean([share >= ENOUGH for share in others]) <= 0.15
