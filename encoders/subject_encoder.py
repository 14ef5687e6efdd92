"""AnyStory's subject encoder on U-Nets (section 3.2), and its file: QFormer, ReferenceNet and the trained projections.

A file holds `qformer.*`, which makes tokens of what a vision model sees of a subject; `image.SITE.to_{k,v}.weight`,
which make keys and values of them for each cross-attention (Eq. 5); `reference_net.*` in the host's names;
`reference.SITE.to_{k,v}.weight`, which make keys and values of its hidden states for each self-attention but the first
(Eq. 6); where the second stage of the training was run, `router.*` (`router.py`); and, where its family's vision model
is not one that the host loads, `vision.*`. Its metadata tell the sizes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import comfy.model_management
import comfy.ops
import torch
from torch import Tensor, nn

from ..patches.families.unet import sites_of, transformer_blocks
from ..patches.mechanisms.image_prompt import KeysAndValues, in_file_order
from ..patches.parts.masks import tokens_inside
from ..patches.parts.sites import Site
from .by_site import module_at, put
from .loading import kept_by_host, loading, opened, read_tensors
from .reference_net import build, delivering, hidden_states
from .resampler import Resampler
from .router import ROUTER, ROUTER_ENTRY, RouterForm, RouterModules
from .vision import seen
from .weights import FileForm, form_said, shapes_of

# The paper's QFormers.
DEPTH = 4


@dataclass(frozen=True)
class Form(FileForm):
    """The sizes that decide every name and shape of a file: `unet` is the shape of the ReferenceNet, as `shape_of`
    writes it; `features` are the channels of what the vision model sees, `tokens` how many a subject gets; `width` and
    `heads` are the QFormer's; `size` is the side in pixels of the picture that the ReferenceNet reads, `scale` what the
    VAE's latents of it are multiplied by, as the model family does."""

    kind: ClassVar[str] = "anystory-unet"
    foreign: ClassVar[str] = "it is no subject encoder of a U-Net"

    unet: str
    features: int
    tokens: int
    width: int
    heads: int
    size: int
    scale: float

    @property
    def context(self) -> int:
        """The channels of a token: those of the model's prompts."""
        return int(json.loads(self.unet)["context_dim"])

    @property
    def latent_channels(self) -> int:
        return int(json.loads(self.unet)["latent_channels"])

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Form:
        counts = {each.name: int(values[each.name]) for each in fields(cls) if each.name not in ("unet", "scale")}
        form = cls(str(values["unet"]), scale=float(values["scale"]), **counts)
        sizes = [*counts.values(), form.context, form.latent_channels]
        if min(sizes) < 1 or form.width % form.heads or not (0 < form.scale < math.inf):
            raise ValueError(f"the sizes {sizes}")
        return form


class Projections(nn.Module):
    """For each site a pair of linear layers `to_k` and `to_v`, from and to so many channels, under the site's name."""

    def __init__(self, channels: Mapping[Site, tuple[int, int]], operations: Any) -> None:
        super().__init__()
        for site, (taken, given) in channels.items():
            pair = {name: operations.Linear(taken, given, bias=False) for name in ("to_k", "to_v")}
            put(self, site, nn.ModuleDict(pair))

    def at(self, site: Site) -> nn.Module:
        """The pair of a site."""
        return module_at(self, site)

    def forward(self, site: Site, given: Tensor) -> KeysAndValues:
        pair = self.at(site)
        return pair.to_k(given), pair.to_v(given)


class SubjectModules(nn.Module):
    """What a file of a form holds but for the vision model, in the file's names; `operations` has the layers' classes,
    `network` those of the ReferenceNet, which torch's own initialises in vain."""

    def __init__(self, form: Form, operations: Any, network: Any = None) -> None:
        super().__init__()
        self.reference_net = build(form.unet, operations=network or operations)
        sites = sites_of(self.reference_net)
        blocks = transformer_blocks(self.reference_net)
        inner = {site: blocks[site.key].attn1.to_k.weight.shape[0] for site in sites}
        self.cross = {site: channels for site, channels in inner.items() if site.kind == "cross"}
        self.delivering = delivering(sites)
        self.qformer = Resampler(
            form.features, form.context, width=form.width, queries=form.tokens, inner=form.width, heads=form.heads,
            depth=DEPTH, operations=operations,
        )  # fmt: skip
        self.image = Projections({site: (form.context, inner[site]) for site in self.cross}, operations)
        self.reference = Projections({site: (inner[site], inner[site]) for site in self.delivering}, operations)

    def prompts(self, features: Tensor) -> dict[Site, KeysAndValues]:
        """Eq. 5's keys and values (rows, tokens, channels) of what a vision model sees of pictures (rows, n,
        features)."""
        tokens = self.qformer(features)
        return {site: self.image(site, tokens) for site in self.cross}

    def references(self, latents: Tensor, mask: Tensor) -> dict[Site, tuple[Tensor, Tensor, tuple[int, int]]]:
        """Eq. 6's keys and values (rows, tokens, channels) of segmented pictures, and the grid of their tokens; see
        `reference_net.hidden_states`."""
        hidden = hidden_states(self.reference_net, latents, mask, self.delivering)
        return {site: (*self.reference(site, normed), grid) for site, (normed, grid) in hidden.items()}


