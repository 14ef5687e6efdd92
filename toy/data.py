"""Endless batches of drawn scenes for the trainers, drawn by worker processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .drawing import draw
from .labels import CELLS, ROWS, labels_of
from .scenes import LARGE, SIZE, SMALL, Scene, sample_scene


class Scenes(IterableDataset):
    """Batches of scenes: pictures, token ids, labels of their latent cells. Worker w of a run with seed s draws from
    its own stream (s, w), so a run is reproducible and no two workers draw the same scene."""

    def __init__(self, batch: int, seed: int, tokenize: bool, sample: Callable[[np.random.Generator], Scene]) -> None:
        self.batch, self.seed, self.tokenize, self.sample = batch, seed, tokenize, sample

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        worker = get_worker_info()
        if worker:
            # A worker may start afresh, and the host looks for a GPU when it is imported.
            from comfy.cli_args import args as host_arguments

            host_arguments.cpu = True
        rng = np.random.default_rng((self.seed, worker.id if worker else 0))
        words = Words() if self.tokenize else None
        while True:
            images = np.empty((self.batch, SIZE, SIZE, 3), dtype=np.uint8)
            labels = np.empty((self.batch, ROWS, CELLS, CELLS), dtype=np.uint8)
            captions = []
            for row in range(self.batch):
                scene = self.sample(rng)
                picture = draw(scene)
                images[row], labels[row] = picture.image, labels_of(picture)
                captions.append(scene.caption)
            tokens = words(captions) if words else torch.empty(0)
            yield torch.from_numpy(images), tokens, torch.from_numpy(labels)


class Words:
    """Captions to CLIP token ids (n, 77), through the toy's own tokenizer. Ids repeat, so words are cached."""

    def __init__(self) -> None:
        from .family import ToyTokenizer

        self.tokenizer = ToyTokenizer().clip_l
        self.cache: dict[str, list[int]] = {}

    def _ids(self, word: str) -> list[int]:
        if word not in self.cache:
            self.cache[word] = self.tokenizer.tokenizer(word)["input_ids"][1:-1]
        return self.cache[word]

    def __call__(self, captions: list[str]) -> torch.Tensor:
        end, length = self.tokenizer.end_token, self.tokenizer.max_length
        rows = torch.full((len(captions), length), end, dtype=torch.long)
        for row, caption in zip(rows, captions, strict=True):
            # CLIP's tokenizer splits at blanks and punctuation, so words and commas can be looked up one by one.
            ids = [i for word in caption.replace(",", " ,").split() for i in self._ids(word)][: length - 2]
            row[0] = self.tokenizer.start_token
            row[1 : 1 + len(ids)] = torch.tensor(ids, dtype=torch.long)
        return rows


def mixed_scene(rng: np.random.Generator) -> Scene:
    """What the first toy learns from: half of the scenes show emblems so large that latents can hold plate and glyph,
    one, or two, or two of one; of the others one in five shows several of one and the same thing."""
    if rng.random() < 0.5:
        return sample_scene(rng, set_share=0.2)
    alone, twins = rng.random() < 0.6, rng.random() < 0.6
    return sample_scene(rng, 1 if alone else 2, emblem_share=1.0, smallest=LARGE, twins=twins)


def small_scene(rng: np.random.Generator) -> Scene:
    """What the DiT learns from: the small world, and more emblems."""
    return sample_scene(rng, emblem_share=0.4, set_share=0.2, world=SMALL)


def vocabulary(captions: int = 5000, sample: Callable[[np.random.Generator], Scene] = mixed_scene) -> torch.Tensor:
    """The ids of all tokens that captions are made of, ascending."""
    rng = np.random.default_rng(0)
    return Words()([sample(rng).caption for _ in range(captions)]).unique()


def batches(
    batch: int,
    workers: int,
    seed: int,
    tokenize: bool,
    sample: Callable[[np.random.Generator], Scene] = mixed_scene,
) -> Iterator:
    """An endless iterator of (images uint8 (batch, 128, 128, 3), token ids (batch, 77) or empty, labels uint8
    (batch, ROWS, 16, 16))."""
    data = Scenes(batch, seed, tokenize, sample)
    loader = DataLoader(data, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None)
    return iter(loader)
