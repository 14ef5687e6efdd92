"""The toy world's CLIP and DINO: what is in a picture, and whether two emblems are the same one.

Two small convolutional networks in one file of weights. The detector marks the centre of every object on a
32 x 32 grid, with its box, shape, colour and texture (after CenterNet, Zhou et al. 2019), and names the background.
The identity network turns the crop of an emblem's box into a unit vector: views of one emblem point one way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from .scenes import BACKGROUNDS, COLOURS, EMBLEM, SIZE, TEXTURES, Background
from .shapes import SHAPES

WEIGHTS = Path(__file__).parents[1] / "tools" / "weights" / "judge.safetensors"
SHAPE_NAMES = (*SHAPES, EMBLEM)
COLOUR_NAMES = tuple(COLOURS)
GRID = 32
STRIDE = SIZE / GRID
BOX_UNIT = 16.0  # pixels in one unit of the predicted distances from a cell to its box's sides
HEADS = {"heat": 1, "box": 4, "shape": len(SHAPE_NAMES), "colour": len(COLOUR_NAMES), "texture": len(TEXTURES)}
BACKGROUND_HEADS = {"kind": len(BACKGROUNDS), "top": len(COLOUR_NAMES), "bottom": len(COLOUR_NAMES)}
CROP, CROP_MARGIN, DIMENSIONS = 48, 1.1, 96
MIN_SCORE, MAX_OBJECTS, MAX_OVERLAP = 0.3, 8, 0.5
CHUNK = 64  # pictures that go through a network at once, which bounds memory


@dataclass(frozen=True)
class Finding:
    """One object that was found: its attributes, its box (x0, y0, x1, y1) in pixels and a score of 0 to 1."""

    shape: str
    colour: str
    texture: str
    box: tuple[float, float, float, float]
    score: float


@dataclass(frozen=True)
class Reading:
    """What is in one picture: objects by falling score, the background's kind, and its colours as a scene's
    `Background` has them (plain one, gradient two, textured none)."""

    objects: tuple[Finding, ...]
    background: str
    background_colours: tuple[str, ...] = ()


@dataclass(frozen=True)
class CaptionScore:
    """How a picture answers a caption: for every asked thing, is it found with all attributes right; is the
    background's kind right; are the kind and its colours right."""

    things: tuple[bool, ...]
    background: bool
    background_colours: bool

    @property
    def all_things(self) -> bool:
        return all(self.things)


class Asked(Protocol):
    """What a caption asks of one object; a scene's `Thing` is one."""

    @property
    def shape(self) -> str: ...
    @property
    def colour(self) -> str: ...
    @property
    def texture(self) -> str: ...


def answers(finding: Finding, asked: Asked) -> bool:
    """Whether a found object is what was asked. A caption says nothing of an emblem but its class."""
    if asked.shape == EMBLEM:
        return finding.shape == EMBLEM
    return (finding.shape, finding.colour, finding.texture) == (asked.shape, asked.colour, asked.texture)


def caption_score(reading: Reading, things: Sequence[Asked], background: Background) -> CaptionScore:
    """Compares a reading with a scene's things and background. Every found object answers at most one thing.
    Greedy matching is exact here: objects that answer the same thing are equal in all that is asked."""
    free = list(reading.objects)
    found = []
    for asked in things:
        match = next((f for f in free if answers(f, asked)), None)
        if match is not None:
            free.remove(match)
        found.append(match is not None)
    kind = reading.background == background.kind
    return CaptionScore(tuple(found), kind, kind and reading.background_colours == background.colours)


