"""The Recycled Self-Attention node (AnyLogo)."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..patches.engine import add_edit
from ..patches.families import chosen_sites
from ..patches.recycled_attention import RecycledSelfAttention
from ..patches.sites import USUAL
from ..patches.subject import Subject
from ..patches.window import Window
from .checks import check_choice, check_number, masks_in, prompt_in
from .inputs import (
    STRENGTH_MAX,
    level_inputs,
    model_input,
    model_output,
    named_sites_input,
    noise_level_input,
    positions_input,
    reference_conditioning_input,
    seed_input,
    sites_input,
    strength_input,
    subject_input,
    window_inputs,
)
from .references import looked_at, positions_for, reference_streams
from .types import SUBJECT

COND_ONLY, BOTH = "cond only", "both"


class RecycledSelfAttentionNode(io.ComfyNode):
    """Patches a MODEL so that it attends to subjects."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SubjectPatchesRecycledSelfAttention",
            display_name="Recycled Self-Attention",
            category=SUBJECT,
            description="Carries a subject's look into the picture, details included: the model runs on the reference "
            "too and the picture attends to it (AnyLogo). No training.",
            search_aliases=[
                "AnyLogo",
                "reference only",
                "reference attention",
                "ip adapter",
                "ipadapter",
                "face",
                "character",
                "consistent",
                "style transfer",
            ],
            inputs=[
                model_input(),
                subject_input(),
                strength_input(),
                io.Float.Input(
                    "keep_probability",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    advanced=True,
                    tooltip="The share of layers and steps that see the reference, chosen by the seed (the paper's "
                    "lambda, sparse recycling). Less gives a freer rendition; 0 is the unpatched model.",
                ),
                sites_input(
                    "self-attention layers see the reference",
                    "the decoder, which the paper finds best; of a transformer all layers, best on the pack's small "
                    "one",
                ),
                *window_inputs(),
                seed_input(),
                io.Mask.Input(
                    "region_mask",
                    optional=True,
                    tooltip="Where in the new picture the subject may show, white is where. Any size; grey weakens. "
                    "Without one, everywhere.",
                ),
                reference_conditioning_input(),
                io.Combo.Input(
                    "apply_to",
                    options=[COND_ONLY, BOTH],
                    default=COND_ONLY,
                    optional=True,
                    advanced=True,
                    tooltip="'cond only' is the paper's: guidance then pushes towards the subject. 'both' also shows "
                    "the reference to the negative prompt's pass, which weakens that push.",
                ),
                named_sites_input(),
                noise_level_input(),
                positions_input(),
                *level_inputs(),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        subject: tuple[Subject, ...],
        strength: float = 1.0,
        keep_probability: float = 1.0,
        sites: str = USUAL,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        seed: int = 0,
        region_mask: Any = None,
        reference_conditioning: Any = None,
        apply_to: str = COND_ONLY,
        named_sites: str = "",
        noise_level: str = USUAL,
        positions: str = USUAL,
        fixed_level: float = 0.75,
        refresh_steps: int = 1,
    ) -> io.NodeOutput:
        check_number("strength", strength, 0.0, STRENGTH_MAX)
        check_number("keep_probability", keep_probability, 0.0, 1.0)
        check_choice("apply_to", apply_to, (COND_ONLY, BOTH))
        window = Window(start_percent, end_percent)
        chosen = chosen_sites(model, "self", sites, named_sites)
        if region_mask is not None:
            region_mask = masks_in("region_mask", region_mask).cpu()
        prompt_in("reference_conditioning", reference_conditioning)
        placed = positions_for(model, positions)
        how = looked_at(model, noise_level, fixed_level, refresh_steps)
        references = [r for s in subject for r in reference_streams(model, s, seed, reference_conditioning, how)]
        idle = strength == 0 or keep_probability == 0 or window.empty or not references
        if idle or (region_mask is not None and not bool(region_mask.any())):
            return io.NodeOutput(model.clone())
        edit = RecycledSelfAttention(
            chosen,
            window,
            tuple(references),
            strength,
            keep_probability,
            region_mask,
            seed,
            unconditioned_too=apply_to == BOTH,
            positions=placed,
        )
        return io.NodeOutput(add_edit(model, edit))
