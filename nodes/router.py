"""The Router node: which place of the picture belongs to which subject (AnyStory)."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..patches.layout_regions import Layout
from ..patches.map_router import MapRouter
from ..patches.mask_router import MaskRouter
from ..patches.router import MOST_SUBJECTS
from .checks import check_choice, check_number
from .types import CATEGORY, LayoutType, RouterType

MASKS, MAPS = "masks or layout", "attention maps"
PRECEDING, MEAN = "preceding layer", "running mean"
SMOOTHING_MAX = 0.5


class RouterNode(io.ComfyNode):
    """Makes a ROUTER of masks, or of the way to read attention maps."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SubjectPatchesRouter",
            display_name="Router",
            category=CATEGORY,
            description="Gives every place of the picture to one subject or to the background, so that subjects do not "
            "blend: by masks or boxes, or by what the model itself means to put there (AnyStory).",
            search_aliases=["AnyStory", "routing", "regional", "multi subject", "masks", "boxes"],
            inputs=[
                io.Combo.Input(
                    "by",
                    options=[MASKS, MAPS],
                    default=MASKS,
                    tooltip="'masks or layout': you say where each subject is. 'attention maps': the model does; where "
                    "it attends to a subject's phrase, that subject goes.",
                ),
                io.Combo.Input(
                    "maps",
                    options=[PRECEDING, MEAN],
                    default=MEAN,
                    tooltip="By attention maps: 'preceding layer' is the paper's: each layer goes by the "
                    "cross-attention just before it. 'running mean' is steadier: the mean over all layers and steps so "
                    "far.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.4,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="By attention maps: background is where every subject's map, stretched to 0 to 1, is at or "
                    "below this. Higher gives the subjects less room; 1 gives them none.",
                ),
                io.Float.Input(
                    "smoothing",
                    default=0.05,
                    min=0.0,
                    max=SMOOTHING_MAX,
                    step=0.01,
                    tooltip="By attention maps: how far they are blurred, as a share of the picture's shorter side.",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="By masks: one a subject, in the order of the subjects, white where it is. Any size. They "
                    "must not overlap; what none covers is background.",
                ),
                LayoutType.Input(
                    "layout",
                    optional=True,
                    tooltip="By masks, instead of them: boxes or masks with phrases; each subject goes where its own "
                    "phrase does.",
                ),
            ],
            outputs=[RouterType.Output(display_name="router", tooltip="For Routed Reference Attention.")],
        )

    @classmethod
    def execute(
        cls,
        by: str,
        maps: str = MEAN,
        threshold: float = 0.4,
        smoothing: float = 0.05,
        masks: Any = None,
        layout: Layout | None = None,
    ) -> io.NodeOutput:
        if by == MASKS:
            return io.NodeOutput(_by_masks(masks, layout))
        if by != MAPS:
            raise ValueError(f"The router goes by '{by}'; choose one of {MASKS}, {MAPS}.")
        check_choice("maps", maps, (PRECEDING, MEAN))
        check_number("threshold", threshold, 0.0, 1.0)
        check_number("smoothing", smoothing, 0.0, SMOOTHING_MAX)
        return io.NodeOutput(MapRouter(threshold, smoothing, maps == MEAN))


def _by_masks(masks: Any, layout: Layout | None) -> MaskRouter:
    if (masks is None) == (layout is None):
        both = "both are" if masks is not None else "neither is"
        raise ValueError(f"A router by masks takes masks or a layout, and {both} connected; connect one of them.")
    if layout is not None:
        shown = layout.shown()
        names = {phrase: f"The layout's region of '{phrase}'" for phrase in shown}
        painted = torch.stack(list(shown.values())) if shown else torch.zeros(0, 1, 1, dtype=torch.bool)
        called = [names[phrase] for phrase in shown]
    else:
        painted = masks.reshape(-1, *masks.shape[-2:]).cpu() > 0.5
        called = [f"Mask {number}" for number in range(1, len(painted) + 1)]
    if not 1 <= len(painted) <= MOST_SUBJECTS:
        raise ValueError(f"There are {len(painted)} regions for subjects; a router takes 1 to {MOST_SUBJECTS}.")
    for number, mask in enumerate(painted):
        if not bool(mask.any()):
            raise ValueError(
                f"{called[number]} covers nothing: no place of its {mask.shape[1]} x {mask.shape[0]} is above one "
                "half; paint white where the subject belongs."
            )
        for other in range(number):
            shared = int((mask & painted[other]).sum())
            if shared:
                raise ValueError(
                    f"{called[other]} and {called[number][0].lower()}{called[number][1:]} overlap in {shared} pixels; "
                    "every place belongs to one subject: cut one of them."
                )
    return MaskRouter(painted, tuple(layout.shown()) if layout is not None else ())