def box_overlap(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of boxes (n, 4) and (m, 4) as x0, y0, x1, y1, giving (n, m)."""
    low = torch.maximum(first[:, None, :2], second[None, :, :2])
    high = torch.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(-1) for boxes in (first, second)]
    return shared / (areas[0][:, None] + areas[1][None] - shared).clamp(min=1e-6)


def crop_boxes(images: Tensor, boxes: Tensor) -> Tensor:
    """Crops (b, 3, 48, 48) of pictures (b, 3, h, w) around one box each (b, 4; pixels), with a small margin."""
    size = torch.tensor([images.shape[3], images.shape[2]], device=boxes.device)
    centre = (boxes[:, :2] + boxes[:, 2:]) / size - 1
    extent = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1) / size * CROP_MARGIN
    zero = torch.zeros_like(centre[:, 0])
    rows = [torch.stack([extent[:, 0], zero, centre[:, 0]], 1), torch.stack([zero, extent[:, 1], centre[:, 1]], 1)]
    grid = functional.affine_grid(torch.stack(rows, 1), [len(images), 3, CROP, CROP], align_corners=False)
    return functional.grid_sample(images, grid.to(images.dtype), padding_mode="border", align_corners=False)


def _step(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    # Group norm keeps no running statistics: training, averaging and judging compute the same function.
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.GroupNorm(8, outputs), nn.SiLU())


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_step(channels, channels), _step(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Detector(nn.Module):
    """Signals (b, 3, 128, 128) in -1..1 to maps by name (b, 32 * 32, channels) and background logits (b, n)."""

    def __init__(self) -> None:
        super().__init__()
        self.quarter = nn.Sequential(_step(3, 32, 2), _step(32, 64, 2), Residual(64))
        self.eighth = nn.Sequential(_step(64, 96, 2), Residual(96))
        self.sixteenth = nn.Sequential(_step(96, 128, 2), Residual(128))
        self.from_eighth = nn.Conv2d(96, 64, 1)
        self.from_sixteenth = nn.Conv2d(128, 64, 1)
        self.heads = nn.Sequential(Residual(64), _step(64, 96), nn.Conv2d(96, sum(HEADS.values()), 1))
        self.background = nn.Linear(2 * 128, sum(BACKGROUND_HEADS.values()))
        # Few cells are centres: starting there spares the first steps (Lin et al. 2017).
        nn.init.constant_(self.heads[-1].bias[:1], -4.0)

    def forward(self, signal: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        fine = self.quarter(signal)
        middle = self.eighth(fine)
        coarse = self.sixteenth(middle)
        context = self.from_eighth(middle) + functional.interpolate(self.from_sixteenth(coarse), scale_factor=2)
        maps = self.heads(fine + functional.interpolate(context, scale_factor=2)).flatten(2).transpose(1, 2).float()
        # The upper and the lower half apart: a gradient's two colours are there.
        halves = functional.adaptive_avg_pool2d(coarse, (2, 1)).flatten(1)
        background = self.background(halves).float()
        return (
            dict(zip(HEADS, maps.split(tuple(HEADS.values()), 2), strict=True)),
            dict(zip(BACKGROUND_HEADS, background.split(tuple(BACKGROUND_HEADS.values()), 1), strict=True)),
        )


class Identity(nn.Module):
    """Crops (b, 3, 48, 48) in -1..1 to vectors (b, 96), not yet of unit length."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(_step(3, 32, 2), Residual(32), _step(32, 64, 2), Residual(64), _step(64, 96, 2), Residual(96)),
            nn.Conv2d(96, 32, 1),
        )
        # Where a glyph's cells lie matters, so the map is not pooled away.
        self.out = nn.Linear(32 * (CROP // 8) ** 2, DIMENSIONS)

    def forward(self, signal: Tensor) -> Tensor:
        return self.out(functional.silu(self.body(signal)).flatten(1)).float()


def cell_centres(device: torch.device) -> Tensor:
    """The grid's cell centres (1024, 2) as x, y in pixels of a 128 x 128 picture, row by row."""
    axis = (torch.arange(GRID, device=device) + 0.5) * STRIDE
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], 1)


def decode_boxes(distances: Tensor, centres: Tensor) -> Tensor:
    """Boxes (..., 4) as x0, y0, x1, y1 from the predicted distances to the left, top, right and bottom side."""
    pixels = distances * BOX_UNIT
    return torch.cat([centres - pixels[..., :2], centres + pixels[..., 2:]], -1)


