"""A small DINOv2 with random weights, and semantic injection's maps for a MODEL."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hosting.random_models import generator
from safetensors.torch import save_file
from subject_patches.encoders.semantic_injection import MapsForm, SemanticMaps, read_semantic_maps, tensors_of
from subject_patches.encoders.weights import metadata
from subject_patches.nodes.semantic_injection import SemanticInjectionNode
from subject_patches.patches.families import family_of
from torch import Tensor

from .small_vision import DINOV2, dinov2

VISION = DINOV2
FEATURES = VISION["hidden_size"]
vision = cache(dinov2)


def contents(family: str, context: int, **form: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a file of random maps."""
    source = generator(32)
    made = MapsForm(**{"context": context, "features": FEATURES, "groups": (0, 1, 2, 3), "prompt": "kept", **form})
    maps = {
        group: (torch.randn(context, FEATURES, generator=source) * 0.3, torch.randn(context, generator=source))
        for group in made.groups
    }
    return tensors_of(maps), metadata(made, family, "nobody")


@cache
def maps_of(family: str, context: int, **form: Any) -> SemanticMaps:
    """Maps as they come from a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "anylogo-small.safetensors"
        tensors, about = contents(family, context, **form)
        save_file(tensors, path, about)
        return read_semantic_maps(path)


def semantics_for(model: Any, **form: Any) -> SemanticMaps:
    """Maps for a MODEL's family."""
    family = family_of(model)
    return maps_of(family.name, family.context_width(model), **form)


def told(model: Any, subjects: tuple[Any, ...], **values: Any) -> Any:
    """A MODEL with Semantic Injection."""
    given = {"semantics": semantics_for(model), "clip_vision": vision(), **values}
    return SemanticInjectionNode.execute(model, subjects, **given).args[0]
