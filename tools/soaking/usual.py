"""What a case has besides the node that it is for: models, pictures and prompts, and what makes a picture of them."""

from __future__ import annotations

import random
from typing import Any

from hosting.client import ApiPrompt

from .described import inputs_of
from .drawn import is_widget, widget
from .homes import UNETS, Link, home_nodes
from .values import TEXTS

# Other patches of the host's, which stand before and behind the pack's.
HOST_PATCHES = ("RescaleCFG", "CFGZeroStar")
# Those that U-Nets alone have openings for.
HOST_UNET_PATCHES = ("FreeU_V2", "TomePatchModel", "HyperTile", "PerturbedAttentionGuidance", *HOST_PATCHES)
PICTURES = tuple(f"subject_patches_{name}.png" for name in ("emblem", "second_emblem", "scene", "shield_1"))
# Of pictures that a run at full length can have, too.
SIZES = ((64, 64), (96, 64), (72, 104))
SAMPLERS = ("euler", "euler", "dpmpp_2m", "heun", "dpmpp_2s_ancestral", "uni_pc", "euler_cfg_pp")


class Usual:
    """A workflow that begins with a model of `HOMES`; `links` are its parts, `positive` the sampler's prompt where a
    node has to have the same."""

    def __init__(self, rng: random.Random, known: dict[str, Any], home: str) -> None:
        self.rng, self.known, self.home = rng, known, home
        self.prompt: ApiPrompt = {}
        self.links = self.parts(home)
        self.positive: Link | None = None

    def add(self, kind: str, /, **inputs: Any) -> str:
        """A node; the number is its own."""
        number = str(len(self.prompt))
        self.prompt[number] = {"class_type": kind, "inputs": inputs}
        return number

    def parts(self, name: str) -> dict[str, Link]:
        """The links of a model's parts, whose loaders join the workflow."""
        loaders, links = home_nodes(name)
        self.prompt |= {number: node for number, node in loaders.items() if number not in self.prompt}
        return links

    def patched(self, model: Link) -> Link:
        """A MODEL with a patch of the host's."""
        kind = self.rng.choice(HOST_UNET_PATCHES if self.home in UNETS else HOST_PATCHES)
        widgets = {
            name: widget(self.rng, name, type_, options, 1)
            for name, (type_, options, _) in inputs_of(self.known, kind).items()
            if is_widget(type_)
        }
        return [self.add(kind, model=model, **widgets), 0]

    def image(self) -> Link:
        """A picture; its opacity is the second output."""
        return [self.add("LoadImage", image=self.rng.choice(PICTURES)), 0]

    def small(self) -> Link:
        """A picture of a size that a run at full length can have."""
        width, height = self.rng.choice(SIZES)
        sides = {"width": width, "height": height, "upscale_method": "area", "crop": "disabled"}
        return [self.add("ImageScale", image=self.image(), **sides), 0]

    def text(self, clip: Link | None = None) -> Link:
        """A prompt that knows its phrases."""
        given = {"clip": clip or self.links["CLIP"], "text": TEXTS["text"][0], "phrases": TEXTS["phrases"][0]}
        return [self.add("SubjectPatchesEncodePrompt", **given), 0]

    def sigmas(self) -> Link:
        steps = self.rng.randint(2, 4)
        return [self.add("BasicScheduler", model=self.links["MODEL"], scheduler="normal", steps=steps, denoise=1.0), 0]

    def sampler(self) -> Link:
        return [self.add("KSamplerSelect", sampler_name=self.rng.choice(SAMPLERS)), 0]

    def empty(self) -> Link:
        width, height = self.rng.choice(SIZES)
        count = self.rng.choice((1, 1, 2))
        return [self.add("EmptyLatentImage", width=width, height=height, batch_size=count), 0]

    # To a picture

    def sampled(self, **given: Link) -> Link:
        """A picture in two steps."""
        sampling = {"seed": 5, "steps": 2, "cfg": self.rng.choice((1.0, 3.0)), "denoise": 1.0}
        usual = {"model": self.links["MODEL"], "sampler_name": self.rng.choice(SAMPLERS), "scheduler": "normal"}
        usual |= {"positive": self.positive or self.text(), "latent_image": self.empty()} | given
        negative = [self.add("CLIPTextEncode", clip=self.links["CLIP"], text=""), 0]
        return self.decoded([self.add("KSampler", negative=negative, **sampling, **usual), 0])

    def custom(self, **given: Link) -> Link:
        """The same by the sampler that takes its parts apart."""
        usual = {"noise": [self.add("RandomNoise", noise_seed=5), 0], "sampler": self.sampler()}
        if "guider" not in given:
            prompts = {"positive": self.positive or self.text(), "negative": self.text()}
            usual["guider"] = [self.add("CFGGuider", model=self.links["MODEL"], cfg=3.0, **prompts), 0]
        usual |= {"sigmas": self.sigmas(), "latent_image": self.empty()} | given
        return self.decoded([self.add("SamplerCustomAdvanced", **usual), 0])

    def decoded(self, latent: Link) -> Link:
        return [self.add("VAEDecode", samples=latent, vae=self.links["VAE"]), 0]

    def digest(self, images: Link) -> None:
        self.add("SoakDigest", images=images)
