"""The model families that the pack knows: what their attention layers are, and how tokens lie in them."""

from __future__ import annotations

from typing import Any

from ..sites import Site
from .family import Family
from .unet import UNETS

# A description of the host's may be a subclass of another's: the more particular family comes first.
FAMILIES: tuple[Family, ...] = UNETS


def family_of(model: Any) -> Family:
    """The family of a MODEL.

    Raises ValueError for every family that is not known, naming it and the ones that are."""
    for family in FAMILIES:
        if family.has(model):
            return family
    known = ", ".join(dict.fromkeys(family.name for family in FAMILIES))
    raise ValueError(
        f"This node cannot patch a model of the family {type(model.model.model_config).__name__}; it knows {known}."
    )


def attention_sites(model: Any) -> tuple[Site, ...]:
    """Every attention layer of a MODEL of a known family, in the order in which they run."""
    return family_of(model).sites(model.model.diffusion_model)
