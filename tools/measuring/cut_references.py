"""Layout-and-Retouch's Table 4 with the reference as it may lend: the whole view, cropped to its subject, or put where
the layout's subject stands; instead of the picture's own keys or beside them. And the swap along the training, and how
diverse layouts are where a concept's views all share one place."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .concepts import Concept, Pictured, Score, learnt, learnt_of, plain_grounds, variance, workplace
from .emblems import place_masks
from .given import Given, paired
from .given_back import CFG
from .retouch import EMBLEMS, LAMBDA1, PROMPTS, ROWS, TRAINING, VANILLA, Cases, table

if TYPE_CHECKING:
    from torch import Tensor

# At these lengths of training the swap is compared with the concept alone, besides the full one.
EARLIER = (50, 100)
ALONE, BLENDED = ROWS[:2]
LAYOUT = "the layout's swap alone"
# How the reference is cut, whether the layout is swapped as well and its output blended, and the settings of the swap.
SWAPS: dict[str, tuple[str, bool, bool, dict[str, Any]]] = {
    "III, the whole view": ("whole", False, False, {}),
    "III, cropped": ("cropped", False, False, {}),
    "III, cropped, extended": ("cropped", False, False, {"reference_keys": "extend"}),
    "IV, the whole view": ("whole", True, False, {}),
    "IV, aligned": ("aligned", True, False, {}),
    "IV, aligned, extended": ("aligned", True, False, {"reference_keys": "extend"}),
    "V, the whole view": ("whole", True, True, {}),
    "V, cropped": ("cropped", True, True, {}),
    "V, aligned": ("aligned", True, True, {}),
    "V, aligned, on white": ("white", True, True, {}),
    "V, aligned, extended": ("aligned", True, True, {"reference_keys": "extend"}),
    "V, aligned, all of the decoder": ("aligned", True, True, {"sites": "decoder"}),
}
EARLY_SWAPS = ("III, the whole view", "III, cropped")


def study(given: Given) -> None:
    """Prints both tables, over `given.count` pairs of up to 8 emblems and 6 to 20 prompts each (160 are all)."""
    emblems, prompts = shared_out(given.count, 6)
    rows: dict[str, list[list[Score]]] = {}
    along: dict[str, list[list[Score]]] = {}
    with workplace(given.toy.clip) as folder:
        for number in range(emblems):
            for steps in EARLIER:
                concept = learnt(given, number, folder, steps, TRAINING["rates"])
                cases = CutCases(given, concept, range(prompts), number)
                for name, images in cases.earlier().items():
                    _add(along, f"{name}, {steps} steps", concept, cases, images)
            concept = learnt(given, number, folder, **TRAINING)
            cases = CutCases(given, concept, range(prompts), number)
            for name, images in cases.pictures().items():
                _add(rows, name, concept, cases, images)
                print(f"emblem {number + 1} of {emblems}, {name}", file=sys.stderr, flush=True)
            for name in (ALONE, *EARLY_SWAPS):
                along.setdefault(f"{name}, {TRAINING['steps']} steps", []).append(rows[name][-1])
    print(f"{emblems} emblems, {prompts} prompts each; concepts of {TRAINING['steps']} steps:\n")
    table(rows)
    print("\nThe reference's swap along the training, against the concept alone of as many steps:\n")
    table(along, {name: f"{ALONE}, {name.rsplit(', ', 1)[1]}" for name in along})


def diversity(given: Given) -> None:
    """Prints how far centres lie apart with and without step blending, of concepts whose views all show the emblem in
    the middle; over `given.count` pairs of up to 8 emblems and 12 to 20 prompts each, whose places are to vary."""
    emblems, prompts = shared_out(given.count, 12)
    rows: dict[str, list[list[Score]]] = {}
    with workplace(given.toy.clip) as folder:
        for number in range(emblems):
            concept = learnt_in_one_place(given, number, folder)
            cases = Cases(given, concept, range(prompts), number)
            for name, vanilla in ((VANILLA, 1.0), (ALONE, 0.0), (BLENDED, LAMBDA1)):
                _add(rows, name, concept, cases, cases.blended(vanilla))
            print(f"emblem {number + 1} of {emblems}", file=sys.stderr, flush=True)
    print(f"{emblems} emblems whose views all stand in the middle, {prompts} prompts each:\n")
    table(rows)
    print(
        f"\nThe variance of centres with step blending, against the concept alone: {risen(rows[ALONE], rows[BLENDED])}."
    )


def shared_out(count: int, least: int) -> tuple[int, int]:
    """Of so many pairs the emblems, as many as leave each `least` prompts, and the prompts of each: a training is a
    matter of chance, so emblems come first."""
    count = min(count, EMBLEMS * PROMPTS)
    emblems = min(EMBLEMS, max(count // least, 1))
    return emblems, min(count // emblems, PROMPTS)


def risen(first: Sequence[Sequence[Score]], other: Sequence[Sequence[Score]]) -> str:
    """How much the variance of centres rises, concept by concept, of those whose emblem is found in both."""
    pairs = [(variance(one), variance(two)) for one, two in zip(first, other, strict=True)]
    both = [(one, two) for one, two in pairs if one is not None and two is not None]
    return paired([one for one, _ in both], [two for _, two in both], places=4)


class CutCases(Cases):
    """One emblem with some of the prompts, and its reference cut in several ways."""

    def pictures(self) -> dict[str, Tensor]:
        """Pictures for each row of the first table."""
        from subject_patches.nodes.retouch import AdaptiveBlendMaskNode, MultiSourceSwapNode

        path, last = self.inverted(self.given.toy.vae.encode(self.layouts), self.negative)
        layout = {"layout": path, "layout_conditioning": self.personal}
        places = place_masks(self.given.judge, self.layouts)
        mask = AdaptiveBlendMaskNode.execute(mask=places, phrase=self.concept.words).args[0]
        swapped = MultiSourceSwapNode.execute(self.concept.model, **layout).args[0]
        found = {VANILLA: self.blended(1.0), ALONE: self.blended(0.0), BLENDED: self.layouts}
        found[LAYOUT] = self._from(last, swapped, self.neutral, CFG)
        paths: dict[str, Any] = {}
        for name, (cut, multi, masked, settings) in SWAPS.items():
            if cut not in paths:
                paths[cut] = self._reference(cut, places)
            given = {"reference": paths[cut], "reference_conditioning": self.neutral, **settings}
            if not multi:
                model = MultiSourceSwapNode.execute(self.concept.model, **given, lambda2=0.0).args[0]
                found[name] = self.blended(LAMBDA1, model)
                continue
            given |= {**layout, "blend_mask": mask if masked else None}
            model = MultiSourceSwapNode.execute(self.concept.model, **given).args[0]
            found[name] = self._from(last, model, self.neutral, CFG)
        return found

    def earlier(self) -> dict[str, Tensor]:
        """Pictures of the concept alone, and with the reference's swap."""
        from subject_patches.nodes.retouch import MultiSourceSwapNode

        found = {ALONE: self.blended(0.0)}
        for name in EARLY_SWAPS:
            given = {"reference": self._reference(SWAPS[name][0], None), "reference_conditioning": self.neutral}
            model = MultiSourceSwapNode.execute(self.concept.model, **given, lambda2=0.0).args[0]
            found[name] = self.blended(LAMBDA1, model)
        return found

    def _reference(self, cut: str, places: Any) -> Any:
        """The trajectory of the first view: whole, cropped to its subject, or one for each of `places`."""
        from dataclasses import replace

        from subject_patches.nodes.align import AlignReferenceNode

        view, mask = self.concept.views[:1], None
        if cut != "whole":
            where = places if cut in ("aligned", "white") else None
            background = "white" if cut == "white" else "keep"
            view, mask = AlignReferenceNode.execute(view, place_masks(self.given.judge, view), where, background).args
        path, _ = self.inverted(self.given.toy.vae.encode(view), self.negative)
        return replace(path, mask=mask)


def learnt_in_one_place(given: Given, number: int, folder: Path) -> Concept:
    """As `learnt`, of views that all show the emblem in the middle of the picture, of one size."""
    from dataclasses import replace

    import numpy as np
    from subject_patches.toy.drawing import draw
    from subject_patches.toy.scenes import view

    rng = np.random.default_rng((2**44, number))
    pictured, scenes = Pictured.sampled(given.judge, rng), []
    for ground in plain_grounds(pictured.emblem):
        scene = view(pictured.emblem, rng, ground)
        scenes.append(draw(replace(scene, things=(replace(scene.things[0], x=64.0, y=64.0, radius=30.0),))))
    centred = replace(pictured, views=Pictured.drawn(given.judge, pictured.emblem, scenes).views)
    return learnt_of(given, centred, number, folder, **TRAINING)


def _add(rows: dict[str, list[list[Score]]], name: str, concept: Concept, cases: Cases, images: Tensor) -> None:
    rows.setdefault(name, []).append(concept.scores(cases.given.judge, images, cases.grounds))
