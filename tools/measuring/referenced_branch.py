"""Dual-branch integration beside a reference: a subject without any training, and a thing beside it that must stay."""

from __future__ import annotations

import sys
from typing import Any

from . import dual_branch
from .dual_branch import AUXILIARY, BESIDE, DEFAULTS, Asked, colour_beside
from .emblems import NOUN, known, most_alike
from .given import Given, heading, paired, row, share

UNPATCHED, ALONE = "unpatched", "the reference alone"
SETTINGS: dict[str, dict[str, Any]] = {
    name: dual_branch.SETTINGS[name]
    for name in (
        *("lambda -1", "lambda 0", "lambda 1", "lambda 2"),
        *("lambda 1, 15% of the schedule", "lambda 1, noise of its own"),
    )
}

Row = tuple[float, bool, float, bool]


def study(given: Given) -> None:
    """Prints the table, over `given.count` emblems with a ring beside each."""
    import numpy as np

    rows: dict[str, list[Row]] = {name: [] for name in (UNPATCHED, ALONE, *SETTINGS)}
    for number in range(given.count):
        case = Case(given, number)
        for name, found in rows.items():
            found.append(case.row(name))
        print(f"emblem {number + 1} of {given.count}", file=sys.stderr, flush=True)
    print(f"{given.count} emblems, each with a ring beside it; all rows but the first have the reference:\n")
    against = f"against {ALONE}"
    print(heading("identity", against, "the ring beside it", against, "emblem found", "background right"))
    base = rows[ALONE]
    for name, found in rows.items():
        identity, emblem, ring, ground = zip(*found, strict=True)
        first, _, third, _ = zip(*base, strict=True)
        rises = ["", ""] if name == ALONE else [paired(first, identity), paired(third, ring)]
        cells = (f"{np.mean(identity):.3f}", rises[0], f"{np.mean(ring):.0%}", rises[1])
        print(row(name, *cells, share(emblem), share(ground)))


class Case:
    """One emblem as a subject, and a prompt of it and a ring on a ground."""

    def __init__(self, given: Given, number: int) -> None:
        import numpy as np
        from subject_patches.nodes.auxiliary_prompt import AuxiliaryPromptNode
        from subject_patches.toy.scenes import TEXTURED_BACKGROUNDS, Background, describe_background, sample_emblem

        rng = np.random.default_rng((2**47, number))
        emblem = sample_emblem(rng)
        self.given, self.seed, self.known = given, number, known(given, emblem, rng)
        self.beside = colour_beside(emblem)
        self.ground = TEXTURED_BACKGROUNDS[number % len(TEXTURED_BACKGROUNDS)]
        ring = f"{self.beside} {BESIDE}"
        asked = Asked(self.ground, f"and a {ring} {describe_background(Background(self.ground))}", number)
        self.concept, self.auxiliary, _ = AuxiliaryPromptNode.execute(
            given.toy.clip, asked.text(NOUN), NOUN, noun=AUXILIARY, phrases=ring
        ).args

    def row(self, name: str) -> Row:
        """Identity of the most alike emblem (0 without one), whether there is an emblem, the ring, the ground."""
        image = self.given.picture(self.concept, self.seed, self._patched(name))
        reading = self.given.judge.findings(image)[0]
        emblems = [found for found in reading.objects if found.shape == NOUN]
        identity = most_alike(self.given.judge, image, emblems, self.known.identity)
        ring = any((found.colour, found.shape) == (self.beside, BESIDE) for found in reading.objects)
        return identity, bool(emblems), float(ring), reading.background == self.ground

    def _patched(self, name: str) -> Any:
        from subject_patches.nodes.dual_branch import DualBranchIntegrationNode
        from subject_patches.nodes.recycled_attention import RecycledSelfAttentionNode

        if name == UNPATCHED:
            return None
        model = RecycledSelfAttentionNode.execute(self.given.toy.model, self.known.subject).args[0]
        if name == ALONE:
            return model
        given = {**DEFAULTS, **SETTINGS[name]}
        return DualBranchIntegrationNode.execute(model, self.concept, self.auxiliary, **given).args[0]
