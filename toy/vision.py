"""The toy's vision model and how it is trained: see `train_vision.py`, which is the command.

By itself: from pictures alone, without their captions or labels and without the judge, so that what the judge measures
stays independent of it. Two views of one picture (crops, turns, light, its ground cut out) are to be told from those of
the others in the batch (SimCLR, Chen et al. 2020), and hidden patches are to be painted (after SimMIM, Xie et al.
2022), so that the patches' tokens keep what is where. Most of a batch are groups of emblems of one plate and colours:
only their glyphs tell those apart.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from comfy.image_encoders.dino2 import Dinov2Model
from comfy.ops import disable_weight_init
from safetensors.torch import load_file
from subject_patches.training.files import save_whole
from torch import Tensor, nn
from torch.nn import functional

from .data import mixed_scene
from .drawing import Picture, draw
from .family import VISION
from .runs import Peers, Run
from .scenes import sample_emblem, view

SIZE, PATCH, WIDTH = VISION["image_size"], VISION["patch_size"], VISION["hidden_size"]
GROUP, GROUPED = 8, 0.75
HIDDEN, VISIBLE_WEIGHT, PAINTING_WEIGHT = 0.4, 0.2, 1.0
TEMPERATURE = 0.1


class Model(nn.Module):
    """The vision model under one roof with two heads that only training needs: of its whole picture's token, the
    vector that is compared, and of each patch's its pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = Dinov2Model(VISION, torch.float32, "cpu", disable_weight_init)
        self.compared = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, 64))
        self.painted = nn.Linear(WIDTH, 3 * PATCH**2)

    def forward(self, pixels: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Of pictures (n, 3, 96, 96) of -1 to 1, with the patches hidden that `hidden` (n, 144) bool says: vectors (n,
        64) of length 1, and the pixels of all patches (n, 144, 192)."""
        embeddings = self.vision.embeddings
        patches = embeddings.patch_embeddings(pixels)
        patches = torch.where(hidden[..., None], embeddings.mask_token.to(patches), patches)
        whole = embeddings.cls_token.to(patches).expand(len(patches), -1, -1)
        x = torch.cat([whole, patches], 1) + embeddings.position_embeddings.to(patches)
        x = self.vision.layernorm(self.vision.encoder(x)[0])
        return functional.normalize(self.compared(x[:, 0]).float(), dim=-1), self.painted(x[:, 1:]).float()


def initialise(model: Model) -> None:
    """Usual initial weights, since the host's layers are made without any."""
    for layer in model.vision.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(layer.weight, std=0.05)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.LayerNorm):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
    for name, parameter in model.vision.named_parameters():
        if name.endswith("lambda1"):
            nn.init.constant_(parameter, 0.5)
        elif name.startswith("embeddings.") and not name.startswith("embeddings.patch"):
            nn.init.trunc_normal_(parameter, std=0.05)


def pictures(rng: np.random.Generator, count: int) -> list[Picture]:
    """Pictures to look at: mostly groups of emblems of one plate and colours, the rest scenes of anything."""
    drawn: list[Picture] = []
    while len(drawn) < count:
        if rng.random() < GROUPED:
            first = sample_emblem(rng)
            alike = [replace(first, cells=sample_emblem(rng).cells) for _ in range(GROUP)]
            drawn += [draw(view(emblem, rng)) for emblem in alike]
        else:
            drawn += [draw(mixed_scene(rng)) for _ in range(GROUP)]
    return drawn[:count]


