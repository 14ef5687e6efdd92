"""Trained image prompts: Load Image Prompt Adapter, Encode Image Prompt, and how any image prompt meets a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from comfy_api.latest import io

from ..encoders.ip_adapter import ImagePromptAdapter, read_adapter
from ..patches.families import family_of
from ..patches.families.unet import UNet
from ..patches.mechanisms.image_prompt import AdaptedPrompt, ImagePrompt, ReadyPrompt, TokenPrompt
from ..patches.mechanisms.subject import Reference, Subject
from ..patches.parts.sites import Site
from .checks import check_choice, prompt_in
from .inputs import ADVANCED, subject_input
from .model_files import ADAPTERS
from .types import SEVERAL, AdapterType, SubjectType

KEPT, REMOVED = "kept", "removed"
CROPS = ("center", "none")


class LoadImagePromptAdapterNode(io.ComfyNode):
    """Loads trained projections of image prompts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SubjectPatchesLoadImagePromptAdapter",
            display_name="Load Image Prompt Adapter",
            category=SEVERAL,
            description="Loads an IP-Adapter file (plain, plus or full; SD 1.x or SDXL) for Encode Image Prompt.",
            search_aliases=["IP-Adapter", "ipadapter", "image prompt", "AnyStory", "load adapter"],
            inputs=[
                ADAPTERS.file_input(
                    f"A safetensors file in the models folder {ADAPTERS.name}, for the checkpoint's family."
                )
            ],
            outputs=[AdapterType.Output(display_name="adapter", tooltip="For Encode Image Prompt.")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str) -> Any:
        return ADAPTERS.state(file)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        import comfy.utils

        path = ADAPTERS.path(file)
        try:
            tensors = comfy.utils.load_torch_file(str(path), safe_load=True)
        except Exception as error:
            raise ValueError(f"'{file}' cannot be read as safetensors ({error}); download it again.") from error
        return io.NodeOutput(read_adapter(tensors, file))


class EncodeImagePromptNode(io.ComfyNode):
    """Gives a subject an image prompt that an adapter made of its pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SubjectPatchesEncodeImagePrompt",
            display_name="Encode Image Prompt",
            category=SEVERAL,
            description="Reads a subject's pictures with a CLIP vision model and a trained adapter, for Routed "
            "Reference Attention to show in the subject's places (AnyStory's Eq. 5 with IP-Adapter's weights).",
            search_aliases=["IP-Adapter", "ipadapter", "image prompt", "AnyStory", "regional ip adapter"],
            inputs=[
                subject_input(),
                AdapterType.Input("adapter", tooltip="From Load Image Prompt Adapter."),
                io.ClipVision.Input(
                    "clip_vision",
                    tooltip="From Load CLIP Vision: the model that the adapter was trained with, for most files CLIP "
                    "ViT-H, for those named vit-G ViT-bigG.",
                ),
                io.Combo.Input(
                    "background",
                    options=[KEPT, REMOVED],
                    default=REMOVED,
                    tooltip="'removed': what is outside the subject's mask becomes white before the vision model sees "
                    "the picture, as AnyStory does. 'kept': it sees all. The same without a mask.",
                ),
                io.Combo.Input(
                    "crop",
                    options=list(CROPS),
                    default="center",
                    **ADVANCED,
                    tooltip="How a picture becomes the vision model's square: its middle, or all of it squeezed.",
                ),
            ],
            outputs=[SubjectType.Output(display_name="subject", tooltip="The subject with its image prompt.")],
        )

    @classmethod
    def execute(
        cls,
        subject: tuple[Subject, ...],
        adapter: ImagePromptAdapter,
        clip_vision: Any,
        background: str = REMOVED,
        crop: str = "center",
    ) -> io.NodeOutput:
        check_choice("background", background, (KEPT, REMOVED))
        check_choice("crop", crop, CROPS)
        empty = adapter.keys_and_values(adapter.tokens(_empty(adapter, clip_vision)))
        shown = []
        for each in subject:
            if not each.references:
                shown.append(each)
                continue
            pictures = [_picture(reference, background == REMOVED) for reference in each.references]
            seen = [_seen(adapter, clip_vision.encode_image(picture, crop=crop == "center")) for picture in pictures]
            states = None if any(state is None for state in seen) else torch.cat(seen)
            kept = AdaptedPrompt(adapter.name, adapter.context, adapter.keys_and_values(adapter.tokens(states)), empty)
            shown.append(replace(each, share=replace(each.share, prompt=kept)))
        return io.NodeOutput(tuple(shown))


def _picture(reference: Reference, removed: bool) -> Any:
    """(1, height, width, 3), white outside the subject's mask where the background is removed."""
    if not removed or reference.pixel_mask is None:
        return reference.image
    mask = reference.pixel_mask[..., None].to(reference.image)
    return reference.image * mask + (1 - mask)


