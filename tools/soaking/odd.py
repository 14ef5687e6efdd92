"""Nodes of the probe's that turn what is on a link into what no node of the host's would make."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _spoilt(value: Tensor, number: float) -> Tensor:
    changed = value.clone()
    changed[-1].flatten()[0] = number
    return changed


def _latent(change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda latent: {**latent, "samples": change(latent["samples"])}


def _context(change: Callable[[Tensor], Tensor]) -> Callable[[list[Any]], list[Any]]:
    return lambda conditioning: [[change(context), values.copy()] for context, values in conditioning]


def _told(**told: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda conditioning: [[context, {**values, **told}] for context, values in conditioning]


ODD: dict[str, dict[str, Callable[[Any], Any]]] = {
    "IMAGE": {
        "1 px": lambda image: image[:, :1, :1],
        "one line": lambda image: image[:, :1],
        "7 x 130": lambda image: torch.rand(1, 7, 130, 3),
        "batch of 3": lambda image: torch.cat([image, image.flip(1), 1 - image]),
        "alpha": lambda image: torch.cat([image[..., :3], (image[..., :1] > 0.5).to(image)], -1),
        "nothing but transparent": lambda image: torch.cat([image[..., :3], 0 * image[..., :1]], -1),
        "grey": lambda image: image[..., :1],
        "5 channels": lambda image: image.repeat(1, 1, 1, 2)[..., :5],
        "black": lambda image: 0 * image,
        "NaN": lambda image: _spoilt(image, math.nan),
        "0 to 255": lambda image: image * 255,
        "bytes": lambda image: (image * 255).byte(),
        "no picture": lambda image: image[:0],
        "half": lambda image: image.half(),
        "3 axes": lambda image: image[0],
        "None": lambda image: None,
    },
    "MASK": {
        "1 px": lambda mask: mask[:, :1, :1],
        "5 x 333": lambda mask: torch.rand(1, 5, 333).round(),
        "batch of 3": lambda mask: torch.cat([mask, mask.flip(2), 1 - mask]),
        "9 masks": lambda mask: torch.eye(9)[:, None].repeat(1, 4, 1),
        "empty": lambda mask: 0 * mask,
        "full": lambda mask: 0 * mask + 1,
        "one place": lambda mask: _spoilt(0 * mask, 1.0),
        "grey": lambda mask: 0.5 * mask,
        "NaN": lambda mask: _spoilt(mask, math.nan),
        "negative": lambda mask: mask - 3,
        "no mask": lambda mask: mask[:0],
        "2 axes": lambda mask: mask[0],
        "booleans": lambda mask: mask > 0.5,
    },
    "LATENT": {
        "1 px": _latent(lambda samples: samples[..., :1, :1]),
        "7 x 5": _latent(lambda samples: samples[..., :7, :5]),
        "batch of 3": _latent(lambda samples: torch.cat([samples, samples.flip(-1), -samples])),
        "more channels": _latent(lambda samples: torch.cat([samples, samples], 1)),
        "a video": _latent(lambda samples: samples[:, :, None].repeat(1, 1, 3, 1, 1)),
        "no picture": _latent(lambda samples: samples[:0]),
        "NaN": _latent(lambda samples: _spoilt(samples, math.nan)),
        "huge": _latent(lambda samples: samples * 1e30),
        "half": _latent(lambda samples: samples.half()),
        "no samples": lambda latent: {},
        "with a mask": lambda latent: {**latent, "noise_mask": torch.ones(1, 1, 9, 9).tril()},
    },
    "CONDITIONING": {
        "empty": lambda conditioning: [],
        "one token": _context(lambda context: context[:, :1]),
        "no token": _context(lambda context: context[:, :0]),
        "three rows": _context(lambda context: context.repeat(3, 1, 1)),
        "twice": lambda conditioning: [*conditioning, *conditioning],
        "wider": _context(lambda context: torch.cat([context, context], -1)),
        "NaN": _context(lambda context: _spoilt(context, math.nan)),
        "half": _context(lambda context: context.half()),
        "nothing but tokens": lambda conditioning: [[context, {}] for context, _ in conditioning],
        "no pooled output": _told(pooled_output=None),
        "in an area": _told(area=(4, 4, 2, 2), strength=0.5, set_area_to_bounds=False),
        "under a mask": _told(mask=torch.ones(1, 9, 9).tril(), set_area_to_bounds=False, mask_strength=1.0),
        "late": _told(start_percent=0.6, end_percent=1.0),
        "zeros": _context(lambda context: 0 * context),
    },
    "SIGMAS": {
        "none": lambda sigmas: sigmas[:0],
        "one": lambda sigmas: sigmas[:1],
        "rising": lambda sigmas: sigmas.flip(0),
        "all the same": lambda sigmas: 0 * sigmas + 1,
        "NaN": lambda sigmas: _spoilt(sigmas[None], math.nan)[0],
        "a part": lambda sigmas: sigmas[:-1],
        "huge": lambda sigmas: sigmas * 1000,
        "2 axes": lambda sigmas: sigmas[None],
    },
    "BOUNDING_BOX": {
        "several": lambda box: [box, {**box, "x": 50}],
        "outside": lambda box: {**box, "x": 10**7},
        "no area": lambda box: {**box, "width": 0},
        "negative": lambda box: {**box, "width": -5},
        "NaN": lambda box: {**box, "x": math.nan},
        "words": lambda box: {**box, "x": "left"},
        "no numbers": lambda box: {},
        "no boxes": lambda box: [],
        "of two pictures": lambda box: [[box], [box]],
        "text": lambda box: "box",
        "two lines": lambda box: {**box, "metadata": {"desc": "em\nblem"}},
        "no words": lambda box: {name: box[name] for name in ("x", "y", "width", "height")},
        "huge": lambda box: {**box, "width": 1e300, "height": 1e300},
    },
}


def _odd(kind: str, ways: dict[str, Callable[[Any], Any]]) -> type:
    def changed(self: Any, value: Any, way: str) -> tuple[Any]:
        return (ways[way](value),)

    types = {"required": {"value": (kind,), "way": (list(ways),)}}
    members = {"RETURN_TYPES": (kind,), "FUNCTION": "changed", "CATEGORY": "soak", "changed": changed}
    return type(f"SoakOdd{kind}", (), {**members, "INPUT_TYPES": classmethod(lambda cls: types)})


NODES = {f"SoakOdd{kind}": _odd(kind, ways) for kind, ways in ODD.items()}
