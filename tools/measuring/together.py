"""Layout bias, dual-branch integration and routed references in the same layers: what each one still does."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from .emblems import Likeness, at_boxes
from .given import Given, centred, paired, share
from .layout import DEFAULTS
from .routed_reference import PHRASES_OF, Case

# Which of the three act.
SETTINGS: dict[str, frozenset[str]] = {
    "unpatched": frozenset(),
    "all three": frozenset({"layout", "branch", "routes"}),
    "without layout bias": frozenset({"branch", "routes"}),
    "without dual-branch integration": frozenset({"layout", "routes"}),
    "without routed references": frozenset({"layout", "branch"}),
}
NOUN = "circle"


@dataclass(frozen=True)
class Score:
    """One subject: its likeness in its box, and the overlap of the box with the best overlapping thing there is."""

    likeness: Likeness
    overlap: float


def study(given: Given) -> None:
    """Prints one table, over `given.count` scenes of two emblems."""
    scores: dict[str, list[Score]] = {name: [] for name in SETTINGS}
    grounds: dict[str, list[bool]] = {name: [] for name in SETTINGS}
    for number in range(given.count):
        case = Together(given, 2, number)
        for name, acting in SETTINGS.items():
            found, ground = case.scores(acting)
            scores[name] += found
            grounds[name].append(ground)
        print(f"scene {number + 1} of {given.count}", file=sys.stderr, flush=True)
    print(f"Two emblems, {given.count} scenes, in the boxes of a layout:\n")
    _table(scores, grounds)


class Together(Case):
    """A scene of emblems that is sampled with some of the three nodes."""

    def __init__(self, given: Given, count: int, number: int) -> None:
        from subject_patches.nodes.auxiliary_prompt import AuxiliaryPromptNode

        super().__init__(given, count, number)
        phrases = "\n".join(PHRASES_OF[count])
        prompts = AuxiliaryPromptNode.execute(given.toy.clip, self.text, "emblem", noun=NOUN, phrases=phrases).args
        self.positive, self.auxiliary = prompts[:2]

    def scores(self, acting: frozenset[str]) -> tuple[list[Score], bool]:
        """A score for each subject, and whether the background is right."""
        import torch
        from subject_patches.toy.judge import box_overlap

        image, reading = self._picture(self._model(acting))
        boxes = torch.tensor(self.boxes, dtype=torch.float32)
        found = torch.tensor([each.box for each in reading.objects]).view(-1, 4)
        overlaps = [max(row, default=0.0) for row in box_overlap(boxes, found).tolist()]
        seen = [
            any(each.shape == "emblem" and centred(each.box, box) for each in reading.objects) for box in self.boxes
        ]
        alike = at_boxes(self.given.judge, image, self.boxes, self.identities, seen)
        scores = [Score(*each) for each in zip(alike, overlaps, strict=True)]
        return scores, reading.background == self.ground

    def _model(self, acting: frozenset[str]) -> Any:
        from subject_patches.nodes.dual_branch import DualBranchIntegrationNode
        from subject_patches.nodes.layout import LayoutBiasNode

        model = self.given.toy.model
        if "layout" in acting:
            model = LayoutBiasNode.execute(model, self.layout, **DEFAULTS).args[0]
        if "branch" in acting:
            settings = {"injection_strength": 1.0, "strength": 1.0, "end_percent": 0.15}
            model = DualBranchIntegrationNode.execute(model, self.positive, self.auxiliary, **settings).args[0]
        return self._referenced(model, "routed by masks") if "routes" in acting else model


def _table(scores: dict[str, list[Score]], grounds: dict[str, list[bool]]) -> None:
    import numpy as np

    print(
        "| | identity | rise, paired | looks more like the other | overlap with the box (IoU) | rise, paired "
        "| emblem found | background right |\n|---|---|---|---|---|---|---|---|"
    )
    identity = {name: [each.likeness.identity for each in rows] for name, rows in scores.items()}
    overlap = {name: [each.overlap for each in rows] for name, rows in scores.items()}
    for name, rows in scores.items():
        print(
            f"| {name} | {np.mean(identity[name]):.3f} | {paired(identity['unpatched'], identity[name])} "
            f"| {share([each.likeness.blended for each in rows])} "
            f"| {np.mean(overlap[name]):.3f} | {paired(overlap['unpatched'], overlap[name])} "
            f"| {share([each.likeness.emblem for each in rows])} | {share(grounds[name])} |"
        )
    print()
