"""Trains the toy's judge from nothing: `python -m toy.judge_train --out FILE --minutes M`.

Scenes are drawn on the fly by worker processes and degraded on the training device as an autoencoder and a
diffusion model degrade pictures, because those are what the judge is for. With `--resume` a stopped run goes on
from its last save; `--evaluate` only measures the weights in FILE on scenes that no training draws.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from subject_patches.training.averages import Average
from subject_patches.training.files import load_state, save_state, save_whole
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from .drawing import Picture, draw
from .judge import (
    BOX_UNIT,
    COLOUR_NAMES,
    DIMENSIONS,
    WEIGHTS,
    Judge,
    box_overlap,
    caption_score,
    cell_centres,
    crop_boxes,
    load_judge,
)
from .judge_scenes import NONE, Batch, Samples, degrade, emblem_view, label_scene, stack, to_planes
from .runs import Clock, Progress, learning_rate
from .scenes import GLYPH_CELLS, SIZE, sample_emblem, sample_scene
from .shapes import PLATES

HELD_OUT = 2**40  # the first word of every evaluation seed; training seeds are small
TEMPERATURE = 0.1


def detector_loss(maps: Batch, background: Batch, boxes: Tensor, batch: Batch) -> Tensor:
    """The focal loss on the heat map, distances to the sides of boxes, and cross entropies of every class."""
    centres = cell_centres(boxes.device)
    used = batch["classes"][..., :1] != NONE
    boxes = torch.where(used, boxes.clamp(0, SIZE), 1e4)
    away = torch.linalg.vector_norm(centres[None, None] - ((boxes[..., :2] + boxes[..., 2:]) / 2)[:, :, None], dim=-1)
    distance, owner = away.min(1)
    best = torch.zeros_like(away).scatter_(2, away.argmin(2, keepdim=True), used.float()).amax(1)
    target = torch.exp(-((distance / 7) ** 2))
    heat, chance = maps["heat"].squeeze(-1), maps["heat"].squeeze(-1).sigmoid()
    hit = (1 - chance) ** 2 * -functional.logsigmoid(heat) * best
    miss = (1 - target) ** 4 * chance**2 * -functional.logsigmoid(-heat) * (1 - best)
    loss = (hit + miss).sum() / used.sum()
    # Every cell near a centre learns to speak for the object, so a peak that is a cell off still reads right.
    near = distance < 7
    owned = boxes.gather(1, owner[..., None].expand(-1, -1, 4))[near]
    place = centres.expand(len(boxes), -1, -1)[near]
    sides = torch.cat([place - owned[:, :2], owned[:, 2:] - place], 1) / BOX_UNIT
    loss = loss + functional.smooth_l1_loss(maps["box"][near], sides, beta=0.1)
    classes = batch["classes"].gather(1, owner[..., None].expand(-1, -1, 3))[near]
    for column, head in enumerate(("shape", "colour", "texture")):
        loss = loss + functional.cross_entropy(maps[head][near], classes[:, column])
    for column, head in enumerate(background):
        # A sum: in a small batch no background may have a named colour, and a mean of none is no number.
        truth = batch["background"][:, column]
        wrong = functional.cross_entropy(background[head], truth, ignore_index=NONE, reduction="sum")
        loss = loss + 0.5 * wrong / len(boxes)
    return loss


class Description(nn.Module):
    """Reads plate, colours and cells back out of identity vectors. It steers training and is not shipped."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = (len(PLATES), len(COLOUR_NAMES), len(COLOUR_NAMES), GLYPH_CELLS**2)
        self.read = nn.Linear(DIMENSIONS, sum(self.sizes))

    def loss(self, vectors: Tensor, batch: Batch) -> Tensor:
        *words, cells = self.read(vectors / TEMPERATURE).split(self.sizes, 1)
        losses = [functional.cross_entropy(w, batch["words"][:, 1 + i]) for i, w in enumerate(words)]
        return torch.stack(losses).mean() + functional.binary_cross_entropy_with_logits(cells, batch["cells"])


def identity_loss(vectors: Tensor, numbers: Tensor) -> Tensor:
    """Supervised contrastive loss (Khosla et al. 2020) over unit vectors (n, d) and their emblems' numbers (n)."""
    same = numbers[:, None] == numbers[None]
    itself = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    scores = (vectors @ vectors.T / TEMPERATURE).masked_fill(itself, -1e9).log_softmax(1)
    return -scores[same & ~itself].mean()


