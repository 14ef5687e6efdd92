"""Dual-branch integration beside a reference: a subject without any training, and a thing beside it that must stay."""

from __future__ import annotations

import sys
from typing import Any

from .emblems import known
from .given import Given, paired, share

# What stands for the emblem in the auxiliary prompt, and what is beside it in every prompt, of one of these colours.
AUXILIARY, BESIDE, COLOURS_BESIDE = "gray circle", "ring", ("red", "yellow", "blue")
UNPATCHED, ALONE = "unpatched", "the reference alone"
SETTINGS: dict[str, dict[str, Any]] = {
    "lambda -1": {"injection_strength": -1.0},
    "lambda 0": {"injection_strength": 0.0},
    "lambda 1": {},
    "lambda 2": {"injection_strength": 2.0},
    "lambda 1, 15% of the schedule": {"end_percent": 0.15},
    "lambda 1, noise of its own": {"noise": "own"},
}
DEFAULTS = {"injection_strength": 1.0, "strength": 1.0, "end_percent": 0.5, "noise": "the concept's"}

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
    print(
        "| | identity | against the reference alone | the ring beside it | against the reference alone | emblem found "
        "| background right |\n|---|---|---|---|---|---|---|"
    )
    base = rows[ALONE]
    for name, found in rows.items():
        identity, emblem, ring, ground = zip(*found, strict=True)
        first, _, third, _ = zip(*base, strict=True)
        against = ["", ""] if name == ALONE else [paired(first, identity), paired(third, ring)]
        print(
            f"| {name} | {np.mean(identity):.3f} | {against[0]} | {np.mean(ring):.0%} | {against[1]} "
            f"| {share(emblem)} | {share(ground)} |"
        )


class Case:
    """One emblem as a subject, and a prompt of it and a ring on a ground."""

    def __init__(self, given: Given, number: int) -> None:
        import math

        import numpy as np
        from subject_patches.nodes.auxiliary_prompt import AuxiliaryPromptNode
        from subject_patches.toy.scenes import (
            COLOURS,
            TEXTURED_BACKGROUNDS,
            Background,
            describe_background,
            sample_emblem,
        )

        rng = np.random.default_rng((2**47, number))
        emblem = sample_emblem(rng)
        self.given, self.seed, self.known = given, number, known(given, emblem, rng)
        own = [COLOURS[name] for name in (emblem.plate_colour, emblem.glyph_colour)]
        self.beside = max(COLOURS_BESIDE, key=lambda name: min(math.dist(COLOURS[name], each) for each in own))
        self.ground = TEXTURED_BACKGROUNDS[number % len(TEXTURED_BACKGROUNDS)]
        ring = f"{self.beside} {BESIDE}"
        text = f"an emblem and a {ring} {describe_background(Background(self.ground))}"
        self.concept, self.auxiliary, _ = AuxiliaryPromptNode.execute(
            given.toy.clip, text, "emblem", noun=AUXILIARY, phrases=ring
        ).args

    def row(self, name: str) -> Row:
        """Identity of the most alike emblem (0 without one), whether there is an emblem, the ring, the ground."""
        import torch

        image = self.given.picture(self.concept, self.seed, self._patched(name))
        reading = self.given.judge.findings(image)[0]
        emblems = [found for found in reading.objects if found.shape == "emblem"]
        identity = 0.0
        if emblems:
            boxes = torch.tensor([found.box for found in emblems], dtype=torch.float32)
            vectors = self.given.judge.identity(image.expand(len(emblems), -1, -1, -1), boxes)
            identity = float((vectors @ self.known.identity).max())
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