def stacked(drawn: Sequence[Picture], rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (n, 3, 128, 128) of -1 to 1, and of one thing of each the mask (n, 1, 128, 128) and the box (n, 4)."""
    chosen = [int(rng.integers(len(each.masks))) for each in drawn]
    images = torch.from_numpy(np.stack([each.image for each in drawn])).movedim(-1, 1).float() / 127.5 - 1
    masks = np.stack([each.masks[number] for each, number in zip(drawn, chosen, strict=True)])
    boxes = np.stack([each.boxes[number] for each, number in zip(drawn, chosen, strict=True)])
    return images, torch.from_numpy(masks).float()[:, None], torch.from_numpy(boxes).float()


def looked_at(images: Tensor, masks: Tensor, boxes: Tensor, still: bool = False) -> Tensor:
    """One view each (n, 3, 96, 96): a square around the box, at random wider, beside it, turned, in another light, and
    mostly with the ground cut out. With `still` as the nodes show a subject: upright, its ground cut out."""
    count, sides = len(images), torch.tensor(images.shape[-2:])
    uniform = (lambda low, high: torch.full((count,), (low + high) / 2)) if still else _uniform(count)
    extent = (boxes[:, 2:] - boxes[:, :2]).amax(1).clamp(min=8) * uniform(1.0, 1.5)
    turn = uniform(-0.5, 0.5)
    shift = torch.stack([uniform(-0.08, 0.08), uniform(-0.08, 0.08)], 1) * extent[:, None]
    centre = (((boxes[:, :2] + boxes[:, 2:]) / 2 + shift) / sides * 2 - 1)[..., None]
    scale = (extent / sides[0])[:, None, None]
    cos, sin = turn.cos(), turn.sin()
    rotation = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    grid = functional.affine_grid(torch.cat([rotation * scale, centre], 2), [count, 3, SIZE, SIZE], align_corners=False)
    seen = functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    inside = functional.grid_sample(masks, grid, align_corners=False)
    cut = torch.ones(count) if still else (torch.rand(count) < 0.7).float()
    gain, light = (each.view(-1, 1, 1, 1) for each in (uniform(0.85, 1.15), uniform(-0.12, 0.12)))
    seen = (seen * gain + light).clamp(-1, 1)
    return seen * (1 - cut.view(-1, 1, 1, 1) * (1 - inside))


def _uniform(count: int) -> Callable[[float, float], Tensor]:
    return lambda low, high: low + (high - low) * torch.rand(count)


def comparison_loss(first: Tensor, second: Tensor) -> Tensor:
    """How badly each vector (n, 64) of one view tells its other view from all other pictures' (NT-Xent, both ways)."""
    scores = first @ second.T / TEMPERATURE
    own = torch.arange(len(first))
    return (functional.cross_entropy(scores, own) + functional.cross_entropy(scores.T, own)) / 2


def painting_loss(painted: Tensor, pixels: Tensor, hidden: Tensor) -> Tensor:
    """The squared error of the patches' pixels; those that were seen count VISIBLE_WEIGHT as much as the hidden."""
    true = functional.unfold(pixels, PATCH, stride=PATCH).mT
    weights = torch.where(hidden, 1.0, VISIBLE_WEIGHT)
    return (weights * (painted - true).square().mean(-1)).sum() / weights.sum()


@torch.no_grad()
def told_apart(vision: Dinov2Model, count: int = 100, seed: int = 1) -> tuple[float, float]:
    """How often an emblem's view is nearest to another view of it among ten of its plate and colours (chance 0.1): by
    the whole picture's token, and by all patches' tokens together."""
    rng = np.random.default_rng((2**43, seed))
    asked, offered = [], []
    for _ in range(count):
        first = sample_emblem(rng)
        others = [replace(first, cells=sample_emblem(rng).cells) for _ in range(9)]
        asked.append(draw(view(first, rng)))
        offered += [draw(view(each, rng)) for each in (first, *others)]

    def features(drawn: Sequence[Picture]) -> tuple[Tensor, Tensor]:
        parts = [drawn[start : start + 50] for start in range(0, len(drawn), 50)]
        found = [vision(looked_at(*stacked(part, rng), still=True), intermediate_output=-2) for part in parts]
        whole = functional.normalize(torch.cat([each[2] for each in found]), dim=-1)
        hidden = torch.cat([each[1] for each in found])
        hidden = (hidden - hidden.mean((0, 1))).flatten(1)
        return whole, functional.normalize(hidden, dim=-1)

    right = []
    for one, ten in zip(features(asked), features(offered), strict=True):
        scores = (ten.view(count, 10, -1) @ one[..., None]).squeeze(-1)
        right.append(float((scores.argmax(1) == 0).float().mean()))
    return right[0], right[1]


def load(path: Path) -> Dinov2Model:
    """The vision model of a file that a run wrote, or the one that an encoder's file brings."""
    vision, tensors, own = Dinov2Model(VISION, torch.float32, "cpu", disable_weight_init), load_file(path), "vision."
    if any(name.startswith(own) for name in tensors):
        tensors = {name.removeprefix(own): each for name, each in tensors.items() if name.startswith(own)}
    vision.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return vision.eval().requires_grad_(False)


def train(arguments: argparse.Namespace, peers: Peers, measured: int = 100) -> None:
    """Trains as a command line asks for and writes the weights, in half precision. `batch` is in pictures, of each of
    which there are two views; `measured` emblems tell in the end how good it is."""
    torch.manual_seed(arguments.seed)
    model, batch = Model(), arguments.batch
    initialise(model)
    if arguments.start:
        model.vision.load_state_dict(load(arguments.start).state_dict())
    run = Run(
        "vision", model, arguments.folder / "vision.state", arguments.minutes, 1.5e-3, peers, warmup=100, decay=0.998
    )
    if arguments.resume:
        run.resume(torch.device("cpu"))
    # From here on every peer draws for itself.
    own = (arguments.seed * peers.count + peers.rank) * 2**20 + run.step
    torch.manual_seed(own)
    rng = np.random.default_rng((own, 1))
    going = True
    while going:
        given = stacked(pictures(rng, batch), rng)
        pixels = torch.cat([looked_at(*given), looked_at(*given)])
        hidden = torch.rand(len(pixels), (SIZE // PATCH) ** 2) < HIDDEN
        with torch.autocast("cpu", torch.bfloat16):
            vectors, painted = model(pixels, hidden)
        loss = comparison_loss(*vectors.chunk(2)) + PAINTING_WEIGHT * painting_loss(painted, pixels, hidden)
        going = run.advance(loss, batch)
    if peers.rank == 0:
        trained = run.average.module.vision
        save_whole(arguments.checkpoint, {name: each.half() for name, each in trained.state_dict().items()})
        whole, patches = told_apart(trained, measured)
        print(
            f"vision: {run.step} steps of {batch * peers.count}; of ten alike the right one {whole:.0%}, by patches "
            f"{patches:.0%}",
            flush=True,
        )
