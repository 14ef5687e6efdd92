"""Route Subjects by Masks, by Attention and by Encoder: which place belongs to which subject (AnyStory)."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..encoders.subject_encoder import SubjectEncoder
from ..patches.mechanisms.layout_regions import Layout
from ..patches.mechanisms.learned_router import LearnedRouter
from ..patches.mechanisms.map_router import MapRouter
from ..patches.mechanisms.mask_router import MaskRouter
from ..patches.mechanisms.router import MOST_SUBJECTS
from .checks import check_choice, check_number, masks_in, tell_upside_down
from .inputs import ADVANCED, SHARE, SHARES
from .types import SEVERAL, LayoutType, RouterType, SubjectEncoderType

PRECEDING, MEAN = "preceding layer", "running mean"
REFINED, COARSE = "refined", "coarse"
ATTENTION, LEARNED = "attention maps", "learned maps"
SMOOTHING_MAX = 0.5
# From timestep 700 on the toy's router fits better than attention maps do; at 800 it does not (docs/EFFECTS.md).
LEARNED_FROM = 0.3


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


class RouteByEncoderNode(io.ComfyNode):
    """Makes a router of the one that a subject encoder was trained with."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SubjectPatchesRouteByEncoder",
            display_name="Route Subjects by Encoder",
            category=SEVERAL,
            description="Lets the router that was trained with a subject encoder say where each subject belongs, by "
            "what the model has drawn so far, so that several do not blend (AnyStory). It needs no phrases.",
            search_aliases=["AnyStory", "router", "routing", "learned", "trained", "segmentation", "multi subject"],
            inputs=[
                SubjectEncoderType.Input(
                    "encoder",
                    tooltip="From Load Subject Encoder: the one that Encode Subjects encodes the subjects with. Its "
                    "file must have a router, as anystory-toy has.",
                ),
                io.Combo.Input(
                    "maps",
                    options=[REFINED, COARSE],
                    default=REFINED,
                    **ADVANCED,
                    tooltip="'refined' has looked at the places that each subject got at first. 'coarse' has not: the "
                    "first guess.",
                ),
                io.Combo.Input(
                    "early",
                    options=[ATTENTION, LEARNED],
                    default=ATTENTION,
                    **ADVANCED,
                    tooltip="By what the noisiest steps go, before learned_from, where no router can know. 'attention "
                    "maps' as Route Subjects by Attention reads them, as far as every subject has a phrase that the "
                    "prompt knows; 'learned maps' all the same.",
                ),
                io.Float.Input(
                    "learned_from",
                    default=LEARNED_FROM,
                    **SHARE,
                    **ADVANCED,
                    tooltip="Where in the run's schedule the learned maps take over from the early ones; 0 is its "
                    f"first step. {SHARES}",
                ),
            ],
            outputs=[router_output()],
        )

    @classmethod
    def execute(
        cls, encoder: SubjectEncoder, maps: str = REFINED, early: str = ATTENTION, learned_from: float = LEARNED_FROM
    ) -> io.NodeOutput:
        check_choice("maps", maps, (REFINED, COARSE))
        check_choice("early", early, (ATTENTION, LEARNED))
        check_number("learned_from", learned_from, 0.0, 1.0)
        if encoder.router is None:
            raise ValueError(
                f"The encoder '{encoder.name}' has no router: only the first stage of its training was run. Load one "
                "that has, or use Route Subjects by Attention."
            )
        before = MapRouter() if early == ATTENTION else None
        return io.NodeOutput(LearnedRouter(encoder.name, encoder.router, maps == REFINED, before, learned_from))


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
