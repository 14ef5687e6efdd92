"""What the nodes that show references share: how the model looks at one, and where its keys stand."""

from __future__ import annotations

from typing import Any

from ..patches.engine.streams import NoisedReference, Pass
from ..patches.families import Transformer, family_of
from ..patches.mechanisms.encoded_subject import KeptReference
from ..patches.mechanisms.positions import BESIDE, CENTRED, DAMPED, SAME, Positions
from ..patches.mechanisms.subject import Subject
from ..patches.parts.sites import USUAL, Site
from .checks import check_choice, check_number
from .image_prompt import layer_channels
from .inputs import CURRENT, FIXED, NEARLY_CLEAN, REFRESH_MAX

AS_THE_PICTURE = Pass()


def looked_at(
    noise_level: str, fixed_level: float, refresh_steps: int, usual: float = 1.0, without_cross_attention: bool = False
) -> Pass:
    """How the model runs on references; `usual` is a share of its schedule. Raises ValueError for another choice of the
    noise level, and for numbers that are out of their bounds."""
    check_choice("noise_level", noise_level, (USUAL, CURRENT, FIXED, NEARLY_CLEAN))
    check_number("fixed_level", fixed_level, 0.0, 1.0)
    check_number("refresh_steps", refresh_steps, 1, REFRESH_MAX)
    if noise_level == CURRENT:
        return Pass(None, refresh_steps, without_cross_attention)
    levels = {USUAL: usual, FIXED: fixed_level, NEARLY_CLEAN: 1.0}
    return Pass(levels[noise_level], 1, without_cross_attention)


def positions_for(model: Any, choice: str, placed: bool) -> Positions | None:
    """How the keys of references are placed in a MODEL; None leaves them as they are. Usual is centred where only some
    places see them, `placed`.

    Raises ValueError where its attention does not know places by rotations, and for another choice."""
    check_choice("positions", choice, (USUAL, SAME, CENTRED, BESIDE, DAMPED))
    if choice == SAME or (choice == USUAL and not placed):
        return None
    family = family_of(model)
    rope = family.rope(model.model.diffusion_model) if isinstance(family, Transformer) else None
    if choice == USUAL:
        return None if rope is None else Positions(CENTRED, family, rope)
    if rope is None:
        raise ValueError(
            f"positions is '{choice}', but the keys of {family.name} have no places that they could be moved from; set "
            f"it to '{USUAL}'."
        )
    return Positions(choice, family, rope)


def reference_streams(
    model: Any, subject: Subject, seed: int, conditioning: Any, how: Pass = AS_THE_PICTURE
) -> tuple[NoisedReference, ...]:
    """A subject's references as companions of a MODEL's generation; none where an encoder's stand for them.

    Raises ValueError when they were encoded for another kind of latent."""
    if subject.encoded is not None:
        return ()
    # A node before this one may have put its own there.
    latent = model.get_model_object("latent_format")
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
        clean = latent.process_in(reference.latents)
        name = ("noised reference", number)
        pixels = reference.pixels or tuple(reference.image.shape[1:3]) or None
        streams.append(NoisedReference(clean, seed, conditioning, reference.mask, subject.cache, name, how, pixels))
    return tuple(streams)


def kept_references(model: Any, subject: Subject) -> tuple[KeptReference, ...]:
    """What a subject's encoder kept of its references, for the layers of a MODEL. Raises ValueError where it is for
    others."""
    kept = () if subject.encoded is None else subject.encoded.references
    for each in kept:
        each.check(layer_channels(model, "self"), family_of(model).context_width(model))
    return kept


def sites_of_kept(kept: tuple[KeptReference, ...], choice: str, chosen: frozenset[Site]) -> frozenset[Site]:
    """Where kept references are seen: of the `chosen` layers, or by a choice of what is usual all, those that they were
    trained for."""
    trained = frozenset(site for each in kept for site in each.sites)
    return trained if choice == USUAL else trained & chosen
