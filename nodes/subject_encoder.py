"""Load Subject Encoder and Encode Subjects: AnyStory's trained encoder on U-Nets, and what it makes of subjects."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from comfy_api.latest import io

from ..encoders.segmented import segmented
from ..encoders.subject_encoder import SubjectEncoder, read_subject_encoder
from ..patches.mechanisms.encoded_subject import EncodedSubject, KeptReference, RoutingFeature
from ..patches.mechanisms.image_prompt import AdaptedPrompt
from ..patches.mechanisms.subject import Reference, Subject, encoded
from ..patches.parts.masks import resize_mask
from .checks import check_choice, check_loaded
from .inputs import ADVANCED, subject_input, vae_input
from .model_files import SUBJECT_ENCODERS
from .types import SUBJECT, SubjectEncoderType, SubjectType

BOTH, TOKENS, REFERENCES = "tokens and references", "tokens", "references"


class LoadSubjectEncoderNode(io.ComfyNode):
    """Loads a trained subject encoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SubjectPatchesLoadSubjectEncoder",
            display_name="Load Subject Encoder",
            category=SUBJECT,
            description="Loads a trained subject encoder (AnyStory's QFormer and ReferenceNet) for Encode Subjects.",
            search_aliases=["AnyStory", "ReferenceNet", "QFormer", "image prompt", "load encoder"],
            inputs=[
                SUBJECT_ENCODERS.file_input(
                    f"A file in the models folder {SUBJECT_ENCODERS.name} that the pack's training wrote, for the "
                    "checkpoint's family. anystory-toy is for the small checkpoint that comes with the pack.",
                    "anystory-",
                )
            ],
            outputs=[
                SubjectEncoderType.Output(
                    display_name="encoder", tooltip="For Encode Subjects, and for Route Subjects by Encoder."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str) -> Any:
        return SUBJECT_ENCODERS.state(file)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        return io.NodeOutput(read_subject_encoder(SUBJECT_ENCODERS.path(file)))


class EncodeSubjectsNode(io.ComfyNode):
    """Has a trained encoder look at subjects, once for all pictures that will show them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SubjectPatchesEncodeSubjects",
            display_name="Encode Subjects",
            category=SUBJECT,
            description="Has a trained encoder look at subjects (AnyStory): Recycled Self-Attention and Routed "
            "Reference Attention then show what it made of them, without a pass over the references.",
            search_aliases=["AnyStory", "ReferenceNet", "QFormer", "image prompt"],
            inputs=[
                vae_input(),
                subject_input(),
                SubjectEncoderType.Input("encoder", tooltip="From Load Subject Encoder."),
                io.Combo.Input(
                    "parts",
                    options=[BOTH, TOKENS, REFERENCES],
                    default=BOTH,
                    **ADVANCED,
                    tooltip="What the subject carries then: 'tokens' say what it is (from the vision model, Eq. 5), "
                    "'references' show its details (from the ReferenceNet, Eq. 6). Both were trained together.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="The vision model that the encoder was trained with, from Load CLIP Vision. Not needed "
                    "where the encoder's file brings its own, as anystory-toy does.",
                ),
            ],
            outputs=[SubjectType.Output(display_name="subject", tooltip="The subject as the encoder sees it.")],
        )

    @classmethod
    def execute(
        cls,
        subject: tuple[Subject, ...],
        encoder: SubjectEncoder,
        vae: Any,
        parts: str = BOTH,
        clip_vision: Any = None,
    ) -> io.NodeOutput:
        check_loaded(vae=vae)
        check_choice("parts", parts, (BOTH, TOKENS, REFERENCES))
        vision = encoder.vision if clip_vision is None else clip_vision
        if vision is None and parts != REFERENCES:
            raise ValueError(
                f"The encoder '{encoder.name}' brings no vision model, and none is connected; connect Load CLIP Vision "
                "with the model that it was trained with, or set parts to 'references'."
            )
        return io.NodeOutput(
            tuple(
                replace(each, encoded=_encoded(each, number, encoder, vae, vision, parts))
                for number, each in enumerate(subject, 1)
            )
        )


def _encoded(
    subject: Subject, number: int, encoder: SubjectEncoder, vae: Any, vision: Any, parts: str
) -> EncodedSubject:
    for picture, reference in enumerate(subject.references, 1):
        if not reference.cut_out:
            raise ValueError(
                f"Picture {picture} of subject {number} has no mask, but the encoder looks at what is cut out of its "
                "ground only; connect a mask to Subject Reference. That of a transparent picture in Load Image goes "
                "through Invert Mask."
            )
    references, prompt, routing = (), None, None
    if parts != TOKENS:
        references = tuple(_kept(reference, encoder, vae) for reference in subject.references)
    told = parts != REFERENCES
    if vision is not None and subject.references and (told or encoder.router is not None):
        size, mean, std = vision.image_size, vision.image_mean, vision.image_std
        cut = [segmented(each.image, each.pixel_mask, size, mean, std)[0] for each in subject.references]
        # What stands for no picture is all zero, as what is cut out.
        own, empty = encoder.seen(vision, torch.cat(cut)), encoder.seen(vision, torch.zeros_like(cut[0]))
        if told:
            prompt = AdaptedPrompt(encoder.name, encoder.form.context, encoder.prompts(own), encoder.prompts(empty))
        if encoder.router is not None:
            routing = RoutingFeature(encoder.name, encoder.routing(own), encoder.routing(empty))
    return EncodedSubject(references, prompt, routing)


def _kept(reference: Reference, encoder: SubjectEncoder, vae: Any) -> KeptReference:
    pixels, mask = segmented(reference.image, reference.pixel_mask, encoder.form.size)
    latents = encoded(vae, (pixels / 2 + 0.5).movedim(1, -1), "the subject's picture")
    wanted = encoder.form.latent_channels
    if latents.ndim != 4 or latents.shape[1] != wanted:
        raise ValueError(
            f"The VAE gives latents of the shape {tuple(latents.shape)}, but the encoder '{encoder.name}' reads "
            f"pictures of {wanted} channels; connect the VAE of the checkpoint that it was trained for."
        )
    small = resize_mask(mask, tuple(latents.shape[-2:]))
    made = encoder.references(latents * encoder.form.scale, small)
    return KeptReference(encoder.name, encoder.family, encoder.form.context, made)
