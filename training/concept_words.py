"""How many words an ICO prompt has, and as what they begin (DCI paper, section 4.2, and its authors' code)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .text import TextEncoder


@dataclass(frozen=True)
class Scheme:
    """How many vectors a prompt has: `before` and `after` of each picture's own (M and L), `concept` of the concept's
    (S). `words` stand before the concept in place of what is learnt, as in a template written by hand.

    A picture's own begin as the words of a template, or where `template` is False at random, as spread as the
    vocabulary; the concept's begin as rare words, or where `rare` is False as the noun."""

    before: int
    after: int
    concept: int
    words: str = ""
    template: bool = True
    rare: bool = True


# The paper's section 4.2, and the template that it compares with.
SCHEMES = {
    "plain": Scheme(4, 2, 2),
    "for dual-branch": Scheme(1, 1, 3),
    "fixed template": Scheme(0, 0, 2, "a photo of a"),
}
# What so many words before the concept begin as in the authors' scripts; more of them begin, before these, as the full
# stops that stand after it.
BEFORE = {0: "", 1: "a", 2: "photo of", 3: "photo of a", 4: "a photo of a"}
FULL_STOP = "."
# CLIP's numbers of the words that the authors' code begins a concept as, the last one first.
RARE = (42170, 47629, 43514)


def template(before: int, after: int) -> str:
    """The words, as many as `before` and `after` together, that a picture's own begin as."""
    least = min(before, max(BEFORE))
    return " ".join([*[FULL_STOP] * (before - least), *BEFORE[least].split(), *[FULL_STOP] * after])


def first_own(encoder: TextEncoder, name: str, scheme: Scheme, generator: torch.Generator) -> Tensor:
    """What a picture's own vectors (before + after, width) begin as, for the CLIP's encoder `name`."""
    vocabulary, count = _vocabulary(encoder, name), scheme.before + scheme.after
    if scheme.template:
        text = encoder.tokenize(template(scheme.before, scheme.after))[name][0]
        return vocabulary[[token for token, _ in text[1 : 1 + count]]]
    drawn = torch.randn(count, vocabulary.shape[1], generator=generator)
    return vocabulary.mean(0) + vocabulary.std(0) * drawn.to(vocabulary)


def first_concept(encoder: TextEncoder, name: str, scheme: Scheme, noun: Sequence[int]) -> Tensor:
    """What a concept's vectors (S, width) begin as, for the CLIP's encoder `name`; `noun` are the noun's tokens."""
    vocabulary = _vocabulary(encoder, name)
    if scheme.rare:
        return vocabulary[[RARE[place % len(RARE)] for place in reversed(range(scheme.concept))]]
    return vocabulary[list(noun)].mean(0).repeat(scheme.concept, 1)


def _vocabulary(encoder: TextEncoder, name: str) -> Tensor:
    """An encoder's word vectors (words, width) in float32."""
    inner = getattr(encoder.model, f"clip_{name}")
    return inner.transformer.get_input_embeddings().weight.detach().float()
