"""At which noise level the model looks at references, how often, how strongly, in which layers, and what the VAE sees
of them: what each choice brings, and how many passes over the reference it costs.

Each case, an emblem or a scene, is sampled with several seeds as one batch; errors are those over cases."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from .emblems import alike, known, places
from .given import Given, centred, heading, mean, paired, row, share
from .recycled_attention import UNPATCHED, Pair
from .routed_reference import ALONE, Case

if TYPE_CHECKING:
    from torch import Tensor

CURRENT = "current"
SEEDS = 4
# After so many cases the table so far is told.
EVERY = 5
CLEAN: dict[str, Any] = {"noise_level": "nearly clean"}
# What both nodes have.
LEVELS: dict[str, dict[str, Any]] = {
    CURRENT: {"noise_level": "current"},
    "nearly clean": CLEAN,
    "fixed at 90%": {"noise_level": "fixed", "fixed_level": 0.9},
    "current, every 2 steps": {"noise_level": "current", "refresh_steps": 2},
    "current, every 4 steps": {"noise_level": "current", "refresh_steps": 4},
}
# How strongly and in which layers, at the level of `usual`.
STRENGTHS: dict[str, dict[str, Any]] = {
    "usual": {},
    "strength 0.5": {"strength": 0.5},
    "strength 2": {"strength": 2.0},
    "encoder and decoder": {"sites": "encoder and decoder"},
}
ROUTED = {
    **LEVELS,
    "current, strength 2": {"noise_level": "current", "strength": 2.0},
    "nearly clean, strength 2": {**CLEAN, "strength": 2.0},
    "nearly clean, without cross-attention (the paper)": {**CLEAN, "cross_attention": "skipped"},
}
BACKGROUNDS: dict[str, dict[str, Any]] = {
    "cropped only": {},
    "background removed, white": {"background": "white"},
    "background removed, gray": {"background": "gray"},
    "the whole picture": {"masked": False},
}
# The longer side of the cropped picture, of pictures of 128 pixels.
SIZES: dict[str, dict[str, Any]] = {f"size {side}": {"size": side} for side in (96, 64, 80, 112, 128)}


@dataclass
class Row:
    """What a choice gave, case by case: the mean identity, how often an emblem was found, looked more like another of
    the picture, and stood on the right ground, and how often the model looked at a reference."""

    identity: list[float] = field(default_factory=list)
    emblem: list[float] = field(default_factory=list)
    blended: list[float] = field(default_factory=list)
    ground: list[float] = field(default_factory=list)
    passes: list[float] = field(default_factory=list)


def recycled(given: Given) -> None:
    """Prints the table of Recycled Self-Attention, over `given.count` emblems carried into a prompt's scene."""
    from subject_patches.nodes.recycled_attention import RecycledSelfAttentionNode

    def case(number: int) -> Callable[[str, Row], None]:
        pair = Pair(given, number)

        def add(name: str, row: Row) -> None:
            model = given.toy.model
            if name != UNPATCHED:
                model = RecycledSelfAttentionNode.execute(model, pair.subject, **LEVELS[name]).args[0]
            _carried(given, row, pair, model, number)
            pair.subject[0].cache.clear()

        return add

    _measured(f"{given.count} emblems of {SEEDS} seeds each in a prompt's scene", (UNPATCHED, *LEVELS), given, case)


def encoded(given: Given, settings_of: Mapping[str, dict[str, Any]]) -> None:
    """Prints the same by how Subject Reference encodes subjects; the others are compared with the first of
    `settings_of`."""
    import numpy as np
    from subject_patches.nodes.recycled_attention import RecycledSelfAttentionNode
    from subject_patches.toy.scenes import sample_emblem

    def case(number: int) -> Callable[[str, Row], None]:
        pair = Pair(given, number)
        # As `pair` draws it: the same view of the same emblem.
        subjects = {}
        for name, settings in settings_of.items():
            rng = np.random.default_rng((2**42, number))
            subjects[name] = known(given, sample_emblem(rng), rng, **settings)

        def add(name: str, row: Row) -> None:
            model = given.toy.model
            if name != UNPATCHED:
                model = RecycledSelfAttentionNode.execute(model, subjects[name].subject).args[0]
            _carried(given, row, pair, model, number)

        return add

    _measured(
        f"{given.count} emblems of {SEEDS} seeds each in a prompt's scene", (UNPATCHED, *settings_of), given, case
    )


