"""Loaders for a test's server, in the places of the host's own whose files have to be of a released model's sizes:
small models with random weights, in the host's own classes, that fit one another."""

from __future__ import annotations

from functools import partial
from typing import Any

import comfy.sd
from clips import ENCODERS, small_encoder
from comfy.ldm.flux.redux import ReduxImageEncoder
from comfy.t2i_adapter.adapter import StyleAdapter
from dit_models import dit_model
from hosting.random_models import fill
from small_vision import VISION, clip_vision, dinov2, siglip

# How wide the small text encoders' tokens are.
CONTEXT = 16
# By what a small model reads them.
_READS: dict[str, dict[str, Any]] = {"Z-Image": {"cap_feat_dim": CONTEXT}}

_VISIONS = {"siglip": siglip, "dinov2": dinov2, "clip": partial(clip_vision, projection_dim=VISION)}


class _Loader:
    CATEGORY = "test"
    FUNCTION = "load"


class SmallModel(_Loader):
    """A MODEL of a transformer family, which reads what the family's small CLIP makes."""

    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802, the host's name
        return {"required": {"family": (list(_READS),)}}

    def load(self, family: str) -> tuple[Any]:
        return (dit_model(family, **_READS[family]),)


class SmallClip(_Loader):
    """A CLIP of a transformer family: the host's tokenizers and its text encoders."""

    RETURN_TYPES = ("CLIP",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802, the host's name
        return {"required": {"family": (list(ENCODERS),)}}

    def load(self, family: str) -> tuple[Any]:
        return (small_encoder(family),)


class SmallVision(_Loader):
    """A SigLIP, a DINOv2, or a CLIP, which alone pools what it sees, as wide as the others."""

    RETURN_TYPES = ("CLIP_VISION",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802, the host's name
        return {"required": {}, "optional": {"kind": (list(_VISIONS),)}}

    def load(self, kind: str = "siglip") -> tuple[Any]:
        return (_VISIONS[kind](),)


class SmallStyle(_Loader):
    """A Redux model for the SigLIP and the small FLUX, or a style model of another kind."""

    RETURN_TYPES = ("STYLE_MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802, the host's name
        return {"required": {"kind": (["redux", "adapter"],)}}

    def load(self, kind: str) -> tuple[Any]:
        module = ReduxImageEncoder(VISION, CONTEXT) if kind == "redux" else StyleAdapter(width=32, num_head=2)
        fill(module, 5)
        return (comfy.sd.StyleModel(module),)


LOADERS = {each.__name__: each for each in (SmallModel, SmallClip, SmallVision, SmallStyle)}
