"""AnyLogo's tuning: a U-Net that extracts and generates at once (Eq. 3 to 6), by low-rank differences of its weights.

The same network runs on the noised reference and lends its self-attention's keys and values to the generation;
gradients go through both passes or, cheaper by a fifth, through the generation alone. Everything here hangs on the
host's own openings for patches and on forward hooks: the network's weights stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..patches.families.unet import layer_at, scales
from ..patches.mechanisms.semantic_injection import Hierarchy, grouped, injected, semantic_tokens
from ..patches.parts.masks import tokens_inside
from ..patches.parts.sites import Site

KeysAndValues = tuple[Tensor, Tensor]
Slots = dict[str, dict[tuple[str, int, int], Callable[..., Tensor]]]
# What is said of a key that is not there: a gradient cannot go through minus infinity's difference with itself.
ABSENT = -1e4
# Shares of rows that learn the pass without a prompt, what the U-Net is without a reference, and each part alone.
UNCONDITIONAL, BLOCKED, NO_TOKENS, NO_REFERENCE, NO_BACKGROUND = 0.1, 0.15, 0.15, 0.1, 0.5
# The paper's lambda in training.
KEEP = 0.6
# How many times as fast as the U-Net's differences the maps learn: they begin at nothing and harm nobody.
MAPS_TIMES = 10.0

# Low-rank differences


class LowRank(nn.Module):
    """What is added to the output of one layer of a frozen network: up(down(input)), zero at first. `down` has entries
    of the size 1 / sqrt(rank), so that a step of Adam changes the weights as much as it would the layer's own."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int) -> None:
        super().__init__()
        if isinstance(layer, nn.Conv2d):
            how = {"stride": layer.stride, "padding": layer.padding, "bias": False}
            self.down = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, **how)
            self.up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        else:
            self.down = nn.Linear(layer.in_features, rank, bias=False)
            self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.normal_(self.down.weight, std=rank**-0.5)
        nn.init.zeros_(self.up.weight)

    def forward(self, given: Tensor) -> Tensor:
        return self.up(self.down(given))


class LowRanks(nn.Module):
    """Low-rank differences of every layer of a U-Net's transformers, by the layer's name in the network."""

    def __init__(self, network: nn.Module, rank: int) -> None:
        super().__init__()
        self.names = tuple(tuned_layers(network))
        self.layers = nn.ModuleList(LowRank(network.get_submodule(name), rank) for name in self.names)

    def attach(self, network: nn.Module) -> list[Any]:
        """Hangs them on a network of the same form; gives the handles that take them off again by `remove`."""

        def adding(low_rank: LowRank) -> Callable[..., Tensor]:
            return lambda layer, given, output: output + low_rank(given[0]).to(output)

        pairs = zip(self.names, self.layers, strict=True)
        return [network.get_submodule(name).register_forward_hook(adding(each)) for name, each in pairs]

    def file(self) -> dict[str, Tensor]:
        """As the host's LoRA loaders take them, in half precision."""
        found = {}
        for name, each in zip(self.names, self.layers, strict=True):
            found[f"diffusion_model.{name}.lora_up.weight"] = each.up.weight.detach().half().cpu().contiguous()
            found[f"diffusion_model.{name}.lora_down.weight"] = each.down.weight.detach().half().cpu().contiguous()
        return found


def tuned_layers(network: nn.Module) -> list[str]:
    """The names of the layers that get a low-rank difference: all linear layers and convolutions of the transformers,
    by which features are delivered and read."""
    from comfy.ldm.modules.attention import SpatialTransformer

    found = []
    for name, module in network.named_modules():
        if isinstance(module, SpatialTransformer):
            inside = module.named_modules()
            found += [f"{name}.{inner}" for inner, layer in inside if isinstance(layer, (nn.Linear, nn.Conv2d))]
    return found


# Maps of the semantic tokens


