"""Recycled self-attention: emblems carried into a prompt's scene, and placed into a painted region of one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .emblems import alike, known, places
from .given import Given, Shape, centred, heading, mean, paired, row, share

if TYPE_CHECKING:
    from torch import Tensor

UNPATCHED = "unpatched"
DECODER = "decoder, in the region"
SETTINGS: dict[str, dict[str, Any]] = {
    "decoder (the default)": {},
    "encoder": {"sites": "encoder"},
    "encoder and decoder": {"sites": "encoder and decoder"},
    "strength 0.5": {"strength": 0.5},
    "strength 2": {"strength": 2.0},
    "keep probability 0.5": {"keep_probability": 0.5},
}
# Of a transformer: where the keys of references stand, at which noise level they were made, in which layers they are
# seen, and how strongly.
DIT_SETTINGS: dict[str, dict[str, Any]] = {
    "by default: all layers, same places, nearly clean": {},
    "positions beside": {"positions": "beside"},
    "positions damped": {"positions": "damped"},
    "noise level current": {"noise_level": "current"},
    "noise level current, strength 2": {"noise_level": "current", "strength": 2.0},
    "double blocks": {"sites": "named", "named_sites": "double.0-1"},
    "first half of the single blocks": {"sites": "named", "named_sites": "single.0-2"},
    "second half of the single blocks": {"sites": "named", "named_sites": "single.3-5"},
    "strength 2": {"strength": 2.0},
    "strength 4": {"strength": 4.0},
    "strength 4, positions beside": {"strength": 4.0, "positions": "beside"},
}


@dataclass
class Score:
    """One picture: identity of its emblem with the reference's, whether an emblem and the background were found, and
    the mean difference to the scene outside the painted region (0 to 255; None where there is no region)."""

    identity: float
    emblem: bool
    background: bool
    outside: float | None = None


def study(given: Given, settings_of: dict[str, dict[str, Any]] = SETTINGS, inside: str = DECODER) -> None:
    """Prints both tables, over `given.count` emblem-and-scene pairs; `inside` names the row of the default in a
    region."""
    whole: dict[str, list[Score]] = {name: [] for name in (UNPATCHED, *settings_of)}
    region: dict[str, list[Score]] = {name: [] for name in (UNPATCHED, inside)}
    for number in range(given.count):
        pair = Pair(given, number)
        for name, settings in {UNPATCHED: None, **settings_of}.items():
            whole[name].append(pair.carried(settings))
        for name in region:
            region[name].append(pair.placed(name))
        print(f"pair {number + 1} of {given.count}", file=sys.stderr, flush=True)
    print("An emblem carried into a prompt's scene:\n")
    table(whole)
    print("\nAn emblem placed into a painted region of a scene:\n")
    table(region)


class Pair:
    """One emblem with its reference picture, and one scene to put it in."""

    def __init__(self, given: Given, number: int) -> None:
        import numpy as np
        from subject_patches.toy.drawing import draw
        from subject_patches.toy.scenes import describe_background, sample_emblem, sample_scene

        rng = np.random.default_rng((2**42, number))
        self.toy, self.judge, self.seed, self.steps = given.toy, given.judge, number, given.steps
        emblem = sample_emblem(rng)
        reference = known(given, emblem, rng)
        self.identity, self.subject = reference.identity, reference.subject
        self.scene = draw(sample_scene(rng, 1, 0.0))
        while emblem.plate_colour in self.scene.scene.background.colours:
            self.scene = draw(sample_scene(rng, 1, 0.0))
        self.prompt = f"an emblem {describe_background(self.scene.scene.background)}"
        self.region = _free_region(self.scene.masks.any(0), rng)

    def carried(self, settings: dict[str, Any] | None) -> Score:
        """The score of a picture of the prompt, with these settings of the node, or unpatched."""
        return self.score_of(self._patched(settings))

    def score_of(self, model: Any) -> Score:
        """The score of a picture of the prompt by a patched model, or by the toy itself where it is None."""
        image = self.toy.sample([self.prompt], [self.seed], model, self.steps)
        (reading,) = self.judge.findings(image)
        (box,), (seen,) = places([reading])
        return self._score(image, box, seen, reading)

    def placed(self, name: str) -> Score:
        """The score of an emblem painted into the scene's region."""
        import torch

        settings = None if name == UNPATCHED else {"region_mask": self.region[None]}
        scene = torch.from_numpy(self.scene.image).float()[None] / 255
        latents = self.toy.vae.encode(scene)
        image = self.toy.sample(
            [self.prompt],
            [self.seed],
            self._patched(settings),
            self.steps,
            latents=latents,
            noise_mask=self.region[None],
        )
        rows, columns = self.region.any(1).nonzero(), self.region.any(0).nonzero()
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        reading = self.judge.findings(image)[0]
        seen = any(f.shape == "emblem" and centred(f.box, box) for f in reading.objects)
        score = self._score(image, box, seen, reading)
        # A latent pixel spreads over its neighbours when decoded: what touches the region is left out.
        near = torch.nn.functional.max_pool2d(self.region[None], 33, 1, 16)[0]
        kept = self.toy.vae.decode(latents)[..., :3]
        score.outside = float((image - kept).abs().mean(-1)[0][near == 0].mean()) * 255
        return score

    def _patched(self, settings: dict[str, Any] | None) -> Any:
        from subject_patches.nodes.recycled_attention import RecycledSelfAttentionNode

        if settings is None:
            return None
        return RecycledSelfAttentionNode.execute(self.toy.model, self.subject, **settings).args[0]

    def _score(self, image: Tensor, box: Sequence[float], emblem: bool, reading: Any) -> Score:
        background = reading.background == self.scene.scene.background.kind
        return Score(float(alike(self.judge, image, [box], self.identity[None])), emblem, background)