class Judge(nn.Module):
    """Reads pictures in the host's IMAGE layout: (b, h, w, 3), 0 to 1."""

    def __init__(self) -> None:
        super().__init__()
        self.detector = Detector()
        self.identifier = Identity()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def _planes(self, images: Tensor) -> Tensor:
        planes = images[..., :3].movedim(-1, 1).to(self.device, torch.float32)
        if planes.shape[2:] == (SIZE, SIZE):
            return planes
        return functional.interpolate(planes, (SIZE, SIZE), mode="bilinear", antialias=True)

    @torch.no_grad()
    def findings(self, images: Tensor) -> list[Reading]:
        """What is in each picture (b, h, w, 3). Boxes are in the pixels of the pictures given."""
        scale = torch.tensor([images.shape[2] / SIZE, images.shape[1] / SIZE] * 2)
        readings: list[Reading] = []
        for chunk in images.split(CHUNK):
            maps, background = self.detector(self._planes(chunk) * 2 - 1)
            heat = maps["heat"].sigmoid().view(-1, 1, GRID, GRID)
            heat = (heat * (heat == functional.max_pool2d(heat, 3, 1, 1))).flatten(1)
            boxes = decode_boxes(maps["box"], cell_centres(heat.device)).clamp(0, SIZE)
            names = torch.stack([maps[head].argmax(-1) for head in ("shape", "colour", "texture")], -1)
            grounds = torch.stack([background[head].argmax(-1) for head in BACKGROUND_HEADS], -1)
            for row in zip(heat.cpu(), boxes.cpu(), names.cpu(), grounds.tolist(), strict=True):
                readings.append(_read(*row, scale))
        return readings

    @torch.no_grad()
    def identity(self, images: Tensor, boxes: Tensor) -> Tensor:
        """Unit vectors (b, 96) for what is in one box of each picture: images (b, h, w, 3), boxes (b, 4) in their
        pixels. The cosine of two vectors says how much alike two emblems are."""
        scale = torch.tensor([SIZE / images.shape[2], SIZE / images.shape[1]] * 2, device=self.device)
        vectors = []
        for chunk, places in zip(images.split(CHUNK), boxes.split(CHUNK), strict=True):
            crops = crop_boxes(self._planes(chunk), places.to(self.device, torch.float32) * scale)
            vectors.append(functional.normalize(self.identifier(crops * 2 - 1), dim=1))
        return torch.cat(vectors)


def _read(heat: Tensor, boxes: Tensor, names: Tensor, ground: list[int], scale: Tensor) -> Reading:
    """One picture's reading from its heat (1024), boxes (1024, 4) and indices of names (1024, 3)."""
    scores, cells = heat.topk(2 * MAX_OBJECTS)
    kept: list[int] = []
    for score, cell in zip(scores.tolist(), cells.tolist(), strict=True):
        if score < MIN_SCORE or len(kept) == MAX_OBJECTS:
            break
        if not kept or box_overlap(boxes[cell][None], boxes[kept]).max() < MAX_OVERLAP:
            kept.append(cell)
    objects = []
    for cell in kept:
        shape, colour, texture = names[cell].tolist()
        x0, y0, x1, y1 = (boxes[cell] * scale).tolist()
        words = SHAPE_NAMES[shape], COLOUR_NAMES[colour], TEXTURES[texture]
        objects.append(Finding(*words, (x0, y0, x1, y1), float(heat[cell])))
    kind, top, bottom = ground
    colours = {"plain": (COLOUR_NAMES[top],), "gradient": (COLOUR_NAMES[top], COLOUR_NAMES[bottom])}
    return Reading(tuple(objects), BACKGROUNDS[kind], colours.get(BACKGROUNDS[kind], ()))


def load_judge(path: Path = WEIGHTS, device: str | torch.device = "cpu") -> Judge:
    """The judge with its shipped weights, in fp32, on a device."""
    judge = Judge()
    judge.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return judge.to(device).eval().requires_grad_(False)
