"""The inputs that every training node has, and its loss output."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from comfy_api.latest import io

from ..patches.families import family_of
from ..patches.families.unet import UNet
from ..patches.parts.context import CLIPS
from ..patches.parts.writing import shortened
from ..training.usual import Usual
from .checks import check_choice, check_number, pictures_in
from .inputs import ADVANCED, model_input, seed_input, vae_input

# The host's own type: a dictionary with the list "loss", for its Plot Loss Graph.
LossMapType = io.Custom("LOSS_MAP")
PRECISIONS = ("auto", "bf16", "fp16", "fp32")
STEPS_MAX = 1_000_000
BATCH_MAX = 64
# Pixels: the least and the greatest side of a training picture.
SIDE = (64, 4096)
AUTO = "0 is what suits the model; the log says what was taken."
# What a picture shows where nothing is said of it.
CAPTION = "a photo of a {}"
NOT_IN_A_NOUN = re.compile(r"[(){}:;,\r\n]")


def material_inputs() -> list[Any]:
    """What is trained on which pictures: the parts of a checkpoint, the pictures and what they show."""
    return [
        model_input("SD 1.x, SD 2.x or SDXL"),
        io.Clip.Input("clip", tooltip="The CLIP of the same checkpoint."),
        vae_input(),
        io.Image.Input(
            "images",
            tooltip="3 to 5 pictures of the subject, from different sides and in different scenes: a batch, or the "
            "list that Load Image (from Folder) gives. Of each the middle square is taken.",
        ),
        io.String.Input("noun", default="", tooltip="What the subject is, in a word: backpack, dog, emblem."),
    ]


def steps_input(tooltip: str) -> io.Int.Input:
    return io.Int.Input("steps", default=0, min=0, max=STEPS_MAX, tooltip=f"{tooltip} {AUTO}")


def side_input() -> io.Int.Input:
    tooltip = (
        "Side of the square in pixels that each picture becomes: what the checkpoint is made for, 512 for SD 1.x, "
    )
    tooltip += "512 or 768 for SD 2.x, 1024 for SDXL."
    return io.Int.Input("size", default=0, min=0, max=SIDE[1], step=8, tooltip=f"{tooltip} {AUTO}")


def batch_input() -> io.Int.Input:
    bounds = {"default": 0, "min": 0, "max": BATCH_MAX}
    return io.Int.Input("batch_size", **bounds, tooltip=f"Pictures in each step. {AUTO}", **ADVANCED)


def rate_input(name: str, step: float, tooltip: str, optional: bool = False) -> io.Float.Input:
    more = ADVANCED if optional else {}
    return io.Float.Input(name, default=0.0, min=0.0, max=1.0, step=step, tooltip=f"{tooltip} {AUTO}", **more)


def check_training(steps: int, batch_size: int, precision: str, size: int) -> None:
    """Raises ValueError for a number or choice of these that the inputs would not take."""
    check_number("steps", steps, 0, STEPS_MAX)
    check_number("batch_size", batch_size, 0, BATCH_MAX)
    check_choice("precision", precision, PRECISIONS)
    if size:
        check_number("size", size, *SIDE)


def settled(given: Usual, usual: Usual, node: str) -> Usual:
    """What a node was given, with what is usual where that is 0; the log says what was taken."""
    taken = {field.name: getattr(given, field.name) or getattr(usual, field.name) for field in fields(Usual)}
    settings = Usual(**taken)
    words = ""
    if settings.words:
        words = f", for the concept's words {settings.concept:g} and for the pictures' own {settings.words:g}"
    logging.info(
        f"{node}: {settings.steps} steps of {settings.batch} pictures at {settings.side} x {settings.side}, learning "
        f"rate {settings.rate:g}{words}."
    )
    return settings


def training_pictures(images: Sequence[Any], side: int) -> list[Any]:
    """The training pictures (1, side, side, 3) in all of an input's IMAGE batches, each its middle square. Raises
    ValueError when there are none, or one is broken."""
    pictures = squares("images", images, side)
    if not pictures:
        raise ValueError("There are no training pictures; give 3 to 5 of the subject.")
    return pictures


def squares(name: str, images: Sequence[Any], side: int) -> list[Any]:
    """The middle squares (1, side, side, 3) of the pictures in all of the IMAGE batches of the input `name`. Raises
    ValueError when one is broken."""
    from ..training.images import pictures_of, square

    return [square(picture, side) for picture in pictures_of([pictures_in(name, batch) for batch in images])]


def digest(pictures: Sequence[Any]) -> str:
    """Tells training pictures apart."""
    found = hashlib.sha256()
    for picture in pictures:
        found.update(picture.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def check_learns(model: Any, clip: Any) -> None:
    """Raises ValueError for a model or a CLIP whose words cannot be trained: only CLIP's text encoders give a word a
    vector of its own, which holds in another prompt too. And for a CLIP that is not the model's."""
    family, tokens = family_of(model), clip.tokenize("")
    others = [name for name in tokens if name not in CLIPS]
    if others or not isinstance(family, UNet):
        what = f"this CLIP has {', '.join(others)}" if others else f"this model is {family.name}"
        raise ValueError(
            f"Words are trained in the CLIP text encoders of SD 1.x, SD 2.x and SDXL, but {what}: what T5 or a "
            "language model makes of a word depends on the whole prompt; train on a checkpoint of one of those."
        )
    takes, gives = family.context_width(model), clip.encode_from_tokens(tokens).shape[-1]
    if takes != gives:
        raise ValueError(
            f"The model takes prompts {takes} wide, but this CLIP encodes them {gives} wide; give both from one "
            "checkpoint."
        )


