"""The model families that the pack knows: what their attention layers are, and how tokens lie in them."""

from __future__ import annotations

from typing import Any

from ..parts.sites import USUAL, Site, select_sites
from .cosmos import COSMOSES
from .family import Family
from .flux import FLUXES
from .hidream import HIDREAMS
from .krea import KREAS
from .lumina import LUMINAS
from .mmdit import MMDITS
from .qwen import QWENS
from .transformer import Counts, Tokens, Transformer
from .unet import UNETS
from .wan import WANS

__all__ = [
    "FAMILIES",
    "Counts",
    "Family",
    "Tokens",
    "Transformer",
    "attention_sites",
    "chosen_sites",
    "context_width",
    "family_of",
]

# A description of the host's may be a subclass of another's: the more particular family comes first.
FAMILIES: tuple[Family, ...] = (*UNETS, *FLUXES, *LUMINAS, *KREAS, *QWENS, *COSMOSES, *WANS, *HIDREAMS, *MMDITS)


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


def context_width(model: Any) -> int | None:
    """How many channels the tokens of a MODEL's prompts have; None where that is not known: of other families, and of
    networks that another pack made of a family's, which may read prompts of other widths."""
    known = type(model.model.diffusion_model).__module__.startswith("comfy.")
    family = next((family for family in FAMILIES if known and family.has(model)), None)
    return None if family is None else family.context_width(model)


def attention_sites(model: Any) -> tuple[Site, ...]:
    """Every attention layer of a MODEL of a known family, in the order in which they run."""
    return family_of(model).sites(model.model.diffusion_model)


def chosen_sites(model: Any, kind: str, choice: str, named: str = "", usual: str = "decoder") -> frozenset[Site]:
    """The layers of a MODEL that a menu choice means; see `select_sites`. `usual` is the paper's choice for U-Nets, of
    which the family says what is usual for itself.

    Raises ValueError when the choice or a name means no layer of this model."""
    family = family_of(model)
    return select_sites(attention_sites(model), kind, family.usual(usual) if choice == USUAL else choice, named)
