"""Subject Layout and Layout Bias: which phrase belongs where in the picture (Cones 2)."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..patches.engine.engine import add_edit
from ..patches.families import chosen_sites
from ..patches.mechanisms.layout import LayoutBias
from ..patches.mechanisms.layout_regions import Layout, Region, box_mask, boxes_of, layout_picture, painted_mask
from ..patches.parts.prompt import split_phrases
from ..patches.parts.sites import USUAL
from ..patches.parts.window import Window
from .checks import check_choice, check_number, masks_in
from .inputs import ADVANCED, model_input, model_output, named_sites_input, sites_input, window_inputs
from .types import LAYOUT, LayoutType

# The canvas, in pixels.
SIDES = (8, 16384)
POSITIVE_MAX = 100.0
NEGATIVE_MIN = -1000.0
# The authors' weight, which hides at every step.
HARD = -1e8
GUIDANCE_MAX = 10.0
OUTSIDE, OTHER_REGIONS = "everywhere outside", "other regions"
FADING, CONSTANT = "fading", "constant"
PER_PICTURE, WHOLE_BATCH = "per picture", "whole batch"


class LayoutNode(io.ComfyNode):
    """Makes a LAYOUT of boxes and masks."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SubjectPatchesLayout",
            display_name="Subject Layout",
            category=LAYOUT,
            description="Says which phrases of the prompt belong where in the picture, by boxes, by masks, or both.",
            search_aliases=["regional prompt", "regional", "boxes", "bounding boxes", "composition", "Cones 2"],
            inputs=[
                io.Int.Input(
                    "width",
                    default=1024,
                    min=SIDES[0],
                    max=SIDES[1],
                    step=8,
                    tooltip="Width of the canvas that the boxes were drawn on. The layout fits a picture of any size; "
                    "give both the same shape, or it is stretched.",
                ),
                io.Int.Input(
                    "height",
                    default=1024,
                    min=SIDES[0],
                    max=SIDES[1],
                    step=8,
                    tooltip="Height of the canvas, see width.",
                ),
                io.String.Input(
                    "phrases",
                    multiline=True,
                    default="",
                    placeholder="one phrase a line",
                    tooltip="One phrase a line or separated by semicolons: one for each box and then for each mask, or "
                    "only for those without a description of their own. A phrase may stand there several times.",
                ),
                io.MultiType.Input(
                    "boxes",
                    [io.BoundingBox, io.Array],
                    optional=True,
                    tooltip="Bounding boxes in pixels of the canvas, or the 'elements' of Create Bounding Boxes, which "
                    "bring their descriptions along as phrases. Boxes may overlap.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the phrase belongs, any size; it is stretched to the canvas. Several masks "
                    "are several regions.",
                ),
                LayoutType.Input("others", optional=True, tooltip="A layout on the same canvas to add this one to."),
            ],
            outputs=[
                LayoutType.Output(display_name="layout", tooltip="The layout, for Layout Bias."),
                io.Image.Output(display_name="picture", tooltip="The canvas with its regions, one colour a phrase."),
            ],
        )

    @classmethod
    def execute(
        cls,
        width: int,
        height: int,
        phrases: str = "",
        boxes: Any = None,
        mask: Any = None,
        others: Layout | None = None,
    ) -> io.NodeOutput:
        check_number("width", width, *SIDES)
        check_number("height", height, *SIDES)
        if boxes is None and mask is None and others is None:
            raise ValueError("The layout is empty: connect boxes, a mask, or another layout.")
        if others is not None and (others.width, others.height) != (width, height):
            raise ValueError(
                f"The canvas is {width} x {height} but that of the layout in 'others' is {others.width} x "
                f"{others.height}; give both the same size."
            )
        drawn = [] if boxes is None else boxes_of(boxes, width, height)
        painted = [] if mask is None else list(masks_in("mask", mask))
        names = _named([*(box.phrase for box in drawn), *("" for _ in painted)], split_phrases(phrases), len(drawn))
        parts = [
            box_mask(box, width, height, f"Box {number} ('{names[number - 1]}')") for number, box in enumerate(drawn, 1)
        ]
        for number, each in enumerate(painted, 1):
            name = f"Mask {number} ('{names[len(drawn) + number - 1]}')"
            parts.append(painted_mask(each.cpu(), width, height, name))
        regions = tuple(Region(name, part) for name, part in zip(names, parts, strict=True))
        layout = Layout(width, height, (*(others.regions if others is not None else ()), *regions))
        return io.NodeOutput(layout, layout_picture(layout))


def _named(described: list[str], lines: tuple[str, ...], boxes: int) -> list[str]:
    """A phrase for each box and mask: all from `lines`, or only where `described` has none."""
    if lines and len(lines) == len(described):
        return list(lines)
    missing = [number for number, phrase in enumerate(described) if not phrase]
    if len(lines) != len(missing):
        raise ValueError(
            f"There are {boxes} boxes and {len(described) - boxes} masks, {len(missing)} of them without a description "
            f"of their own, but {len(lines)} phrases; write one a line for each of them all, or of those without."
        )
    names = list(described)
    for number, phrase in zip(missing, lines, strict=True):
        names[number] = phrase
    return names


