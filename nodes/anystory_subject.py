"""Load AnyStory and AnyStory Subject: the authors' released weights for FLUX.1, and a subject as they encode it."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..encoders.anystory import AnyStory, read_anystory, subject_tokens
from ..encoders.preprocessing import cut_out, latent_pixels, places, to_bytes, vision_pixels
from ..patches.anystory.anystory_subject import AnyStorySubject
from ..patches.mechanisms.subject import composite, encoded
from ..patches.parts.cache import MEGABYTE, FeatureCache
from .checks import MEGABYTES_MAX, check_choice, check_loaded, check_number, masks_in, pictures_in, tell_upside_down
from .inputs import ADVANCED, CACHE_MEGABYTES, cache_input, vae_input
from .model_files import SUBJECT_ENCODERS
from .types import SEVERAL, AnyStorySubjectType, AnyStoryType

SQUARE, NONE = "square around the mask", "none"
# The side of a reference's picture is given in steps of what one token of FLUX covers.
TOKEN = 16


class LoadAnyStoryNode(io.ComfyNode):
    """Loads AnyStory's weights."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SubjectPatchesLoadAnyStory",
            display_name="Load AnyStory",
            category=SEVERAL,
            description="Loads the weights that AnyStory's authors released for FLUX.1 dev, converted by the pack's "
            "tools/convert.py.",
            search_aliases=["AnyStory", "flux ip adapter", "subject", "multi subject", "load encoder"],
            inputs=[
                SUBJECT_ENCODERS.file_input(
                    f"A file in the models folder {SUBJECT_ENCODERS.name} that python tools/convert.py made of the "
                    "authors' anystory_flux.bin.",
                    "anystory_",
                )
            ],
            outputs=[AnyStoryType.Output(display_name="anystory", tooltip="For AnyStory Subject and AnyStory.")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str) -> Any:
        return SUBJECT_ENCODERS.state(file)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        return io.NodeOutput(read_anystory(SUBJECT_ENCODERS.path(file)))


