"""The nodes of another pack in the server that is soaked: what turns links into something odd, a digest of pictures, a
latent that the host cannot take from its cache. Imported by the server alone (`served.install`)."""

from __future__ import annotations

import hashlib
from typing import Any

from torch import Tensor

from . import odd

BOX = {"x": 8, "y": 8, "width": 40, "height": 48, "metadata": {"desc": "emblem"}}


class Boxes:
    """One box with a description."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("BOUNDING_BOX",), "made", "soak"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802, the host's name
        return {"required": {}}

    def made(self) -> tuple[Any]:
        return (dict(BOX),)


class Nothing:
    """A CLIP and a VAE of a checkpoint that has none."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("CLIP", "VAE"), "made", "soak"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802, the host's name
        return {"required": {}}

    def made(self) -> tuple[None, None]:
        return None, None


class Again:
    """Gives a latent on; with another number the host has to run what stands behind."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "given", "soak"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802, the host's name
        return {"required": {"latent": ("LATENT",), "number": ("INT", {"default": 0, "min": 0, "max": 2**31})}}

    def given(self, latent: Any, number: int) -> tuple[Any]:
        return (latent,)


class Digest:
    """Says of pictures what they are, to the bit, and whether all of their numbers are some."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "told", "soak", True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802, the host's name
        return {"required": {"images": ("IMAGE",)}}

    def told(self, images: Tensor) -> dict[str, Any]:
        whole = images.detach().float().cpu().contiguous()
        digest = hashlib.sha256(whole.numpy().tobytes()).hexdigest()
        return {"ui": {"digest": [digest], "finite": [bool(whole.isfinite().all())]}}


NODE_CLASS_MAPPINGS = {
    **odd.NODES,
    "SoakBoxes": Boxes,
    "SoakNothing": Nothing,
    "SoakAgain": Again,
    "SoakDigest": Digest,
}