def checked_noun(text: str) -> str:
    """The noun that was written. Raises ValueError when it is empty, or has what a prompt reads as more than words."""
    noun = text.strip()
    if not noun:
        raise ValueError("The noun is empty; write what the subject is, like dog or backpack.")
    if NOT_IN_A_NOUN.search(noun):
        raise ValueError(f"The noun is '{shortened(noun)}'; write words alone, without brackets, weights or commas.")
    return noun


def lines_of(text: str) -> list[str]:
    """The lines of a text field; empty ones are left out."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def captions_of(text: str, noun: str, count: int, kind: str = "") -> list[str]:
    """A caption for each of `count` pictures, of the lines of a text field. Raises ValueError, naming the `kind` of
    pictures, when there are neither so many nor one for all."""
    from ..training.residual import filled

    lines = lines_of(text) or [CAPTION]
    if len(lines) not in (1, count):
        raise ValueError(
            f"There are {len(lines)} {kind}captions for {count} {kind}pictures; write one line for all, or one for "
            "each."
        )
    return [filled(line, noun) for line in (lines * count if len(lines) == 1 else lines)]


def training_inputs() -> list[Any]:
    """Seed, precision, gradient checkpointing, and the name under which a training can go on."""
    return [
        seed_input(),
        io.Combo.Input(
            "precision",
            options=list(PRECISIONS),
            default="auto",
            **ADVANCED,
            tooltip="What the model computes in; what is trained is kept in fp32. 'auto' is bf16 or fp16 where the GPU "
            "has it, fp32 on a CPU.",
        ),
        io.Boolean.Input(
            "gradient_checkpointing",
            default=True,
            **ADVANCED,
            tooltip="Needs much less memory, and about a third more time. Changes nothing in the result.",
        ),
        io.String.Input(
            "resume_name",
            default="",
            **ADVANCED,
            tooltip="With a name, a training that was cancelled or whose steps were raised goes on where it stopped. "
            "Its state is kept in the output folder under training/, a few times the size of what is trained.",
        ),
    ]


def loss_output() -> Any:
    return LossMapType.Output(display_name="loss_map", tooltip="The loss of each step, for Plot Loss Graph.")