class SemanticModule(nn.Module):
    """A linear map for each group, in the order of `groups`: nothing at first."""

    def __init__(self, groups: Iterable[int], features: int, context: int) -> None:
        super().__init__()
        self.groups = tuple(sorted(set(groups)))
        self.maps = nn.ModuleList(nn.Linear(features, context) for _ in self.groups)
        for each in self.maps:
            nn.init.zeros_(each.weight)
            nn.init.zeros_(each.bias)

    def forward(self, subject: Hierarchy, background: Sequence[Tensor]) -> dict[int, Tensor]:
        """The tokens (rows, n, context) of each group: of the subject's patches, and last of the background's one
        (rows, features), of which `background` has that of each group."""
        pairs = zip(self.groups, self.maps, strict=True)
        return {g: semantic_tokens(subject[g][0], background[g][:, None], each.weight, each.bias) for g, each in pairs}

    def tensors(self) -> dict[int, tuple[Tensor, Tensor]]:
        """The maps as a file keeps them."""
        return {group: (each.weight, each.bias) for group, each in zip(self.groups, self.maps, strict=True)}


class Tuning(nn.Module):
    """What is trained: the low-rank differences, and the maps from a vision model's `features` channels to prompts'
    tokens of `context`."""

    def __init__(self, network: nn.Module, rank: int, groups: Iterable[int], features: int, context: int) -> None:
        super().__init__()
        self.low_ranks = LowRanks(network, rank)
        self.semantic = SemanticModule(groups, features, context)


# The two passes, and what stands in the host's slots in each


