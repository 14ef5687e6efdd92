"""ICO against a fixed template, and each thing that its authors' code does alone: of pictures with more in them.

An emblem's views each have another textured ground and another thing beside it: what a concept must not take up. Its
prompts ask for grounds that the views have and others, half of them for a thing beside it. A training is a matter of
chance, so errors are those of the emblems' means, paired."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .concepts import VERSIONS, Pictured, in_use, kept_or_trained, training_settings, workplace
from .emblems import NOUN, alike, places
from .given import Given, heading, paired, row

if TYPE_CHECKING:
    from torch import Tensor

EMBLEMS, PROMPTS = 8, 20
STEPS, RATES = 120, (4e-3, 5e-2)
WORDS = f"embedding:study {NOUN}"
# The grounds of the views, the prompts' others, and what a prompt may ask for beside the emblem.
VIEWS = ("grass", "sky", "brick", "sand")
GROUNDS = (*VIEWS, "water", "white", "gray", "yellow", "cyan", "pink")
BESIDE = (("red", "star"), ("blue", "ring"), ("yellow", "circle"), ("green", "square"), ("purple", "heart"))
OTHERS = 16
UNTRAINED, TEMPLATE, ICO, ALL = "the noun, untrained", "fixed template", "ICO", "ICO, all of these"
# What a row's training has, and the row that it is compared with.
FIRST: dict[str, Any] = {"template": True}
CONCEPT: dict[str, Any] = {"rare": True}
HELD: dict[str, Any] = {"held": True}
RATED: dict[str, Any] = {"concept_learning_rate": RATES[0], "word_learning_rate": 10 * RATES[0]}
REGULARISED: dict[str, Any] = {"others": True}
MIRRORED: dict[str, Any] = {"mirrored": True}
ROWS: dict[str, tuple[dict[str, Any], str]] = {
    TEMPLATE: ({"preset": "fixed template"}, ""),
    ICO: ({}, TEMPLATE),
    "ICO, half of a batch regularisation": (REGULARISED, ICO),
    "ICO, start token held": (HELD, ICO),
    "ICO, the authors' rates": (RATED, ICO),
    "ICO, pictures' words as a template": (FIRST, ICO),
    "ICO, concept's words as rare ones": (CONCEPT, ICO),
    "ICO, mirrored": (MIRRORED, ICO),
    ALL: ({**REGULARISED, **HELD, **RATED, **FIRST, **CONCEPT, **MIRRORED}, ICO),
    "fixed template, all of these": (
        {"preset": "fixed template", **REGULARISED, **HELD, **RATED, **CONCEPT, **MIRRORED},
        TEMPLATE,
    ),
}


@dataclass(frozen=True)
class Means:
    """An emblem's means over its prompts: identity (cosine), the share of what a prompt adds that is there, of emblems,
    grounds and asked things that are found, and of pictures with a thing in them that nobody asked for."""

    identity: float
    followed: float
    emblem: float
    ground: float
    thing: float
    stray: float


@dataclass(frozen=True)
class Asked:
    """A prompt: its ground, and the thing beside the emblem (colour and shape), if any."""

    background: Any
    beside: tuple[str, str] | None

    def text(self, subject: str) -> str:
        from subject_patches.toy.scenes import describe_background

        beside = f" and a {' '.join(self.beside)}" if self.beside else ""
        return f"an {subject}{beside} {describe_background(self.background)}"

    def ground_right(self, reading: Any) -> bool:
        """Whether the judge finds the ground, in its colours."""
        kind, colours = self.background.kind, self.background.colours
        return (reading.background, reading.background_colours) == (kind, colours)

    def thing_there(self, reading: Any) -> bool:
        """Whether the judge finds the thing beside the emblem."""
        return any((each.colour, each.shape) == self.beside for each in reading.objects)


def study(given: Given) -> None:
    """Prints the table, over `given.count` pairs of 8 emblems and 20 prompts each (160 are all)."""
    emblems = min(max(given.count // PROMPTS, 1), EMBLEMS)
    found: dict[str, list[Means]] = {}
    with workplace(given.toy.clip) as folder:
        others = regularisation(given)
        for number in range(emblems):
            case = Case(given, number, folder, others)
            for name in (UNTRAINED, *ROWS):
                means = case.row(name)
                found.setdefault(name, []).append(means)
                print(json.dumps({"number": number, "row": name, **asdict(means)}), file=sys.stderr, flush=True)
    print(
        f"{emblems} emblems of {len(VIEWS)} views, {PROMPTS} prompts each; {STEPS} steps of batch 2, learning rates "
        f"{RATES[0]:g} and, of all words, {RATES[1]:g}; the authors': {RATES[0]:g} for the concept's words too and "
        f"{10 * RATES[0]:g} for the pictures'.\n"
    )
    table(found, {name: base for name, (_, base) in ROWS.items() if base})


def table(found: Mapping[str, Sequence[Means]], bases: Mapping[str, str]) -> None:
    """Prints rows of emblems' means; those with a base are compared with it emblem by emblem."""
    import numpy as np

    compared = ("identity", "followed", "stray")
    measures = ("identity", "prompt followed", "emblem found", "ground right", "asked thing there", "stray things")
    print(heading(*measures, "identity, paired", "following, paired", "stray, paired"))
    for name, means in found.items():
        values = {each.name: [getattr(one, each.name) for one in means] for each in fields(Means)}
        cells = [f"{np.mean(values['identity']):.3f}"]
        cells += [f"{np.mean(each):.0%}" for which, each in values.items() if which != "identity"]
        base = found[bases[name]] if name in bases else []
        rises = [paired([getattr(one, each) for one in base], values[each]) if base else "" for each in compared]
        print(row(name, *cells, *rises))


