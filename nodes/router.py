"""Route Subjects by Masks, and by Attention: which place of the picture belongs to which subject (AnyStory)."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..patches.mechanisms.layout_regions import Layout
from ..patches.mechanisms.map_router import MapRouter
from ..patches.mechanisms.mask_router import MaskRouter
from ..patches.mechanisms.router import MOST_SUBJECTS
from .checks import check_choice, check_number, masks_in, tell_upside_down
from .inputs import ADVANCED, SHARE
from .types import SEVERAL, LayoutType, RouterType

PRECEDING, MEAN = "preceding layer", "running mean"
SMOOTHING_MAX = 0.5


class RouteByMasksNode(io.ComfyNode):
    """Makes a router of masks or of a layout."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SubjectPatchesRouteByMasks",
            display_name="Route Subjects by Masks",
            category=SEVERAL,
            description="Says where each subject belongs, by masks or boxes, so that several do not blend (AnyStory).",
            search_aliases=["AnyStory", "router", "routing", "regional", "multi subject", "masks", "boxes"],
            inputs=[
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="One a subject, in the order of the subjects, white where it is. Any size. They must not "
                    "overlap; what none covers is background.",
                ),
                LayoutType.Input(
                    "layout",
                    optional=True,
                    tooltip="Instead of masks: boxes or masks with phrases; each subject goes where its own phrase "
                    "does.",
                ),
            ],
            outputs=[router_output()],
        )

    @classmethod
    def execute(cls, masks: Any = None, layout: Layout | None = None) -> io.NodeOutput:
        if (masks is None) == (layout is None):
            both = "both are" if masks is not None else "neither is"
            raise ValueError(f"Routes are made of masks or a layout, and {both} connected; connect one of them.")
        if layout is not None:
            shown = layout.shown()
            painted = torch.stack(list(shown.values())) if shown else torch.zeros(0, 1, 1, dtype=torch.bool)
            called = [f"The layout's region of '{phrase}'" for phrase in shown]
        else:
            painted = masks_in("masks", masks).cpu() > 0.5
            called = [f"Mask {number}" for number in range(1, len(painted) + 1)]
        _check_regions(painted, called)
        for name, region in zip(called, painted, strict=True):
            if masks is not None:
                tell_upside_down(name.lower(), region)
        return io.NodeOutput(MaskRouter(painted, tuple(layout.shown()) if layout is not None else ()))


class RouteByAttentionNode(io.ComfyNode):
    """Makes a router of the way to read attention maps."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SubjectPatchesRouteByAttention",
            display_name="Route Subjects by Attention",
            category=SEVERAL,
            description="Lets the model say where each subject belongs: where it attends to a subject's phrase, that "
            "subject goes, so that several do not blend (AnyStory).",
            search_aliases=["AnyStory", "router", "routing", "attention maps", "daam", "regional", "multi subject"],
            inputs=[
                io.Float.Input(
                    "threshold",
                    default=0.4,
                    **SHARE,
                    tooltip="Background is where every subject's map, stretched to 0 to 1, is at or below this. Higher "
                    "gives the subjects less room; 1 gives them none.",
                ),
                io.Combo.Input(
                    "maps",
                    options=[PRECEDING, MEAN],
                    default=MEAN,
                    **ADVANCED,
                    tooltip="'preceding layer' is the paper's: each layer goes by the cross-attention just before it. "
                    "'running mean' is steadier: the mean over all layers and steps so far.",
                ),
                io.Float.Input(
                    "smoothing",
                    default=0.05,
                    min=0.0,
                    max=SMOOTHING_MAX,
                    step=0.01,
                    **ADVANCED,
                    tooltip="How far the maps are blurred, as a share of the picture's shorter side.",
                ),
            ],
            outputs=[router_output()],
        )

    @classmethod
    def execute(cls, threshold: float = 0.4, maps: str = MEAN, smoothing: float = 0.05) -> io.NodeOutput:
        check_choice("maps", maps, (PRECEDING, MEAN))
        check_number("threshold", threshold, 0.0, 1.0)
        check_number("smoothing", smoothing, 0.0, SMOOTHING_MAX)
        return io.NodeOutput(MapRouter(threshold, smoothing, maps == MEAN))


def router_output() -> Any:
    return RouterType.Output(display_name="router", tooltip="For Routed Reference Attention.")


def _check_regions(painted: torch.Tensor, called: list[str]) -> None:
    """Raises ValueError unless there are some regions (n, height, width), none of them empty, none in another."""
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