def _seen(adapter: ImagePromptAdapter, output: Any) -> Any:
    return output["image_embeds"] if adapter.pooled else output["penultimate_hidden_states"]


def _empty(adapter: ImagePromptAdapter, clip_vision: Any) -> Any:
    """What stands for no picture, as in the authors' code: zeros in the place of the pooled output, and the hidden
    states of a picture that is zero after the vision model's normalisation."""
    import comfy.model_management

    if adapter.pooled:
        return torch.zeros(1, adapter.features)
    comfy.model_management.load_model_gpu(clip_vision.patcher)
    size = clip_vision.image_size
    with torch.inference_mode():
        pixels = torch.zeros(1, 3, size, size, device=clip_vision.load_device)
        return clip_vision.model(pixel_values=pixels, intermediate_output=-2)[1]


# What an image prompt is to a model


def token_prompt(name: str, conditioning: Any, last: int = 0) -> TokenPrompt | None:
    """The tokens of a CONDITIONING; `last` of them, or all where it is 0. None without a conditioning. Raises
    ValueError, calling it `name`, when it is several, of which only one could act."""
    if prompt_in(name, conditioning) is None:
        return None
    tokens = conditioning[0][0]
    if len(conditioning) > 1 or len(tokens) > 1:
        raise ValueError(
            f"The {name} has {len(conditioning)} prompts of {len(tokens)} rows, of which only one can act; connect one "
            "alone, without combining or batching."
        )
    if last > tokens.shape[1]:
        raise ValueError(f"last_tokens is {last} but the {name} has {tokens.shape[1]}; 0 takes all of them.")
    return TokenPrompt(tokens[:, -last:])


def at_model(prompt: TokenPrompt | AdaptedPrompt | None, model: Any, name: str) -> ImagePrompt | None:
    """An image prompt as the layers of a MODEL take it. Raises ValueError, calling it `name`, where it does not fit."""
    if isinstance(prompt, AdaptedPrompt):
        return _at_layers(prompt, model)[0]
    width = family_of(model).context_width(model)
    if prompt is not None and prompt.tokens.shape[-1] != width:
        raise ValueError(
            f"{name} has tokens of {prompt.tokens.shape[-1]} channels but this model's prompts have {width}; encode it "
            "with the encoder or adapter that is made for this model."
        )
    return prompt


def empty_prompt(prompts: Sequence[TokenPrompt | AdaptedPrompt | None], model: Any) -> ReadyPrompt | None:
    """The empty picture's prompt of the adapter that made the subjects' prompts, or None where none did."""
    adapted = {prompt.adapter: prompt for prompt in prompts if isinstance(prompt, AdaptedPrompt)}
    if len(adapted) > 1:
        raise ValueError(
            f"The subjects' image prompts come from different adapters ({', '.join(sorted(adapted))}), but the "
            "unconditional pass can show the empty picture of one only; encode all subjects with one adapter."
        )
    return next((_at_layers(prompt, model)[1] for prompt in adapted.values()), None)


def _at_layers(prompt: AdaptedPrompt, model: Any) -> tuple[ReadyPrompt, ReadyPrompt]:
    return prompt.at(layer_channels(model, "cross"), family_of(model).context_width(model))


def layer_channels(model: Any, kind: str) -> dict[Site, int]:
    """How many channels each layer of a kind, "self" or "cross", of a MODEL has, in their order. Raises ValueError
    where it is no U-Net."""
    family = family_of(model)
    if not isinstance(family, UNet):
        raise ValueError(
            "The image prompt or references that a trained encoder or adapter made of a subject are for the layers of "
            f"SD 1.x, 2.x and SDXL, but this model is {family.name}. Take Encode Subjects or Encode Image Prompt out "
            "of the subject's way."
        )
    network = model.model.diffusion_model
    return {site: family.channels(network, site, "key") for site in family.sites(network) if site.kind == kind}