def regularisation(given: Given) -> Any:
    """Pictures that the toy itself makes of the noun on the prompts' grounds, as a workflow would."""
    from subject_patches.toy.family import LATENT_CHANNELS
    from subject_patches.toy.scenes import describe_background
    from subject_patches.training.images import version_latents
    from subject_patches.training.regularisation import Regularisation

    grounds = [background(GROUNDS[number % len(GROUNDS)]) for number in range(OTHERS)]
    texts = [f"an {NOUN} {describe_background(each)}" for each in grounds]
    images = given.toy.sample(texts, [2**20 + number for number in range(OTHERS)], steps=given.steps)
    versions = [[image[None]] for image in images]
    return Regularisation(version_latents(given.toy.vae, versions, LATENT_CHANNELS, mirrored=True), texts)


def background(name: str) -> Any:
    """One of GROUNDS; a colour is a plain ground of it."""
    from subject_patches.toy.scenes import TEXTURED_BACKGROUNDS, Background

    return Background(name) if name in TEXTURED_BACKGROUNDS else Background("plain", (name,))


class Case:
    """One emblem's views, and the prompts and seeds to sample it with."""

    def __init__(self, given: Given, number: int, folder: Path, others: Any) -> None:
        import numpy as np
        from subject_patches.toy.scenes import sample_emblem

        rng = np.random.default_rng((2**46, number))
        self.given, self.number, self.folder, self.others = given, number, folder, others
        self.emblem = sample_emblem(rng)
        self.pictured = Pictured.drawn(given.judge, self.emblem, [self._view(rng, kind) for kind in VIEWS])
        colours = {self.emblem.plate_colour, self.emblem.glyph_colour}
        free = [each for each in BESIDE if each[0] not in colours]
        self.asked = []
        for place in range(PROMPTS):
            name = GROUNDS[place % len(GROUNDS)]
            beside = free[place % len(free)] if place >= PROMPTS // 2 else None
            # No emblem on a ground of its plate's colour, nothing on one of its own.
            hidden = {self.emblem.plate_colour, *(beside or ())}
            self.asked.append(Asked(background(name if name not in hidden else "gray"), beside))

    def _view(self, rng: Any, kind: str) -> Any:
        """The emblem, drawn in a scene of two things on this ground."""
        from dataclasses import replace

        from subject_patches.toy.drawing import draw
        from subject_patches.toy.scenes import EMBLEM, sample_scene

        scene = sample_scene(rng, 2, 0.0, background(kind))
        colour = self.emblem.plate_colour
        thing = replace(scene.things[0], shape=EMBLEM, colour=colour, texture="plain", emblem=self.emblem)
        return draw(replace(scene, things=(thing, scene.things[1])))

    def row(self, name: str) -> Means:
        """A row of the table."""
        if name == UNTRAINED:
            return self.means(NOUN, self.given.toy.model)
        return self.means(WORDS, self.trained(**ROWS[name][0]))

    def trained(
        self,
        preset: str = "plain",
        others: bool = False,
        mirrored: bool = False,
        template: bool = False,
        rare: bool = False,
        held: bool = False,
        **rates: float,
    ) -> Any:
        """The toy's MODEL with a concept trained so, which is in the prompts from then on."""
        from dataclasses import replace

        settings = training_settings(self.given.toy, preset, STEPS, RATES, self.number, held=held, **rates)
        settings = replace(settings, scheme=replace(settings.scheme, template=template, rare=rare))
        return self.learnt(settings, mirrored, others=self.others if others else None)

    def learnt(self, settings: Any, mirrored: bool = False, **more: Any) -> Any:
        """The same with these settings of a training, and `more` that it is given."""
        latents = self.latents if mirrored else self.latents[:, :VERSIONS]
        concept = kept_or_trained(self.given, latents, settings, **more)
        return in_use(self.given.toy.model, concept, self.folder / "study.safetensors")

    @cached_property
    def latents(self) -> Tensor:
        """Those of versions of each view, and then of the mirrored ones."""
        return self.pictured.latents(self.given.toy.vae, self.number, mirrored=True)

    def means(self, subject: str, model: Any) -> Means:
        """What comes of the prompts with the emblem under this name."""
        import numpy as np

        toy, judge, seeds = self.given.toy, self.given.judge, range(PROMPTS * self.number, PROMPTS * (self.number + 1))
        images = toy.sample([each.text(subject) for each in self.asked], list(seeds), model, self.given.steps)
        readings = judge.findings(images)
        boxes, seen = places(readings)
        identity = float(alike(judge, images, boxes, self.pictured.identity[None]).mean())
        grounds, things, strays = [], [], []
        for asked, reading in zip(self.asked, readings, strict=True):
            grounds.append(asked.ground_right(reading))
            wanted = asked.beside[1] if asked.beside else NOUN
            strays.append(any(each.shape not in (NOUN, wanted) for each in reading.objects))
            if asked.beside:
                things.append(asked.thing_there(reading))
        ground, thing = float(np.mean(grounds)), float(np.mean(things))
        followed = (sum(grounds) + sum(things)) / (len(grounds) + len(things))
        return Means(identity, followed, float(np.mean(seen)), ground, thing, float(np.mean(strays)))
