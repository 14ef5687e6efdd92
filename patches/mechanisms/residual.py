"""Residual tokens: one subject as a shift of its noun's output embedding (Cones 2, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..parts.prompt import Spans, positions_of
from ..parts.writing import one_line

FORMAT = "subject_patches.residual_token"
# The families that share a text encoding, by the width of their context.
FAMILIES = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL", 64: "the toy"}


def family_of(width: int) -> str:
    """The model family whose context is this wide."""
    return FAMILIES.get(width, f"a family {width} wide")


@dataclass(frozen=True, eq=False)
class ResidualToken:
    """A learned subject: `vectors` (k, width) float32, one for each token of the `noun` that it was trained for, and
    the `steps` of its training, 0 where they are not known."""

    vectors: Tensor
    noun: str
    steps: int

    @property
    def width(self) -> int:
        return self.vectors.shape[1]


def file_contents(residual: ResidualToken) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a residual token's safetensors file."""
    about = {
        "format": FORMAT,
        "noun": residual.noun,
        "family": family_of(residual.width),
        "width": str(residual.width),
        "steps": str(residual.steps),
    }
    return {"residual": residual.vectors.float().cpu().contiguous()}, about


def preservation_loss(tuned: Tensor, original: Tensor, subject: Tensor) -> Tensor:
    """How far a tuned text encoder moves the tokens that are not the subject's: Eq. 3, as a mean over those tokens of
    the squared distance.

    `tuned` and `original` (n, tokens, width) are the encodings of n sentences, `subject` (n, tokens) is True at the
    subject's tokens. Start, end and padding tokens count: a model attends to them too."""
    distance = (tuned - original).square().sum(-1)
    return distance[~subject].mean()


def mean_shift(tuned: Tensor, original: Tensor, subject: Tensor) -> Tensor:
    """The residual (k, width): how far each of the k subject tokens moved, on average over n sentences; Eq. 5.
    Arguments as in `preservation_loss`, with k subject tokens in each sentence."""
    shift = (tuned - original)[subject]
    return shift.unflatten(0, (len(tuned), -1)).mean(0)


def add_residual(context: Tensor, vectors: Tensor, positions: list[int], strength: float = 1.0) -> Tensor:
    """A context (b, tokens, width) with `strength` times the vectors (k, width) added at these positions, k at a time;
    Eq. 6. A single vector is added at every position. Raises ValueError when k does not divide the positions, and when
    the context ends before one."""
    if positions and max(positions) >= context.shape[1]:
        raise ValueError(
            f"The prompt has {context.shape[1]} tokens, but the noun's last is number {max(positions) + 1}: another "
            "node has cut it off; apply the residual before that node."
        )
    if len(positions) % len(vectors):
        raise ValueError(
            f"The residual is {len(vectors)} vectors, one for each token of its noun, and cannot be added at "
            f"{len(positions)} tokens; write its noun into the prompt as it was trained."
        )
    shift = strength * vectors.to(context).repeat(len(positions) // len(vectors), 1)
    index = torch.tensor(positions, device=context.device)
    return context.index_add(1, index, shift.expand(len(context), -1, -1).contiguous())


def in_doubled(vectors: Tensor, spans: Spans) -> Tensor:
    """Vectors (k, width) for `add_residual` at spans of a prompt that has each token several times in a row, as another
    pack may have encoded it: each vector as often."""
    count, longest = len(vectors), max((stop - start for start, stop in spans), default=0)
    return vectors if count == 1 or longest % count else vectors.repeat_interleave(max(longest // count, 1), 0)


def subject_spans(known: Mapping[str, Spans], noun: str, phrase: str = "") -> Spans:
    """Where a prompt that knows these phrases wants a residual of `noun`: at every occurrence of the noun, or with a
    phrase at the noun in that phrase ("dog" in "brown dog"), or, where the phrase is another name for the subject
    ("puppy"), at all its tokens. Letter case does not count.

    Raises ValueError when the prompt does not know the phrase, or not the noun where it is needed."""
    spans = {one_line(name.casefold()): found for name, found in known.items()}
    noun, phrase = one_line(noun.casefold()), one_line(phrase.casefold()) or one_line(noun.casefold())
    inside = phrase if phrase != noun and f" {noun} " in f" {phrase} " else ""
    for wanted in (phrase, noun) if inside else (phrase,):
        if wanted not in spans:
            has = f"it knows {', '.join(known)}" if known else "it knows none"
            raise ValueError(
                f"The conditioning does not know where '{wanted}' is in its prompt ({has}); make it with Encode Prompt "
                f"with Subjects, with '{wanted}' among its phrases."
            )
    if not inside:
        return spans[phrase]
    found = positions_of(spans[phrase])
    return tuple(span for span in spans[noun] if span[0] in found)
