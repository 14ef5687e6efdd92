"""Small subject encoders with random weights, and what such a one makes of subjects, shared by the tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.ops
import torch
from safetensors.torch import save_file
from subject_patches.encoders.loading import kept_by_host
from subject_patches.encoders.reference_net import delivering, first_weights, shape_of
from subject_patches.encoders.router import ROUTER, ROUTER_ENTRY, RouterForm
from subject_patches.encoders.subject_encoder import Form, SubjectModules, router_modules
from subject_patches.encoders.weights import metadata
from subject_patches.nodes.image_prompt import layer_channels
from subject_patches.patches.families import family_of
from subject_patches.patches.mechanisms.encoded_subject import EncodedSubject, KeptReference, RoutingFeature
from subject_patches.patches.mechanisms.image_prompt import AdaptedPrompt, in_file_order
from subject_patches.patches.mechanisms.learned_router import LearnedRouter
from subject_patches.patches.mechanisms.subject import Subject
from torch import Tensor, nn

from .models import generator
from .small_vision import dinov2_sizes

VISION = dinov2_sizes(32, 2, 48, 16, [0.5, 0.4, 0.5], [0.5, 0.5, 0.3])
SIZE = 64
ROUTER_FORM = RouterForm(width=12, heads=3)
Tensors = dict[str, Tensor]


def form_for(model: Any) -> Form:
    """The form of a small encoder for a MODEL."""
    latent = model.model.latent_format
    shape = shape_of(model.model.model_config.unet_config, latent.latent_channels)
    return Form(shape, VISION["hidden_size"], tokens=3, width=16, heads=2, size=SIZE, scale=latent.scale_factor)


def file_for(model: Any, seed: int = 3, routed: bool = False) -> tuple[Tensors, dict[str, str]]:
    """The tensors and metadata of an encoder's file for a MODEL: its own weights in the ReferenceNet, random others;
    `routed` with a router."""
    from comfy.image_encoders.dino2 import Dinov2Model
    from comfy.ops import disable_weight_init

    form = form_for(model)
    modules = SubjectModules(form, nn, disable_weight_init)
    modules.reference_net.load_state_dict(first_weights(model.model.diffusion_model.state_dict(), form.latent_channels))
    vision = Dinov2Model(VISION, torch.float32, "cpu", disable_weight_init)
    source, tensors = generator(seed), modules.state_dict()
    router = router_modules(ROUTER_FORM, form, modules.cross, nn).state_dict() if routed else {}
    tensors |= {ROUTER + name: tensor for name, tensor in router.items()}
    tensors |= {f"vision.{name}": tensor for name, tensor in vision.state_dict().items()}
    for name, tensor in tensors.items():
        if not name.startswith("reference_net."):
            tensors[name] = torch.randn(tensor.shape, generator=source) * 0.2
    told = {ROUTER_ENTRY: ROUTER_FORM.said()} if routed else {}
    return dict(tensors), metadata(form, "the tests", "nobody", VISION, **told)


def written(path: Path, tensors: Tensors, about: dict[str, str]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, about)
    return path


def encoded_subject(model: Any, subject: Subject, seed: int = 0, parts: str = "both") -> Subject:
    """A subject with what an encoder might have made of it, at random, for a MODEL's layers; what it makes of an empty
    picture is the same for all."""
    source, ground = generator(70 + seed), generator(69)

    def pair(channels: int, count: int, of: torch.Generator = source) -> tuple[Tensor, Tensor]:
        return tuple(torch.randn(1, count, channels, generator=of) for _ in range(2))

    own, cross = layer_channels(model, "self"), layer_channels(model, "cross")
    features = (torch.randn(1, ROUTER_FORM.width, generator=of) for of in (source, ground))
    width = family_of(model).context_width(model)
    kept = KeptReference("encoder", "the tests", width, {site: pair(own[site], 5) for site in delivering(own)})
    shown, empty = (tuple(pair(cross[site], 3, of) for site in in_file_order(cross)) for of in (source, ground))
    prompt = None if parts == "references" else AdaptedPrompt("encoder", width, shown, empty)
    routing = RoutingFeature("encoder", *features)
    return replace(subject, encoded=EncodedSubject(() if parts == "tokens" else (kept,), prompt, routing))


def learned_router(model: Any, seed: int = 7, **values: Any) -> LearnedRouter:
    """A router with random weights for a MODEL's layers and what `encoded_subject` makes; `values` are its own.

    Where two subjects are about even, half a digit decides between them; with this seed few are."""
    modules = router_modules(ROUTER_FORM, form_for(model), layer_channels(model, "cross"), comfy.ops.manual_cast)
    source = generator(seed)
    for parameter in modules.parameters():
        parameter.data = torch.randn(parameter.shape, generator=source)
    return LearnedRouter("encoder", kept_by_host(modules), **values)
