"""What the nodes that show references share: how the model looks at one, and where its keys stand."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..patches.families import Transformer, family_of
from ..patches.positions import BESIDE, DAMPED, SAME, Positions
from ..patches.sites import USUAL
from ..patches.streams import NoisedReference, Pass
from ..patches.subject import Subject
from .checks import check_choice, check_number

CURRENT, FIXED, NEARLY_CLEAN = "current", "fixed", "nearly clean"
AS_THE_PICTURE = Pass()
REFRESH_MAX = 1000


def noise_level_input() -> io.Combo.Input:
    """At which noise level the model runs on a reference."""
    return io.Combo.Input(
        "noise_level",
        options=[USUAL, CURRENT, FIXED, NEARLY_CLEAN],
        default=USUAL,
        optional=True,
        advanced=True,
        tooltip="At which noise level the model looks at a reference. 'current': the picture's own, one pass a step. "
        "'nearly clean': the schedule's last, one pass in all. 'fixed': that of fixed_level, one pass in all. 'usual' "
        "is 'current' for SD 1.x and 2.x, and 'nearly clean' for SDXL and transformers, whose features of every step "
        "would overflow the subject's cache.",
    )


def level_inputs() -> list[io.Input]:
    """What goes with the noise level: which one, and how often the model looks."""
    return [
        io.Float.Input(
            "fixed_level",
            default=0.75,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            advanced=True,
            tooltip="With noise_level 'fixed': where in the model's schedule the reference is looked at. 0 is nothing "
            "but noise, 1 is nearly clean.",
        ),
        io.Int.Input(
            "refresh_steps",
            default=1,
            min=1,
            max=REFRESH_MAX,
            optional=True,
            advanced=True,
            tooltip="With noise_level 'current': how many steps a look at the reference serves. 1 looks at every step; "
            "2 halves what the first picture costs, and what the subject's cache holds.",
        ),
    ]


def looked_at(
    model: Any, noise_level: str, fixed_level: float, refresh_steps: int, without_cross_attention: bool = False
) -> Pass:
    """How a MODEL runs on references. Raises ValueError for another choice of the noise level, and for numbers that
    are out of their bounds."""
    check_choice("noise_level", noise_level, (USUAL, CURRENT, FIXED, NEARLY_CLEAN))
    check_number("fixed_level", fixed_level, 0.0, 1.0)
    check_number("refresh_steps", refresh_steps, 1, REFRESH_MAX)
    if noise_level == USUAL:
        noise_level = NEARLY_CLEAN if family_of(model).looks_nearly_clean() else CURRENT
    if noise_level == CURRENT:
        return Pass(None, refresh_steps, without_cross_attention)
    return Pass(1.0 if noise_level == NEARLY_CLEAN else fixed_level, 1, without_cross_attention)


def positions_input() -> io.Combo.Input:
    """Where the keys of references stand."""
    return io.Combo.Input(
        "positions",
        options=[USUAL, SAME, BESIDE, DAMPED],
        default=USUAL,
        optional=True,
        advanced=True,
        tooltip="For transformers that know places by rotations: where the picture sees a reference. 'same': in the "
        "same place, as it ran. 'beside': left of the picture, one after another, as AnyStory's on FLUX. 'damped': in "
        "the same place, the finer a difference of places the less it counts. 'usual' is 'same', which is "
        "best by far on the pack's small transformer.",
    )


def positions_for(model: Any, choice: str) -> Positions | None:
    """How the keys of references are placed in a MODEL; None leaves them as they are.

    Raises ValueError where its attention does not know places by rotations, and for another choice."""
    check_choice("positions", choice, (USUAL, SAME, BESIDE, DAMPED))
    if choice in (USUAL, SAME):
        return None
    family = family_of(model)
    rope = family.rope(model.model.diffusion_model) if isinstance(family, Transformer) else None
    if rope is None:
        raise ValueError(
            f"positions is '{choice}', but the keys of {family.name} have no places that they could be moved from; set "
            f"it to '{USUAL}'."
        )
    return Positions(choice, family, rope)


def reference_streams(
    model: Any, subject: Subject, seed: int, conditioning: Any, how: Pass = AS_THE_PICTURE
) -> tuple[NoisedReference, ...]:
    """A subject's references as companions of a MODEL's generation.

    Raises ValueError when they were encoded for another kind of latent."""
    latent = model.model.latent_format
    wanted, sides = latent.latent_channels, latent.latent_dimensions + 2
    streams = []
    for number, reference in enumerate(subject.references):
        channels = reference.latents.shape[1]
        if reference.latents.ndim != sides:
            raise ValueError(
                f"The subject was encoded with a VAE of {'videos' if sides == 4 else 'pictures'} but this model takes "
                f"latents of {'pictures' if sides == 4 else 'videos, of one frame'}; connect the VAE of this model to "
                "the Subject Reference node."
            )
        if channels != wanted:
            raise ValueError(
                f"The subject was encoded with a VAE of {channels} latent channels but this model takes {wanted}; "
                "connect the VAE of this checkpoint to the Subject Reference node."
            )
        clean = model.model.process_latent_in(reference.latents)
        name = ("noised reference", number)
        pixels = reference.pixels or tuple(reference.image.shape[1:3]) or None
        streams.append(NoisedReference(clean, seed, conditioning, reference.mask, subject.cache, name, how, pixels))
    return tuple(streams)
