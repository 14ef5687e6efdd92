"""Layout-and-Retouch: the paper's Table 4, how diverse layouts are, the sweep of lambda1, and a picture given back.

The personalised model is the toy with Recycled Self-Attention on a picture of the emblem, whose prompts are the vanilla
model's: like a tuned model it knows one subject, and it needs no training."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .given import Given, Shape, paired, share

if TYPE_CHECKING:
    from torch import Tensor

EMBLEMS, PROMPTS = 8, 20
CFG = 4.0
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
SWEPT = (0.05, 0.2, 0.5)


@dataclass(frozen=True)
class Score:
    """One picture: the emblem's identity with the reference, whether an emblem and the background were found, and the
    emblem's centre in pixels, if any."""

    identity: float
    emblem: bool
    background: bool
    centre: tuple[float, float] | None


def study(given: Given) -> None:
    """Prints the tables, over `given.count` pairs of 8 emblems and 20 prompts (160 are all)."""
    count = min(given.count, EMBLEMS * PROMPTS)
    subjects = [Subject(given, number) for number in range(min(EMBLEMS, count))]
    scores: dict[str, list[Score]] = {name: [] for name in (VANILLA, *ROWS)}
    sweep: dict[float, list[Score]] = {share_: [] for share_ in SWEPT}
    replays: list[tuple[float, float]] = []
    for number in range(count):
        case = Case(given, subjects[number % len(subjects)], number // EMBLEMS, number)
        for name, image in case.pictures().items():
            scores[name].append(case.score(image))
        # Every eighth prompt.
        if number // EMBLEMS % 8 == 0:
            for share_, found in sweep.items():
                found.append(case.score(case.blended(share_)))
            replays.append(case.given_back())
        print(f"pair {number + 1} of {count}", file=sys.stderr, flush=True)
    print(f"{count} pairs of {len(subjects)} emblems and {PROMPTS} prompts:\n")
    _table(scores)
    known = {0.0: ROWS[0], LAMBDA1: ROWS[1], 1.0: VANILLA}
    every = [number for number in range(count) if number // EMBLEMS % 8 == 0]
    swept = sweep | {share_: [scores[name][number] for number in every] for share_, name in known.items()}
    print(f"\nlambda1, the vanilla model's share of the steps, over {len(every)} of them:\n")
    _sweep(swept)
    patched, plain = ([pair[n] for pair in replays] for n in (0, 1))
    print(
        f"\nLayout and reference one picture, an empty mask, {len(replays)} pictures: PSNR {_mean(patched):.1f} dB "
        f"against {_mean(plain):.1f} dB when sampled from the same last latent without the swap."
    )


class Subject:
    """One emblem: its reference picture with its trajectory, and the personalised model."""

    def __init__(self, given: Given, number: int) -> None:
        import numpy as np
        import torch
        from subject_patches.nodes.recycled_attention import RecycledSelfAttentionNode
        from subject_patches.nodes.subject import SubjectNode
        from subject_patches.toy.drawing import draw
        from subject_patches.toy.scenes import Background, sample_emblem, view

        rng = np.random.default_rng((2**44, number))
        self.emblem = sample_emblem(rng)
        plain = "gray" if self.emblem.plate_colour != "gray" else "white"
        drawn = draw(view(self.emblem, rng, Background("plain", (plain,))))
        picture = torch.from_numpy(drawn.image).float()[None] / 255
        self.identity = given.judge.identity(picture, torch.from_numpy(drawn.boxes).float())
        shown = {"phrase": "emblem", "size": 96, "margin": 0.15, "mask": torch.from_numpy(drawn.masks[:1]).float()}
        subject = SubjectNode.execute(picture, given.toy.vae, **shown).args[0]
        self.model = RecycledSelfAttentionNode.execute(given.toy.model, subject).args[0]
        self.path = inverted(given, given.toy.vae.encode(picture)).args[0]


@dataclass
class Case:
    """One emblem, one prompt, one seed."""

    given: Given
    subject: Subject
    prompt: int
    seed: int
    background: Any = field(init=False)

    def __post_init__(self) -> None:
        import numpy as np
        from subject_patches.toy.scenes import describe_background, sample_background

        rng = np.random.default_rng((2**45, self.prompt))
        self.background = sample_background(rng)
        while self.subject.emblem.plate_colour in self.background.colours:
            self.background = sample_background(rng)
        self.words = f"an emblem {describe_background(self.background)}"

    def pictures(self) -> dict[str, Tensor]:
        """A picture for each row of the table, and the vanilla model's."""
        from subject_patches.nodes.encode_prompt import EncodePromptWithSubjects
        from subject_patches.nodes.retouch import AdaptiveBlendMaskNode, MultiSourceSwapNode

        given, subject = self.given, self.subject
        layout = self.blended(LAMBDA1)
        prompt = given.toy.encode([self.words])
        neutral = EncodePromptWithSubjects.execute(given.toy.clip, "an emblem", "emblem").args[0]
        path, last, _ = inverted(given, given.toy.vae.encode(layout)).args
        reference = {"reference": subject.path, "reference_conditioning": neutral}
        both = {**reference, "layout": path, "layout_conditioning": prompt}
        alone = MultiSourceSwapNode.execute(subject.model, **reference, lambda2=0.0).args[0]
        multi = MultiSourceSwapNode.execute(subject.model, **both).args[0]
        mask = AdaptiveBlendMaskNode.execute(mask=self._segmented(layout), phrase="emblem").args[0]
        masked = MultiSourceSwapNode.execute(subject.model, **both, blend_mask=mask).args[0]
        noise = _noise(self.seed)
        first_steps = self._guider(LAMBDA1, alone)
        return {
            VANILLA: self.blended(1.0),
            ROWS[0]: self.blended(0.0),
            ROWS[1]: layout,
            ROWS[2]: self._sample(first_steps, noise),
            ROWS[3]: self._sample(_plain(multi, neutral, given), None, last["samples"]),
            ROWS[4]: self._sample(_plain(masked, neutral, given), None, last["samples"]),
        }

    def blended(self, vanilla: float) -> Tensor:
        """A picture whose first share of steps is the vanilla model's and the rest the personalised one's."""
        return self._sample(self._guider(vanilla, self.subject.model), _noise(self.seed))

    def given_back(self) -> tuple[float, float]:
        """PSNR in dB of a picture sampled from its own last latent with the swap of itself, and without."""
        import torch
        from subject_patches.nodes.retouch import MultiSourceSwapNode

        latent = self.given.toy.vae.encode(self.blended(LAMBDA1))
        picture = self.given.toy.vae.decode(latent)[..., :3].clamp(0, 1)
        prompt = self.given.toy.encode([self.words])
        path, last, _ = inverted(self.given, latent).args
        model = self.given.toy.model
        swapped = MultiSourceSwapNode.execute(model, path, path, blend_mask=torch.zeros(1, 128, 128)).args[0]
        again = [self._sample(_plain(each, prompt, self.given), None, last["samples"]) for each in (swapped, model)]
        return tuple(-10 * math.log10(float((image - picture).square().mean())) for image in again)

    def score(self, image: Tensor) -> Score:
        import torch

        reading = self.given.judge.findings(image)[0]
        emblems = [found for found in reading.objects if found.shape == "emblem"]
        # Where the judge sees no emblem, what it sees best stands in its place, or the whole picture.
        best = (emblems or list(reading.objects))[:1]
        box = best[0].box if best else (0, 0, image.shape[2], image.shape[1])
        vector = self.given.judge.identity(image, torch.tensor([box], dtype=torch.float32))
        centre = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) if emblems else None
        right = reading.background == self.background.kind
        return Score(float((vector * self.subject.identity).sum()), bool(emblems), right, centre)

    def _guider(self, vanilla: float, personalised: Any) -> Any:
        from subject_patches.nodes.step_blended_guider import StepBlendedGuiderNode

        prompt, negative = self.given.toy.encode([self.words]), self.given.toy.encode([""])
        steps = round(vanilla * self.given.steps)
        model = self.given.toy.model
        return StepBlendedGuiderNode.execute(model, prompt, personalised, prompt, negative, steps, CFG, CFG).args[0]

    def _segmented(self, image: Tensor) -> Tensor:
        """In a segmenter's place: the box of what the judge takes for the emblem, or for anything; all without one."""
        import torch

        objects = self.given.judge.findings(image)[0].objects
        found = sorted(objects, key=lambda each: each.shape != "emblem")[:1]
        mask = torch.zeros(1, *image.shape[1:3])
        x0, y0, x1, y1 = (round(c) for c in found[0].box) if found else (0, 0, image.shape[2], image.shape[1])
        mask[:, max(y0, 0) : max(y1, 1), max(x0, 0) : max(x1, 1)] = 1
        return mask

    def _sample(self, guider: Any, noise: Tensor | None, latent: Tensor | None = None) -> Tensor:
        import comfy.samplers
        import torch

        noise = torch.zeros_like(latent) if noise is None else noise
        latent = torch.zeros_like(noise) if latent is None else latent
        sampler = comfy.samplers.sampler_object("euler")
        result = guider.sample(noise, latent, sampler, _sigmas(self.given), disable_pbar=True, seed=self.seed)
        return self.given.toy.vae.decode(result)[..., :3].clamp(0, 1)


def _plain(model: Any, positive: Any, given: Given) -> Any:
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, given.toy.encode([""]))
    guider.set_cfg(CFG)
    return guider


