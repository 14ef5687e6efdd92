"""The training of a residual token (Cones 2, section 3.2)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..patches.mechanisms.residual import ResidualToken, add_residual, mean_shift, preservation_loss
from ..patches.parts.prompt import find_spans, positions_of
from ..patches.parts.writing import shortened
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
                raise ValueError(f"The sentence '{shortened(text)}' is longer than 75 tokens; shorten it.")
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


@dataclass(frozen=True)
class Plan:
    """How a residual is trained. `batch` counts pictures, and sentences, a step; `preservation` is lambda of Eq. 4.

    With `alone` the residual itself is what learns, and the text encoder stays. With `as_v` the loss is that of v."""

    steps: int
    learning_rate: float
    batch: int
    preservation: float
    seed: int
    dtype: torch.dtype
    checkpointing: bool
    alone: bool = False
    as_v: bool = False


def train_residual_token(
    model: Any,
    clip: Any,
    latents: Tensor,
    captions: Sequence[str],
    sentences: Sequence[str],
    noun: str,
    plan: Plan,
    state: StateFile | None = None,
) -> tuple[ResidualToken, LossMap]:
    """Learns a noun's residual from `latents` (n, channels, h, w) with a caption each. The pooled output, which a
    residual does not change when it is applied, is the given encoder's."""
    with with_gradients():
        encoder, denoiser = TextEncoder(clip), Denoiser(model, plan.dtype, plan.checkpointing, plan.as_v)
        shown, kept = Sentences.of(clip, captions, noun), Sentences.of(clip, sentences, noun).once()
        with loaded(encoder.patcher, denoiser.patcher):
            shots = Shots(denoiser, encoder, latents.clone(), shown)
            count = len(Sentences.of(clip, [noun], noun).positions[0])
            learner = Alone(encoder, shots, count) if plan.alone else Tuned(encoder, shots, kept, plan.preservation)
            training = Training(
                [Group(learner.parameters, plan.learning_rate)],
                device=denoiser.device, dtype=plan.dtype, seed=plan.seed, state=state,
            )  # fmt: skip
            loss_map = training.run(plan.steps, lambda source: learner.loss(plan.batch, source))
            vectors = learner.residual().detach().cpu()
    return ResidualToken(vectors, noun, training.step), loss_map


class Shots:
    """The training pictures as latents, each with its caption's tokens and pooled output."""

    def __init__(self, denoiser: Denoiser, encoder: TextEncoder, latents: Tensor, captions: Sentences) -> None:
        self.denoiser, self.latents, self.captions = denoiser, latents, captions
        with torch.no_grad():
            self.pooled = [encoder.encode(tokens)[1] for tokens in captions.tokens]

    def loss(self, rows: list[int], context: Tensor, source: torch.Generator) -> Tensor:
        """Eq. 2 for these pictures, with the contexts of their captions."""
        pooled = None if self.pooled[0] is None else torch.cat([self.pooled[row] for row in rows])
        return self.denoiser.loss(self.latents[rows], context, pooled, source)


class Tuned:
    """Eq. 2 to 5: the text encoder is tuned until the noun denoises the pictures, while all other tokens of many
    sentences stay; the residual is the noun's mean shift over them."""

    def __init__(self, encoder: TextEncoder, shots: Shots, kept: Sentences, preservation: float) -> None:
        self.encoder, self.shots, self.kept, self.preservation = encoder, shots, kept, preservation
        self.parameters = encoder.train_weights()
        self.original = kept.encoded(encoder)
        self.subject = kept.subject(self.original.shape[1]).to(self.original.device)

    def loss(self, batch: int, source: torch.Generator) -> Tensor:
        rows = torch.randint(len(self.shots.latents), (batch,), generator=source).tolist()
        chosen = torch.randint(len(self.original), (batch,), generator=source).tolist()
        prompts = [self.shots.captions.tokens[row] for row in rows] + [self.kept.tokens[each] for each in chosen]
        context, tuned = self.encoder.encode_all(prompts).split(batch)
        denoising = self.shots.loss(rows, context, source)
        moved = preservation_loss(tuned, self.original[chosen], self.subject[chosen])
        return denoising + self.preservation * moved.to(denoising.device)

    def residual(self) -> Tensor:
        return mean_shift(self.kept.encoded(self.encoder), self.original, self.subject)


class Alone:
    """Eq. 2 with Eq. 6 in it: the residual learns by itself, added to what the encoder gives for the noun. All other
    tokens stay by construction. The paper's appendix C.2 learns an output embedding so, to compare with."""

    def __init__(self, encoder: TextEncoder, shots: Shots, count: int) -> None:
        self.shots = shots
        contexts = torch.cat([encoder.encode(tokens)[0] for tokens in shots.captions.tokens])
        self.contexts = contexts.detach().to(shots.denoiser.device)
        start = torch.zeros(count, self.contexts.shape[-1], device=self.contexts.device)
        self.parameters = {"residual": start.requires_grad_()}

    def loss(self, batch: int, source: torch.Generator) -> Tensor:
        rows = torch.randint(len(self.shots.latents), (batch,), generator=source).tolist()
        vectors, positions = self.parameters["residual"], self.shots.captions.positions
        shifted = [add_residual(self.contexts[row : row + 1], vectors, positions[row]) for row in rows]
        return self.shots.loss(rows, torch.cat(shifted), source)

    def residual(self) -> Tensor:
        return self.parameters["residual"]
