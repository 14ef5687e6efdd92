"""The Recycled Self-Attention node (AnyLogo)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io

from ..patches.engine.edit import Edit
from ..patches.engine.engine import add_edit
from ..patches.families import attention_sites, chosen_sites, family_of
from ..patches.mechanisms.image_prompt import AdaptedPrompt
from ..patches.mechanisms.recycled_attention import RecycledSelfAttention
from ..patches.mechanisms.routed_reference import EmptyTokens
from ..patches.mechanisms.shown_tokens import ShownTokens
from ..patches.mechanisms.subject import Subject
from ..patches.parts.sites import USUAL
from ..patches.parts.window import Window
from .checks import check_choice, check_number, masks_in, prompt_in, tell
from .image_prompt import at_model, empty_prompt
from .inputs import (
    ADVANCED,
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
from .references import kept_references, looked_at, positions_for, reference_streams, sites_of_kept
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
            "too and the picture attends to it (AnyLogo). No training; a subject from Encode Subjects shows what its "
            "trained encoder made of it.",
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
                    **ADVANCED,
                    tooltip="The share of layers and steps that see the reference, chosen by the seed (the paper's "
                    "lambda, sparse recycling). Less gives a freer rendition; 0 is the unpatched model.",
                ),
                sites_input(
                    "self-attention layers see the reference",
                    "the decoder, which the paper finds best; of a transformer all layers, best on the pack's small "
                    "one; of an encoded subject those that its encoder was trained for",
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
                    **ADVANCED,
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
        fixed_level: float = 0.9,
        refresh_steps: int = 1,
    ) -> io.NodeOutput:
        check_number("strength", strength, 0.0, STRENGTH_MAX)
        check_number("keep_probability", keep_probability, 0.0, 1.0)
        check_choice("apply_to", apply_to, (COND_ONLY, BOTH))
        window = Window(start_percent, end_percent)
        chosen = chosen_sites(model, "self", sites, named_sites)
        if region_mask is not None:
            region_mask = masks_in("region_mask", region_mask).cpu()
        prompt_in("reference_conditioning", reference_conditioning, model)
        placed = positions_for(model, positions, placed=region_mask is not None)
        how = looked_at(noise_level, fixed_level, refresh_steps, family_of(model).reference_level())
        references = [r for s in subject for r in reference_streams(model, s, seed, reference_conditioning, how)]
        kept = tuple(each for s in subject for each in kept_references(model, s))
        tokens = [s.encoded.prompt for s in subject if s.encoded is not None and s.encoded.prompt is not None]
        idle = strength == 0 or keep_probability == 0 or window.empty
        patched = model.clone()
        if idle:
            return io.NodeOutput(patched)
        if region_mask is not None and not bool(region_mask.any()):
            tell(
                "The region mask is black everywhere, so the subject shows nowhere: paint white where it may, or "
                "connect none."
            )
            return io.NodeOutput(patched)
        settings = (strength, keep_probability, region_mask, seed, apply_to == BOTH, placed)
        if references:
            patched = add_edit(patched, RecycledSelfAttention(chosen, window, tuple(references), *settings))
        if kept:
            own = sites_of_kept(kept, sites, chosen)
            patched = add_edit(patched, RecycledSelfAttention(own, window, (), *settings, kept))
        for edit in _token_edits(model, tokens, window, min(strength, 1.0), region_mask):
            patched = add_edit(patched, edit)
        return io.NodeOutput(patched)


def _token_edits(
    model: Any, tokens: Sequence[AdaptedPrompt], window: Window, eta: float, region_mask: Any
) -> tuple[Edit, ...]:
    """What shows the tokens of encoded subjects, in all layers that they were trained for, and those of an empty
    picture in the unconditional pass."""
    if not tokens:
        return ()
    cross = frozenset(site for site in attention_sites(model) if site.kind == "cross")
    prompts = tuple(at_model(each, model, "The subject") for each in tokens)
    empty = empty_prompt(tokens, model)
    shown = ShownTokens(cross, window, prompts, empty, eta, region_mask)
    # As often as subjects are shown, as a chain of nodes would have it.
    return shown, EmptyTokens(cross, window, empty, len(prompts) * eta)
