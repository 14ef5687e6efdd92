"""Dual-branch integration with the mask that it should find: is it the toy, or is it the mask?

Concepts are learnt of views with something in them to absorb, and sampled with the prompts that ask for a thing beside
the concept (`ico.Case`): where a prompt asks for the concept and a ground alone, 400 steps of training drive nothing
out, and there is no trade-off to lie above. The oracle mixes the branches by the box of the emblem in the concept's own
picture of the same seed. If that lies above the training's curve and the paper's mask does not, it is the mask; if
neither does, it is the toy."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .concepts import training_settings, workplace
from .dual_branch import (
    AUXILIARY,
    DEFAULTS,
    LENGTHS,
    NO_MASK,
    OTHER,
    RATES,
    UNTRAINED,
    WORDS,
    integrated_by,
    without_masks,
)
from .emblems import NOUN, alike, place_masks, places
from .given import Given, heading, paired, row
from .ico import Case as Views
from .tradeoff import Score, above, following, identities, means

if TYPE_CHECKING:
    from torch import Tensor

EMBLEMS, SEEDS = 4, 3
OWN, OWN_TWO, ORACLE = "the paper's mask, lambda 1", "the paper's mask, lambda 2", "the box as the mask (oracle)"
SEPARATE, STAR = "separate prompts (Figure 10)", "another auxiliary noun (Figure 12)"
MIXED: dict[str, dict[str, Any]] = {
    OWN: {},
    OWN_TWO: {"injection_strength": 2.0},
    ORACLE: {},
    NO_MASK: {},
    SEPARATE: {},
    STAR: {},
}
# What stands for the concept in the auxiliary prompt (Figure 12).
NOUNS = {STAR: "gray star"}


def study(given: Given) -> None:
    """Prints the table, over `given.count` pictures a row (3 seeds of a prompt each; 192 are 4 emblems with 16 prompts
    each)."""
    rows: dict[str, list[Score]] = {}
    with workplace(given.toy.clip) as folder:
        for number in range(EMBLEMS):
            prompts = len(range(number, -(-given.count // SEEDS), EMBLEMS))
            if prompts:
                case = Case(given, number, prompts, folder)
                for name, scores in case.rows():
                    rows.setdefault(name, []).extend(scores)
                    print(f"emblem {number + 1}, {name}", file=sys.stderr, flush=True)
    curve = [rows[UNTRAINED], *(rows[_row(steps)] for steps in LENGTHS)]
    print(f"{len(curve[0])} pictures a row, with {SEEDS} seeds of each prompt:\n")
    measures = ("identity", "prompt followed", "emblem found", "ground right", "thing beside")
    print(heading(*measures, "identity, paired", "following, paired", "above the curve"))
    for name, scores in rows.items():
        base = rows[_row(LENGTHS[-1])] if name in MIXED else scores
        rises = [paired(of(base), of(scores)) if name in MIXED else "" for of in (identities, following)]
        print(row(name, *means(scores), *rises, above(curve, scores) if name in MIXED else ""))


def _row(steps: int) -> str:
    return f"{steps} steps"


class Case:
    """One emblem's views, and the prompts and seeds to sample it with."""

    def __init__(self, given: Given, number: int, prompts: int, folder: Path) -> None:
        self.given, self.number = given, number
        self.views = Views(given, number, folder, None)
        two = [each for each in self.views.asked if each.beside]
        self.asked = [two[place % len(two)] for place in range(prompts)]

    def rows(self) -> Any:
        """The rows of the table, each with a score for each picture."""
        toy = self.given.toy
        yield UNTRAINED, self._scored(lambda place: (toy.encode([self.asked[place].text(NOUN)]), toy.model))
        model, alone = toy.model, []
        for steps in LENGTHS:
            model = self._trained(steps)
            alone = [self._images(self._prompts(place)[0], model, place) for place in range(len(self.asked))]
            yield _row(steps), [score for place, images in enumerate(alone) for score in self._scores(images, place)]
        yield OTHER, self._scored(lambda place: (self._prompts(place)[1], model))
        for name in MIXED:
            yield name, self._scored(lambda place, name=name: self._mixed(place, name, model, alone[place]))

    def _trained(self, steps: int) -> Any:
        """The toy's MODEL with a concept of so many steps, which goes on from the shorter training."""
        from subject_patches.training.state import StateFile

        name = f"oracle {self.number}"
        settings = training_settings(self.given.toy, "for dual-branch", steps, RATES)
        return self.views.learnt(settings, state=StateFile(name, {"training": name}))

    def _prompts(self, place: int, name: str = "") -> tuple[Any, Any]:
        """A prompt with the concept, and its auxiliary prompt; or what each is responsible for alone."""
        from subject_patches.nodes.auxiliary_prompt import AuxiliaryPromptNode
        from subject_patches.patches.mechanisms.dual_branch import BRANCH_KEY, BranchTokens
        from subject_patches.patches.parts.prompt import in_context, prompt_spans
        from subject_patches.toy.scenes import describe_background

        clip, asked = self.given.toy.clip, self.asked[place]
        thing = " ".join(asked.beside)
        if name == SEPARATE:
            concept = AuxiliaryPromptNode.execute(clip, f"an {WORDS}", WORDS, noun=AUXILIARY).args[0]
            text = f"a {thing} {describe_background(asked.background)}"
            auxiliary = clip.encode_from_tokens_scheduled(clip.tokenize(text))
            for tokens, values in auxiliary:
                own = in_context(clip, text, tokens, prompt_spans(clip, text))
                values[BRANCH_KEY] = BranchTokens(own, (), auxiliary=True)
            return concept, auxiliary
        noun = NOUNS.get(name, AUXILIARY)
        return AuxiliaryPromptNode.execute(clip, asked.text(WORDS), WORDS, noun=noun, phrases=thing).args[:2]

    def _mixed(self, place: int, name: str, model: Any, alone: Tensor) -> tuple[Any, Any]:
        from subject_patches.nodes.dual_branch import DualBranchIntegrationNode

        concept, auxiliary = self._prompts(place, name)
        patched = DualBranchIntegrationNode.execute(model, concept, auxiliary, **{**DEFAULTS, **MIXED[name]}).args[0]
        if name == ORACLE:
            patched = integrated_by(_by_a_mask(), model, patched, boxes=place_masks(self.given.judge, alone))
        if name == NO_MASK:
            patched = integrated_by(without_masks(), model, patched)
        return concept, patched

    def _scored(self, made: Callable[[int], tuple[Any, Any]]) -> list[Score]:
        found = []
        for place in range(len(self.asked)):
            positive, model = made(place)
            found += self._scores(self._images(positive, model, place), place)
        return found

    def _images(self, positive: Any, model: Any, place: int) -> Tensor:
        first = SEEDS * (EMBLEMS * place + self.number)
        return self.given.pictures(positive, range(first, first + SEEDS), model)

    def _scores(self, images: Tensor, place: int) -> list[Score]:
        judge, asked = self.given.judge, self.asked[place]
        readings = judge.findings(images)
        boxes, seen = places(readings)
        likeness = alike(judge, images, boxes, self.views.pictured.identity[None])[:, 0].tolist()
        return [
            Score(identity, emblem, asked.ground_right(reading), asked.thing_there(reading))
            for identity, emblem, reading in zip(likeness, seen, readings, strict=True)
        ]


def _by_a_mask() -> type:
    """The integration with masks (pictures, height, width) in the place of Eq. 3 and 4."""
    from dataclasses import dataclass

    from subject_patches.patches.mechanisms.dual_branch import DualBranchIntegration
    from subject_patches.patches.mechanisms.region import region_at

    @dataclass(frozen=True, eq=False)
    class ByAMask(DualBranchIntegration):
        boxes: Any = None

        def weight(self, call: Any, once: slice, beside: Any) -> Any:
            place = region_at(self.boxes, call.chunk, call.grid, len(call.query))
            return place.to(call.query)[:, None].expand(len(call.query), call.heads, -1)

    return ByAMask
