"""AnyLogo's semantic injection as a file: the linear maps of its groups, and for small models the vision model.

`semantic.GROUP.weight` (context, features) and `semantic.GROUP.bias` (context) of each group, 0 to 3, that the
family's U-Net has a layer for; `vision.*`, the weights of a vision model that the host's loader does not know. The
U-Net that was tuned with them is a LoRA, a file of its own for the host's LoRA loader. Its metadata tell the sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import comfy.model_management
import torch
from torch import Tensor, nn

from ..patches.mechanisms.semantic_injection import GROUPS, Hierarchy, Maps, layers_of
from .loading import file_tensors, loading, opened, read_tensors
from .segmented import segmented
from .weights import FileForm, Shape, form_said

PROMPTS = ("kept", "replaced")
_PREFIX = "semantic."
_NAMES = ("weight", "bias")


@dataclass(frozen=True)
class MapsForm(FileForm):
    """What decides every name and shape of a file: the channels of a prompt's tokens, of the vision model's, which
    `groups` there are, and whether the maps were trained beside a `prompt` or in its place, one of PROMPTS."""

    kind: ClassVar[str] = "anylogo-unet"
    foreign: ClassVar[str] = "it holds no maps of AnyLogo's semantic injection"

    context: int
    features: int
    groups: tuple[int, ...]
    prompt: str

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> MapsForm:
        form = cls(int(values["context"]), int(values["features"]), tuple(values["groups"]), values["prompt"])
        if not (min(form.context, form.features) > 0 and form.groups and set(form.groups) <= set(range(GROUPS))):
            raise ValueError(f"the sizes {form.context}, {form.features} and groups {form.groups}")
        if form.prompt not in PROMPTS:
            raise ValueError(f"the prompt '{form.prompt}'")
        return form

    def shapes(self) -> dict[str, Shape]:
        """Every name of a file but for its vision model's, with its shape."""
        parts = {"weight": (self.context, self.features), "bias": (self.context,)}
        return {f"{_PREFIX}{group}.{name}": shape for group in self.groups for name, shape in parts.items()}


@dataclass(frozen=True, eq=False)
class SemanticMaps:
    """A loaded file: of each group the weight (context, features) and bias (context) of its map, in float32 on the CPU;
    `family` says for whom they were trained, `vision` is the host's CLIP_VISION that the file brings, or None."""

    name: str
    family: str
    form: MapsForm
    maps: Maps
    vision: Any = None

    def vision_model(self, connected: Any) -> Any:
        """The vision model to look with: the connected one, else the file's own. Raises ValueError when there is none,
        or it is not one that the maps were trained for."""
        vision, features = self.vision if connected is None else connected, self.form.features
        if vision is None:
            raise ValueError(
                f"'{self.name}' brings no vision model; connect Load CLIP Vision with a DINOv2 of {features} channels "
                "(ViT-L has 1024)."
            )
        kind = getattr(vision, "model_type", type(vision).__name__)
        if kind != "dinov2":
            raise ValueError(
                f"'{self.name}' reads the layers of a DINOv2, but the vision model connected is a {kind}; load a "
                "DINOv2 with Load CLIP Vision."
            )
        width = vision.model.embed_dim
        if width != features:
            raise ValueError(
                f"'{self.name}' reads a DINOv2 of {features} channels, but the one connected has {width}; load the "
                "vision model that it was trained with (ViT-L has 1024)."
            )
        return vision


def layers_seen(network: nn.Module, pixels: Tensor) -> Hierarchy:
    """The four groups of what the host's DINOv2 `network` sees of `pixels` (rows, 3, height, width), each normalised as
    the network's last layer is."""
    wanted = [after - 1 for after in layers_of(len(network.encoder.layer))]
    return tuple(network.get_intermediate_layers(pixels, wanted))


def hierarchy(vision: Any, image: Tensor, mask: Tensor | None) -> Hierarchy:
    """The four groups of a picture (1, height, width, 3) of 0 to 1, what is outside the mask (1, height, width) cut
    out, as a CLIP_VISION sees it; float32 on the CPU."""
    comfy.model_management.load_model_gpu(vision.patcher)
    inside = torch.ones(image.shape[:3]) if mask is None else mask
    pixels, _ = segmented(image, inside, vision.image_size, vision.image_mean, vision.image_std)
    with torch.inference_mode():
        found = layers_seen(vision.model, pixels.to(vision.load_device))
    return tuple((patches.float().cpu(), whole.float().cpu()) for patches, whole in found)


def tensors_of(maps: Maps, vision: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of a file; see `file_tensors`."""
    own = {f"{_PREFIX}{g}.{name}": each for g, pair in maps.items() for name, each in zip(_NAMES, pair, strict=True)}
    return file_tensors(own, vision)


def read_semantic_maps(path: Path) -> SemanticMaps:
    """Loads a file of semantic injection. Raises ValueError with one sentence where it is none or is damaged."""
    remedy = "Take an anylogo-FAMILY.safetensors that the pack's training wrote, or download it again."
    with loading(path, "semantic injection", remedy):
        about, shapes = opened(path)
        form = form_said(about, MapsForm)
        own, vision = read_tensors(path, about, shapes, form.shapes())
    maps = {g: tuple(own[f"{_PREFIX}{g}.{part}"].float() for part in _NAMES) for g in form.groups}
    return SemanticMaps(path.name, about.get("family", "a U-Net"), form, maps, vision)