class Trained(nn.Module):
    """The judge and what only its training needs."""

    def __init__(self) -> None:
        super().__init__()
        self.judge, self.description = Judge(), Description()

    @staticmethod
    def _mixed(like: Tensor) -> torch.autocast:
        # The networks only: coordinates and similarities need all their bits.
        return torch.autocast(like.device.type, torch.bfloat16, enabled=like.device.type == "cuda")

    def loss(self, scenes: Batch, views: Batch) -> Tensor:
        """The sum of all losses on a batch of scenes and one of emblem views."""
        planes, boxes = degrade(to_planes(scenes["image"]), scenes["boxes"])
        with self._mixed(planes):
            maps, background = self.judge.detector(planes * 2 - 1)
        total = detector_loss(maps, background, boxes, scenes)
        planes, boxes = degrade(to_planes(views["image"]), views["boxes"])
        boxes = boxes[:, 0]
        # Boxes that the detector finds are a few pixels off.
        extent = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
        boxes = boxes + 0.04 * extent * torch.randn_like(boxes)
        crops = crop_boxes(planes, boxes)
        with self._mixed(crops):
            vectors = self.judge.identifier(crops * 2 - 1)
        vectors = functional.normalize(vectors, dim=1)
        return total + identity_loss(vectors, views["words"][:, 0]) + self.description.loss(vectors, views)


def _fetch(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def train(out: Path, minutes: float, device: torch.device, workers: int, batch: int, seed: int, resume: bool) -> None:
    """Trains for `minutes` and writes the averaged weights to `out` in fp16; the run's state lies beside it."""
    torch.manual_seed(seed)
    model = Trained().to(device)
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3, (0.9, 0.99), weight_decay=1e-3)
    average, step, clock, state_file = Average(model, 0.999), 0, Clock(minutes), out.with_suffix(".state")
    state = load_state(state_file, device) if resume else None
    if state:
        model.load_state_dict(state["model"])
        average.module.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
        step, clock = state["step"], Clock(minutes, state["spent"])

    def save() -> None:
        parts = {"model": model, "average": average.module, "optimiser": optimiser}
        state = {name: part.state_dict() for name, part in parts.items()}
        save_state(state_file, {**state, "step": step, "spent": clock.spent})
        save_whole(out, {k: v.half() for k, v in average.module.judge.state_dict().items()})

    # One thread each: the workers are as many as the cores they may use.
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
    spawned = {"num_workers": workers, "multiprocessing_context": "spawn", "prefetch_factor": 2} if workers else {}
    loader = DataLoader(Samples(batch, seed, step), batch_size=None, pin_memory=device.type == "cuda", **spawned)
    progress, saved = Progress("judge"), clock.spent
    for scenes, views in loader:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(2e-3, step, clock.share)
        loss = model.loss(_fetch(scenes, device), _fetch(views, device))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        average.update(model, step)
        step += 1
        progress.step(step, loss, 2 * batch, clock.left)
        if clock.share >= 1:
            break
        if clock.spent - saved > 60:
            saved = clock.spent
            save()
    save()
    print(f"judge: {step} steps of {batch} scenes and {batch} emblem views; wrote {out}", flush=True)


def held_out(count: int, seed: int = 0) -> list[Picture]:
    """Scenes that no training draws."""
    rng = np.random.default_rng((HELD_OUT, seed))
    return [draw(sample_scene(rng)) for _ in range(count)]


def _images(pictures: Sequence[Picture], degraded: bool) -> tuple[Tensor, list[Tensor]]:
    """Pictures (n, 128, 128, 3) in 0..1 and the boxes of their things, both degraded if asked; always the same way."""
    rows = stack([label_scene(p) for p in pictures])
    planes, boxes = to_planes(rows["image"]), rows["boxes"]
    if degraded:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            planes, boxes = degrade(planes, boxes)
    return planes.movedim(1, -1), [b[: len(p.boxes)] for b, p in zip(boxes, pictures, strict=True)]


