"""A trained subject encoder: emblems carried into a prompt's scene by its tokens, its ReferenceNet, and both.

The cases are those of recycled attention. Besides the identity: whether the emblem is nearest to its own reference
among ten of the same plate and colours, which glyphs alone tell apart.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

from hosting.errors import ToolError

from .emblems import alike, places
from .given import Given, paired, share
from .recycled_attention import UNPATCHED, Pair

SIBLINGS = 9
UNTRAINED = "untrained, the node's default, nearly clean"
# Of each row, the parts that an encoder gives the subject; None: it is not encoded.
ROWS: dict[str, str | None] = {
    UNTRAINED: None,
    "tokens only": "tokens",
    "ReferenceNet only": "references",
    "tokens and ReferenceNet": "tokens and references",
}


@dataclass(frozen=True)
class Shown:
    """One picture: identity of its emblem with the reference's, whether it is nearest to that among ten alike, and
    whether an emblem and the background were found."""

    identity: float
    nearest: bool
    emblem: bool
    background: bool


class Case(Pair):
    """A pair of recycled attention, and the references of emblems of its plate and colours."""

    def __init__(self, given: Given, number: int) -> None:
        super().__init__(given, number)
        import numpy as np
        import torch
        from subject_patches.toy.drawing import draw
        from subject_patches.toy.scenes import Background, sample_emblem, view

        rng = np.random.default_rng((2**42, number, 1))
        own = sample_emblem(np.random.default_rng((2**42, number)))
        ground = Background("plain", ("gray",))
        drawn = [draw(view(replace(own, cells=sample_emblem(rng).cells), rng, ground)) for _ in range(SIBLINGS)]
        pictures = torch.from_numpy(np.stack([each.image for each in drawn])).float() / 255
        boxes = torch.from_numpy(np.stack([each.boxes[0] for each in drawn])).float()
        self.alike = torch.cat([self.identity[None], self.judge.identity(pictures, boxes)])

    def shown(self, encoder: Any, parts: str | None) -> Shown:
        """The score of a row."""
        from subject_patches.nodes.recycled_attention import RecycledSelfAttentionNode
        from subject_patches.nodes.subject_encoder import EncodeSubjectsNode

        who = self.subject
        if parts is not None:
            who = EncodeSubjectsNode.execute(who, encoder, self.toy.vae, parts).args[0]
        return self.seen(RecycledSelfAttentionNode.execute(self.toy.model, who).args[0])

    def seen(self, model: Any) -> Shown:
        """The score of a picture of the prompt by a model; None is the unpatched one."""
        image = self.toy.sample([self.prompt], [self.seed], model, self.steps)
        (reading,) = self.judge.findings(image)
        boxes, (seen,) = places([reading])
        (scores,) = alike(self.judge, image, boxes, self.alike)
        ground = reading.background == self.scene.scene.background.kind
        return Shown(float(scores[0]), int(scores.argmax()) == 0, seen, ground)


def study(given: Given) -> None:
    """Prints the table over `given.count` cases, and the fall of the noise's error in held-out emblems."""
    encoder = _encoder()
    rows: dict[str, list[Shown]] = {name: [] for name in (UNPATCHED, *ROWS)}
    for number in range(given.count):
        case = Case(given, number)
        rows[UNPATCHED].append(case.seen(None))
        for name, parts in ROWS.items():
            rows[name].append(case.shown(encoder, parts))
        print(f"case {number + 1} of {given.count}", file=sys.stderr, flush=True)
    print(
        "| | identity | rise over unpatched | over the best untrained | nearest of ten | emblem found | ground right |"
    )
    print("|---|---|---|---|---|---|---|")
    identity = {name: [each.identity for each in row] for name, row in rows.items()}
    for name, row in rows.items():
        print(
            f"| {name} | {sum(identity[name]) / len(row):.3f} | {paired(identity[UNPATCHED], identity[name])} "
            f"| {paired(identity[UNTRAINED], identity[name])} | {share([each.nearest for each in row])} "
            f"| {share([each.emblem for each in row])} | {share([each.background for each in row])} |"
        )
    print(f"\nThe noise's error in {given.count} held-out emblems, against no reference:\n")
    for name, fall in _falls(encoder, given.count).items():
        print(f"- {name}: {fall:+.1%}")


def _encoder() -> Any:
    """The toy's encoder. Raises ToolError where there is none yet."""
    from subject_patches.encoders.subject_encoder import read_subject_encoder
    from subject_patches.toy.train_subjects import ENCODER, TRAINED_BY

    if not ENCODER.is_file():
        raise ToolError(f"There is no {ENCODER.name} to measure; train it: {TRAINED_BY}")
    return read_subject_encoder(ENCODER)


def _falls(encoder: Any, count: int) -> dict[str, float]:
    """See `Lesson.falls`; of other pairs than the training's log."""
    import numpy as np
    import torch
    from subject_patches.toy.data import Words
    from subject_patches.toy.pair_training import CHECKPOINT, frozen
    from subject_patches.toy.pairs import Pairs
    from subject_patches.toy.subjects import Stage

    model, autoencoder = frozen(CHECKPOINT)
    stage = Stage(model, encoder.vision.model.float(), Words()([""]))
    pairs = Pairs(autoencoder, np.random.default_rng((2**41, 6)), count)
    pairs.add(count)
    return stage.falls(encoder.modules, pairs.draw(count, torch.Generator().manual_seed(6)))