class LayoutBiasNode(io.ComfyNode):
    """Patches a MODEL so that phrases show where a layout says."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SubjectPatchesLayoutBias",
            display_name="Layout Bias",
            category=LAYOUT,
            description="Places what the prompt names where the layout says, each thing by itself: its words are "
            "strengthened in its regions and weakened elsewhere (Cones 2). No training.",
            search_aliases=[
                "Cones 2",
                "layout guidance",
                "regional prompt",
                "regional",
                "attention bias",
                "attention couple",
                "boxes",
                "gligen",
            ],
            inputs=[
                model_input(),
                LayoutType.Input(
                    "layout",
                    tooltip="From Subject Layout. The prompt must come from Encode Prompt with Subjects, with the "
                    "layout's phrases among its own.",
                ),
                io.Float.Input(
                    "guidance_weight",
                    default=0.08,
                    min=0.0,
                    max=GUIDANCE_MAX,
                    step=0.005,
                    tooltip="How hard the layout pushes. The authors use 0.05 to 0.08; 0 is the unpatched model.",
                ),
                io.Float.Input(
                    "positive_weight",
                    default=2.5,
                    min=0.0,
                    max=POSITIVE_MAX,
                    step=0.1,
                    tooltip="How much a phrase is strengthened in its regions. 2.5 is the paper's, 0 strengthens "
                    "nothing.",
                ),
                io.Boolean.Input(
                    "hard_mask",
                    default=True,
                    tooltip="Hides a phrase completely where it is weakened, as the authors do. Off, negative_weight "
                    "says how much it is weakened there.",
                ),
                io.Combo.Input(
                    "weaken",
                    options=[OUTSIDE, OTHER_REGIONS],
                    default=OUTSIDE,
                    tooltip="Where a phrase is weakened: everywhere outside its regions, as in the authors' code, or "
                    "only in the regions of other phrases, as in the paper. Where two regions overlap, neither is.",
                ),
                sites_input("cross-attention layers are biased", "all, as the authors do"),
                *window_inputs(),
                io.Float.Input(
                    "negative_weight",
                    default=-5.0,
                    min=NEGATIVE_MIN,
                    max=0.0,
                    step=0.1,
                    **ADVANCED,
                    tooltip="With hard_mask off, how much a phrase is weakened: about -1 to -10 is soft, 0 weakens "
                    "nothing. The guidance weight multiplies it too.",
                ),
                io.Combo.Input(
                    "eta",
                    options=[FADING, CONSTANT],
                    default=FADING,
                    **ADVANCED,
                    tooltip="How the push changes over the schedule. 'fading' is the authors': strong at first, "
                    "ln(1 + sigma^2). 'constant' is 1 at every step, what 'fading' is at sigma 1.31.",
                ),
                io.Combo.Input(
                    "statistics",
                    options=[PER_PICTURE, WHOLE_BATCH],
                    default=PER_PICTURE,
                    **ADVANCED,
                    tooltip="The push is scaled by how much the attention scores vary: in each picture, or over the "
                    "whole batch as in the authors' code, where a picture then depends on the others beside it.",
                ),
                named_sites_input(),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        layout: Layout,
        guidance_weight: float,
        positive_weight: float,
        hard_mask: bool,
        weaken: str,
        start_percent: float,
        end_percent: float,
        negative_weight: float = -5.0,
        sites: str = USUAL,
        eta: str = FADING,
        statistics: str = PER_PICTURE,
        named_sites: str = "",
    ) -> io.NodeOutput:
        check_number("guidance_weight", guidance_weight, 0.0, GUIDANCE_MAX)
        check_number("positive_weight", positive_weight, 0.0, POSITIVE_MAX)
        check_number("negative_weight", negative_weight, NEGATIVE_MIN, 0.0)
        negative = HARD if hard_mask else negative_weight
        check_choice("weaken", weaken, (OUTSIDE, OTHER_REGIONS))
        check_choice("eta", eta, (FADING, CONSTANT))
        check_choice("statistics", statistics, (PER_PICTURE, WHOLE_BATCH))
        window = Window(start_percent, end_percent)
        chosen = chosen_sites(model, "cross", sites, named_sites, "encoder and decoder")
        weightless = guidance_weight == 0 or positive_weight == negative == 0
        if weightless or window.empty or not layout.regions:
            return io.NodeOutput(model.clone())
        edit = LayoutBias(
            chosen,
            window,
            layout,
            positive=positive_weight,
            negative=negative,
            guidance=guidance_weight,
            everywhere=weaken == OUTSIDE,
            constant=eta == CONSTANT,
            each_row=statistics == PER_PICTURE,
        )
        return io.NodeOutput(add_edit(model, edit))
