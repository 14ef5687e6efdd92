"""Layout-and-Retouch: the paper's Table 4, how diverse layouts are, the sweep of lambda1, and a picture given back.

The personalised model of each emblem is an ICO concept of four views of it. An emblem's prompts are sampled as one
batch, which gives what each alone would."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .concepts import Concept, Score, followed, learnt, spread, workplace
from .emblems import place_masks
from .given import Given, Shape, heading, mean, paired, row
from .given_back import CFG, WAYS, Back, given_back
from .given_back import table as given_back_table

if TYPE_CHECKING:
    from torch import Tensor

EMBLEMS, PROMPTS = 8, 20
TRAINING = {"steps": 200, "rates": (2e-3, 5e-2)}
VANILLA = "the vanilla model"
ROWS = (
    "I personalised alone",
    "II with step blending",
    "III and the reference's swap alone",
    "IV II and the multi-source swap",
    "V IV and mask blending",
)
# The vanilla model's share of the steps: the paper's 5 of 50, and what the sweep tries besides it, none and all.
LAMBDA1 = 0.1
SWEPT = (0.2, 0.35, 0.5)
# The sweep takes every fourth prompt, and every tenth gives a picture to be given back.
EVERY, BACK_EVERY = 4, 10


def study(given: Given) -> None:
    """Prints the tables, over `given.count` pairs of 8 emblems and up to 20 prompts each (160 are all)."""
    count = min(given.count, EMBLEMS * PROMPTS)
    emblems = min(EMBLEMS, count)
    prompts = count // emblems
    # A list of scores for each emblem.
    scores: dict[str, list[list[Score]]] = {name: [] for name in (VANILLA, *ROWS)}
    sweep: dict[float, list[list[Score]]] = {part: [] for part in SWEPT}
    back: dict[str, list[Back]] = {name: [] for name in WAYS}
    with workplace(given.toy.clip) as folder:
        for number in range(emblems):
            concept = learnt(given, number, folder, **TRAINING)
            print(f"emblem {number + 1} of {emblems}: learnt", file=sys.stderr, flush=True)
            cases = Cases(given, concept, range(prompts), number)
            for name, images in cases.pictures().items():
                scores[name].append(concept.scores(given.judge, images, cases.grounds))
            some = Cases(given, concept, range(0, prompts, EVERY), number)
            for part, found in sweep.items():
                found.append(concept.scores(given.judge, some.blended(part), some.grounds))
            few = Cases(given, concept, range(0, prompts, BACK_EVERY), number)
            for name, pairs in back.items():
                pairs += few.given_back(*WAYS[name])
            print(f"emblem {number + 1} of {emblems}: {prompts} prompts", file=sys.stderr, flush=True)
    print(f"{emblems} emblems, {prompts} prompts each; concepts of {TRAINING['steps']} steps:\n")
    table(scores)
    known = {0.0: ROWS[0], LAMBDA1: ROWS[1], 1.0: VANILLA}
    swept = sweep | {part: [rows[::EVERY] for rows in scores[name]] for part, name in known.items()}
    print(f"\nlambda1, the vanilla model's steps of {given.steps}, over {len(_all(swept[0.0]))} pictures:\n")
    _sweep(swept, given.steps)
    print("\nLayout and reference one picture and an empty mask, sampled from its last latent, PSNR in dB:\n")
    given_back_table(back)


class Cases:
    """One emblem with some of the prompts, each with a seed of its own; pictures are (prompts, 128, 128, 3)."""

    def __init__(self, given: Given, concept: Concept, prompts: Sequence[int], number: int) -> None:
        from subject_patches.nodes.encode_prompt import EncodePromptWithSubjects
        from subject_patches.toy.sampling import noise_of
        from subject_patches.toy.scenes import describe_background

        self.given, self.concept = given, concept
        self.grounds = [_ground(prompt, concept.emblem.plate_colour) for prompt in prompts]
        words = [describe_background(ground) for ground in self.grounds]
        self.plain = given.toy.encode([f"an emblem {each}" for each in words])
        self.personal = given.toy.encode([f"an {concept.words} {each}" for each in words])
        self.negative = given.toy.encode([""])
        neutral = f"an {concept.words}"
        self.neutral = EncodePromptWithSubjects.execute(given.toy.clip, neutral, concept.words).args[0]
        self.noise = noise_of([number * PROMPTS + prompt for prompt in prompts])

    def pictures(self) -> dict[str, Tensor]:
        """Pictures for each row of the table, and the vanilla model's."""
        from subject_patches.nodes.retouch import AdaptiveBlendMaskNode, MultiSourceSwapNode

        model = self.concept.model
        reference, _ = self.inverted(self.given.toy.vae.encode(self.concept.views[:1]), self.negative)
        path, last = self.inverted(self.given.toy.vae.encode(self.layouts), self.negative)
        details = {"reference": reference, "reference_conditioning": self.neutral}
        both = {**details, "layout": path, "layout_conditioning": self.personal}
        mask = AdaptiveBlendMaskNode.execute(
            mask=place_masks(self.given.judge, self.layouts), phrase=self.concept.words
        ).args[0]
        alone = MultiSourceSwapNode.execute(model, **details, lambda2=0.0).args[0]
        multi = MultiSourceSwapNode.execute(model, **both).args[0]
        masked = MultiSourceSwapNode.execute(model, **both, blend_mask=mask).args[0]
        return {
            VANILLA: self.blended(1.0),
            ROWS[0]: self.blended(0.0),
            ROWS[1]: self.layouts,
            ROWS[2]: self.blended(LAMBDA1, alone),
            ROWS[3]: self._from(last, multi, self.neutral, CFG),
            ROWS[4]: self._from(last, masked, self.neutral, CFG),
        }

    @cached_property
    def layouts(self) -> Tensor:
        """The first stage's pictures."""
        return self.blended(LAMBDA1)

    def blended(self, vanilla: float, personalised: Any = None) -> Tensor:
        """Pictures whose first share of steps is the vanilla model's and the rest the personalised one's."""
        import torch
        from subject_patches.nodes.step_blended_guider import StepBlendedGuiderNode

        model, other = self.given.toy.model, personalised or self.concept.model
        steps = round(vanilla * self.given.steps)
        guider = StepBlendedGuiderNode.execute(
            model, self.plain, other, self.personal, self.negative, steps, CFG, CFG
        ).args[0]
        return self.given.sampled(guider, self.noise, torch.zeros_like(self.noise))

    def given_back(self, known: bool, rounds: int, own: bool, cfg: float) -> list[Back]:
        """What comes back of the layouts; see `WAYS`."""
        inverted_with, prompt = self.personal if known else self.negative, self.personal if own else self.neutral
        latents = self.given.toy.vae.encode(self.layouts)
        return given_back(self.given, self.concept.model, latents, inverted_with, rounds, self.personal, prompt, cfg)

    def inverted(self, latents: Tensor, prompt: Any, rounds: int = 0) -> tuple[Any, Tensor]:
        """The trajectory of latents with the personalised model, as Algorithm 1 has it, and the noisiest of it."""
        from subject_patches.nodes.trajectory import InvertToTrajectoryNode

        model, sigmas = self.concept.model, self.given.sigmas()
        path, last, *_ = InvertToTrajectoryNode.execute(model, {"samples": latents}, sigmas, None, prompt, rounds).args
        return path, last["samples"]

    def _from(self, latents: Tensor, model: Any, positive: Any, cfg: float) -> Tensor:
        """Pictures sampled from noisy latents, without noise of their own."""
        import torch

        guider = self.given.guided(model, positive, self.negative, cfg)
        return self.given.sampled(guider, torch.zeros_like(latents), latents)


