"""AnyStory's ReferenceNet (section 3.2): a U-Net that reads a subject's picture, and its hidden states are features.

The host's own U-Net class, without its cross-attention (Table 1's simplified form) and with one more input channel, the
subject's mask. It reads a picture without noise at timestep 0, so neither the noise level nor the prompt decides its
features: one pass serves all steps.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..patches.engine.companion import silenced
from ..patches.families.unet import transformer_blocks
from ..patches.parts.sites import Site

# What decides a U-Net's shape, of what the host tells its class; the rest is the same in all of ours.
SHAPE = (
    "model_channels",
    "num_res_blocks",
    "channel_mult",
    "transformer_depth",
    "transformer_depth_output",
    "transformer_depth_middle",
    "use_linear_in_transformer",
    "context_dim",
    "num_heads",
    "num_head_channels",
)
# The input's convolution, which gets the mask's channel.
ENTRANCE = "input_blocks.0.0.weight"


def shape_of(config: Mapping[str, Any], latent_channels: int) -> str:
    """What of the host's configuration of a U-Net its ReferenceNet is built from, as JSON."""
    told = {name: config[name] for name in SHAPE if name in config}
    return json.dumps({**told, "latent_channels": latent_channels}, sort_keys=True)


def build(shape: str, operations: Any = None) -> nn.Module:
    """A ReferenceNet of a `shape` as `shape_of` writes it, its weights as the host's classes leave them.

    Raises ValueError where the shape is none."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.ops import disable_weight_init

    try:
        told = json.loads(shape)
        channels = told.pop("latent_channels")
        if unknown := sorted(told.keys() - set(SHAPE)):
            raise ValueError(f"it has {', '.join(unknown)}, which are not a U-Net's")
        network = UNetModel(
            image_size=32, in_channels=channels + 1, out_channels=channels, use_spatial_transformer=True, legacy=False,
            num_classes=None, operations=operations or disable_weight_init, **told,
        )  # fmt: skip
    except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"The ReferenceNet's shape is not one that a U-Net can have ({error}).") from error
    for block in transformer_blocks(network).values():
        block.attn2 = None
        del block.norm2
    return network


def first_weights(unet: Mapping[str, Tensor], latent_channels: int) -> dict[str, Tensor]:
    """What a ReferenceNet's training begins with, of the weights of the U-Net that it is for: those without its
    cross-attention, and zeros for the mask's channel, which changes nothing until it is trained."""
    kept = {key: value for key, value in unet.items() if ".attn2." not in key and ".norm2." not in key}
    kept = {key: value for key, value in kept.items() if not key.startswith("label_emb.")}
    entrance = kept[ENTRANCE][:, :latent_channels]
    return {**kept, ENTRANCE: torch.cat([entrance, torch.zeros_like(entrance[:, :1])], 1)}


def delivering(sites: Iterable[Site]) -> tuple[Site, ...]:
    """Of all sites of a U-Net in their order those whose hidden states are delivered: every self-attention but the
    first (Eq. 3)."""
    return tuple(site for site in sites if site.kind == "self")[1:]


def hidden_states(
    network: nn.Module, latents: Tensor, mask: Tensor, sites: Iterable[Site]
) -> dict[Site, tuple[Tensor, tuple[int, int]]]:
    """The input of each self-attention among `sites`, normalised (rows, tokens, channels), and the (height, width) of
    its tokens: Eq. 3's G. `latents` (rows, channels, height, width) are the segmented pictures' in the model's latent
    space, `mask` (rows, height, width) of 0 to 1 says where in them the subject is."""
    wanted = {site.key: site for site in sites}
    found: dict[Site, tuple[Tensor, tuple[int, int]]] = {}

    def note(normed: Tensor, context: Tensor, value: Tensor, extra: dict[str, Any]) -> tuple[Tensor, ...]:
        site = wanted.get((*extra["block"], extra["block_index"]))
        if site is not None:
            height, width = extra["activations_shape"][-2:]
            found[site] = (normed, (height, width))
        return normed, context, value

    # The host's block adds its self-attention's output once more where it has no cross-attention.
    options = {"patches": {"attn1_patch": [note], "attn2_output_patch": [silenced]}}
    given = torch.cat([latents, mask[:, None].to(latents)], 1)
    network(given, given.new_zeros(len(given)), transformer_options=options)
    return found
