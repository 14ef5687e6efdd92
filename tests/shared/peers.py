"""Small stand-ins for what other packs do to a MODEL, each of the shape of a kind that is in use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP
from subject_patches.tests.shared.models import CONTEXT, randn
from torch import Tensor

OPENINGS = ("function", "apply model", "diffusion model")


class StepCache:
    """Answers every other call of one shape with what the last one added; another shape begins afresh."""

    def __init__(self) -> None:
        self.last: Tensor | None = None
        self.added: Tensor | None = None
        self.skips = 0

    def __call__(self, run: Callable[[], Tensor], x: Tensor) -> Tensor:
        if self.last is not None and self.last.shape == x.shape and self.added is not None:
            result, self.added = x + self.added, None
            self.skips += 1
        else:
            result = run()
            self.added = result - x
        self.last = x
        return result


def step_cache(model: Any, opening: str) -> Any:
    """A step cache of its own for each clone, in one of the openings through which a call of the model is wrapped."""
    cache, clone = StepCache(), model.clone()

    def function(apply: Callable[..., Tensor], given: dict[str, Any]) -> Tensor:
        x = given["input"]
        return cache(lambda: apply(x, given["timestep"], **given["c"]), x)

    def wrapper(executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return cache(lambda: executor(x, *args, **kwargs), x)

    if opening == "function":
        clone.set_model_unet_function_wrapper(function)
    else:
        kind = WrappersMP.APPLY_MODEL if opening == "apply model" else WrappersMP.DIFFUSION_MODEL
        clone.add_wrapper_with_key(kind, "a step cache", wrapper)
    return clone


def shared_in_the_batch(model: Any) -> Any:
    """Self-attention over one's own tokens and those of the first row of one's half of the batch, as if a batch were
    always cond and uncond."""

    def first(tokens: Tensor) -> Tensor:
        half = len(tokens) // 2
        firsts = torch.stack((tokens[0], tokens[half]))[:, None]
        return firsts.expand(2, half, -1, -1).reshape(tokens.shape)

    def share(query: Tensor, key: Tensor, value: Tensor, _: dict[str, Any]) -> tuple[Tensor, ...]:
        return query, torch.cat([key, first(key)], 1), torch.cat([value, first(value)], 1)

    clone = model.clone()
    clone.set_model_attn1_patch(share)
    return clone


def shared_by_index(model: Any) -> Any:
    """As above, in a way that does not fail on a single row but gives it its own tokens twice."""

    def share(query: Tensor, key: Tensor, value: Tensor, extra: dict[str, Any]) -> tuple[Tensor, ...]:
        size = len(query) // len(extra["cond_or_uncond"])
        lent = [tokens[::size].repeat_interleave(size, 0) for tokens in (key, value)]
        return query, *(torch.cat(both, 1) for both in zip((key, value), lent, strict=True))

    clone = model.clone()
    clone.set_model_attn1_patch(share)
    return clone


def of_its_own_prompt(model: Any, lengths: tuple[int, ...]) -> Any:
    """Cross-attention replaced by one that knows prompts of some lengths only."""

    def replacement(query: Tensor, key: Tensor, value: Tensor, extra: dict[str, Any]) -> Tensor:
        assert key.shape[1] in lengths
        return 1.1 * optimized_attention(query, key, value, extra["n_heads"])

    clone = model.clone()
    for block, number in (("input", 1), ("middle", 0), ("output", 3)):
        clone.set_model_attn2_replace(replacement, block, number)
    return clone


def couple(model: Any, regions: int = 1, length: int = 7) -> Any:
    """An attention couple: the conditioned chunks' rows once more for each region, with the region's prompt; the
    outputs are mixed by masks, stripes of equal width, the chunk's own prompt having the first."""
    prompts = [randn(1, length, CONTEXT, seed=300 + number) for number in range(regions)]
    shares = regions + 1

    def widen(query: Tensor, key: Tensor, value: Tensor, extra: dict[str, Any]) -> tuple[Tensor, ...]:
        kinds = extra["cond_or_uncond"]
        size = len(query) // len(kinds)
        queries, keys = [], []
        for kind, rows, own in zip(kinds, query.split(size), key.split(size), strict=True):
            queries += [rows] if kind == 1 else [rows] * shares
            others = [prompt.repeat(size, own.shape[1] // length, 1).to(own) for prompt in prompts]
            keys += [own] if kind == 1 else [own, *others]
        return torch.cat(queries), torch.cat(keys), torch.cat(keys)

    def mix(output: Tensor, extra: dict[str, Any]) -> Tensor:
        kinds = extra["cond_or_uncond"]
        size = len(output) // sum(1 if kind == 1 else shares for kind in kinds)
        parts, results = list(output.split(size)), []
        for kind in kinds:
            mine = [parts.pop(0) for _ in range(1 if kind == 1 else shares)]
            width = extra["activations_shape"][-1]
            columns = torch.arange(output.shape[1]) % width * len(mine) // width
            masks = [(columns == number).to(output)[:, None] for number in range(len(mine))]
            results.append(sum(mask * part for mask, part in zip(masks, mine, strict=True)))
        return torch.cat(results)

    clone = model.clone()
    clone.set_model_attn2_patch(widen)
    clone.set_model_attn2_output_patch(mix)
    return clone


def splitting(apply: Callable[..., Tensor], arguments: dict[str, Any]) -> Tensor:
    """A function wrapper as packs that save memory have it: each chunk in a call of its own, the last one first."""
    x, timestep, c = arguments["input"], arguments["timestep"], arguments["c"]
    options = c["transformer_options"]
    count = len(options["cond_or_uncond"])
    size = len(x) // count
    outputs = []
    for index in reversed(range(count)):
        rows = slice(index * size, (index + 1) * size)
        part = {name: value[rows] if isinstance(value, Tensor) else value for name, value in c.items()}
        part["transformer_options"] = {
            **options,
            "cond_or_uncond": [options["cond_or_uncond"][index]],
            "uuids": [options["uuids"][index]],
        }
        outputs.insert(0, apply(x[rows], timestep[rows], **part))
    return torch.cat(outputs)


Box = tuple[int, int, int, int]


def tiled(model: Any, boxes: list[Box], together: int = 1, prompts_first: bool = False, roll: int = 0) -> Any:
    """The model runs on tiles (height, width, y, x), some `together` in one batch: each tile with all prompts, or with
    `prompts_first` each prompt with all tiles; of the latents rolled to the right by `roll`. Where tiles overlap, their
    mean counts."""

    def function(apply: Callable[..., Tensor], given: dict[str, Any]) -> Tensor:
        x, sigma, values = given["input"].roll(roll, -1), given["timestep"], given["c"]
        prompts = len(values["transformer_options"]["uuids"])
        total, count = torch.zeros_like(x), torch.zeros_like(x)
        for first in range(0, len(boxes), together):
            some = boxes[first : first + together]
            # By tile, prompt and picture.
            cut = [x[..., y : y + h, left : left + w].unflatten(0, (prompts, -1)) for h, w, y, left in some]
            order = (1, 0) if prompts_first else (0, 1)
            batch = torch.stack(cut).permute(*order, 2, 3, 4, 5).flatten(0, 2)
            context = values["c_crossattn"].unflatten(0, (prompts, -1)).expand(len(some), *(-1,) * 4)
            context = context.permute(*order, 2, 3, 4).flatten(0, 2)
            out = apply(batch, sigma[:1].expand(len(batch)), **{**values, "c_crossattn": context})
            shape = (prompts, len(some), -1) if prompts_first else (len(some), prompts, -1)
            out = out.unflatten(0, shape)
            for (h, w, y, left), part in zip(some, out.transpose(0, 1) if prompts_first else out, strict=True):
                total[..., y : y + h, left : left + w] += part.flatten(0, 1)
                count[..., y : y + h, left : left + w] += 1
        return (total / count.clamp(min=1)).roll(-roll, -1)

    clone = model.clone()
    clone.set_model_unet_function_wrapper(function)
    return clone


def prompt_by_prompt(model: Any) -> Any:
    """Each prompt's rows in a call of their own, the last ones first; what the host says of the call stays the same."""

    def function(apply: Callable[..., Tensor], given: dict[str, Any]) -> Tensor:
        x, sigma, values = given["input"], given["timestep"], given["c"]
        count = len(values["transformer_options"]["uuids"])
        size, outputs = len(x) // count, []
        for number in reversed(range(count)):
            rows = slice(number * size, (number + 1) * size)
            part = {name: value[rows] if isinstance(value, Tensor) else value for name, value in values.items()}
            outputs.insert(0, apply(x[rows], sigma[rows], **part))
        return torch.cat(outputs)

    clone = model.clone()
    clone.set_model_unet_function_wrapper(function)
    return clone


def with_tokens(model: Any, how: str) -> Any:
    """What a prompt's attention is over: with other tokens "appended" or "put before", all "doubled", every second one
    left out ("halved", as of a prompt that was encoded with each token twice), or neighbours "pooled"."""
    more = randn(1, 3, CONTEXT, seed=310)

    def change(query: Tensor, key: Tensor, value: Tensor, _: dict[str, Any]) -> tuple[Tensor, ...]:
        others = more.expand(len(key), -1, -1).to(key)
        if how in ("appended", "put before"):
            changed = torch.cat([key, others] if how == "appended" else [others, key], 1)
        elif how == "doubled":
            changed = torch.cat([key, key], 1)
        else:
            changed = key[:, ::2] if how == "halved" else (key[:, :-1:2] + key[:, 1::2]) / 2
        return query, changed, changed

    clone = model.clone()
    clone.set_model_attn2_patch(change)
    return clone
