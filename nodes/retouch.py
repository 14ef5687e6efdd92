"""Multi-Source Attention Swap and Adaptive Swap Mask (Layout-and-Retouch)."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..patches.engine.engine import add_edit
from ..patches.families import chosen_sites, family_of
from ..patches.mechanisms.blend_mask import AdaptiveMask
from ..patches.mechanisms.inversion import Inversion
from ..patches.mechanisms.retouch import MultiSourceSwap, path_of
from ..patches.parts.process import Process
from ..patches.parts.sites import LATE, USUAL
from ..patches.parts.window import Window
from ..patches.parts.writing import one_line
from .checks import check_choice, check_number, masks_in, prompt_in, tell_upside_down
from .inputs import ADVANCED, SHARE, model_input, model_output, named_sites_input, sites_input, window_inputs
from .types import RETOUCH, BlendMaskType, TrajectoryType

BOTH, COND_ONLY = "both", "cond only"
OR, AND = "OR", "AND"
REPLACE, EXTEND = "replace", "extend"


class MultiSourceSwapNode(io.ComfyNode):
    """Patches a MODEL so that it retouches one picture with the looks of another."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SubjectPatchesMultiSourceSwap",
            display_name="Multi-Source Attention Swap",
            category=RETOUCH,
            description="Retouches a picture: its structure comes from the layout trajectory, the subject's details "
            "from the reference trajectory, both by their attention (Layout-and-Retouch). No training.",
            search_aliases=["Layout-and-Retouch", "MasaCtrl", "mutual self-attention", "retouch", "attention swap"],
            inputs=[
                model_input(),
                TrajectoryType.Input(
                    "layout",
                    optional=True,
                    tooltip="From Invert to Trajectory: the picture to retouch, of the size that you sample at. Start "
                    "sampling from its last latent with DisableNoise; with a flow model from its noise and an empty "
                    "latent.",
                ),
                TrajectoryType.Input(
                    "reference",
                    optional=True,
                    tooltip="From Invert to Trajectory: the picture with the subject's details, of any size. With a "
                    "mask there, only the subject lends. Align Reference to Layout puts it where the layout's stands.",
                ),
                io.Conditioning.Input(
                    "layout_conditioning",
                    optional=True,
                    tooltip="The prompt that the layout was made with (the paper's y_p). Without one, the generation's "
                    "own.",
                ),
                io.Conditioning.Input(
                    "reference_conditioning",
                    optional=True,
                    tooltip="A neutral prompt of the subject, as 'a photo of <*>' (the paper's y_r). Without one, the "
                    "generation's, which should be the same.",
                ),
                io.Float.Input(
                    "lambda2",
                    default=0.2,
                    **SHARE,
                    tooltip="The share of the schedule in which query, key and value are the layout's. 0.2 is the "
                    "paper's 10 of 50 steps; more keeps more of the layout's structure. A share of the run's own "
                    "schedule, or in a run without noise of the layout trajectory's.",
                ),
                io.Float.Input(
                    "mask_blend_start",
                    default=0.6,
                    **SHARE,
                    tooltip="From here on the blend mask acts, a share as lambda2 is. 0.6 is the paper's 31st of 50 "
                    "steps.",
                ),
                io.MultiType.Input(
                    "blend_mask",
                    [BlendMaskType, io.Mask],
                    optional=True,
                    tooltip="Where the picture is retouched: from Adaptive Swap Mask, or any mask. White is "
                    "retouched, black stays the layout's. Without one, all of it is.",
                ),
                sites_input(
                    "self-attention layers swap",
                    "'late decoder': the decoder's blocks but the first third, as in the works that the paper follows. "
                    "'decoder' is all of them and the middle, which holds more of the layout. Of a transformer 'usual' "
                    "is all layers, which is not measured yet",
                    LATE,
                ),
                io.Boolean.Input(
                    "swap_cross_attention",
                    default=True,
                    **ADVANCED,
                    tooltip="Whether the layout's query, key and value also replace those of the cross-attention in "
                    "the same blocks, as in the paper's Algorithm 1.",
                ),
                *window_inputs(),
                io.Combo.Input(
                    "apply_to",
                    options=[BOTH, COND_ONLY],
                    default=BOTH,
                    **ADVANCED,
                    tooltip="'both': the negative prompt's pass takes from passes with the negative prompt, as in the "
                    "swap that the paper follows. 'cond only' leaves it alone, which costs half as much.",
                ),
                named_sites_input(),
                io.Combo.Input(
                    "reference_keys",
                    options=[REPLACE, EXTEND],
                    default=REPLACE,
                    **ADVANCED,
                    tooltip="'replace' is the paper's: self-attention sees the reference's keys and values instead of "
                    "the picture's own. 'extend' puts them beside its own, so that the ground stays the picture's.",
                ),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        layout: Inversion | None = None,
        reference: Inversion | None = None,
        layout_conditioning: Any = None,
        reference_conditioning: Any = None,
        lambda2: float = 0.2,
        mask_blend_start: float = 0.6,
        blend_mask: Any = None,
        sites: str = USUAL,
        swap_cross_attention: bool = True,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        apply_to: str = BOTH,
        named_sites: str = "",
        reference_keys: str = REPLACE,
    ) -> io.NodeOutput:
        for name, value in (("lambda2", lambda2), ("mask_blend_start", mask_blend_start)):
            check_number(name, value, 0.0, 1.0)
        check_choice("apply_to", apply_to, (BOTH, COND_ONLY))
        check_choice("reference_keys", reference_keys, (REPLACE, EXTEND))
        window = Window(start_percent, end_percent)
        chosen = chosen_sites(model, "self", sites, named_sites, LATE)
        _check_trajectories(model, layout, reference)
        prompt_in("layout_conditioning", layout_conditioning, model)
        prompt_in("reference_conditioning", reference_conditioning, model)
        if blend_mask is not None and layout is None:
            raise ValueError("The blend mask needs a picture to blend with; connect a layout trajectory, or no mask.")
        mask = blend_mask
        if isinstance(mask, torch.Tensor):
            mask = masks_in("blend_mask", mask)
        blends = mask is not None and mask_blend_start < 1
        if window.empty or (reference is None and not blends and (layout is None or lambda2 == 0)):
            return io.NodeOutput(model.clone())
        both = apply_to == BOTH
        crossing = chosen_sites(model, "cross", sites, named_sites, LATE) if swap_cross_attention else frozenset()
        edit = MultiSourceSwap(
            chosen,
            window,
            None if layout is None else path_of(layout.stream, layout_conditioning, both),
            None if reference is None else path_of(reference.stream, reference_conditioning, both, reference.mask),
            switch=lambda2,
            blend_from=mask_blend_start,
            mask=mask,
            crossing=crossing,
            watched=chosen_sites(model, "cross", "decoder"),
            extends=reference_keys == EXTEND,
        )
        return io.NodeOutput(add_edit(model, edit))