def _ground(prompt: int, plate: str) -> Any:
    """The background of a prompt, of other colours than the emblem's plate."""
    import numpy as np
    from subject_patches.toy.scenes import sample_background

    rng = np.random.default_rng((2**45, prompt))
    ground = sample_background(rng)
    while plate in ground.colours:
        ground = sample_background(rng)
    return ground


def _all(groups: Sequence[Sequence[Score]]) -> list[Score]:
    return [score for group in groups for score in group]


def table(scores: Mapping[str, list[list[Score]]], bases: Mapping[str, str] | None = None) -> None:
    """Prints rows of scores, a list for each emblem, paired with the rows that `bases` names, by default the first of
    the paper's."""
    identity = {name: [score.identity for score in _all(groups)] for name, groups in scores.items()}
    found = ("emblem found", "background right", "both", "variance of centres")
    print(heading("identity", "against I, paired", *found))
    for name, groups in scores.items():
        against = paired(identity[bases[name] if bases else ROWS[0]], identity[name])
        print(row(name, f"{mean(identity[name]):.3f}", against, followed(_all(groups)), spread(groups)))


def _sweep(scores: dict[float, list[list[Score]]], steps: int) -> None:
    print(heading("identity", "emblem found", "background right", "both", "variance of centres", rows="lambda1"))
    for part, groups in sorted(scores.items()):
        every = _all(groups)
        identity = mean(score.identity for score in every)
        print(row(round(part * steps), f"{identity:.3f}", followed(every), spread(groups)))


def costs(shape: Shape) -> dict[str, Callable[[Any], Any]]:
    """The benchmark's rows: two fresh trajectories of random latents, kept at 20 noise levels."""
    import torch
    from subject_patches.nodes.retouch import AdaptiveBlendMaskNode, MultiSourceSwapNode
    from subject_patches.patches.families import family_of
    from subject_patches.patches.mechanisms.inversion import Inversion

    from .given import PHRASES

    generator = torch.Generator().manual_seed(1)
    region = shape.middle()

    def path(model: Any) -> Inversion:
        sigmas = torch.linspace(1 if shape.flux else 20, 0, 20)
        clean, noise = (torch.randn(1, shape.channels, shape.size, shape.size, generator=generator) for _ in range(2))
        levels = sigmas.view(-1, 1, 1, 1, 1)
        states = (1 - levels) * clean + levels * noise if shape.flux else clean + levels * noise
        return Inversion(sigmas, states, family_of(model).name)

    def swap(masked: bool, **settings: Any) -> Callable[[Any], Any]:
        def patch(model: Any) -> Any:
            phrase = next(iter(PHRASES))
            mask = AdaptiveBlendMaskNode.execute(mask=region, phrase=phrase).args[0] if masked else None
            return MultiSourceSwapNode.execute(model, path(model), path(model), blend_mask=mask, **settings).args[0]

        return patch

    return {
        "multi-source swap": swap(False),
        "multi-source swap, adaptive mask": swap(True),
        "multi-source swap, adaptive mask, cond only": swap(True, apply_to="cond only"),
    }
