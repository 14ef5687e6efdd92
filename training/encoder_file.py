"""The file of AnyStory's subject encoder, as every training of it leaves it for Load Subject Encoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..encoders.loading import file_tensors
from ..encoders.router import ROUTER, ROUTER_ENTRY, RouterForm, RouterModules
from ..encoders.subject_encoder import Form, SubjectEncoder, SubjectModules
from ..encoders.weights import metadata
from .files import save_whole


def write_encoder(
    path: Path,
    modules: SubjectModules,
    form: Form,
    family: str,
    by: str,
    vision: tuple[nn.Module, Mapping[str, Any]] | None = None,
    router: tuple[RouterModules, RouterForm] | None = None,
) -> None:
    """Writes the encoder of a model `family`, in half precision; `by` says what trained it. It brings the `vision`
    model, given with its configuration, and the `router`, given with its form, where there are any."""
    own, told = modules.state_dict(), {}
    if router is not None:
        own |= {ROUTER + name: each for name, each in router[0].state_dict().items()}
        told[ROUTER_ENTRY] = router[1].said()
    weights, sizes = (None, None) if vision is None else (vision[0].state_dict(), vision[1])
    save_whole(path, file_tensors(own, weights), metadata(form, family, by, sizes, **told))


def write_with_router(path: Path, encoder: SubjectEncoder, router: RouterModules, form: RouterForm, by: str) -> None:
    """Writes the file of an encoder that is loaded with a router of a `form` in it. The encoder's weights, and the
    vision model that it brings, are those that were loaded."""
    vision = None if encoder.vision is None else (encoder.vision.model, encoder.vision.config)
    write_encoder(path, encoder.modules, encoder.form, encoder.family, by, vision, (router, form))