def _check_trajectories(model: Any, layout: Inversion | None, reference: Inversion | None) -> None:
    family = family_of(model).name
    wanted = model.model.latent_format.latent_channels
    for name, each in (("layout", layout), ("reference", reference)):
        if each is None:
            continue
        channels = each.states.shape[2]
        if each.family != family or channels != wanted:
            raise ValueError(
                f"The {name} trajectory is of a model of the family {each.family} with {channels} latent channels but "
                f"this one is {family} with {wanted}; invert the picture with this model."
            )
        if Process.of(model.get_model_object("model_sampling")).flow and float(each.sigmas[0]) > 1:
            raise ValueError(
                f"The {name} trajectory begins at sigma {float(each.sigmas[0]):.4g}, which a flow model does not have; "
                "invert the picture with this model, and its own sampling patch."
            )
    if layout is not None and reference is not None and len(layout.sigmas) != len(reference.sigmas):
        raise ValueError(
            f"The layout trajectory keeps {len(layout.sigmas)} latents but the reference trajectory "
            f"{len(reference.sigmas)}; invert both with the same sigmas."
        )


class AdaptiveBlendMaskNode(io.ComfyNode):
    """Says how to make a BLEND_MASK while sampling."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SubjectPatchesAdaptiveBlendMask",
            display_name="Adaptive Swap Mask",
            category=RETOUCH,
            description="Where a picture is retouched: a segmenter's mask of the layout picture, joined with where the "
            "prompt's words for the subject act, which is found while sampling (Layout-and-Retouch).",
            search_aliases=["Layout-and-Retouch", "foreground mask", "cross-attention mask", "blend mask"],
            inputs=[
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the subject is in the layout picture, from any segmenter or painted, any "
                    "size. Without one, the attention alone decides.",
                ),
                io.String.Input(
                    "phrase",
                    default="",
                    tooltip="The prompt's words for the subject. The prompt must come from Encode Prompt with "
                    "Subjects, with these words among its phrases. Empty: the mask alone decides.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.3,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="How much attention counts as the subject, between its smallest and its largest. The paper "
                    "does not give its value.",
                ),
                io.Float.Input(
                    "smallest_component",
                    default=0.01,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    **ADVANCED,
                    tooltip="Connected parts of the attention's mask smaller than this share of the picture are noise.",
                ),
                io.Combo.Input(
                    "join",
                    options=[OR, AND],
                    default=OR,
                    tooltip="OR is the paper's formula: a place counts where either finds the subject. AND is its "
                    "text, which discards what the attention finds outside of the mask.",
                ),
            ],
            outputs=[
                BlendMaskType.Output(display_name="blend_mask", tooltip="For Multi-Source Attention Swap."),
                io.Image.Output(
                    display_name="preview",
                    tooltip="The mask, and the weights made of it, as far as they are known before sampling. Attention "
                    "Inspector shows all stages.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        mask: Any = None,
        phrase: str = "",
        threshold: float = 0.3,
        smallest_component: float = 0.01,
        join: str = OR,
    ) -> io.NodeOutput:
        phrase = one_line(phrase)
        if mask is None and not phrase:
            raise ValueError("There is nothing to make a blend mask of; connect a mask, or write the subject's phrase.")
        check_number("threshold", threshold, 0.01, 1.0)
        check_number("smallest_component", smallest_component, 0.0, 1.0)
        check_choice("join", join, (OR, AND))
        if mask is not None:
            mask = masks_in("mask", mask).cpu()
            for number, each in enumerate(mask, 1):
                if not bool((each > 0.5).any()):
                    raise ValueError(
                        f"Mask {number} of {len(mask)} is empty: no place of its {each.shape[1]} x {each.shape[0]} is "
                        "above one half. Segment the subject in the layout picture, or invert the mask."
                    )
                tell_upside_down(f"mask {number} of {len(mask)}", each)
        made = AdaptiveMask(mask, phrase, threshold, smallest_component, join == AND)
        return io.NodeOutput(made, _preview(made))


def _preview(made: AdaptiveMask) -> torch.Tensor:
    """(n, height, 2 * width, 3): the mask beside its weights, at the mask's own size; black without a mask."""
    if made.segmented is None:
        return torch.zeros(1, 64, 128, 3)
    stages = made.of_the_segmenter(tuple(made.segmented.shape[1:]))
    return torch.cat([stages.subject, stages.blend], 2)[..., None].repeat(1, 1, 1, 3)
