"""IP-Adapter's published files (Ye et al. 2023) as trained image prompts of AnyStory's Eq. 5.

Such a file holds a projection from a CLIP vision model's output to tokens and, for every cross-attention layer of a
U-Net, the weights that make keys and values of them, to be attended to beside the text: the form of Eq. 5.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..patches.mechanisms.image_prompt import KeysAndValues
from .resampler import Resampler
from .weights import Shapes, check_shapes, shapes_of

# The published resamplers divide their attention into heads of this width.
HEAD = 64
_LAYER = re.compile(r"ip_adapter\.(\d+)\.to_([kv])_ip\.weight")
_PROJECTION = "image_proj."


@dataclass(frozen=True, eq=False)
class ImagePromptAdapter:
    """A loaded file: its `projection` from a vision model's features to tokens (rows, n, context), whether it reads the
    `pooled` output or the hidden states before the last layer, how many channels these have (`features`), and of every
    cross-attention layer, in the file's order, the weights (channels, context) of keys and values. In float32 on the
    CPU."""

    name: str
    projection: nn.Module
    pooled: bool
    features: int
    layers: tuple[tuple[Tensor, Tensor], ...]

    @property
    def context(self) -> int:
        """The channels of a token: those of the model's prompts."""
        return self.layers[0][0].shape[1]

    @torch.inference_mode()
    def tokens(self, seen: Tensor | None) -> Tensor:
        """The tokens (1, pictures * n, context) of what the vision model gave of some pictures of one subject: its
        pooled output (pictures, features), or its hidden states (pictures, m, features).

        Raises ValueError when that is not what the adapter was trained with."""
        axes = 2 if self.pooled else 3
        if seen is None or seen.ndim != axes or seen.shape[-1] != self.features:
            found = "none" if seen is None else f"{seen.shape[-1]} channels"
            if seen is not None and seen.ndim != axes:
                found = "one for each of its tokens" if self.pooled else "one for the whole picture"
            raise ValueError(
                f"The adapter '{self.name}' reads {'the pooled output' if self.pooled else 'the hidden states'} of a "
                f"CLIP vision model, {self.features} channels, but the one connected gives {found}; load the vision "
                "model that the adapter was trained with (CLIP ViT-H for most, ViT-bigG where the name says so)."
            )
        return self.projection(seen.float().cpu()).flatten(0, 1)[None]

    @torch.inference_mode()
    def keys_and_values(self, tokens: Tensor) -> tuple[KeysAndValues, ...]:
        """The keys and values (1, n, channels) of tokens for every layer, in the file's order."""
        return tuple((tokens @ key.mT, tokens @ value.mT) for key, value in self.layers)


class _Linear(nn.Module):
    """The plain form: one linear layer from the pooled output to all tokens, each normalised."""

    def __init__(self, shapes: Shapes, context: int) -> None:
        super().__init__()
        wide, features = shapes["proj.weight"]
        self.proj, self.norm = nn.Linear(features, wide), nn.LayerNorm(context)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.norm(self.proj(pooled).unflatten(-1, (-1, *self.norm.normalized_shape)))


class _Perceptron(nn.Module):
    """The full form: every hidden state becomes a token."""

    def __init__(self, shapes: Shapes, context: int) -> None:
        super().__init__()
        hidden, features = shapes["proj.0.weight"]
        layers = (nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, context), nn.LayerNorm(context))
        self.proj = nn.Sequential(*layers)

    def forward(self, states: Tensor) -> Tensor:
        return self.proj(states)


def _resampler(shapes: Shapes, context: int) -> Resampler:
    """The plus form."""
    _, queries, width = shapes["latents"]
    inner = shapes["layers.0.0.to_q.weight"][0]
    depth = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("layers."))
    features = shapes["proj_in.weight"][1]
    return Resampler(
        features, context, width=width, queries=queries, inner=inner, heads=max(inner // HEAD, 1), depth=depth
    )


# The tensor that only this form has, its features' tensor, and what makes it.
_FORMS = (
    ("latents", "proj_in.weight", _resampler),
    ("proj.3.weight", "proj.0.weight", _Perceptron),
    ("proj.weight", "proj.weight", _Linear),
)


def read_adapter(tensors: Mapping[str, Tensor], name: str) -> ImagePromptAdapter:
    """The adapter in the tensors of the file `name`, in IP-Adapter's plain, plus or full form.

    Raises ValueError when they are something else."""
    layers = _layers(tensors, name)
    weights = {k.removeprefix(_PROJECTION): v.float() for k, v in tensors.items() if k.startswith(_PROJECTION)}
    if any(k.startswith("perceiver_resampler.") for k in weights) or {"proj.2.weight", "norm.weight"} <= weights.keys():
        raise ValueError(
            f"'{name}' is a face adapter: it reads the embedding of a face recogniser. This node takes adapters that "
            "read a CLIP vision model, of the plain, plus or full form."
        )
    shapes = shapes_of(weights)
    form = next((form for form in _FORMS if form[0] in shapes), None)
    if form is None:
        raise ValueError(f"'{name}' has no projection of the plain, plus or full form; take an IP-Adapter file.")
    _, reads, make = form
    try:
        with torch.device("meta"):
            projection = make(shapes, layers[0][0].shape[1])
        features = shapes[reads][1]
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"The projection in '{name}' is not whole ({error}); download the file again.") from error
    try:
        check_shapes(shapes_of(projection.state_dict()), shapes, _PROJECTION)
    except ValueError as error:
        raise ValueError(
            f"The projection in '{name}' does not fit its layers: {error}; download the file again."
        ) from error
    projection.load_state_dict(weights, assign=True)
    return ImagePromptAdapter(name, projection.requires_grad_(False).eval(), make is _Linear, features, layers)


def _layers(tensors: Mapping[str, Tensor], name: str) -> tuple[tuple[Tensor, Tensor], ...]:
    found: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _LAYER.fullmatch(key)
        if match:
            found.setdefault(int(match[1]), {})[match[2]] = tensor.float()
    if not found:
        raise ValueError(
            f"'{name}' is no IP-Adapter: it has no tensors named ip_adapter.N.to_k_ip.weight. Take a file as its "
            "authors published it, in safetensors form."
        )
    layers = tuple((found[number].get("k"), found[number].get("v")) for number in sorted(found))
    weights = [weight for pair in layers for weight in pair]
    contexts = {weight.shape[-1] if weight is not None and weight.ndim == 2 else 0 for weight in weights}
    if len(contexts) != 1 or 0 in contexts or any(key.shape != value.shape for key, value in layers):
        raise ValueError(
            f"The layers in '{name}' are not whole: each needs keys and values of one shape; download the file again."
        )
    return layers
