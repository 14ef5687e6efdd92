"""Endless batches of drawn scenes for the trainers, drawn by worker processes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .drawing import draw
from .scenes import SIZE, sample_scene


class Scenes(IterableDataset):
    """Batches of scenes. Worker w of a run with seed s draws from its own stream (s, w), so a run is
    reproducible and no two workers draw the same scene."""

    def __init__(self, batch: int, seed: int, tokenize: bool, set_share: float = 0.2) -> None:
        self.batch, self.seed, self.tokenize, self.set_share = batch, seed, tokenize, set_share

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        worker = get_worker_info()
        rng = np.random.default_rng((self.seed, worker.id if worker else 0))
        words = Words() if self.tokenize else None
        while True:
            images = np.empty((self.batch, SIZE, SIZE, 3), dtype=np.uint8)
            captions = []
            for row in range(self.batch):
                scene = sample_scene(rng, set_share=self.set_share)
                images[row] = draw(scene).image
                captions.append(scene.caption)
            tokens = words(captions) if words else torch.empty(0)
            yield torch.from_numpy(images), tokens


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


def batches(batch: int, workers: int, seed: int, tokenize: bool) -> Iterator:
    """An endless iterator of (images uint8 (batch, 128, 128, 3), token ids (batch, 77) or empty)."""
    data = Scenes(batch, seed, tokenize)
    loader = DataLoader(data, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None)
    return iter(loader)
