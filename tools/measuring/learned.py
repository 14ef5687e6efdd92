"""A trained subject encoder: emblems carried into a prompt's scene by its tokens, its ReferenceNet, and both.

The cases are those of recycled attention. Besides the identity: whether the emblem is nearest to its own reference
among ten of the same plate and colours, which glyphs alone tell apart.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hosting.errors import ToolError

from .emblems import alike, places
from .given import PHRASES, Given, Shape, heading, mean, paired, row, share
from .recycled_attention import UNPATCHED, Pair

SIBLINGS = 9
UNTRAINED = "untrained, nearly clean"
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
        from subject_patches.nodes.inputs import NEARLY_CLEAN
        from subject_patches.nodes.recycled_attention import RecycledSelfAttentionNode
        from subject_patches.nodes.subject_encoder import EncodeSubjectsNode

        who = self.subject
        if parts is not None:
            who = EncodeSubjectsNode.execute(who, encoder, self.toy.vae, parts).args[0]
        return self.seen(RecycledSelfAttentionNode.execute(self.toy.model, who, noise_level=NEARLY_CLEAN).args[0])

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
    encoder = the_encoder()
    rows: dict[str, list[Shown]] = {name: [] for name in (UNPATCHED, *ROWS)}
    for number in range(given.count):
        case = Case(given, number)
        rows[UNPATCHED].append(case.seen(None))
        for name, parts in ROWS.items():
            rows[name].append(case.shown(encoder, parts))
        print(f"case {number + 1} of {given.count}", file=sys.stderr, flush=True)
    table(rows, rows[UNTRAINED], "over the best untrained")
    print(f"\nThe noise's error in {given.count} held-out emblems, against no reference:\n")
    for name, fall in _falls(encoder, given.count).items():
        print(f"- {name}: {fall:+.1%}")


def table(rows: dict[str, list[Shown]], base: list[Shown], over: str) -> None:
    """Prints rows of scores, paired with the unpatched ones and, under the words `over`, with those of `base`."""
    print(heading("identity", "rise over unpatched", over, "nearest of ten", "emblem found", "ground right"))
    for name, seen in rows.items():
        cells = [f"{mean(each.identity for each in seen):.3f}"]
        for other in (rows[UNPATCHED], base):
            first, then = ([each.identity for each in scores] for scores in (other, seen))
            cells.append("" if seen is other else paired(first, then))
        shares = ([each.nearest for each in seen], [each.emblem for each in seen], [each.background for each in seen])
        print(row(name, *cells, *map(share, shares)))


def the_encoder() -> Any:
    """The toy's encoder. Raises ToolError where there is none yet."""
    from subject_patches.encoders.subject_encoder import read_subject_encoder
    from subject_patches.toy.pair_training import ENCODER
    from subject_patches.toy.train_subjects import TRAINED_BY

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


def costs(shape: Shape) -> dict[str, Callable[[Any], Any]]:
    """The benchmark's rows, of U-Nets: what an encoder made of subjects, at random, of references as large as the
    picture; on the toy also with Encode Subjects itself, which the first picture then pays for."""
    import torch
    from subject_patches.nodes.recycled_attention import RecycledSelfAttentionNode
    from subject_patches.nodes.routed_reference import RoutedReferenceAttentionNode
    from subject_patches.patches.mechanisms.mask_router import MaskRouter

    if shape.flux:
        return {}
    source = torch.Generator().manual_seed(2)
    columns = torch.arange(shape.size) * 2 // shape.size
    halves = MaskRouter((columns == torch.arange(2)[:, None])[:, None].expand(-1, shape.size, -1))

    def recycled(model: Any) -> Any:
        return RecycledSelfAttentionNode.execute(model, random_subjects(model, shape.size, source, [""])).args[0]

    def routed(model: Any) -> Any:
        two = random_subjects(model, shape.size, source, list(PHRASES)[:2])
        return RoutedReferenceAttentionNode.execute(model, two, halves).args[0]

    rows = {"a trained encoder's subject": recycled, "two of a trained encoder's subjects, routed": routed}
    return rows | ({"a trained encoder's subject, with Encode Subjects": _encoding} if shape.name == "toy" else {})


def random_subjects(
    model: Any, side: int, source: Any, phrases: Sequence[str], routing: Any = lambda: None
) -> tuple[Any, ...]:
    """A subject for each phrase: what an encoder might have made of a picture of `side` x `side` latents for a MODEL's
    layers, all of it the subject's, at random from the generator `source`; `routing` gives each its RoutingFeature."""
    from subject_patches.patches.mechanisms.subject import Subject

    return tuple(
        Subject((), phrase, encoded=replace(_random_encoded(model, side, source), routing=routing()))
        for phrase in phrases
    )


def _random_encoded(model: Any, side: int, source: Any) -> Any:
    import torch
    from subject_patches.encoders.reference_net import delivering
    from subject_patches.nodes.image_prompt import layer_channels
    from subject_patches.patches.families import family_of
    from subject_patches.patches.families.unet import scales
    from subject_patches.patches.mechanisms.encoded_subject import EncodedSubject, KeptReference
    from subject_patches.patches.mechanisms.image_prompt import AdaptedPrompt, in_file_order

    own, cross = layer_channels(model, "self"), layer_channels(model, "cross")
    halvings = scales(model.model.diffusion_model)

    def pair(channels: int, count: int) -> Any:
        return tuple(torch.randn(1, count, channels, generator=source) for _ in range(2))

    ready = {at: pair(own[at], (side >> halvings[at.block, at.number]) ** 2) for at in delivering(own)}
    # As many tokens as the paper's QFormer has, on the toy its own.
    tokens = 8 if side == 16 else 64
    shown, empty = (tuple(pair(cross[at], tokens) for at in in_file_order(cross)) for _ in range(2))
    width = family_of(model).context_width(model)
    kept = KeptReference("random", "a U-Net", width, ready)
    return EncodedSubject((kept,), AdaptedPrompt("random", width, shown, empty))


def _encoding(model: Any) -> Any:
    """The toy with a subject that Encode Subjects looks at when the first picture begins, as a queue would run it."""
    import comfy.patcher_extension
    import torch
    from subject_patches.nodes.recycled_attention import RecycledSelfAttentionNode
    from subject_patches.nodes.subject import SubjectNode
    from subject_patches.nodes.subject_encoder import EncodeSubjectsNode
    from subject_patches.toy.sampling import Toy

    vae, encoder = Toy.load().vae, the_encoder()
    picture = torch.rand(1, 96, 96, 3, generator=torch.Generator().manual_seed(3))
    mask = torch.nn.functional.pad(torch.ones(1, 72, 72), (12, 12, 12, 12))
    subject = SubjectNode.made([picture], vae, size=96, mask=[mask]).args[0]
    shown = EncodeSubjectsNode.execute(subject, encoder, vae).args[0]
    patched = RecycledSelfAttentionNode.execute(model, shown).args[0]
    owed = [subject]

    def sample(executor: Any, *given: Any, **named: Any) -> Any:
        while owed:
            EncodeSubjectsNode.execute(owed.pop(), encoder, vae)
        return executor(*given, **named)

    patched.add_wrapper(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, sample)
    return patched
