"""Workflows in API format that are being made for real models: what each begins with, and how it ends."""

from __future__ import annotations

from dataclasses import dataclass
from string import ascii_lowercase
from typing import Any, ClassVar

from .client import ApiPrompt

Link = list[Any]
NOUNS_IN_PROMPT = "Prompt: {a} and {b} stand for both"
NEGATIVE = "blurry, low quality, watermark, text"
CHECKPOINT_NOTE = """

**Choose your checkpoint** in Load Checkpoint first: this workflow has the size, steps and guidance of {family}, and
any checkpoint of that family works. **{title}** says how big {what}; it stands nowhere else."""
DISTILLED_NOTE = """

**Choose your files** in Load Diffusion Model, Load CLIP and Load VAE first. {family} needs three, under
*models*: *diffusion_models/z_image_turbo_bf16.safetensors*, its text encoder *text_encoders/qwen_3_4b.safetensors*
(type lumina2) and FLUX.1's VAE, *vae/ae.safetensors*. It is distilled: CFG stays 1, so there is no negative prompt, and
8 steps are enough. **{title}** says how big {what}; it stands nowhere else.{chosen}

**Another transformer** (Qwen-Image, SD 3.5, Chroma, Krea 2 and so on): begin with its own template, and put this pack's
nodes there between its model and its sampler."""


@dataclass(frozen=True)
class Family:
    """What workflows for a family of checkpoints have: a usual checkpoint, the side of its pictures, guidance."""

    name: str
    checkpoint: str
    side: int
    cfg: float

    @property
    def subject(self) -> int:
        """The longer side of references: that did best on both small models (docs/EFFECTS.md)."""
        return self.side * 3 // 4


FAMILIES = {
    "sd15": Family("SD 1.5", "v1-5-pruned-emaonly-fp16.safetensors", 512, 7.0),
    "sdxl": Family("SDXL", "sd_xl_base_1.0.safetensors", 1024, 6.0),
}
FLUX_NOTE = """

**Choose your files** in Load Diffusion Model, Load CLIP (Dual) and Load VAE first. FLUX.1 dev needs four, under
*models*: *diffusion_models/flux1-dev.safetensors*, its text encoders *text_encoders/clip_l.safetensors* and
*text_encoders/t5xxl_fp16.safetensors*, and its VAE, *vae/ae.safetensors*. A checkpoint that has all in one file goes
into Load Checkpoint in their place. It is distilled: {cfg}FluxGuidance says how closely the prompt is
followed. **{title}** says how big {what}; it stands nowhere else.{chosen}"""
_CHOSEN = """ The defaults of references and
layouts on transformers were chosen on the pack's second small model: try more and less of them."""
# Recipes whose nodes have such defaults.
_WITH_CHOSEN = frozenset({"reference", "two_subjects", "layout"})
DISTILLED = {"zimage": Family("Z-Image Turbo", "z_image_turbo_bf16.safetensors", 1024, 1.0)}
FLUX = {"flux": Family("FLUX.1 dev", "flux1-dev.safetensors", 1024, 1.0)}


