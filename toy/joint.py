"""The forward of the host's `Flux` for training: the same weights and the same sums, but every sum makes a new tensor.
The host's own blocks add in place, which autograd refuses. `tests/toy/test_toy_dit.py` holds the two equal."""

from __future__ import annotations

import torch
from comfy.ldm.flux.layers import DoubleStreamBlock, SingleStreamBlock, timestep_embedding
from comfy.ldm.flux.model import Flux
from torch import Tensor
from torch.nn import functional


def positions(model: Flux, text: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token's rotary angles, each (text + height * width, half of a head's width): text tokens
    stand at 0, an image token at (0, its row, its column)."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack((torch.zeros_like(rows), rows, columns), -1).reshape(-1, 3).double()
    places = torch.cat((places.new_zeros(text, 3), places))
    angles = []
    for axis, dim in enumerate(model.params.axes_dim):
        frequencies = model.params.theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles.append(places[:, axis, None] * frequencies)
    angle = torch.cat(angles, 1)
    return angle.cos().float(), angle.sin().float()


def _norm(x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], eps=1e-6)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, _norm(x), 1 + scale).to(x.dtype)


def _halves(weight: Tensor, parts: int) -> Tensor:
    """The rows of a weight, (parts * width, ...), with the first of every rotary pair of all parts before all seconds.
    Reordering queries and keys alike changes no score, and the processor is spared strides of two."""
    return weight.unflatten(0, (parts, -1, 2)).movedim(2, 0).flatten(0, 2)


def _projected(x: Tensor, layer: torch.nn.Linear, heads: int, width: int) -> tuple[Tensor, ...]:
    """A layer's first 2 * width outputs, which are queries and keys in the order of `_halves`; the values; the rest."""
    weight = torch.cat((_halves(layer.weight[: 2 * width], 2 * heads), layer.weight[2 * width :]))
    bias = torch.cat((_halves(layer.bias[: 2 * width], 2 * heads), layer.bias[2 * width :]))
    # One split, whose gradient is one concatenation: every slice's would fill a tensor with zeros.
    out = functional.linear(x, weight, bias)
    both, values, rest = out.split([2 * width, width, out.shape[-1] - 3 * width], -1)
    return both, values.unflatten(-1, (heads, -1)).transpose(1, 2), rest


def _queries_keys(x: Tensor, heads: int, norm: torch.nn.Module, turns: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Queries and keys (n, heads, tokens, width) from their projections (n, tokens, 2 * heads * width) in the order of
    `_halves`: normed per head, and turned by the tokens' rotary angles. The sums over a head's width are matrix
    products, which are far cheaper on a CPU than reductions over so few numbers."""
    width = norm.query_norm.weight.shape[0]
    owner = torch.arange(2 * heads, device=x.device).repeat_interleave(width // 2).repeat(2)
    member = functional.one_hot(owner, 2 * heads).to(x.dtype)
    weights = [_halves(layer.weight, 1).view(2, 1, -1) for layer in (norm.query_norm, norm.key_norm)]
    scale = torch.cat([weight.expand(2, heads, -1) for weight in weights], 1).flatten()
    inverse = ((x * x) @ (member / width) + torch.finfo(torch.float32).eps).rsqrt()
    first, second = (x * (inverse @ (member.T * scale))).chunk(2, -1)
    cos, sin = turns
    turned = (first * cos - second * sin, first * sin + second * cos)
    both = torch.cat([part.unflatten(-1, (2, heads, -1)) for part in turned], -1)
    q, k = both.permute(2, 0, 3, 1, 4)
    return q, k


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of (n, heads, tokens, width), giving (n, tokens, heads * width)."""
    if q.device.type == "cpu":
        # For so few tokens plain products are several times faster there than the fused kernel, backward above all.
        seen = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1).to(v.dtype) @ v
    else:
        seen = functional.scaled_dot_product_attention(q, k, v)
    return seen.transpose(1, 2).flatten(2)


def _gelu(x: Tensor) -> Tensor:
    """GELU by the error function: within 5e-4 of the host's by the hyperbolic tangent, less than bfloat16 resolves, and
    three times as fast on a CPU."""
    return functional.gelu(x)


def _double(
    block: DoubleStreamBlock, image: Tensor, text: Tensor, condition: Tensor, turns: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    streams = (
        (text, block.txt_mod.lin, block.txt_attn, block.txt_mlp),
        (image, block.img_mod.lin, block.img_attn, block.img_mlp),
    )
    modulations = [lin(condition)[:, None].chunk(6, -1) for _, lin, _, _ in streams]
    parts, heads, start = [], block.num_heads, 0
    for (x, _, attention, _), (shift, scale, *_) in zip(streams, modulations, strict=True):
        both, v, _ = _projected(_modulated(x, shift, scale), attention.qkv, heads, x.shape[-1])
        here = tuple(turn[start : start + x.shape[1]] for turn in turns)
        q, k = _queries_keys(both, heads, attention.norm, here)
        parts.append((q, k, v))
        start += x.shape[1]
    q, k, v = (torch.cat(some, 2) for some in zip(*parts, strict=True))
    attended = _attend(q, k, v).split([text.shape[1], image.shape[1]], 1)
    out = []
    for (x, _, attention, mlp), (_, _, gate, shift, scale, gate_mlp), seen in zip(
        streams, modulations, attended, strict=True
    ):
        x = x + attention.proj(seen) * gate
        hidden = _gelu(mlp[0](_modulated(x, shift, scale)))
        out.append(x + mlp[2](hidden) * gate_mlp)
    return out[1], out[0]


def _single(block: SingleStreamBlock, x: Tensor, condition: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    shift, scale, gate = block.modulation.lin(condition)[:, None].chunk(3, -1)
    both, v, mlp = _projected(_modulated(x, shift, scale), block.linear1, block.num_heads, block.hidden_size)
    seen = _attend(*_queries_keys(both, block.num_heads, block.norm, turns), v)
    return x + block.linear2(torch.cat((seen, _gelu(mlp)), 2)) * gate


def forward(
    model: Flux, x: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor, turns: tuple[Tensor, Tensor], middle: int
) -> tuple[Tensor, Tensor]:
    """The velocity (n, c, h, w) of `x` (n, c, h, w) at `sigma` (n,), 0 to 1, and the image tokens
    (n, tokens, width) that leave single block `middle`. `turns` comes from `positions`."""
    patch = model.patch_size
    n, c, h, w = x.shape
    patches = x.reshape(n, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    image, text = model.img_in(patches), model.txt_in(context)
    condition = model.time_in(timestep_embedding(sigma, 256).to(x.dtype)) + model.vector_in(pooled)
    condition = functional.silu(condition)
    turns = tuple(turn.repeat(1, 2 * model.params.num_heads).to(image) for turn in turns)
    for block in model.double_blocks:
        image, text = _double(block, image, text, condition, turns)
    joint, words = torch.cat((text, image), 1), text.shape[1]
    kept = joint
    for number, block in enumerate(model.single_blocks):
        joint = _single(block, joint, condition, turns)
        if number == middle:
            kept = joint
    final = model.final_layer
    shift, scale = final.adaLN_modulation[1](condition)[:, None].chunk(2, -1)
    out = final.linear(_modulated(joint[:, words:], shift, scale))
    out = out.unflatten(1, (h // patch, w // patch)).unflatten(-1, (-1, patch, patch))
    return out.permute(0, 3, 1, 4, 2, 5).reshape(n, -1, h, w), kept[:, words:]
