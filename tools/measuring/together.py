"""Layout bias, dual-branch integration and routed references in the same layers: what each one still does.

The scenes are those of the dual-branch study, each of an over-fitted concept with a ring beside it. A layout has a box
for either, and the concept has a reference in its box. The rows leave one of the three away."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import dual_branch, layout, tradeoff
from .concepts import workplace
from .dual_branch import EMBLEMS, LENGTHS, PRESETS, WORDS, Asked
from .emblems import known
from .given import Given, heading, paired, row, share

# Which of the three act.
ALL = "all three"
SETTINGS: dict[str, frozenset[str]] = {
    "the concept alone": frozenset(),
    ALL: frozenset({"layout", "branch", "routes"}),
    "without layout bias": frozenset({"branch", "routes"}),
    "without dual-branch integration": frozenset({"layout", "routes"}),
    "without routed references": frozenset({"layout", "branch"}),
}
# The concept's box and the ring's (x, y, width, height); every other scene has them the other way round.
BOXES = ((8, 38, 52, 52), (68, 38, 52, 52))


@dataclass(frozen=True)
class Score(tradeoff.Score):
    """One picture, with the mean overlap (IoU) of the two boxes with what is found there."""

    overlap: float


def study(given: Given) -> None:
    """Prints one table, over `given.count` scenes."""
    scores: dict[str, list[Score]] = {name: [] for name in SETTINGS}
    with workplace(given.toy.clip) as folder:
        for number in range(EMBLEMS):
            case = Together(given, number, len(range(number, given.count, EMBLEMS)), folder)
            for name, acting in SETTINGS.items():
                scores[name] += [case.score_with(asked, acting) for asked in case.asked]
                print(f"emblem {number + 1} of {EMBLEMS}, {name}", file=sys.stderr, flush=True)
    print(f"{EMBLEMS} emblems, {LENGTHS[-1]} steps of training, {given.count} scenes:\n")
    _table(scores)


class Together(dual_branch.Case):
    """One emblem's over-fitted concept, sampled with some of the three nodes."""

    def __init__(self, given: Given, number: int, cases: int, folder: Path) -> None:
        import numpy as np

        super().__init__(given, number, cases, folder)
        self.model = self.trained(PRESETS[-1], LENGTHS[-1])
        self.subject = known(given, self.emblem, np.random.default_rng((2**46, number)), WORDS).subject

    def score_with(self, asked: Asked, acting: frozenset[str]) -> Score:
        """The score of one scene's picture, with those of the three that act."""
        import torch
        from subject_patches.toy.judge import box_overlap

        boxes = BOXES if asked.seed // EMBLEMS % 2 else BOXES[::-1]
        positive, auxiliary = self.prompts(asked)
        image = self.given.picture(positive, asked.seed, self._patched(positive, auxiliary, boxes, acting))
        (reading,) = self.given.judge.findings(image)
        corners = torch.tensor([(x, y, x + width, y + height) for x, y, width, height in boxes], dtype=torch.float32)
        found = torch.tensor([each.box for each in reading.objects]).view(-1, 4)
        overlaps = [max(row, default=0.0) for row in box_overlap(corners, found).tolist()]
        return Score(**vars(self.score(image, reading, asked)), overlap=sum(overlaps) / len(overlaps))

    def _patched(self, positive: Any, auxiliary: Any, boxes: Sequence[Any], acting: frozenset[str]) -> Any:
        from subject_patches.nodes.dual_branch import DualBranchIntegrationNode
        from subject_patches.nodes.layout import LayoutBiasNode, LayoutNode
        from subject_patches.nodes.routed_reference import RoutedReferenceAttentionNode
        from subject_patches.patches.mechanisms.mask_router import MaskRouter
        from subject_patches.toy.scenes import SIZE

        model = self.model
        drawn = [dict(zip(("x", "y", "width", "height"), box, strict=True)) for box in boxes]
        places = LayoutNode.execute(SIZE, SIZE, f"{WORDS}\n{self.ring}", boxes=drawn).args[0]
        if "layout" in acting:
            model = LayoutBiasNode.execute(model, places, **layout.DEFAULTS).args[0]
        if "branch" in acting:
            model = DualBranchIntegrationNode.execute(model, positive, auxiliary, **dual_branch.DEFAULTS).args[0]
        if "routes" in acting:
            router = MaskRouter(places.shown()[WORDS][None])
            model = RoutedReferenceAttentionNode.execute(model, self.subject, router).args[0]
        return model


def _table(scores: dict[str, list[Score]]) -> None:
    """Means, and what each row is against all three, paired."""
    import numpy as np

    measures = {"identity": "identity", "beside": "the ring beside it", "overlap": "overlap with the boxes (IoU)"}
    titles = [each for title in measures.values() for each in (title, f"against {ALL}")]
    print(heading(*titles, "emblem", "background"))
    for name, rows in scores.items():
        cells = []
        for measure in measures:
            values, base = ([float(getattr(each, measure)) for each in found] for found in (rows, scores[ALL]))
            mean = f"{np.mean(values):.0%}" if measure == "beside" else f"{np.mean(values):.3f}"
            cells += [mean, "" if name == ALL else paired(base, values)]
        cells += [share([each.emblem for each in rows]), share([each.background for each in rows])]
        print(row(name, *cells))
    print()
