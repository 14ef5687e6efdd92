"""The Subject Reference node: reference pictures of a subject, encoded once, for any mechanism."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..patches.cache import FeatureCache
from ..patches.streams import resize_mask
from ..patches.subject import MEGABYTE, Reference, Subject, composite, fit, mask_bounds
from .checks import check_loaded, check_number
from .types import SUBJECT, SubjectType


class SubjectNode(io.ComfyNode):
    """Makes a SUBJECT of pictures and masks."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SubjectPatchesSubject",
            display_name="Subject Reference",
            category=SUBJECT,
            description="Reference pictures of one subject, cropped to it and encoded, for the nodes that show it.",
            search_aliases=[
                "reference image",
                "ip adapter",
                "ipadapter",
                "face",
                "character",
                "consistent",
                "identity",
                "logo",
                "product",
            ],
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip="One or more pictures of the same subject. Transparent pictures are put on white, and "
                    "without a mask their opacity is the mask.",
                ),
                io.Vae.Input("vae", tooltip="The VAE of the checkpoint that will generate."),
                io.String.Input(
                    "phrase",
                    default="",
                    tooltip="What prompts call the subject, for example: red dog. Nodes that look for the subject's "
                    "words use it; may stay empty otherwise.",
                ),
                io.Int.Input(
                    "size",
                    default=512,
                    min=64,
                    max=2048,
                    step=8,
                    tooltip="Pixels on the longer side after cropping; the aspect ratio is kept. About the size the "
                    "subject should have in the result works best.",
                ),
                io.Float.Input(
                    "margin",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="Space kept around the mask when cropping, as a share of the subject's longer side.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the subject is. The picture is cropped to it, and only what is inside lends "
                    "its features. One mask for all pictures, or one for each.",
                ),
                SubjectType.Input("others", optional=True, tooltip="Subjects to pass along with this one."),
                io.Int.Input(
                    "cache_megabytes",
                    default=2048,
                    min=0,
                    max=65536,
                    optional=True,
                    advanced=True,
                    tooltip="How much of the subject's features to keep for the next picture, which then costs little "
                    "more than without the subject. 0 keeps none.",
                ),
            ],
            outputs=[SubjectType.Output(display_name="subject", tooltip="The subject, after those in 'others'.")],
        )

    @classmethod
    def execute(
        cls,
        image: Any,
        vae: Any,
        phrase: str = "",
        size: int = 512,
        margin: float = 0.1,
        mask: Any = None,
        others: tuple[Subject, ...] = (),
        cache_megabytes: int = 2048,
    ) -> io.NodeOutput:
        check_loaded(vae=vae)
        check_number("margin", margin, 0.0, 1.0)
        image, mask = composite(image, mask)
        if mask is not None:
            mask = mask if mask.ndim == 3 else mask.reshape(-1, *mask.shape[-2:])
            if len(mask) not in (1, len(image)):
                raise ValueError(
                    f"There are {len(mask)} masks for {len(image)} pictures; give one mask, or one for each picture."
                )
            if mask.shape[1:] != image.shape[1:3]:
                mask = resize_mask(mask, tuple(image.shape[1:3]))
        references = []
        for number in range(len(image)):
            own_mask = None if mask is None else mask[min(number, len(mask) - 1)]
            references.append(_reference(image[number : number + 1], own_mask, vae, size, margin))
        cache = FeatureCache(cache_megabytes * MEGABYTE)
        return io.NodeOutput((*others, Subject(tuple(references), phrase.strip(), cache)))


def _reference(image: Any, mask: Any, vae: Any, size: int, margin: float) -> Reference:
    if mask is not None:
        x0, y0, x1, y1 = mask_bounds(mask, margin)
        image, mask = image[:, y0:y1, x0:x1], mask[None, y0:y1, x0:x1]
    image, mask = fit(image, mask, size, vae.spacial_compression_encode())
    latents = vae.encode(image)
    return Reference(image, latents, None if mask is None else resize_mask(mask, tuple(latents.shape[-2:])), mask)
