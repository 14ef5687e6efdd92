"""The training of a residual token: a text encoder that learns one subject (Cones 2, section 3.2)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..patches.prompt import find_spans
from ..patches.residual import ResidualToken, mean_shift, positions_of, preservation_loss
from .copies import loaded, with_gradients
from .denoising import Denoiser
from .loop import Group, LossMap, Training
from .state import StateFile
from .text import TextEncoder, Tokens

TEMPLATES = Path(__file__).with_name("templates.txt")
SLOT = "{}"
# How many sentences go through the encoder at once where nothing is learned from them.
CHUNK = 32


def shipped_templates() -> list[str]:
    """The sentences with a place for a noun that come with the pack."""
    return TEMPLATES.read_text(encoding="utf-8").splitlines()


def filled(template: str, noun: str) -> str:
    """A template's sentence of a noun: "a {} on grass" gives "an emblem on grass"."""
    if noun[:1].lower() in "aeiou":
        template = re.sub(r"\b([aA]) (?=\{\})", r"\1n ", template)
    return template.replace(SLOT, noun)


@dataclass(frozen=True)
class Sentences:
    """Sentences with a noun: each one's tokens, and where the noun is in it."""

    tokens: list[Tokens]
    positions: list[list[int]]

    @classmethod
    def of(cls, clip: Any, texts: Sequence[str], noun: str) -> Sentences:
        """Raises ValueError when one is longer than a chunk of the encoder."""
        tokens = [clip.tokenize(text) for text in texts]
        for text, each in zip(texts, tokens, strict=True):
            if any(len(chunks) > 1 for chunks in each.values()):
                raise ValueError(f"The sentence '{text}' is longer than 75 tokens; shorten it.")
        return cls(tokens, [positions_of(find_spans(clip, text, [noun])[noun]) for text in texts])

    def once(self) -> Sentences:
        """Those that name the noun only once: a template may have it among its own words."""
        count = min(map(len, self.positions))
        rows = [row for row, positions in enumerate(self.positions) if len(positions) == count]
        return Sentences([self.tokens[row] for row in rows], [self.positions[row] for row in rows])

    def subject(self, length: int) -> Tensor:
        """(n, length): True at the noun's tokens."""
        rows = torch.zeros(len(self.positions), length, dtype=torch.bool)
        for row, positions in zip(rows, self.positions, strict=True):
            row[positions] = True
        return rows

    @torch.no_grad()
    def encoded(self, encoder: TextEncoder) -> Tensor:
        """Their contexts (n, tokens, width), without gradients."""
        chunks = [self.tokens[at : at + CHUNK] for at in range(0, len(self.tokens), CHUNK)]
        return torch.cat([encoder.encode_all(chunk) for chunk in chunks])


def train_residual_token(
    model: Any,
    clip: Any,
    latents: Tensor,
    captions: Sequence[str],
    sentences: Sequence[str],
    noun: str,
    *,
    steps: int,
    learning_rate: float,
    batch: int,
    preservation: float,
    seed: int,
    dtype: torch.dtype,
    checkpointing: bool,
    state: StateFile | None,
    node_id: str | None,
) -> tuple[ResidualToken, LossMap]:
    """Eq. 2 to 5: tunes a copy of the text encoder until the noun in `captions`, one for each of `latents` (n,
    channels, h, w), denoises them, while all other tokens of `sentences` stay; the residual is the noun's mean shift.

    Each step takes `batch` of the latents and as many sentences. The pooled output, which a residual does not change
    when it is applied, is the given encoder's."""
    with with_gradients():
        encoder, denoiser = TextEncoder(clip), Denoiser(model, dtype, checkpointing)
        shown, kept = Sentences.of(clip, captions, noun), Sentences.of(clip, sentences, noun).once()
        latents = latents.clone()
        with loaded(encoder.patcher, denoiser.patcher):
            weights = encoder.train_weights()
            original = kept.encoded(encoder)
            subject = kept.subject(original.shape[1]).to(original.device)
            with torch.no_grad():
                pooled = [encoder.encode(tokens)[1] for tokens in shown.tokens]
            training = Training(
                [Group(weights, learning_rate)],
                device=denoiser.device, dtype=dtype, seed=seed, state=state, node_id=node_id,
            )  # fmt: skip

            def loss(source: torch.Generator) -> Tensor:
                rows = torch.randint(len(latents), (batch,), generator=source).tolist()
                chosen = torch.randint(len(original), (batch,), generator=source).tolist()
                encoded = encoder.encode_all([shown.tokens[r] for r in rows] + [kept.tokens[c] for c in chosen])
                context, tuned = encoded.split(batch)
                told = None if pooled[0] is None else torch.cat([pooled[row] for row in rows])
                denoising = denoiser.loss(latents[rows], context, told, source)
                moved = preservation_loss(tuned, original[chosen], subject[chosen])
                return denoising + preservation * moved.to(denoising.device)

            loss_map = training.run(steps, loss)
            vectors = mean_shift(kept.encoded(encoder), original, subject)
    return ResidualToken(vectors.cpu(), noun, training.step), loss_map
