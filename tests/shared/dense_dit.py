"""Recycled attention in a transformer, computed densely by a raw override of the host's attention, without the pack."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.samplers import encode_model_conds
from subject_patches.patches.mechanisms.subject import Subject
from subject_patches.tests.shared import dense
from subject_patches.tests.shared.models import Conditioning, generator
from torch import Tensor

NAMES = ("q", "k", "v", "heads", "mask")


def arguments(args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, int]:
    """Query, key and value (rows, tokens, channels) of one call of the host's attention, and its heads."""
    given = {**dict(zip(NAMES, args, strict=False)), **named}
    heads = given["heads"]

    def flat(tokens: Tensor) -> Tensor:
        if named.get("skip_reshape"):
            tokens = tokens.repeat_interleave(heads // tokens.shape[1], 1).transpose(1, 2)
        return tokens.flatten(2)

    return flat(given["q"]), flat(given["k"]), flat(given["v"]), heads


def forward(model: Any, latents: Tensor, sigma: float, positive: Conditioning, options: dict[str, Any]) -> Tensor:
    """One forward of the model on a prompt, as the host encodes it."""
    (tokens, values), *_ = positive
    entry = {**values, "cross_attn": tokens, "model_conds": {}}
    (encoded,) = encode_model_conds(
        model.model.extra_conds, [entry], torch.zeros_like(latents), latents.device, "positive", seed=None
    )
    given = {name: cond.cond for name, cond in encoded["model_conds"].items()}
    return model.model.apply_model(latents, torch.tensor([sigma]), transformer_options=options, **given)


def begins_at(model: Any, keys: int, count: int) -> int:
    """Where among so many keys of a joint attention a picture of so many tokens begins."""
    family = type(model.model.model_config).__name__
    # Filled up to 32, and before the prompt.
    return {"ZImage": keys + -count // 32 * 32, "HiDream": 0}.get(family, keys - count)


def is_numbered(model: Any) -> bool:
    """Whether the host says of an attention which block it is of; others are then of no block."""
    return type(model.model.model_config).__name__ not in ("SD3", "HiDream")


@dataclass
class ByHand:
    """An override that lets the picture of the conditioned chunk attend to a reference, which it runs at the noise
    level of each step. Only with plain guidance. So many tokens of the host's own references are `behind` the
    picture."""

    model: Any
    who: Subject
    positive: Conditioning
    latent: tuple[int, int]
    patch: int
    seed: int = 0
    behind: int = 0
    sigma: float = float("nan")
    calls: int = 0
    lent: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def grid(self, latent: tuple[int, int]) -> tuple[int, int]:
        return tuple(-(-side // self.patch) for side in latent)

    def is_wanted(self, query: Tensor, key: Tensor, count: int, options: dict[str, Any]) -> bool:
        """Whether it is an attention of a picture of so many tokens to itself and maybe a prompt, in a block."""
        of_block = "block_index" in options or not is_numbered(self.model)
        return of_block and query.shape[1] == key.shape[1] >= count

    def begins(self, query: Tensor, key: Tensor, count: int) -> int:
        return 0 if query.shape[1] == count else begins_at(self.model, key.shape[1], count)

    def lend(self, sigma: float) -> None:
        reference = self.who.references[0]
        clean = self.model.model.process_latent_in(reference.latents)
        noise = torch.randn(clean.shape[1:], generator=generator(self.seed))[None]
        noisy = self.model.model.model_sampling.noise_scaling(torch.tensor(sigma), noise, clean)
        height, width = self.grid(clean.shape[-2:])
        inside = torch.nn.functional.adaptive_avg_pool2d(reference.mask, (height, width)).flatten() >= 0.5
        self.lent.clear()

        def keep(function: Any, *args: Any, **named: Any) -> Tensor:
            query, key, value, _ = arguments(args, named)
            if self.is_wanted(query, key, height * width, named["transformer_options"]):
                start = self.begins(query, key, height * width)
                own = slice(start, start + height * width)
                self.lent.append((key[:, own][:, inside], value[:, own][:, inside]))
            return function(*args, **named)

        forward(self.model, noisy, sigma, self.positive, {"optimized_attention_override": keep})

    def __call__(self, function: Any, *args: Any, **named: Any) -> Tensor:
        options = named["transformer_options"]
        sigma = float(options["sigmas"][0])
        if sigma != self.sigma:
            self.lend(sigma)
            self.sigma, self.calls = sigma, 0
        output = function(*args, **named)
        query, key, value, heads = arguments(args, named)
        height, width = self.grid(self.latent)
        if not self.is_wanted(query, key, height * width, options):
            return output
        mine, theirs = self.lent[self.calls % len(self.lent)]
        self.calls += 1
        start = self.begins(query, key, height * width + self.behind)
        own, chunks = slice(start, start + height * width), options["cond_or_uncond"]
        size = len(query) // len(chunks)
        result = output.clone()
        for number, chunk in enumerate(chunks):
            rows = slice(number * size, (number + 1) * size)
            if chunk == 0:
                keys = torch.cat([key[rows], mine.expand(size, -1, -1)], 1)
                values = torch.cat([value[rows], theirs.expand(size, -1, -1)], 1)
                result[rows, own] = dense.attention(query[rows, own], keys, values, heads).to(output)
        return result