def _noise(seed: int) -> Tensor:
    import torch
    from subject_patches.toy.sampling import NOISE_SHAPE

    return torch.randn(1, *NOISE_SHAPE, generator=torch.Generator().manual_seed(seed))


def _sigmas(given: Given) -> Tensor:
    import comfy.samplers

    return comfy.samplers.calculate_sigmas(given.toy.model.get_model_object("model_sampling"), "normal", given.steps)


def inverted(given: Given, latent: Tensor) -> Any:
    """What Invert to Trajectory gives for a latent, with the empty prompt."""
    from subject_patches.nodes.trajectory import InvertToTrajectoryNode

    return InvertToTrajectoryNode.execute(given.toy.model, {"samples": latent}, _sigmas(given), given.toy.clip)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)


def _spread(scores: Sequence[Score]) -> str:
    """The variance of the emblems' centres, averaged over x and y, as a share of the picture's side squared."""
    import numpy as np

    centres = np.array([score.centre for score in scores if score.centre is not None])
    return f"{centres.var(0, ddof=1).mean() / 128**2:.4f}" if len(centres) > 1 else "none found"


def _table(scores: dict[str, list[Score]]) -> None:
    first = [score.identity for score in scores[ROWS[0]]]
    print("| | identity | against I, paired | emblem found | background right | variance of centres |")
    print("|---|---|---|---|---|---|")
    for name, rows in scores.items():
        identity = first if name == ROWS[0] else [score.identity for score in rows]
        print(
            f"| {name} | {_mean(identity):.3f} | {paired(first, identity)} | {share([s.emblem for s in rows])} "
            f"| {share([s.background for s in rows])} | {_spread(rows)} |"
        )