def _free_region(taken: Any, rng: Any) -> Tensor:
    """A disc (128, 128) of 0 and 1 that covers as little as can be of what the scene shows."""
    import numpy as np
    import torch

    y, x = np.mgrid[: taken.shape[0], : taken.shape[1]] + 0.5
    discs = [np.hypot(x - cx, y - cy) < 30 for cx, cy in rng.uniform(32, 96, size=(40, 2))]
    return torch.from_numpy(min(discs, key=lambda disc: int((disc & taken).sum()))).float()


def table(scores: dict[str, list[Score]]) -> None:
    """Prints rows of scores, paired with the unpatched ones; what is outside only where there is a region."""
    regional = any(score.outside is not None for score in scores[UNPATCHED])
    columns = ["identity", "rise, paired", "emblem found", "background right"]
    columns += ["outside, of 255"] if regional else []
    print(heading(*columns))
    identity = {name: [s.identity for s in rows] for name, rows in scores.items()}
    for name, rows in scores.items():
        cells = [f"{mean(identity[name]):.3f}", paired(identity[UNPATCHED], identity[name])]
        cells += [share([s.emblem for s in rows]), share([s.background for s in rows])]
        cells += [f"{mean(s.outside for s in rows):.2f}"] if regional else []
        print(row(name, *cells))


def costs(shape: Shape) -> dict[str, Callable[[Any], Any]]:
    """The benchmark's rows: a name, and a function that patches a model with a fresh subject."""
    import torch
    from subject_patches.nodes.recycled_attention import RecycledSelfAttentionNode
    from subject_patches.patches.mechanisms.subject import Reference, Subject

    generator = torch.Generator().manual_seed(1)
    region = shape.middle()

    def recycled(**settings: Any) -> Callable[[Any], Any]:
        def patch(model: Any) -> Any:
            latents = torch.randn(1, shape.channels, shape.size, shape.size, generator=generator)
            subject = Subject((Reference(torch.empty(0), latents, settings.get("mask")),), "")
            given = {name: value for name, value in settings.items() if name != "mask"}
            return RecycledSelfAttentionNode.execute(model, (subject,), **given).args[0]

        return patch

    return {
        "recycled self-attention": recycled(),
        "recycled self-attention, strength 0.5": recycled(strength=0.5),
        "recycled self-attention, region and reference masks": recycled(region_mask=region, mask=region),
        **({"the recycled attention alone, not in the pack": _alone(shape)} if shape.flux else {}),
    }


def _alone(shape: Shape) -> Callable[[Any], Any]:
    """What recycling costs at least in a transformer: every attention of the conditioned chunk with as many more keys
    as the picture has, the same ones each time, by a bare override."""
    import torch

    count = (shape.size // 2) ** 2
    more: list[Tensor] = []

    def attend(function: Any, query: Tensor, key: Tensor, value: Tensor, heads: int, **named: Any) -> Tensor:
        if not more:
            more.append(torch.randn((1, *key.shape[1:2], count, key.shape[3])).to(key))
        outputs = []
        size = len(query) // len(named["transformer_options"]["cond_or_uncond"])
        for number, chunk in enumerate(named["transformer_options"]["cond_or_uncond"]):
            rows = slice(number * size, (number + 1) * size)
            k, v = (torch.cat([each[rows], more[0]], 2) if chunk == 0 else each[rows] for each in (key, value))
            outputs.append(function(query[rows], k, v, heads, **named))
        return torch.cat(outputs)

    def patch(model: Any) -> Any:
        alone = model.clone()
        alone.model_options["transformer_options"]["optimized_attention_override"] = attend
        return alone

    return patch
