"""Train Residual Token: one subject from a few pictures (Cones 2)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io

from .checks import check_choice, check_loaded, check_number, single, tell
from .inputs import ADVANCED
from .training_inputs import (
    CAPTION,
    batch_input,
    captions_of,
    check_learns,
    check_training,
    checked_noun,
    digest,
    lines_of,
    loss_output,
    material_inputs,
    rate_input,
    settled,
    side_input,
    steps_input,
    training_inputs,
    training_pictures,
)
from .types import CONCEPT, ResidualTokenType
from .written import refusal, typed

ENCODER, ALONE = "text encoder", "residual alone"
OWN, AS_V = "what the model predicts", "v"


class TrainResidualToken(io.ComfyNode):
    """Learns a residual token. Its inputs come as lists, so that a list of pictures is one training."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SubjectPatchesTrainResidualToken",
            display_name="Train Residual Token",
            category=CONCEPT,
            description="Learns a subject from 3 to 5 pictures of it, as one vector that turns its noun into it (Cones "
            "2). The MODEL and CLIP stay as they are. Needs about as much memory as training their text encoder.",
            search_aliases=[
                "Cones 2",
                "personalization",
                "DreamBooth",
                "textual inversion",
                "lora training",
                "train character",
                "concept",
            ],
            is_input_list=True,
            inputs=[
                *material_inputs(),
                steps_input("How many steps. 3000 is the paper's."),
                rate_input(
                    "learning_rate",
                    1e-8,
                    "0.000001 is the paper's, for text encoders of Stable Diffusion's size. Small ones take more, a "
                    "residual alone about 0.05.",
                ),
                batch_input(),
                io.Float.Input(
                    "preservation",
                    default=0.1,
                    min=0.0,
                    max=1000.0,
                    step=0.01,
                    **ADVANCED,
                    tooltip="How much the other words of a prompt are kept as they are: lambda of the paper's Eq. 4. "
                    "More keeps residuals of several subjects apart better, less learns faster.",
                ),
                side_input(),
                io.String.Input(
                    "captions",
                    multiline=True,
                    default=CAPTION,
                    tooltip="What the pictures show, with {} for the noun: one line for all, or one for each. Words "
                    "for what is not the subject, like its ground, keep that out of the residual.",
                ),
                io.String.Input(
                    "more_templates",
                    multiline=True,
                    default="",
                    placeholder="a {} on a skateboard",
                    **ADVANCED,
                    tooltip="Further sentences, one a line, with {} for the noun. They join those that come with the "
                    "pack: over them other words are kept, and the residual is their mean.",
                ),
                io.Combo.Input(
                    "tunes",
                    options=[ENCODER, ALONE],
                    default=ENCODER,
                    **ADVANCED,
                    tooltip="What learns. 'text encoder' is the paper's: the residual is its mean shift. 'residual "
                    "alone' needs little memory, no sentences, and a learning rate of about 0.05; the paper "
                    "finds it weaker with several subjects.",
                ),
                io.Combo.Input(
                    "loss",
                    options=[OWN, AS_V],
                    default=OWN,
                    **ADVANCED,
                    tooltip="What the loss is of. 'what the model predicts' is the paper's, the noise for most models. "
                    "'v' counts strong noise more, where shapes and colours are decided.",
                ),
                *training_inputs(),
            ],
            outputs=[
                ResidualTokenType.Output(
                    display_name="residual", tooltip="For Apply Residual Tokens and Save Residual Token."
                ),
                loss_output(),
            ],
        )

    @classmethod
    def validate_inputs(cls, noun: Any = None) -> bool | str:
        return refusal(checked_noun, typed(noun))

    @classmethod
    def execute(cls, images: list[Any], **given: list[Any]) -> io.NodeOutput:
        return cls.trained(images, **{name: single(name, values) for name, values in given.items()})

    @classmethod
    def trained(
        cls,
        images: Sequence[Any],
        model: Any,
        clip: Any,
        vae: Any,
        noun: str,
        steps: int = 0,
        learning_rate: float = 0.0,
        size: int = 0,
        captions: str = CAPTION,
        batch_size: int = 0,
        preservation: float = 0.1,
        more_templates: str = "",
        tunes: str = ENCODER,
        loss: str = OWN,
        seed: int = 0,
        precision: str = "auto",
        gradient_checkpointing: bool = True,
        resume_name: str = "",
    ) -> io.NodeOutput:
        """`execute`, of the values themselves and a sequence of IMAGE batches."""
        from ..training.copies import told_of, with_gradients
        from ..training.images import latents_of
        from ..training.loop import compute_dtype
        from ..training.residual import Plan, filled, shipped_templates, train_residual_token
        from ..training.state import StateFile
        from ..training.usual import Usual, usual_residual

        noun = checked_noun(noun)
        check_training(steps, batch_size, precision, size)
        check_number("learning_rate", learning_rate, 0.0, 1.0)
        check_number("preservation", preservation, 0.0, 1000.0)
        check_choice("tunes", tunes, (ENCODER, ALONE))
        check_choice("loss", loss, (OWN, AS_V))
        check_loaded(clip, vae)
        check_learns(model, clip)
        usual = usual_residual(model, alone=tunes == ALONE)
        taken = settled(Usual(steps, batch_size, size, learning_rate), usual, "Train Residual Token")
        squares = training_pictures(images, taken.side)
        if len(squares) == 1:
            tell(
                "Train Residual Token has one picture: it will learn the ground and the view along with the subject. "
                "Give 3 to 5 from different sides if you can."
            )
        _templates(captions, "captions")
        shown = captions_of(captions, noun, len(squares))
        templates = shipped_templates() + _templates(more_templates, "more_templates")
        dtype = compute_dtype(precision, model.load_device)
        resumed = resume_name.strip()
        about = {
            "noun": noun,
            "tunes": tunes,
            "loss": loss,
            "pictures": digest(squares),
            "captions": "; ".join(shown),
            "sentences": f"{len(templates)}, {hashlib.sha256(chr(10).join(templates).encode()).hexdigest()[:16]}",
            "learning rate": str(taken.rate),
            "batch size": str(taken.batch),
            "preservation": str(preservation),
            "precision": str(dtype),
            "seed": str(seed),
        }
        state = StateFile(resumed, about | told_of(model, clip, vae)) if resumed else None
        with with_gradients():
            latents = latents_of(vae, squares, model.model.latent_format.latent_channels)
        plan = Plan(
            taken.steps,
            taken.rate,
            taken.batch,
            preservation,
            seed,
            dtype,
            gradient_checkpointing,
            alone=tunes == ALONE,
            as_v=loss == AS_V,
        )
        sentences = [filled(line, noun) for line in templates]
        residual, loss_map = train_residual_token(model, clip, latents, shown, sentences, noun, plan, state)
        return io.NodeOutput(residual, loss_map)


def _templates(text: str, name: str) -> list[str]:
    """The lines of the text field `name`. Raises ValueError for one without a place for the noun, or with several."""
    lines = lines_of(text)
    for line in lines:
        if line.count("{}") != 1:
            raise ValueError(f"The line '{line}' of {name} needs the place of the noun once, written as {{}}.")
    return lines
