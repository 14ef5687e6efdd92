"""Layout Bias and Self-Recurrence: are things where their boxes are, each with its own shape, colour and texture?"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .given import PHRASES, Given, Shape, centred, drawn_boxes, heading, paired, row, share

# Strengthening alone and weakening alone are the paper's Figure 6.
SETTINGS: dict[str, dict[str, Any]] = {
    "layout bias": {},
    "strengthening alone": {"hard_mask": False, "negative_weight": 0.0},
    "weakening alone": {"positive_weight": 0.0},
    "layout bias and self-recurrence": {},
}
# Of a transformer, whose attention has prompt and picture in one: how strong the bias must be there.
DIT_SETTINGS: dict[str, dict[str, Any]] = {
    "layout bias": {},
    "guidance weight 0.04": {"guidance_weight": 0.04},
    "guidance weight 0.16": {"guidance_weight": 0.16},
    "guidance weight 0.32": {"guidance_weight": 0.32},
    "first half of the schedule": {"end_percent": 0.5},
    "strengthening alone": SETTINGS["strengthening alone"],
    "weakening alone": SETTINGS["weakening alone"],
    "layout bias and self-recurrence": {},
}
UNPATCHED = "no layout"


@dataclass(frozen=True)
class Score:
    """One thing of a layout: the overlap of its box with the best overlapping one that the judge finds, whether one is
    centred in it, and whether one there has its colour, or all that the prompt says of it."""

    overlap: float
    inside: bool
    colour: bool
    bound: bool


def study(given: Given, things: int, settings_of: dict[str, dict[str, Any]] = SETTINGS) -> None:
    """Prints one table, over `given.count` layouts of so many things."""
    scores: dict[str, list[Score]] = {name: [] for name in (UNPATCHED, *settings_of)}
    grounds: dict[str, list[bool]] = {name: [] for name in scores}
    for number in range(given.count):
        case = Case(given, things, number)
        for name in scores:
            found, ground = case.scores(name, settings_of.get(name))
            scores[name] += found
            grounds[name].append(ground)
        print(f"{things} things: layout {number + 1} of {given.count}", file=sys.stderr, flush=True)
    print(f"{things} things, {given.count} layouts:\n")
    _table(scores, grounds)


class Case:
    """One scene's things, as a prompt and as a layout of its boxes."""

    def __init__(self, given: Given, things: int, number: int) -> None:
        import numpy as np
        from subject_patches.nodes.encode_prompt import EncodePromptWithSubjects
        from subject_patches.nodes.layout import LayoutNode
        from subject_patches.toy.drawing import draw
        from subject_patches.toy.scenes import SIZE, describe, phrase, sample_scene

        rng = np.random.default_rng((2**43, things, number))
        scene = sample_scene(rng, things, emblem_share=0.0, world=given.world)
        while len({phrase(thing) for thing in scene.things}) < things:
            scene = sample_scene(rng, things, emblem_share=0.0, world=given.world)
        phrases = "\n".join(phrase(thing) for thing in scene.things)
        self.given, self.scene, self.seed = given, scene, number
        self.boxes = draw(scene).boxes.tolist()
        self.layout = LayoutNode.execute(SIZE, SIZE, phrases, boxes=drawn_boxes(self.boxes)).args[0]
        self.positive = EncodePromptWithSubjects.execute(given.toy.clip, describe(scene), phrases).args[0]

    def scores(self, name: str, settings: dict[str, Any] | None) -> tuple[list[Score], bool]:
        """A score for each thing of a picture made with these settings, or without a layout, and whether its background
        is right."""
        import comfy.samplers
        from subject_patches.nodes.layout import LayoutBiasNode
        from subject_patches.nodes.self_recurrence import SelfRecurrenceNode

        model = sampler = None
        if settings is not None:
            model = LayoutBiasNode.execute(self.given.toy.model, self.layout, **{**DEFAULTS, **settings}).args[0]
        if "recurrence" in name:
            sampler = SelfRecurrenceNode.execute(comfy.samplers.sampler_object("euler"), 2, 0.0, 1.0, 0).args[0]
        image = self.given.picture(self.positive, self.seed, model, sampler)
        reading = self.given.judge.findings(image)[0]
        scores = [_score(reading.objects, thing, box) for thing, box in zip(self.scene.things, self.boxes, strict=True)]
        return scores, reading.background == self.scene.background.kind


# What the node's inputs are when nobody touches them.
DEFAULTS = {
    "guidance_weight": 0.08,
    "positive_weight": 2.5,
    "hard_mask": True,
    "weaken": "everywhere outside",
    "start_percent": 0.0,
    "end_percent": 1.0,
}


def _score(findings: Sequence[Any], thing: Any, box: Sequence[int]) -> Score:
    import torch
    from subject_patches.toy.judge import answers, box_overlap

    mine = torch.tensor([box], dtype=torch.float32)
    overlaps = [float(box_overlap(mine, torch.tensor([f.box]))) for f in findings]
    here = [f for f in findings if centred(f.box, box)]
    return Score(
        max(overlaps, default=0.0),
        bool(here),
        any(f.colour == thing.colour for f in here),
        any(answers(f, thing) for f in here),
    )


def _table(scores: dict[str, list[Score]], grounds: dict[str, list[bool]]) -> None:
    import numpy as np

    there = ("centred in it", "of its colour there", "all right there")
    print(heading("overlap with the box (IoU)", "rise, paired", *there, "background right"))
    overlap = {name: [s.overlap for s in rows] for name, rows in scores.items()}
    for name, rows in scores.items():
        shares = [share([getattr(s, field) for s in rows]) for field in ("inside", "colour", "bound")]
        rise = paired(overlap[UNPATCHED], overlap[name])
        print(row(name, f"{np.mean(overlap[name]):.3f}", rise, *shares, share(grounds[name])))
    print()


def costs(shape: Shape) -> dict[str, Callable[[Any], Any]]:
    """The benchmark's rows: four regions, a quarter of the picture each."""
    from subject_patches.nodes.layout import LayoutBiasNode, LayoutNode

    half = shape.size * 4
    corners = ((0, 0), (half, 0), (0, half), (half, half))
    boxes = [{"x": x, "y": y, "width": half, "height": half} for x, y in corners]
    phrases = "\n".join(list(PHRASES)[: len(boxes)])

    def patch(model: Any) -> Any:
        layout = LayoutNode.execute(2 * half, 2 * half, phrases, boxes=boxes).args[0]
        return LayoutBiasNode.execute(model, layout, **DEFAULTS).args[0]

    return {"layout bias, four regions": patch}
