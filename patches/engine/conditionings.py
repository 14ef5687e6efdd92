"""What of the generation's conditioning holds for a companion stream, which runs the model on other latents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .chunks import UNCONDITIONED
from .denoising import Denoising
from .streams import Stream

# What a conditioning says of the generation's picture alone, and a companion's must not take over.
_OF_THE_GENERATION = frozenset(
    {
        "area",
        "mask",
        "mask_strength",
        "set_area_to_bounds",
        "strength",
        "control",
        "control_apply_to_uncond",
        "gligen",
        "default",
        "start_percent",
        "end_percent",
        "timestep_start",
        "timestep_end",
        "clip_start_percent",
        "clip_end_percent",
        "concat_latent_image",
        "concat_mask",
        "noise_concat",
        "denoise_mask",
        "model_conds",
        "uuid",
    }
)
# What of it says how an inpainting model is shown the picture, which a branch of the same picture is shown too.
_OF_THE_PICTURE = frozenset({"concat_latent_image", "concat_mask", "noise_concat"})
# Pictures that the host shows an editing model beside its own.
_BESIDE_THE_PICTURE = frozenset(
    {
        "reference_latents",
        "reference_latents_method",
        "reference_latents_text_embeds",
        "clip_vision_outputs",
        "time_dim_concat",
        "context_latents",
    }
)
# How closely a distilled model follows the prompt.
_GUIDANCE = frozenset({"guidance"})
# What SDXL is told of a picture's size.
_SIZES = frozenset({"width", "height", "crop_w", "crop_h", "target_width", "target_height"})


def entries_of(guider: Any, conditioned: bool) -> list[dict[str, Any]]:
    """The generation's conditionings, or its negative ones; those of the usual list first."""
    lists = [listed for name, listed in guider.conds.items() if (name in UNCONDITIONED) != conditioned]
    usual = guider.conds.get("positive" if conditioned else "negative")
    lists.sort(key=lambda listed: listed is not usual)
    return [entry for listed in lists for entry in listed or ()]


def of_the_stream(
    stream: Stream,
    source: Mapping[str, Any],
    given: bool,
    own: Iterable[Mapping[str, Any]],
    latent: tuple[int, int],
) -> dict[str, Any]:
    """What of the conditioning `source` holds for a stream; `given` says that it was given for the stream and is not
    the generation's. `own` are the generation's conditioned ones, `latent` its latents' (height, width).

    A branch is of the generation's own picture and is told of it what the generation is. A reference is another
    picture: its size is its own, not what the generation's prompt may say of itself, and it is run without the pictures
    that an editing model is shown beside that."""
    if isinstance(stream, Denoising):
        entry = {name: value for name, value in source.items() if name not in _OF_THE_GENERATION - _OF_THE_PICTURE}
        taken = _OF_THE_PICTURE | _SIZES | (_GUIDANCE | _BESIDE_THE_PICTURE if given else frozenset())
        for each in own:
            for name in taken & each.keys():
                entry.setdefault(name, each[name])
        return entry
    entry = {name: value for name, value in source.items() if name not in _OF_THE_GENERATION}
    if not given:
        entry = {name: value for name, value in entry.items() if name not in _BESIDE_THE_PICTURE}
    if not given and (stream.pixels is not None or tuple(stream.shape[-2:]) != latent):
        entry = {name: value for name, value in entry.items() if name not in _SIZES}
    if stream.pixels is not None and not _SIZES & entry.keys():
        entry["height"], entry["width"] = stream.pixels
    return entry
