"""Align Reference to Layout: a reference picture, scaled and moved to where the subject stands in another picture."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..patches.mechanisms.aligned import SHADES, Box, aligned, filled_box, without_background
from ..patches.mechanisms.subject import composite, mask_bounds
from .checks import check_choice, check_each, check_number, masks_in, pictures_in, tell_upside_down
from .inputs import ADVANCED
from .types import RETOUCH

KEEP = "keep"
MARGIN_MAX = 0.45


def background_input(tooltip: str) -> io.Combo.Input:
    """What stands around a subject when it is encoded; `tooltip` says what is usual."""
    return io.Combo.Input("background", options=[KEEP, *SHADES], default=KEEP, **ADVANCED, tooltip=tooltip)


class AlignReferenceNode(io.ComfyNode):
    """Makes a reference picture of the layout's size whose subject stands where the layout's does."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SubjectPatchesAlignReference",
            display_name="Align Reference to Layout",
            category=RETOUCH,
            description="Scales and moves a reference picture so that its subject stands where the subject of another "
            "picture does, or fills its own. For Invert to Trajectory: details do not carry across scales.",
            search_aliases=["crop reference", "crop to mask", "remove background", "Layout-and-Retouch"],
            inputs=[
                io.Image.Input("image", tooltip="The picture with the subject. Several are aligned one by one."),
                io.Mask.Input(
                    "mask", tooltip="White where the subject is in it. One for all pictures, or one for each."
                ),
                io.Mask.Input(
                    "layout_mask",
                    optional=True,
                    tooltip="White where the subject is in the layout picture, of that picture's size: the reference "
                    "gets the same size. Without one, the reference keeps its size and the subject fills it.",
                ),
                background_input(
                    "What stands around the subject: 'keep' what is there, or a plain 'white' or 'gray', so that only "
                    "the subject is inverted."
                ),
                io.Float.Input(
                    "margin",
                    default=0.1,
                    min=0.0,
                    max=MARGIN_MAX,
                    step=0.01,
                    **ADVANCED,
                    tooltip="Without a layout mask: how much of each side stays free around the subject.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="For VAE Encode, then Invert to Trajectory."),
                io.Mask.Output(display_name="mask", tooltip="Where the subject is in it, for Invert to Trajectory."),
            ],
        )

    @classmethod
    def execute(
        cls, image: Any, mask: Any, layout_mask: Any = None, background: str = KEEP, margin: float = 0.1
    ) -> io.NodeOutput:
        check_choice("background", background, (KEEP, *SHADES))
        check_number("margin", margin, 0.0, MARGIN_MAX)
        pictures = pictures_in("image", image)
        masks = masks_in("mask", mask)
        places = None if layout_mask is None else masks_in("layout_mask", layout_mask)
        count = max(len(pictures), 1 if places is None else len(places))
        whose = "pictures" if len(pictures) == count else "layout masks"
        for name, found in (("pictures", pictures), ("masks", masks), ("layout masks", places)):
            if found is not None:
                check_each(name, len(found), count, whose)
        made = []
        for number in range(count):
            own = [each[min(number, len(each) - 1)][None] for each in (pictures, masks)]
            place = None if places is None else places[min(number, len(places) - 1)]
            made.append(_aligned(*own, place, background, margin))
        images, moved = zip(*made, strict=True)
        return io.NodeOutput(torch.cat(images), torch.cat(moved))


def _aligned(image: Any, mask: Any, place: Any, background: str, margin: float) -> tuple[Any, Any]:
    image, mask = composite(image, mask)
    tell_upside_down("subject's mask", mask[0])
    subject = Box(*mask_bounds(mask[0], 0.0))
    if background != KEEP:
        image = without_background(image, mask, SHADES[background])
    if place is None:
        size = tuple(image.shape[1:3])
        return aligned(image, mask, subject, filled_box(*size, margin), size, within=True)
    return aligned(image, mask, subject, Box(*mask_bounds(place, 0.0)), tuple(place.shape))
