"""ICO and dual-branch integration: a concept's identity and prompt following, along trainings and for several lambdas.

Each emblem is trained with words of its pictures' own, by both presets, and with a fixed template, and sampled at
several lengths: the trade-off curve. From the longest training for dual-branch, whose concept is over-fitted,
dual-branch integration then samples the same prompts and seeds.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .concepts import VIEWS, Pictured, in_use, kept_or_trained, training_settings, workplace
from .emblems import NOUN, most_alike
from .given import Given, Shape, concept_tokens
from .tradeoff import Score, table

if TYPE_CHECKING:
    from torch import Tensor

EMBLEMS = 4
PRESETS = ("fixed template", "plain", "for dual-branch")
# Steps after which a training is sampled.
LENGTHS = (100, 200, 300, 400)
# The words learn fast, the projections slowly: these are the auxiliary prompt's too, which must still be followed.
RATES = (1e-3, 5e-2)
WORDS = f"embedding:study {NOUN}"
# What stands for the concept in the auxiliary prompt, and what is beside it in every prompt, of one of these colours.
AUXILIARY, BESIDE, COLOURS_BESIDE = "gray circle", "ring", ("red", "yellow", "blue")
UNTRAINED, ALONE, OTHER = "the noun, untrained", "the concept alone", "the auxiliary prompt alone"
NO_MASK = "lambda 1, no mask"
SETTINGS: dict[str, dict[str, Any]] = {
    "lambda -1": {"injection_strength": -1.0},
    "lambda 0": {"injection_strength": 0.0},
    "lambda 1": {},
    "lambda 2": {"injection_strength": 2.0},
    "lambda 1, 15% of the schedule": {"end_percent": 0.15},
    "lambda 1, noise of its own": {"noise": "own"},
    "lambda 1, gain by resolution": {"gain_mode": "by resolution"},
    NO_MASK: {},
    "lambda 1, last layer only": {"sites": "named"},
}
# The paper's window in latents of 64 x 64 ends at a noise of 6.5. Where a picture has a quarter as many places a side,
# a quarter of the noise hides as much of its layout: 1.6, which is half of the schedule. In so long a window both
# branches are laid out, so they begin from one noise, which lays them out alike.
WINDOW = 0.5
DEFAULTS = {"injection_strength": 1.0, "strength": 1.0, "end_percent": WINDOW, "noise": "the concept's"}


@dataclass(frozen=True)
class Asked:
    """A prompt's scene: the kind of its background, the words for all but the subject, and the seed."""

    ground: str
    words: str
    seed: int

    def text(self, subject: str) -> str:
        return f"{'an' if subject[0] in 'aeiou' else 'a'} {subject} {self.words}"


def study(given: Given) -> None:
    """Prints the trade-off curves of three trainings, and dual-branch integration of the longest ICO training."""
    rows: dict[str, list[Score]] = {}
    with workplace(given.toy.clip) as folder:
        for number in range(EMBLEMS):
            cases = len(range(number, given.count, EMBLEMS))
            for name, scores in Case(given, number, cases, folder).rows():
                rows.setdefault(name, []).extend(scores)
                print(f"emblem {number + 1}, {name}", file=sys.stderr, flush=True)
    print(
        f"{EMBLEMS} emblems of {VIEWS} views, steps of batch 2, learning rates {RATES[0]:g} and, of the "
        f"words, {RATES[1]:g}. {given.count} pictures a row.\n\n"
        "The trade-off along the training, paired with the fixed template at equal steps:\n"
    )
    trained = {_row(preset, steps): (_row(PRESETS[0], steps), preset) for preset in PRESETS for steps in LENGTHS}
    bases = {name: rows[template] for name, (template, preset) in trained.items() if preset != PRESETS[0]}
    table({name: rows[name] for name in (UNTRAINED, *trained)}, bases)
    base = rows[_row(PRESETS[-1], LENGTHS[-1])]
    curve = [rows[UNTRAINED], *(rows[_row(PRESETS[-1], steps)] for steps in LENGTHS)]
    print(f"\nDual-branch integration, from {LENGTHS[-1]} steps of training, over {WINDOW:.0%} of the schedule:\n")
    mixed = {OTHER: rows[OTHER], ALONE: base, **{name: rows[name] for name in SETTINGS}}
    table(mixed, dict.fromkeys(SETTINGS, base), curve)


def _row(preset: str, steps: int) -> str:
    return f"{preset}, {steps} steps"