def routed(given: Given, settings_of: Mapping[str, dict[str, Any]] = ROUTED) -> None:
    """Prints the table of Routed Reference Attention, over `given.count` scenes of two emblems, each in its box of a
    layout and routed by masks."""
    from subject_patches.nodes.layout import LayoutBiasNode
    from subject_patches.nodes.routed_reference import RoutedReferenceAttentionNode
    from subject_patches.patches.mechanisms.mask_router import MaskRouter

    from .layout import DEFAULTS

    def case(number: int) -> Callable[[str, Row], None]:
        scene = Case(given, 2, number)
        laid_out = LayoutBiasNode.execute(given.toy.model, scene.layout, **DEFAULTS).args[0]

        def add(name: str, row: Row) -> None:
            model, router = laid_out, MaskRouter(scene.masks)
            if name != ALONE:
                model = RoutedReferenceAttentionNode.execute(model, scene.subjects, router, **settings_of[name]).args[0]
            images = _sampled(given, row, model, scene.positive, number)
            readings = given.judge.findings(images)
            own, blended, seen = [], [], []
            for one, box in enumerate(scene.boxes):
                likeness = alike(given.judge, images, [box] * SEEDS, scene.identities)
                own.append(float(likeness[:, one].mean()))
                blended.append(float((likeness[:, 1 - one] > likeness[:, one]).float().mean()))
                emblems = [[each for each in reading.objects if each.shape == "emblem"] for reading in readings]
                seen.append(mean(any(centred(each.box, box) for each in some) for some in emblems))
            for values, found in ((row.identity, own), (row.blended, blended), (row.emblem, seen)):
                values.append(mean(found))
            row.ground.append(mean(each.background == scene.ground for each in readings))
            for subject in scene.subjects:
                subject.cache.clear()

        return add

    what = f"{given.count} scenes of two emblems in a layout, {SEEDS} seeds each"
    _measured(what, (ALONE, *settings_of), given, case)


def _carried(given: Given, row: Row, pair: Pair, model: Any, number: int) -> None:
    """Adds what a model makes of an emblem's prompt to a row."""
    images = _sampled(given, row, model, pair.prompt, number)
    readings = given.judge.findings(images)
    boxes, seen = places(readings)
    row.identity.append(float(alike(given.judge, images, boxes, pair.identity[None]).mean()))
    row.emblem.append(mean(seen))
    row.ground.append(mean(each.background == pair.scene.scene.background.kind for each in readings))


def _measured(what: str, names: Sequence[str], given: Given, case: Callable[[int], Callable[[str, Row], None]]) -> None:
    rows = {name: Row() for name in names}
    for number in range(given.count):
        add = case(number)
        for name, each in rows.items():
            add(name, each)
        print(f"{number + 1} of {what}", file=sys.stderr, flush=True)
        if number % EVERY == EVERY - 1:
            _table(rows, sys.stderr)
    print(f"{what}:\n")
    _table(rows)


def _sampled(given: Given, row: Row, model: Any, prompt: Any, number: int) -> Tensor:
    """A case's pictures (SEEDS, 128, 128, 3) of a caption or a CONDITIONING; the model's passes over references are
    noted."""
    with counted(given.toy.model) as seen:
        positive = given.toy.encode([prompt]) if isinstance(prompt, str) else prompt
        images = given.pictures(positive, [SEEDS * number + seed for seed in range(SEEDS)], model)
    # Two rows a step are the pictures' own, by guidance.
    row.passes.append(sum(seen) - 2 * given.steps * SEEDS)
    return images


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """The rows of every call of a MODEL's network, those over references too, while it lasts."""
    seen: list[int] = []
    handle = model.model.diffusion_model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    try:
        yield seen
    finally:
        handle.remove()


def _table(rows: dict[str, Row], file: TextIO | None = None) -> None:
    rises = ("rise, paired", f"against {list(rows)[1]}")
    shares = ("emblem found", "more like another", "background right")
    print(heading("identity", *rises, *shares, "passes over references"), file=file)
    first = next(iter(rows.values())).identity
    for name, each in rows.items():
        # Besides the first, rows are compared with the second.
        against = "" if each.identity is first else paired(list(rows.values())[1].identity, each.identity)
        seen = (share(each.emblem), share(each.blended) if each.blended else "", share(each.ground))
        cells = (f"{mean(each.identity):.3f}", paired(first, each.identity), against, *seen, f"{mean(each.passes):.0f}")
        print(row(name, *cells), file=file, flush=True)
    print(file=file)
