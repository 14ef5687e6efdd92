"""The AnyStory node: the authors' released weights at work in a FLUX.1 MODEL."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..encoders.anystory import AnyStory
from ..patches.anystory.anystory_loras import Loras
from ..patches.anystory.anystory_references import clean_reference
from ..patches.anystory.anystory_run import AnyStorySettings, add_anystory
from ..patches.anystory.anystory_subject import AnyStorySubject
from ..patches.families import attention_sites, family_of
from ..patches.mechanisms.router import MOST_SUBJECTS
from ..patches.parts.window import Window
from .anystory_subject import check_latents
from .checks import check_choice, check_number
from .inputs import ADVANCED, SHARE, STRENGTH_MAX, model_input, model_output
from .types import SEVERAL, AnyStorySubjectType, AnyStoryType

AUTO, ON, OFF = "auto", "on", "off"
SCALE_MAX, SHIFT_MAX = 10.0, 100.0


class AnyStoryNode(io.ComfyNode):
    """Patches a FLUX.1 MODEL with AnyStory."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        share = {**SHARE, **ADVANCED}
        strength = {"default": 1.0, "min": 0.0, "max": STRENGTH_MAX, "step": 0.05, **ADVANCED}
        steps = "as a share of the sampler's steps, rounded to whole ones."
        return io.Schema(
            node_id="SubjectPatchesAnyStory",
            display_name="AnyStory",
            category=SEVERAL,
            description="Shows one to eight subjects in a picture of FLUX.1 dev with AnyStory's trained weights, each "
            "routed to its own places.",
            search_aliases=["multi subject", "flux ip adapter", "flux reference", "character", "routed", "identity"],
            inputs=[
                model_input("FLUX.1 dev"),
                AnyStoryType.Input("anystory", tooltip="From Load AnyStory, the same for the model and its subjects."),
                AnyStorySubjectType.Input(
                    "subjects", tooltip="One to eight subjects: chain AnyStory Subject nodes by their 'others'."
                ),
                io.Combo.Input(
                    "router",
                    options=[AUTO, ON, OFF],
                    default=AUTO,
                    tooltip="Gives every place of the picture to one subject, in every block, so that similar ones do "
                    "not blend. 'auto': with several subjects. With one it changes nothing.",
                ),
                io.Float.Input(
                    "token_scale",
                    default=0.6,
                    min=0.0,
                    max=SCALE_MAX,
                    step=0.05,
                    tooltip="What each subject's own tokens, which say what it is, are multiplied by. 0 leaves them "
                    "out.",
                ),
                io.Float.Input(
                    "reference_start",
                    **share | {"advanced": False, "optional": False},
                    default=0.0,
                    tooltip=f"When the references begin to be seen, {steps} The authors take 0 for one subject and "
                    "0.09 for several.",
                ),
                io.Float.Input(
                    "reference_end", **share, default=1.0, tooltip=f"When the references are no longer seen, {steps}"
                ),
                io.Float.Input(
                    "token_start", **share, default=0.1, tooltip=f"When the subjects' tokens begin to be seen, {steps}"
                ),
                io.Float.Input(
                    "token_end", **share, default=0.3, tooltip=f"When the tokens are no longer seen, {steps}"
                ),
                io.Float.Input(
                    "reference_shift",
                    default=0.0,
                    min=-SHIFT_MAX,
                    max=SHIFT_MAX,
                    step=0.05,
                    **ADVANCED,
                    tooltip="Added to the attention's logits of all references: below 0 they count less, above 0 more. "
                    "-0.7 is about half their weight.",
                ),
                io.Boolean.Input(
                    "reference_mask",
                    default=True,
                    **ADVANCED,
                    tooltip="Whether only what lies inside a subject's mask is seen of its reference.",
                ),
                io.Float.Input(
                    "reference_lora",
                    **strength,
                    tooltip="The strength of the LoRA that the FLUX looks at references with. 1 is as trained.",
                ),
                io.Float.Input(
                    "router_lora",
                    **strength,
                    tooltip="The strength of the LoRA that the router runs with. 1 is as trained.",
                ),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        anystory: AnyStory,
        subjects: tuple[AnyStorySubject, ...],
        router: str = AUTO,
        token_scale: float = 0.6,
        reference_start: float = 0.0,
        reference_end: float = 1.0,
        token_start: float = 0.1,
        token_end: float = 0.3,
        reference_shift: float = 0.0,
        reference_mask: bool = True,
        reference_lora: float = 1.0,
        router_lora: float = 1.0,
    ) -> io.NodeOutput:
        check_choice("router", router, (AUTO, ON, OFF))
        check_number("token_scale", token_scale, 0.0, SCALE_MAX)
        check_number("reference_shift", reference_shift, -SHIFT_MAX, SHIFT_MAX)
        check_number("reference_lora", reference_lora, 0.0, STRENGTH_MAX)
        check_number("router_lora", router_lora, 0.0, STRENGTH_MAX)
        shares = {"reference_start": reference_start, "reference_end": reference_end}
        for name, value in {**shares, "token_start": token_start, "token_end": token_end}.items():
            check_number(name, value, 0.0, 1.0)
        references, tokens = Window(reference_start, reference_end), Window(token_start, token_end)
        _check_model(model, anystory)
        for subject in subjects:
            check_latents(anystory, subject.latents)
        if len(subjects) > MOST_SUBJECTS:
            raise ValueError(
                f"AnyStory shows one to {MOST_SUBJECTS} subjects, but there are {len(subjects)}; leave some out."
            )
        tokens = tokens if token_scale else Window(0.0, 0.0)
        if not subjects or (references.empty and tokens.empty):
            return io.NodeOutput(model.clone())
        loras = Loras(anystory, reference_lora, router_lora)
        streams = tuple(
            clean_reference(
                model.get_model_object("latent_format").process_in(each.latents),
                each.inside if reference_mask else None,
                reference_shift,
                loras,
                each.cache,
            )
            for each in subjects
        )
        routed = len(subjects) > 1 and router != OFF
        settings = AnyStorySettings(
            loras,
            tuple(f"subject {number}" for number in range(1, len(subjects) + 1)),
            token_scale * torch.cat([each.tokens for each in subjects], 1),
            torch.cat([each.router for each in subjects], 1) if routed else None,
            streams,
            (tokens.start_percent, tokens.end_percent),
            (references.start_percent, references.end_percent),
            reference_shift,
        )
        return io.NodeOutput(add_anystory(model, frozenset(attention_sites(model)), settings))


def _check_model(model: Any, anystory: AnyStory) -> None:
    """Raises ValueError for another family, or a FLUX of other sizes than the weights are for."""
    family, form = family_of(model), anystory.form
    if family.name != "FLUX.1":
        raise ValueError(f"AnyStory's weights are for FLUX.1, but this model is of {family.name}; load FLUX.1 dev.")
    network = model.model.diffusion_model
    found = (
        len(network.double_blocks), len(network.single_blocks), network.hidden_size,
        network.params.context_in_dim, network.in_channels,
    )  # fmt: skip
    if found != form.model():
        raise ValueError(
            f"The weights '{anystory.name}' are for a FLUX of {form.double} and {form.single} blocks, {form.width} "
            f"wide, with {form.packed} channels a patch, but this one has {found[0]} and {found[1]} blocks, is "
            f"{found[2]} wide and has {found[4]} channels; load FLUX.1 dev."
        )