class Passes:
    """Eq. 6 on a U-Net with so many attention layers, of which the self-attentions of `delivering` lend their keys and
    values. With `through` gradients go through the reference's pass, too."""

    def __init__(self, network: nn.Module, sites: Iterable[Site], delivering: Iterable[Site], through: bool) -> None:
        self.network, self.delivering, self.through = network, tuple(sorted(delivering)), through
        self.scales = scales(network)
        self.groups = grouped(sites, self.scales)

    def slots(
        self,
        semantic: SemanticModule,
        extract: Callable[[Slots], Any],
        subject: Hierarchy,
        background: Sequence[Tensor],
        inside: Tensor,
        rows: Mapping[str, Tensor],
        keep: float,
        generator: torch.Generator | None = None,
    ) -> Slots:
        """What stands in the slots of the generation's pass, after `extract` has run the reference's with what stands
        in its own. `inside` (rows, h, w) is the subject's mask in cells of the latent; `rows` are `drawn_rows`, and
        layers keep the reference as `kept_layers` says."""
        lent: dict[Site, KeysAndValues] = {}
        if self.delivering:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.through):
                extract(recording(self.delivering, lent))
            # Weights that it cast where no gradients are kept would serve the other pass, too, which needs theirs.
            torch.clear_autocast_cache()
        kept = kept_layers(self.delivering, rows["reference"], keep, generator)
        bias = {site: sparse_bias(tokens_inside(inside, self._grid(site, inside)), kept[site]) for site in lent}
        tokens = semantic(subject, background)
        told = telling(self.network, tokens, self.groups, rows["tokens"], rows["background"])
        return {**recycling(lent, bias), **told}

    def _grid(self, site: Site, cells: Tensor) -> tuple[int, int]:
        by = 2 ** self.scales[site.block, site.number]
        height, width = cells.shape[-2:]
        return -(-height // by), -(-width // by)


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """Softmax(Q K^T / sqrt(d) + bias) V of tensors (rows, tokens, channels), with a backward pass."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    bias = None if bias is None else bias.to(q)
    return functional.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)


def recording(sites: Collection[Site], delivered: dict[Site, KeysAndValues]) -> Slots:
    """The signature extraction: each self-attention of `sites` puts its keys and values into `delivered`. What the
    model computes after the last of them keeps no gradients: nothing asks for them, and torch does not free all of a
    graph that no backward pass went through."""
    count = len(frozenset(sites))

    def at(site: Site) -> Callable[..., Tensor]:
        def record(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
            # Once: a layer that is computed again in the backward pass has been read by then.
            if site not in delivered:
                delivered[site] = (k, v)
                if len(delivered) == count:
                    # Until the pass ends: whoever runs it sets it back.
                    torch.set_grad_enabled(False)
            return attention(q, k, v, extra["n_heads"])

        return record

    return {"attn1": {site.key: at(site) for site in sites}}


def recycling(delivered: Mapping[Site, KeysAndValues], bias: Mapping[Site, Tensor]) -> Slots:
    """Eq. 4: each self-attention goes over its own keys and the delivered ones, whose logits get a `bias` broadcastable
    to (rows, heads, queries, keys)."""

    def at(site: Site) -> Callable[..., Tensor]:
        def extend(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
            key, value = delivered[site]
            both = functional.pad(bias[site].to(q), (k.shape[1], 0))
            return attention(q, torch.cat([k, key.to(k)], 1), torch.cat([v, value.to(v)], 1), extra["n_heads"], both)

        return extend

    return {"attn1": {site.key: at(site) for site in delivered}}


def telling(
    network: nn.Module,
    tokens: Mapping[int, Tensor],
    groups: Mapping[Site, int],
    told: Tensor,
    background: Tensor,
) -> Slots:
    """The semantic injection: each cross-attention of `groups` is shown its group's tokens (rows, n, context) in the
    rows that are `told` (rows, bool), and of these the last one, the background's, where `background` (rows, bool)
    says; see `semantic_injection.injected`."""
    some = next(iter(tokens.values()))
    absent = torch.zeros(some.shape[:2], dtype=torch.bool, device=some.device)
    absent[:, -1] = ~background
    bias = torch.zeros(absent.shape, device=some.device).masked_fill(absent, ABSENT)[:, None, None]

    def at(site: Site, group: int) -> Callable[..., Tensor]:
        layer = layer_at(network, site)

        def inject(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
            given = tokens[group].to(q)
            term = attention(q, layer.to_k(given), layer.to_v(given), extra["n_heads"], bias)
            share = told.to(q).view(-1, 1, 1)
            return injected(attention(q, k, v, extra["n_heads"]), term, share, replaces=False)

        return inject

    return {"attn2": {site.key: at(site, group) for site, group in groups.items()}}


def drawn_rows(count: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Which of `count` rows (bool) are of the pass without a prompt (`unconditional`), and which of the others see the
    `tokens`, the `reference` and the `background`; some rows see nothing of a reference."""

    def share(of: float) -> Tensor:
        return torch.rand(count, generator=generator) < of

    unconditional, blocked = share(UNCONDITIONAL), share(BLOCKED)
    seen = ~(unconditional | blocked)
    return {
        "unconditional": unconditional,
        "tokens": seen & ~share(NO_TOKENS),
        "reference": seen & ~share(NO_REFERENCE),
        "background": ~share(NO_BACKGROUND),
    }


def sparse_bias(inside: Tensor, kept: Tensor) -> Tensor:
    """The bias (rows, 1, 1, keys) of a layer's delivered keys: those `inside` (rows, keys) the subject's mask, in rows
    that `kept` (rows) says the layer keeps (Eq. 5), are there."""
    absent = ~(inside & kept[:, None])
    return torch.zeros(absent.shape, device=inside.device).masked_fill(absent, ABSENT)[:, None, None]


def kept_layers(
    sites: Iterable[Site], reference: Tensor, keep_probability: float, generator: torch.Generator | None = None
) -> dict[Site, Tensor]:
    """Eq. 5 in training: which rows keep the reference in each layer, k < lambda with k uniform on 0 to 1, drawn for
    each row and layer by itself; rows without a `reference` (rows, bool) never do."""
    drawn = {site: torch.rand(len(reference), generator=generator) for site in sites}
    return {site: reference & (each.to(reference.device) < keep_probability) for site, each in drawn.items()}