class AnyStorySubjectNode(io.ComfyNode):
    """Encodes a subject for AnyStory."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SubjectPatchesAnyStorySubject",
            display_name="AnyStory Subject",
            category=SEVERAL,
            description="Encodes one subject for AnyStory on FLUX.1, cut out of its picture.",
            search_aliases=["AnyStory", "flux reference", "flux subject", "character", "redux"],
            inputs=[
                AnyStoryType.Input("anystory", tooltip="From Load AnyStory, the same for the model and its subjects."),
                io.Image.Input(
                    "image",
                    tooltip="One picture of the subject. Without a mask, a transparent picture's opacity is the mask; "
                    "Load Image leaves it out, so connect its mask through Invert Mask.",
                ),
                vae_input(),
                io.ClipVision.Input(
                    "clip_vision", tooltip="The SigLIP vision model of FLUX.1 Redux, from Load CLIP Vision."
                ),
                io.StyleModel.Input("style_model", tooltip="FLUX.1 Redux, from Load Style Model."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the subject is; everything else is left out, as AnyStory was trained. "
                    "Needed unless the picture itself comes with opacity.",
                ),
                AnyStorySubjectType.Input("others", optional=True, tooltip="Subjects to pass along with this one."),
                io.Combo.Input(
                    "crop",
                    options=[SQUARE, NONE],
                    default=SQUARE,
                    **ADVANCED,
                    tooltip=f"'{SQUARE}' cuts the subject out as the authors' application does, with a mask of black "
                    f"and white. '{NONE}' takes the whole picture, squeezed into a square, and greys of the mask.",
                ),
                io.Int.Input(
                    "size",
                    default=512,
                    min=64,
                    max=2048,
                    step=TOKEN,
                    **ADVANCED,
                    tooltip="The side of the square, in pixels, in which the FLUX sees the reference. AnyStory was "
                    "trained with 512.",
                ),
                cache_input(),
            ],
            outputs=[
                AnyStorySubjectType.Output(display_name="subjects", tooltip="The subject, after those in 'others'.")
            ],
        )

    @classmethod
    def execute(
        cls,
        anystory: AnyStory,
        image: Any,
        vae: Any,
        clip_vision: Any,
        style_model: Any,
        mask: Any = None,
        others: tuple[AnyStorySubject, ...] = (),
        crop: str = SQUARE,
        size: int = 512,
        cache_megabytes: int = CACHE_MEGABYTES,
    ) -> io.NodeOutput:
        check_loaded(vae=vae)
        check_choice("crop", crop, (SQUARE, NONE))
        check_number("size", size, 64, 2048)
        check_number("cache_megabytes", cache_megabytes, 0, MEGABYTES_MAX)
        if size % TOKEN:
            raise ValueError(f"The size is {size}; give a multiple of {TOKEN}.")
        picture, shares = _given(image, mask)
        redux = _redux(anystory, style_model)
        if crop == SQUARE:
            picture, shares = cut_out(picture, shares)
        elif not shares.any():
            raise ValueError("The subject's mask is empty; paint the subject white, or invert the mask.")
        features, inside = _seen(anystory, clip_vision, picture, shares)
        tokens, router = subject_tokens(anystory, features, inside, redux)
        pixels, square = latent_pixels(picture, shares, size)
        latents = encoded(vae, (pixels / 2 + 0.5).movedim(1, -1), "the subject's picture")
        check_latents(anystory, latents)
        touched = places(square, (size // TOKEN, size // TOKEN))
        subject = AnyStorySubject(tokens, router, latents, touched, FeatureCache(cache_megabytes * MEGABYTE))
        return io.NodeOutput((*others, subject))


def check_latents(anystory: AnyStory, latents: torch.Tensor) -> None:
    """Raises ValueError for latents of another kind of VAE."""
    wanted = anystory.form.packed // 4
    if latents.ndim != 4 or latents.shape[1] != wanted:
        raise ValueError(
            f"The VAE gives latents of the shape {tuple(latents.shape)}, but AnyStory's FLUX takes pictures of "
            f"{wanted} channels; connect FLUX.1's VAE to AnyStory Subject."
        )


def _redux(anystory: AnyStory, style_model: Any) -> Any:
    """The host's Redux layers. Raises ValueError for another style model."""
    redux, form = getattr(style_model, "model", None), anystory.form
    layers = [getattr(redux, name, None) for name in ("redux_up", "redux_down")]
    if None in layers:
        raise ValueError(
            "The style model is not FLUX.1 Redux, whose layers AnyStory builds on; load flux1-redux-dev with Load "
            "Style Model."
        )
    sizes = (layers[0].weight.shape[1], layers[1].weight.shape[0])
    if sizes != (form.vision, form.context):
        raise ValueError(
            f"The Redux model makes {sizes[1]} channels of {sizes[0]}, but AnyStory's weights are for {form.context} "
            f"of {form.vision}; load flux1-redux-dev."
        )
    return redux


def _given(image: torch.Tensor, mask: torch.Tensor | None) -> tuple[Any, Any]:
    """One picture and its mask in bytes."""
    image = pictures_in("image", image)
    mask = None if mask is None else masks_in("mask", mask)
    if len(image) != 1:
        raise ValueError(f"There are {len(image)} pictures; AnyStory takes one a subject.")
    image, mask = composite(image, mask)
    if mask is None:
        raise ValueError(
            "There is no mask; connect one. That of a transparent picture in Load Image goes through Invert Mask."
        )
    if len(mask) != 1:
        raise ValueError(f"There are {len(mask)} masks; AnyStory takes one a subject.")
    tell_upside_down("subject's mask", mask[0])
    return to_bytes(image[0]), to_bytes(mask[0])


def _seen(anystory: AnyStory, clip_vision: Any, picture: Any, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What the vision model makes of a subject (1, n, channels), and which of its n places the subject touches."""
    import comfy.model_management

    if clip_vision is None:
        raise ValueError("The vision model could not be loaded; choose the SigLIP model of FLUX.1 Redux.")
    pixels, shares = vision_pixels(picture, mask, clip_vision.image_size)
    comfy.model_management.load_model_gpu(clip_vision.patcher)
    # Not by the host's `encode_image`: its rounding would make the mid grey of the background another colour.
    features = clip_vision.model(pixel_values=pixels.to(clip_vision.load_device), intermediate_output=-2)[0].float()
    side = round(features.shape[1] ** 0.5)
    if features.shape[-1] != anystory.form.vision or side**2 != features.shape[1]:
        raise ValueError(
            f"The vision model gives {features.shape[1]} tokens of {features.shape[-1]} channels, but AnyStory reads "
            f"squares of {anystory.form.vision} channels; load sigclip_vision_patch14_384."
        )
    return features, places(shares, (side, side))
