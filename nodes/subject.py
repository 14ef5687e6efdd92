"""The Subject Reference node: reference pictures of a subject, encoded once, for any mechanism."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io

from ..patches.mechanisms.aligned import SHADES, without_background
from ..patches.mechanisms.subject import Reference, Subject, composite, encoded, fit, mask_bounds
from ..patches.parts.cache import MEGABYTE, FeatureCache
from ..patches.parts.masks import resize_mask
from ..patches.parts.writing import one_line
from .align import KEEP, background_input
from .checks import (
    MEGABYTES_MAX,
    check_choice,
    check_each,
    check_loaded,
    check_number,
    masks_in,
    pictures_in,
    single,
    tell_upside_down,
)
from .inputs import ADVANCED, CACHE_MEGABYTES, SHARE, cache_input, vae_input
from .types import SUBJECT, SubjectType

# The least and the greatest longer side in pixels.
SIZES = (64, 2048)


class SubjectNode(io.ComfyNode):
    """Makes a SUBJECT of pictures and masks. Its inputs come as lists, so that a list of pictures is one subject."""

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
            is_input_list=True,
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip="One or more pictures of the same subject, as a batch or a list. Transparent pictures are "
                    "put on white, and without a mask their opacity is the mask; Load Image leaves it out, so connect "
                    "its mask through Invert Mask.",
                ),
                vae_input(),
                io.String.Input(
                    "phrase",
                    default="",
                    tooltip="What the prompt calls the subject, for example: red dog; dog#2 is its second dog. Only "
                    "nodes that route several subjects look for it; may stay empty otherwise.",
                ),
                io.Int.Input(
                    "size",
                    default=512,
                    min=SIZES[0],
                    max=SIZES[1],
                    step=8,
                    tooltip="Pixels on the longer side after cropping; the aspect ratio is kept. About 3/4 of the new "
                    "picture's side works best: 384 for SD 1.5, 768 for SDXL and FLUX.",
                ),
                io.Float.Input(
                    "margin",
                    default=0.1,
                    **SHARE,
                    **ADVANCED,
                    tooltip="Space kept around the mask when cropping, as a share of the subject's longer side.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the subject is. The picture is cropped to it, and only what is inside lends "
                    "its features. One mask for all pictures, or one for each.",
                ),
                SubjectType.Input("others", optional=True, tooltip="Subjects to pass along with this one."),
                cache_input(),
                background_input(
                    "What the VAE sees around the subject's mask: 'keep' what is there, or a plain 'white' or 'gray', "
                    "as AnyStory cuts subjects out. Either way only what is inside the mask lends its features."
                ),
            ],
            outputs=[SubjectType.Output(display_name="subject", tooltip="The subject, after those in 'others'.")],
        )

    @classmethod
    def execute(cls, image: list[Any], mask: list[Any] | None = None, **given: list[Any]) -> io.NodeOutput:
        values = {name: single(name, values) for name, values in given.items()}
        return cls.made(image, mask=mask or (), **values)

    @classmethod
    def made(
        cls,
        image: Sequence[Any],
        vae: Any,
        phrase: str = "",
        size: int = 512,
        margin: float = 0.1,
        mask: Sequence[Any] = (),
        others: tuple[Subject, ...] = (),
        cache_megabytes: int = CACHE_MEGABYTES,
        background: str = KEEP,
    ) -> io.NodeOutput:
        """`execute`, of the values themselves and sequences of IMAGE and MASK batches."""
        check_loaded(vae=vae)
        check_number("size", size, *SIZES)
        check_number("margin", margin, 0.0, 1.0)
        check_number("cache_megabytes", cache_megabytes, 0, MEGABYTES_MAX)
        check_choice("background", background, (KEEP, *SHADES))
        pictures = [each[None] for batch in image for each in pictures_in("image", batch)]
        masks = [each for batch in mask for each in masks_in("mask", batch)]
        if masks:
            check_each("masks", len(masks), len(pictures))
        references = []
        for number, picture in enumerate(pictures):
            own_mask = masks[min(number, len(masks) - 1)] if masks else None
            what = "picture" if len(pictures) == 1 else f"picture {number + 1}"
            references.append(_reference(picture, own_mask, vae, size, margin, what, background))
        cache = FeatureCache(cache_megabytes * MEGABYTE)
        return io.NodeOutput((*(others or ()), Subject(tuple(references), one_line(phrase), cache)))


def _reference(image: Any, mask: Any, vae: Any, size: int, margin: float, what: str, background: str) -> Reference:
    image, masks = composite(image, None if mask is None else mask[None])
    if masks is not None:
        tell_upside_down("subject's mask", masks[0])
        x0, y0, x1, y1 = mask_bounds(masks[0], margin)
        image, masks = image[:, y0:y1, x0:x1], masks[:, y0:y1, x0:x1]
        if background != KEEP:
            image = without_background(image, masks, SHADES[background])
    pixels, cut_out = tuple(image.shape[1:3]), masks is not None
    image, masks = fit(image, masks, size, vae.spacial_compression_encode())
    latents = encoded(vae, image, f"the subject's {what}")
    mask = None if masks is None else resize_mask(masks, tuple(latents.shape[-2:]))
    return Reference(image, latents, mask, masks, pixels, cut_out)