class Graph:
    """A workflow for a checkpoint; `add` gives the new node's number."""

    told: ClassVar[str] = CHECKPOINT_NOTE

    def __init__(self, family: Family) -> None:
        self.family = family
        self.prompt: ApiPrompt = {}
        self.model, self.clip, self.vae = self.loaded()

    def loaded(self) -> tuple[Link, Link, Link]:
        """MODEL, CLIP and VAE."""
        checkpoint = self.add("CheckpointLoaderSimple", ckpt_name=self.family.checkpoint)
        return [checkpoint, 0], [checkpoint, 1], [checkpoint, 2]

    def note(self, kind: str) -> str:
        """What the note of a recipe's workflow says of the family."""
        title = "Size of the picture" if kind == "reference" else "Side of the picture"
        what = "the region is generated" if kind == "small_region" else "the picture is"
        chosen = _CHOSEN if kind in _WITH_CHOSEN else ""
        # AnyStory's graph samples without.
        cfg = "" if kind == "anystory" else "CFG stays 1, "
        return self.told.format(family=self.family.name, title=title, what=what, chosen=chosen, cfg=cfg)

    def add(self, kind: str, title: str = "", /, **inputs: Any) -> str:
        """A node of the host's or the pack's own; inputs that are not named keep what a new node has."""
        number = str(len(self.prompt) + 1)
        self.prompt[number] = {"class_type": kind, "inputs": inputs, **({"_meta": {"title": title}} if title else {})}
        return number

    def side(self, pixels: int = 0) -> Link:
        """The side of the picture, in the one place where it stands; by default the family's."""
        return [self.add("PrimitiveInt", "Side of the picture", value=pixels or self.family.side), 0]

    def told_of_sizes(self) -> str:
        """What the note says of how big references are."""
        return (
            f" *size* of Subject Reference, {self.family.subject}, is 3/4 of the picture's side: on the pack's small "
            "models, larger references lost subject and ground, and smaller ones showed less."
        )

    def noun(self, title: str, value: str) -> Link:
        """What a subject is called, in the one place where it stands; `filled` puts it where else it is needed."""
        return [self.add("PrimitiveString", title, value=value), 0]

    def filled(self, title: str, text: str, *words: Link) -> Link:
        """A text in which {a}, {b} and so on stand for the words."""
        values = {f"values.{letter}": word for letter, word in zip(ascii_lowercase, words, strict=False)}
        return [self.add("StringFormat", title, **values, f_string=text), 0]

    def text(self, title: str, text: Link | str) -> Link:
        return [self.add("CLIPTextEncode", title, clip=self.clip, text=text), 0]

    def negative(self, positive: Link, text: str = NEGATIVE) -> Link:
        """The negative conditioning that goes with a positive one."""
        return self.text("Negative prompt", text)

    def guided(self, positive: Link) -> Link:
        """A prompt's conditioning as the model wants it."""
        return positive

    def unprompted(self) -> dict[str, Link]:
        """What an inversion is told for a prompt: with a text encoder alone, that there is none."""
        return {"clip": self.clip}

    def steps(self) -> dict[str, Any]:
        """The schedule of a retouch."""
        return {"scheduler": "normal", "steps": 50, "denoise": 1.0}

    def begun(self, path: str, side: Link) -> dict[str, Link]:
        """The noise and latent of a sampler that begins where an inverted picture ended."""
        return {"noise": [self.add("DisableNoise"), 0], "latent_image": [path, 1]}

    def picture(self, title: str, name: str) -> Link:
        return [self.add("LoadImage", title, image=f"subject_patches_{name}.png"), 0]

    def subject(self, title: str, image: Link, phrase: Link | str = "", **more: Any) -> Link:
        given = {"image": image, "vae": self.vae, "phrase": phrase, "size": self.family.subject, **more}
        return [self.add("SubjectPatchesSubject", title, **given), 0]

    def sampled(self, title: str, model: Link, positive: Link, negative: Link, latent: Link, **more: Any) -> Link:
        """A picture by the host's own sampler."""
        usual = {"seed": 1, "denoise": 1.0, **self.sampling()}
        links = {"model": model, "positive": positive, "negative": negative, "latent_image": latent}
        sampler = self.add("KSampler", title, **links, **usual, **more)
        return self.decoded([sampler, 0])

    def sampling(self) -> dict[str, Any]:
        """Steps, guidance, sampler and scheduler."""
        return {"steps": 25, "cfg": self.family.cfg, "sampler_name": "dpmpp_2m", "scheduler": "karras"}

    def decoded(self, latent: Link) -> Link:
        return [self.add("VAEDecode", samples=latent, vae=self.vae), 0]

    def save(self, title: str, images: Link, prefix: str) -> None:
        self.add("SaveImage", title, images=images, filename_prefix=f"subject_patches/{prefix}")

    def empty(self, side: Link | int, count: int = 1) -> Link:
        return [self.add("EmptyLatentImage", "Size of the picture", width=side, height=side, batch_size=count), 0]


class DistilledGraph(Graph):
    """A workflow for Z-Image Turbo: three loaders, CFG 1 and no negative prompt."""

    told: ClassVar[str] = DISTILLED_NOTE

    def loaded(self) -> tuple[Link, Link, Link]:
        model = self.add("UNETLoader", unet_name=self.family.checkpoint, weight_dtype="default")
        clip = self.add("CLIPLoader", clip_name="qwen_3_4b.safetensors", type="lumina2", device="default")
        vae = self.add("VAELoader", vae_name="ae.safetensors")
        return [self.add("ModelSamplingAuraFlow", model=[model, 0], shift=3.0), 0], [clip, 0], [vae, 0]

    def negative(self, positive: Link, text: str = "") -> Link:
        """Nothing asks for it at CFG 1, but the sampler's input wants to be connected."""
        return [self.add("ConditioningZeroOut", "No negative prompt at CFG 1", conditioning=positive), 0]

    def sampling(self) -> dict[str, Any]:
        """Those of the host's own template."""
        return {"steps": 8, "cfg": self.family.cfg, "sampler_name": "res_multistep", "scheduler": "simple"}

    def empty(self, side: Link | int, count: int = 1) -> Link:
        return [self.add("EmptySD3LatentImage", "Size of the picture", width=side, height=side, batch_size=count), 0]


class FluxGraph(DistilledGraph):
    """A workflow for FLUX.1 dev, which is told its guidance. Being a flow, it begins with nothing but noise."""

    told: ClassVar[str] = FLUX_NOTE

    def loaded(self) -> tuple[Link, Link, Link]:
        model = self.add("UNETLoader", unet_name=self.family.checkpoint, weight_dtype="default")
        names = {"clip_name1": "clip_l.safetensors", "clip_name2": "t5xxl_fp16.safetensors"}
        clip = self.add("DualCLIPLoader", **names, type="flux", device="default")
        return [model, 0], [clip, 0], [self.add("VAELoader", vae_name="ae.safetensors"), 0]

    def guided(self, positive: Link, guidance: float = 3.5) -> Link:
        return [self.add("FluxGuidance", conditioning=positive, guidance=guidance), 0]

    def unprompted(self) -> dict[str, Link]:
        return {"conditioning": self.guided(self.text("No prompt to invert with", ""), 1.0)}

    def steps(self) -> dict[str, Any]:
        return {"scheduler": "simple", "steps": 28, "denoise": 1.0}

    def sampling(self) -> dict[str, Any]:
        """Those of the host's own template."""
        return {"steps": 20, "cfg": self.family.cfg, "sampler_name": "euler", "scheduler": "simple"}

    def begun(self, path: str, side: Link) -> dict[str, Link]:
        return {"noise": [path, 3], "latent_image": self.empty(side)}


def graph_for(family: Family) -> Graph:
    """An empty workflow for a family."""
    if family in FLUX.values():
        return FluxGraph(family)
    return (DistilledGraph if family in DISTILLED.values() else Graph)(family)
