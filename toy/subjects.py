"""How the toy's subject encoder is trained (AnyStory, section 3.4, first stage): see `train_subjects.py`, the command.

Pairs of pictures of one emblem: one becomes a reference as the Subject Reference and Encode Subjects nodes make it, the
other, a scene with the emblem in it, is to be denoised. The U-Net is frozen; what is trained is the ReferenceNet, the
QFormer and the projections of both. One row in ten learns the unconditional pass: no caption, no reference, and the
tokens of an empty picture. Tokens or reference are left out of further rows, so that each also works alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..encoders.reference_net import first_weights, shape_of
from ..encoders.segmented import segmented
from ..encoders.subject_encoder import Form, SubjectModules
from ..patches.families.unet import layer_at, sites_of
from ..patches.image_prompt import KeysAndValues
from ..patches.masks import resize_mask, tokens_inside
from ..patches.sites import Site
from ..patches.subject import fit, mask_bounds
from .data import CELL, Words
from .drawing import Picture, draw
from .family import LATENT_CHANNELS, UNET, VISION
from .scenes import COLOURS, EMBLEM, SIZE, Background, Emblem, describe, sample_emblem, sample_scene, view
from .train_diffusion import SNR_CAP, alphas_cumprod, encode_text

REFERENCE = VISION["image_size"]
VIEWS = 2
UNCONDITIONAL, NO_TOKENS, NO_REFERENCE = 0.1, 0.15, 0.15
EMBLEM_WEIGHT = 6.0
LARGE = 3.5 * CELL
LOGGED = (500, 700)
# What is said of a key that is not there: a gradient cannot go through minus infinity's difference with itself.
ABSENT = -1e4
FORM = Form(
    shape_of(UNET, LATENT_CHANNELS), VISION["hidden_size"], tokens=8, width=64, heads=4, size=REFERENCE, scale=1.0
)


def scene_with(emblem: Emblem, rng: np.random.Generator) -> tuple[Picture, int]:
    """A picture of the emblem, alone or beside one or two other things, and which of its things it is."""
    count = int(rng.choice([1, 2, 3], p=[0.7, 0.2, 0.1]))
    # Half of those alone are so large that latents can hold their glyph.
    smallest = LARGE if count == 1 and rng.random() < 0.5 else 0.0
    scene = sample_scene(rng, count, 0.0)
    while scene.things[0].radius < smallest or emblem.plate_colour in scene.background.colours:
        scene = sample_scene(rng, count, 0.0)
    place = int(rng.integers(count))
    shown = replace(scene.things[place], shape=EMBLEM, colour=emblem.plate_colour, texture="plain", emblem=emblem)
    scene = replace(scene, things=(*scene.things[:place], shown, *scene.things[place + 1 :]))
    return draw(replace(scene, caption=describe(scene, rng))), place


def reference_of(emblem: Emblem, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A picture of the emblem (1, 3, 96, 96) of -1 to 1 and its mask (1, 96, 96), as the nodes make them."""
    colours = [name for name in COLOURS if name != emblem.plate_colour]
    ground = None if rng.random() < 0.4 else Background("plain", (str(rng.choice(colours)),))
    drawn = draw(view(emblem, rng, ground))
    image, mask = torch.from_numpy(drawn.image).float()[None] / 255, torch.from_numpy(drawn.masks[:1]).float()
    x0, y0, x1, y1 = mask_bounds(mask[0], float(rng.uniform(0.08, 0.22)))
    image, mask = fit(image[:, y0:y1, x0:x1], mask[:, y0:y1, x0:x1], REFERENCE, CELL)
    return segmented(image, mask, REFERENCE)


@dataclass
class Batch:
    """Rows to train on: `latents` (n, 8, 16, 16) of scenes and where the emblem is in them `emblem` (n, 16, 16),
    `tokens` (n, 77) of their captions, `references` (n, 8, 12, 12) and `mask` (n, 12, 12), and the references'
    `pixels` (n, 3, 96, 96)."""

    latents: Tensor
    emblem: Tensor
    tokens: Tensor
    references: Tensor
    mask: Tensor
    pixels: Tensor