@dataclass(frozen=True, eq=False)
class SubjectEncoder:
    """A loaded file: the `patcher` holds its `SubjectModules` for the host to move, `vision` is the vision model that
    it brings, as the host's CLIP_VISION, or None; `family` says for whom it was trained, and `router` holds its
    `RouterModules` as `patcher` does, None where there are none."""

    name: str
    family: str
    form: Form
    patcher: Any
    vision: Any
    router: Any = None

    @property
    def modules(self) -> SubjectModules:
        return self.patcher.model

    def _loaded(self) -> torch.device:
        comfy.model_management.load_model_gpu(self.patcher)
        return self.patcher.load_device

    def seen(self, vision: Any, pixels: Tensor) -> Tensor:
        """What the `vision` model sees (rows, n, features) of pictures as it takes them. Raises ValueError unless the
        encoder was trained with a model as wide."""
        features = seen(vision, pixels)
        self.check_vision(features.shape[-1])
        return features

    def check_vision(self, channels: int) -> None:
        """Raises ValueError unless the encoder reads so many channels of a vision model."""
        if channels != self.form.features:
            raise ValueError(
                f"The encoder '{self.name}' reads {self.form.features} channels of a vision model, but the one "
                f"connected gives {channels}; load the vision model that the encoder was trained with."
            )

    @torch.inference_mode()
    def routing(self, features: Tensor) -> Tensor:
        """The router's feature R_i (1, width), float32 on the CPU, of what is `seen` of one subject's pictures: the
        mean over these."""
        comfy.model_management.load_model_gpu(self.router)
        made = self.router.model.features(features.to(self.router.load_device))
        return made.float().mean(0, keepdim=True).cpu()

    @torch.inference_mode()
    def prompts(self, features: Tensor) -> tuple[KeysAndValues, ...]:
        """Keys and values (1, pictures * tokens, channels), float32 on the CPU, for all cross-attention layers in the
        order of published adapters, of what is `seen` of one subject's pictures."""
        made = self.modules.prompts(features.to(self._loaded()))
        joined = {site: tuple(t.flatten(0, 1)[None].float().cpu() for t in pair) for site, pair in made.items()}
        return tuple(joined[site] for site in in_file_order(joined))

    @torch.inference_mode()
    def references(self, latents: Tensor, mask: Tensor) -> dict[Site, KeysAndValues]:
        """Keys and values (1, n, channels), float32 on the CPU, of the places of one segmented picture that are the
        subject's; see `SubjectModules.references`."""
        device = self._loaded()
        made = self.modules.references(latents.to(device, torch.float32), mask.to(device, torch.float32))
        kept = {}
        for site, (key, value, grid) in made.items():
            inside = tokens_inside(mask, grid)[0].nonzero().squeeze(1).to(device)
            kept[site] = (key[:, inside].float().cpu(), value[:, inside].float().cpu())
        return kept


def router_modules(router: RouterForm, form: Form, channels: Mapping[Site, int], operations: Any) -> RouterModules:
    """The router of an encoder of a `form`; `channels` are those of the U-Net's cross-attentions."""
    return RouterModules(
        router, channels, operations, features=form.features, width=form.width, heads=form.heads, depth=DEPTH
    )


def read_subject_encoder(path: Path) -> SubjectEncoder:
    """Loads a subject encoder's file. Raises ValueError with one sentence where it is none or is damaged."""
    remedy = "Take a file that the pack's training wrote, or download it again."
    with loading(path, "a subject encoder", remedy):
        about, shapes = opened(path)
        form, router = form_said(about, Form), None
        with torch.device("meta"):
            modules = SubjectModules(form, comfy.ops.manual_cast)
            if ROUTER_ENTRY in about:
                told = RouterForm.read(about[ROUTER_ENTRY])
                router = router_modules(told, form, modules.cross, comfy.ops.manual_cast)
        wanted = shapes_of(modules.state_dict())
        if router is not None:
            wanted |= {ROUTER + name: shape for name, shape in shapes_of(router.state_dict()).items()}
        own, vision = read_tensors(path, about, shapes, wanted)
        routing = {name.removeprefix(ROUTER): own.pop(name) for name in list(own) if name.startswith(ROUTER)}
        modules.load_state_dict(own, assign=True)
        if router is not None:
            router.load_state_dict(routing, assign=True)
    routed = None if router is None else kept_by_host(router)
    return SubjectEncoder(path.name, about.get("family", "a U-Net"), form, kept_by_host(modules), vision, routed)