def _sweep(scores: dict[float, list[Score]]) -> None:
    print("| lambda1 | identity | emblem found | background right | variance of centres |\n|---|---|---|---|---|")
    for share_, rows in sorted(scores.items()):
        found, right = share([s.emblem for s in rows]), share([s.background for s in rows])
        print(f"| {share_:g} | {_mean([s.identity for s in rows]):.3f} | {found} | {right} | {_spread(rows)} |")


def costs(shape: Shape) -> dict[str, Callable[[Any], Any]]:
    """The benchmark's rows: two fresh trajectories of random latents, kept at 20 noise levels."""
    import torch
    from subject_patches.nodes.retouch import AdaptiveBlendMaskNode, MultiSourceSwapNode
    from subject_patches.patches.inversion import Inversion
    from subject_patches.patches.sites import family_of

    from .given import PHRASES

    generator = torch.Generator().manual_seed(1)
    region = torch.zeros(1, shape.size, shape.size)
    region[:, shape.size // 4 : 3 * shape.size // 4, shape.size // 4 : 3 * shape.size // 4] = 1

    def path(model: Any) -> Inversion:
        sigmas = torch.linspace(20, 0, 20)
        clean, noise = (torch.randn(1, shape.channels, shape.size, shape.size, generator=generator) for _ in range(2))
        return Inversion(sigmas, clean + sigmas.view(-1, 1, 1, 1, 1) * noise, family_of(model))

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
