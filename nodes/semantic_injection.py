"""Load Semantic Injection and Semantic Injection (AnyLogo)."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..encoders.semantic_injection import PROMPTS, SemanticMaps, hierarchy, read_semantic_maps
from ..patches.engine.engine import add_edit
from ..patches.families import attention_sites, family_of
from ..patches.families.unet import UNet, scales
from ..patches.mechanisms.semantic_injection import SemanticInjection, grouped, tokens_of
from ..patches.mechanisms.subject import Subject, composite
from ..patches.parts.sites import USUAL
from ..patches.parts.window import Window
from .checks import check_choice, check_number, pictures_in
from .inputs import ADVANCED, STRENGTH_MAX, model_input, model_output, strength_input, subject_input, window_inputs
from .model_files import SUBJECT_ENCODERS
from .types import SUBJECT, SemanticsType

KEPT, REPLACED = PROMPTS


class LoadSemanticInjectionNode(io.ComfyNode):
    """Loads the trained maps of AnyLogo's semantic injection."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SubjectPatchesLoadSemanticInjection",
            display_name="Load Semantic Injection",
            category=SUBJECT,
            description="Loads the trained maps of AnyLogo's semantic injection, for Semantic Injection.",
            search_aliases=["AnyLogo", "DINOv2", "semantic", "load maps"],
            inputs=[
                SUBJECT_ENCODERS.file_input(
                    f"An anylogo-FAMILY.safetensors of the models folder {SUBJECT_ENCODERS.name}, for the family at "
                    "hand. The U-Net that was tuned with it is a LoRA: load that with Load LoRA.",
                    "anylogo-",
                )
            ],
            outputs=[SemanticsType.Output(display_name="semantics", tooltip="For Semantic Injection.")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str) -> Any:
        return SUBJECT_ENCODERS.state(file)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        return io.NodeOutput(read_semantic_maps(SUBJECT_ENCODERS.path(file)))


class SemanticInjectionNode(io.ComfyNode):
    """Patches a MODEL so that its cross-attention sees what a vision model sees of a subject."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SubjectPatchesSemanticInjection",
            display_name="Semantic Injection",
            category=SUBJECT,
            description="Tells the model what a subject is by four groups of a vision model's tokens, one for each "
            "scale of the U-Net (AnyLogo). Needs trained maps; Recycled Self-Attention beside it brings the details.",
            search_aliases=["AnyLogo", "DINOv2", "image prompt", "logo", "semantic"],
            inputs=[
                model_input("SD 1.x, SD 2.x or SDXL"),
                subject_input(),
                SemanticsType.Input("semantics", tooltip="From Load Semantic Injection."),
                strength_input("How much of it the layers take. 1 is the paper's, 0 is the unpatched model."),
                *window_inputs(),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="From Load CLIP Vision: the DINOv2 that the maps were trained with, ViT-L as a rule. Not "
                    "needed where the file brings its own.",
                ),
                io.Image.Input(
                    "background",
                    optional=True,
                    tooltip="The scene that the subject is put into, one picture: of it the model is told one token, "
                    "so that the subject suits it. Without one there is none.",
                ),
                io.Combo.Input(
                    "prompt",
                    options=[USUAL, KEPT, REPLACED],
                    default=USUAL,
                    **ADVANCED,
                    tooltip="'kept': the layers attend to the subject's tokens beside the prompt's. 'replaced': in "
                    "their place, as in the paper, whose model reads no text. 'usual' is how the file was trained.",
                ),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        subject: tuple[Subject, ...],
        semantics: SemanticMaps,
        strength: float = 1.0,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        clip_vision: Any = None,
        background: Any = None,
        prompt: str = USUAL,
    ) -> io.NodeOutput:
        check_number("strength", strength, 0.0, STRENGTH_MAX)
        check_choice("prompt", prompt, (USUAL, KEPT, REPLACED))
        prompt = semantics.form.prompt if prompt == USUAL else prompt
        if prompt == REPLACED and strength > 1:
            raise ValueError(
                f"The strength is {strength:g}, but where the subject's tokens replace the prompt's there is none "
                "above 1; lower it, or set prompt to 'kept'."
            )
        window = Window(start_percent, end_percent)
        groups = _groups(model, semantics)
        vision = semantics.vision_model(clip_vision)
        scene = None if background is None else _scene(background)
        references = [reference for each in subject for reference in each.references]
        if strength == 0 or window.empty or not references:
            return io.NodeOutput(model.clone())
        seen = [hierarchy(vision, reference.image, reference.pixel_mask) for reference in references]
        behind = None if scene is None else hierarchy(vision, scene, None)
        tokens = tokens_of({group: semantics.maps[group] for group in set(groups.values())}, seen, behind)
        edit = SemanticInjection(frozenset(groups), window, tokens, groups, strength, prompt == REPLACED)
        return io.NodeOutput(add_edit(model, edit))


def _groups(model: Any, semantics: SemanticMaps) -> dict[Any, int]:
    """The group of each cross-attention layer of a MODEL. Raises ValueError where the maps are not for it."""
    family = family_of(model)
    if not isinstance(family, UNet):
        raise ValueError(
            f"Semantic Injection is for the scales of a U-Net, but this model is {family.name}; take a checkpoint of "
            f"{semantics.family}."
        )
    width = family.context_width(model)
    context = semantics.form.context
    if context != width or semantics.family != family.name:
        raise ValueError(
            f"'{semantics.name}' is for {semantics.family}, whose prompts have {context} channels, but this "
            f"model is {family.name} with {width}; choose the file for this model's family."
        )
    groups = grouped(attention_sites(model), scales(model.model.diffusion_model))
    missing = set(groups.values()) - semantics.maps.keys()
    if missing:
        raise ValueError(
            f"'{semantics.name}' has no map of group {min(missing)}, which a layer of this model takes; choose the "
            "file for this model's family."
        )
    return groups


def _scene(background: Any) -> Any:
    """The one picture (1, height, width, 3) on the background's link."""
    pictures = pictures_in("background", background)
    if len(pictures) > 1:
        raise ValueError(
            f"The background has {len(pictures)} pictures, but a scene is one; pick one with Get Image from Batch."
        )
    return composite(pictures, None)[0]