class Case:
    """One emblem's views, and the scenes and seeds to sample it with."""

    def __init__(self, given: Given, number: int, cases: int, folder: Path) -> None:
        import numpy as np
        from subject_patches.toy.scenes import TEXTURED_BACKGROUNDS, Background, describe_background

        pictured = Pictured.sampled(given.judge, np.random.default_rng((2**45, number)))
        self.identity, self.latents = pictured.identity, pictured.latents(given.toy.vae, 0)
        self.given, self.number, self.folder, self.emblem = given, number, folder, pictured.emblem
        self.beside = colour_beside(self.emblem)
        self.ring = f"{self.beside} {BESIDE}"
        self.asked = []
        for case in range(cases):
            kind = TEXTURED_BACKGROUNDS[(number + case) % len(TEXTURED_BACKGROUNDS)]
            words = f"and a {self.ring} {describe_background(Background(kind))}"
            self.asked.append(Asked(kind, words, EMBLEMS * case + number))

    def rows(self) -> Iterator[tuple[str, list[Score]]]:
        """The rows of the tables, each with a score for each scene."""
        toy = self.given.toy
        yield UNTRAINED, [self._sampled(toy.encode([each.text(NOUN)]), each, toy.model) for each in self.asked]
        for preset in PRESETS:
            for steps in LENGTHS:
                model = self.trained(preset, steps)
                yield _row(preset, steps), [self._sampled(self.prompts(each)[0], each, model) for each in self.asked]
        # The last of the presets and lengths is the one to integrate.
        yield OTHER, [self._sampled(self.prompts(each)[1], each, model) for each in self.asked]
        for name in SETTINGS:
            scores = []
            for each in self.asked:
                concept, auxiliary = self.prompts(each)
                scores.append(self._sampled(concept, each, _patched(model, concept, auxiliary, name)))
            yield name, scores

    def trained(self, preset: str, steps: int) -> Any:
        """The toy's MODEL with a concept of so many steps, which is in the prompts from then on. A training goes on
        from its shorter one."""
        from subject_patches.training.state import StateFile

        name = f"{preset} {self.number}"
        toy, state = self.given.toy, StateFile(name, {"training": name})
        settings = training_settings(toy, preset, steps, RATES)
        concept = kept_or_trained(self.given, self.latents, settings, state)
        return in_use(toy.model, concept, self.folder / "study.safetensors")

    def prompts(self, asked: Asked) -> tuple[Any, Any]:
        """A scene's prompt with the concept, and its auxiliary prompt; where the ring is named is known too."""
        from subject_patches.nodes.auxiliary_prompt import AuxiliaryPromptNode

        node, clip = AuxiliaryPromptNode, self.given.toy.clip
        return node.execute(clip, asked.text(WORDS), WORDS, noun=AUXILIARY, phrases=self.ring).args[:2]

    def _sampled(self, positive: Any, asked: Asked, model: Any) -> Score:
        image = self.given.picture(positive, asked.seed, model)
        return self.score(image, self.given.judge.findings(image)[0], asked)

    def score(self, image: Tensor, reading: Any, asked: Asked) -> Score:
        """The score of a scene's picture (1, 128, 128, 3), in which the judge finds `reading`."""
        beside = any((found.colour, found.shape) == (self.beside, BESIDE) for found in reading.objects)
        emblems = [found for found in reading.objects if found.shape == NOUN and found.colour != self.beside]
        identity = most_alike(self.given.judge, image, emblems, self.identity)
        return Score(identity, bool(emblems), reading.background == asked.ground, beside)


def colour_beside(emblem: Any) -> str:
    """The colour of what is beside an emblem: of the possible ones that furthest from its own."""
    from subject_patches.toy.scenes import COLOURS

    own = [COLOURS[name] for name in (emblem.plate_colour, emblem.glyph_colour)]
    return max(COLOURS_BESIDE, key=lambda name: min(math.dist(COLOURS[name], each) for each in own))


def _patched(model: Any, concept: Any, auxiliary: Any, name: str) -> Any:
    from subject_patches.nodes.dual_branch import DualBranchIntegrationNode
    from subject_patches.patches.families import attention_sites

    given = {**DEFAULTS, **SETTINGS[name]}
    if given.get("sites") == "named":
        given["named_sites"] = str([site for site in attention_sites(model) if site.kind == "cross"][-1])
    patched = DualBranchIntegrationNode.execute(model, concept, auxiliary, **given).args[0]
    return integrated_by(without_masks(), model, patched) if name == NO_MASK else patched


def without_masks() -> type:
    """The paper's Figure 10 without masks: both branches added, each by half so that the size stays."""
    from subject_patches.patches.mechanisms.dual_branch import DualBranchIntegration

    class Unmasked(DualBranchIntegration):
        def mix(self, concept: Tensor, auxiliary: Tensor, weight: Tensor) -> Tensor:
            return (concept + auxiliary) / 2

    return Unmasked


def integrated_by(kind: type, model: Any, patched: Any, **more: Any) -> Any:
    """The model with an edit of another kind, of the same fields, than the one that it was `patched` with."""
    from subject_patches.patches.engine.engine import KEY, add_edit

    edit = patched.model_options["transformer_options"][KEY][-1]
    same = {each.name: getattr(edit, each.name) for each in fields(edit) if each.name[0] != "_"}
    return add_edit(model, kind(**same, **more))


def costs(shape: Shape) -> dict[str, Callable[[Any], Any]]:
    """The benchmark's rows: the paper's window, with both kinds of guidance."""
    import torch
    from subject_patches.nodes.dual_branch import DualBranchIntegrationNode
    from subject_patches.patches.mechanisms.dual_branch import BRANCH_KEY, BranchTokens

    generator = torch.Generator().manual_seed(2)
    auxiliary = {**shape.pooled(generator), BRANCH_KEY: BranchTokens(((1, 7),), ((2, 3),), auxiliary=True)}

    def integrated(**settings: Any) -> Callable[[Any], Any]:
        def patch(model: Any) -> Any:
            prompt = torch.randn(1, 77, shape.width, generator=generator)
            given = {"injection_strength": 1.0, "strength": 1.0, "end_percent": 0.15, **settings}
            concept = [[prompt, {BRANCH_KEY: concept_tokens()}]]
            return DualBranchIntegrationNode.execute(model, concept, [[prompt, auxiliary]], **given).args[0]

        return patch

    return {
        "dual-branch integration, 15 % of the steps": integrated(),
        "dual-branch integration, 15 % of the steps, guidance of its own": integrated(guidance="own"),
    }