class Pairs:
    """A store of encoded pairs: every emblem has two scenes and two references, and a batch takes one of each."""

    def __init__(self, autoencoder: Any, rng: np.random.Generator, capacity: int) -> None:
        self.autoencoder, self.rng, self.capacity, self.written = autoencoder, rng, capacity, 0
        self.words = Words()
        cells, small = SIZE // CELL, REFERENCE // CELL
        half, shape = torch.float16, (capacity, VIEWS)
        self.latents = torch.empty(*shape, LATENT_CHANNELS, cells, cells, dtype=half)
        self.emblem = torch.empty(*shape, cells, cells, dtype=half)
        self.tokens = torch.empty(*shape, 77, dtype=torch.int32)
        self.references = torch.empty(*shape, LATENT_CHANNELS, small, small, dtype=half)
        self.mask = torch.empty(*shape, small, small, dtype=half)
        self.pixels = torch.empty(*shape, 3, REFERENCE, REFERENCE, dtype=torch.uint8)

    def _encoded(self, pixels: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return self.autoencoder.encode(pixels).float()

    def add(self, count: int) -> None:
        """Draws and encodes so many more emblems."""
        emblems = [sample_emblem(self.rng) for _ in range(count)]
        scenes = [scene_with(emblem, self.rng) for emblem in emblems for _ in range(VIEWS)]
        references = [reference_of(emblem, self.rng) for emblem in emblems for _ in range(VIEWS)]
        rows = (self.written + torch.arange(count)) % self.capacity
        images = torch.from_numpy(np.stack([drawn.image for drawn, _ in scenes])).movedim(-1, 1).float() / 127.5 - 1
        inside = torch.from_numpy(np.stack([drawn.masks[place] for drawn, place in scenes])).float()
        pixels, masks = (torch.cat(each) for each in zip(*references, strict=True))
        made = {
            "latents": self._encoded(images),
            "emblem": resize_mask(inside, (SIZE // CELL, SIZE // CELL)),
            "tokens": self.words([drawn.scene.caption for drawn, _ in scenes]),
            "references": self._encoded(pixels),
            "mask": resize_mask(masks, (REFERENCE // CELL, REFERENCE // CELL)),
            "pixels": ((pixels + 1) * 127.5).round().clamp(0, 255),
        }
        for name, tensor in made.items():
            store = getattr(self, name)
            store[rows] = tensor.view(count, VIEWS, *tensor.shape[1:]).to(store.dtype)
        self.written += count

    def draw(self, count: int, generator: torch.Generator | None = None) -> Batch:
        """Rows of emblems, scenes and references at random."""
        drawn = torch.randint(min(self.written, self.capacity), (count,), generator=generator)
        scene, reference = (torch.randint(VIEWS, (count,), generator=generator) for _ in range(2))
        return Batch(
            self.latents[drawn, scene].float(), self.emblem[drawn, scene].float(), self.tokens[drawn, scene].long(),
            self.references[drawn, reference].float(), self.mask[drawn, reference].float(),
            self.pixels[drawn, reference].float() / 127.5 - 1,
        )  # fmt: skip


def encoder_modules(unet: nn.Module) -> SubjectModules:
    """The modules before their training: what there is of the U-Net's own weights, and for the rest usual ones. The
    values of the tokens begin at zero, so that they begin as nothing."""
    from comfy.ops import disable_weight_init

    modules = SubjectModules(FORM, nn, disable_weight_init)
    modules.reference_net.load_state_dict(first_weights(unet.state_dict(), LATENT_CHANNELS))
    with torch.no_grad():
        for site in modules.delivering:
            own = layer_at(unet, site)
            modules.reference.at(site).to_k.weight.copy_(own.to_k.weight)
            modules.reference.at(site).to_v.weight.copy_(own.to_v.weight)
        for site in modules.cross:
            modules.image.at(site).to_k.weight.copy_(layer_at(unet, site).to_k.weight)
            modules.image.at(site).to_v.weight.zero_()
    return modules


@dataclass
class Shown:
    """What a call of the U-Net is shown of subjects: Eq. 5's `prompts` with a weight (n) for each row, and Eq. 6's
    `references` with the bias (n, 1, 1, keys) of their logits; see `SubjectModules`."""

    prompts: Mapping[Site, KeysAndValues]
    weight: Tensor
    references: Mapping[Site, KeysAndValues]
    bias: Mapping[Site, Tensor]


def predicted(unet: nn.Module, noisy: Tensor, timestep: Tensor, context: Tensor, shown: Shown) -> Tensor:
    """The U-Net's prediction with the subjects shown at every place: there is no router in the first stage."""

    def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
        return functional.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)

    def own(site: Site) -> Any:
        def extended(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
            key, value = shown.references[site]
            bias = functional.pad(shown.bias[site].to(q), (k.shape[1], 0))
            return attend(q, torch.cat([k, key.to(k)], 1), torch.cat([v, value.to(v)], 1), extra["n_heads"], bias)

        return extended

    def told(site: Site) -> Any:
        def injected(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
            key, value = (each.to(q) for each in shown.prompts[site])
            term = attend(q, key, value, extra["n_heads"]) * shown.weight.to(q).view(-1, 1, 1)
            return attend(q, k, v, extra["n_heads"]) + term

        return injected

    replaced = {
        "attn1": {site.key: own(site) for site in shown.references},
        "attn2": {site.key: told(site) for site in shown.prompts},
    }
    return unet(noisy, timestep, context=context, transformer_options={"patches_replace": replaced}).float()


class Stage:
    """What the training and its measure share: the frozen parts of the toy, its schedule, and the empty picture."""

    def __init__(self, model: Any, vision: Any, empty: Tensor) -> None:
        self.unet, self.text, self.vision = model.unet.eval(), model.text.text_model, vision
        self.empty = empty
        self.schedule = alphas_cumprod(torch.device("cpu"))
        self.sites = sites_of(self.unet)
        with torch.no_grad():
            self.nothing = vision(torch.zeros(1, 3, REFERENCE, REFERENCE), intermediate_output=-2)[1]

    def noised(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        alpha = self.schedule[timestep].view(-1, 1, 1, 1)
        return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise

    def prediction(
        self,
        modules: SubjectModules,
        batch: Batch,
        noisy: Tensor,
        timestep: Tensor,
        rows: Mapping[str, Tensor],
        precision: torch.dtype = torch.bfloat16,
    ) -> Tensor:
        """The U-Net's prediction, computed in a `precision`. `rows` says of which rows (n, bool) the pass is
        `unconditional`, and of which further ones the `tokens` and the `reference` are there."""
        apart = rows["unconditional"]
        tokens = torch.where(apart[:, None], self.empty, batch.tokens)
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            with torch.no_grad():
                context = encode_text(self.text, tokens)
                seen = self.vision(batch.pixels, intermediate_output=-2)[1].float()
                seen = torch.where(apart[:, None, None], self.nothing, seen)
            given = modules.references(batch.references, batch.mask)
            absent = (apart | ~rows["reference"])[:, None]
            bias = {}
            for site, (_, _, grid) in given.items():
                hidden = ~tokens_inside(batch.mask, grid) | absent
                bias[site] = torch.zeros(hidden.shape).masked_fill(hidden, ABSENT)[:, None, None]
            weight = (apart | rows["tokens"]).float()
            references = {site: (key, value) for site, (key, value, _) in given.items()}
            shown = Shown(modules.prompts(seen), weight, references, bias)
            return predicted(self.unet, noisy, timestep, context, shown)

    def loss(self, modules: SubjectModules, batch: Batch) -> Tensor:
        """Eq. 1, weighted as the toy's own training weights it (see `train_diffusion.training_loss`), in and right
        beside the emblem EMBLEM_WEIGHT times as much as on the ground."""
        count = len(batch.latents)
        snr = self.schedule / (1 - self.schedule)
        weights = (snr + 1) / snr * snr.clamp(max=SNR_CAP) / snr
        timestep = torch.randint(len(self.schedule), (count,))
        noise = torch.randn_like(batch.latents)
        rows = {
            "unconditional": torch.rand(count) < UNCONDITIONAL,
            "tokens": torch.rand(count) >= NO_TOKENS,
            "reference": torch.rand(count) >= NO_REFERENCE,
        }
        noisy = self.noised(batch.latents, noise, timestep)
        error = (self.prediction(modules, batch, noisy, timestep, rows) - noise).square()
        inside = functional.max_pool2d((batch.emblem[:, None] > 0.3).float(), 3, 1, 1)
        places = 1 + (EMBLEM_WEIGHT - 1) * inside
        error = (places / places.mean() * error).mean((1, 2, 3))
        return (weights[timestep] * error).mean() / weights.mean()

    @torch.no_grad()
    def fall(self, modules: SubjectModules, held_out: Batch) -> dict[str, float]:
        """By how much the error of the noise in the emblem falls against no reference, of held-out rows under the same
        noise, as a share: -0.08 is 8 % less. At LOGGED timesteps, for tokens, reference, and both."""
        count, found = len(held_out.latents), {}
        generator = torch.Generator().manual_seed(1)
        all_, none = torch.ones(count, dtype=torch.bool), torch.zeros(count, dtype=torch.bool)
        inside = (held_out.emblem[:, None] > 0.3).float()
        for at in LOGGED:
            noise = torch.randn(held_out.latents.shape, generator=generator)
            timestep = torch.full((count,), at)
            noisy = self.noised(held_out.latents, noise, timestep)
            errors = {}
            for name, parts in {
                "none": (none, none), "tokens": (all_, none), "reference": (none, all_), "both": (all_, all_)
            }.items():  # fmt: skip
                rows = {"unconditional": none, "tokens": parts[0], "reference": parts[1]}
                error = (self.prediction(modules, held_out, noisy, timestep, rows) - noise).square()
                errors[name] = float((error * inside).sum() / inside.sum() / LATENT_CHANNELS)
            for name in ("tokens", "reference", "both"):
                found[f"{name} at {at}"] = errors[name] / errors["none"] - 1
        return found