def accuracies(judge: Judge, pictures: Sequence[Picture], degraded: bool = False) -> dict[str, float]:
    """Shares of 0 to 1: things found (a box that overlaps by half), findings that are things, attributes right among
    found things, backgrounds right, and whole scenes right."""
    images, all_boxes = _images(pictures, degraded)
    right: dict[str, list[bool]] = {name: [] for name in ("found", "true", "shape", "colour", "texture")}
    grounds, colours, whole = [], [], []
    for picture, reading, boxes in zip(pictures, judge.findings(images), all_boxes, strict=True):
        seen = torch.tensor([f.box for f in reading.objects]).view(-1, 4)
        overlap = box_overlap(boxes, seen)
        right["true"] += (overlap.amax(0) >= 0.5).tolist()
        for thing, row in zip(picture.scene.things, overlap, strict=True):
            right["found"].append(bool((row >= 0.5).any()))
            if right["found"][-1]:
                finding = reading.objects[int(row.argmax())]
                for name in ("shape", "colour", "texture"):
                    right[name].append(getattr(finding, name) == getattr(thing, name))
        score = caption_score(reading, picture.scene.things, picture.scene.background)
        grounds.append(score.background)
        colours.append(score.background_colours)
        whole.append(score.all_things and score.background)
    shares = {**right, "background": grounds, "background and its colours": colours, "whole scene": whole}
    return {name: float(np.mean(values)) for name, values in shares.items()}


def retrieval(judge: Judge, rounds: int, hard: bool = False, degraded: bool = False, size: int = 100) -> float:
    """Share of emblem views whose nearest among views of `size` emblems is of their own. When `hard`, all emblems of
    a round have one plate and two colours, so that only their glyphs differ. The boxes are the judge's own."""
    rng, hits = np.random.default_rng((HELD_OUT, 1)), []
    for _ in range(rounds):
        first = sample_emblem(rng)
        emblems = [replace(first, cells=sample_emblem(rng).cells) if hard else sample_emblem(rng) for _ in range(size)]
        sides = []
        for _ in range(2):
            images, boxes = _images([emblem_view(e, rng) for e in emblems], degraded)
            whole = [(0.0, 0.0, float(SIZE), float(SIZE))]
            found = [torch.tensor([f.box for f in r.objects] or whole) for r in judge.findings(images)]
            nearest = [f[box_overlap(b[:1], f)[0].argmax()] for b, f in zip(boxes, found, strict=True)]
            sides.append(judge.identity(images, torch.stack(nearest)))
        hits += ((sides[0] @ sides[1].T).argmax(1).cpu() == torch.arange(size)).tolist()
    return float(np.mean(hits))


def evaluate(judge: Judge, scenes: int, rounds: int) -> None:
    """Prints what the judge gets right on held-out scenes, as drawn and degraded."""
    pictures = held_out(scenes)
    columns = [accuracies(judge, pictures, degraded) for degraded in (False, True)]
    for hard, name in ((False, "emblem among 100"), (True, "emblem among 100 of its plate and colours")):
        for column, degraded in zip(columns, (False, True), strict=True):
            column[name] = retrieval(judge, rounds, hard, degraded)
    print(f"| {scenes} held-out scenes | as drawn | degraded |\n|---|---|---|")
    for name, share in columns[0].items():
        print(f"| {name} | {share:.1%} | {columns[1][name]:.1%} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="the file of weights that is written, or evaluated")
    parser.add_argument("--minutes", type=float, default=60, help="training time, evaluation not counted")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw pictures")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=192, help="scenes in one step, and as many emblem views; by 4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the state file beside FILE")
    parser.add_argument("--evaluate", action="store_true", help="only measure FILE")
    parser.add_argument("--scenes", type=int, default=1000, help="held-out scenes of the evaluation")
    given = parser.parse_args()
    device = torch.device(given.device)
    # On a CPU the gradients' denormal numbers make a step several times slower.
    torch.set_flush_denormal(True)
    if given.batch < 4 or given.batch % 4:
        parser.error("--batch must be a multiple of 4")
    if given.evaluate and not given.out.is_file():
        parser.error(f"--out: no weights at {given.out}")
    if not given.evaluate:
        train(given.out, given.minutes, device, given.workers, given.batch, given.seed, given.resume)
    evaluate(load_judge(given.out, device), given.scenes, max(given.scenes // 200, 1))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("Stopped. --resume goes on from the last save, at most a minute ago.") from None
