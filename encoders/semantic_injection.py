"""AnyLogo's semantic injection as a file: the linear maps of its groups, and for small models the vision model.

`semantic.GROUP.weight` (context, features) and `semantic.GROUP.bias` (context) of each group, 0 to 3, that the
family's U-Net has a layer for; `vision.*`, the weights of a vision model that the host's loader does not know. The
U-Net that was tuned with them is a LoRA, a file of its own for the host's LoRA loader. Its metadata tell the sizes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..patches.semantic_injection import GROUPS, Hierarchy, Maps, layers_of
from .anystory_file import FORMAT
from .segmented import segmented
from .vision import vision_model
from .weights import check_shapes

KIND, VERSION = "anylogo-unet", "1"
PROMPTS = ("kept", "replaced")
_PREFIX, _VISION = "semantic.", "vision."
_NAMES = ("weight", "bias")


@dataclass(frozen=True)
class MapsForm:
    """What decides every name and shape of a file: the channels of a prompt's tokens, of the vision model's, which
    `groups` there are, and whether the maps were trained beside a `prompt` or in its place, one of PROMPTS."""

    context: int
    features: int
    groups: tuple[int, ...]
    prompt: str


def form_said(told: str) -> MapsForm:
    """The form that a file's metadata tell. Raises ValueError with a phrase where they are broken."""
    try:
        values = json.loads(told)
        form = MapsForm(int(values["context"]), int(values["features"]), tuple(values["groups"]), values["prompt"])
        if not (min(form.context, form.features) > 0 and form.groups and set(form.groups) <= set(range(GROUPS))):
            raise ValueError(f"the sizes {form.context}, {form.features} and groups {form.groups}")
        if form.prompt not in PROMPTS:
            raise ValueError(f"the prompt '{form.prompt}'")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"its metadata are broken ({error})") from error
    return form


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
    import comfy.model_management

    comfy.model_management.load_model_gpu(vision.patcher)
    inside = torch.ones(image.shape[:3]) if mask is None else mask
    pixels, _ = segmented(image, inside, vision.image_size, vision.image_mean, vision.image_std)
    with torch.inference_mode():
        found = layers_seen(vision.model, pixels.to(vision.load_device))
    return tuple((patches.float().cpu(), whole.float().cpu()) for patches, whole in found)


def metadata(form: MapsForm, family: str, trained_by: str, vision: Mapping[str, Any] | None = None) -> dict[str, str]:
    """What a file says of itself; `vision` is the configuration of the vision model in it, as the host writes them."""
    about = {"format": FORMAT, "kind": KIND, "version": VERSION, "family": family, "trained_by": trained_by}
    brought = {} if vision is None else {"vision": json.dumps(dict(vision), sort_keys=True)}
    return {**about, "form": json.dumps(asdict(form), sort_keys=True), **brought}


def tensors_of(maps: Maps, vision: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of a file, in half precision."""
    parts = {f"{_PREFIX}{g}.{name}": each for g, pair in maps.items() for name, each in zip(_NAMES, pair, strict=True)}
    parts |= {_VISION + name: tensor for name, tensor in (vision or {}).items()}
    return {name: tensor.detach().half().contiguous() for name, tensor in parts.items()}


def read_semantic_maps(path: Path) -> SemanticMaps:
    """Loads a file of semantic injection. Raises ValueError with one sentence where it is none or is damaged."""
    import comfy.utils
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
        if about.get("format") != FORMAT or about.get("kind") != KIND:
            raise ValueError("it holds no maps of AnyLogo's semantic injection")
        if about.get("version") != VERSION:
            raise ValueError(f"it is of version {about.get('version')} where this pack reads {VERSION}")
        form = form_said(about.get("form", ""))
        tensors = comfy.utils.load_torch_file(str(path), safe_load=True)
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith(_VISION)}
        brought = {name.removeprefix(_VISION): each for name, each in tensors.items() if name.startswith(_VISION)}
        shapes = {"weight": (form.context, form.features), "bias": (form.context,)}
        wanted = {f"{_PREFIX}{group}.{part}": shape for group in form.groups for part, shape in shapes.items()}
        check_shapes({name: torch.empty(shape, device="meta") for name, shape in wanted.items()}, own)
        if bool(brought) != ("vision" in about):
            raise ValueError("it does not say of which kind its vision model is" if brought else "it lacks its vision")
        vision = vision_model(about["vision"], brought) if brought else None
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).strip().rstrip(".")
        raise ValueError(
            f"'{path.name}' cannot be loaded as semantic injection: {reason}. Take an anylogo-FAMILY.safetensors that "
            "the pack's training wrote, or download it again."
        ) from error
    maps = {g: tuple(own[f"{_PREFIX}{g}.{part}"].float() for part in _NAMES) for g in form.groups}
    return SemanticMaps(path.name, about.get("family", "a U-Net"), form, maps, vision)
