"""Image-specific context optimisation (ICO, section 3.2 of the DCI paper).

A prompt of Eq. 2 is learnt for each training picture: [I] x M, [T] x S, noun, [I] x L. The vectors [I] belong to one
picture and take up what is its own; [T] belongs to the concept. They are tuned with the key and value projections of
the cross-attentions. Only [T], the noun and the projections are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..patches.parts.prompt import find_spans
from ..patches.parts.writing import shortened
from .concept_words import Scheme, first_concept, first_own
from .low_rank import covariance, factors
from .text import TextEncoder, Tokens

PLACES = 77
# How much of what a change of weights does to prompts a file may miss, where no rank is given.
ERROR = 0.1


class ConceptPrompts:
    """The prompts of `count` pictures for a text encoder, and the vectors in them that learn, by name.

    Vectors are (n, width of the encoder) in float32, for each encoder of the CLIP; `scheme` says how many there are and
    as what they begin. Call it in `loaded`."""

    def __init__(self, encoder: TextEncoder, noun: str, scheme: Scheme, count: int, generator: torch.Generator) -> None:
        self.scheme, self.text, self.count = scheme, noun, count
        self.words = _words(encoder, scheme.words) if scheme.words else {}
        self.noun = _words(encoder, noun)
        self.frame = {name: chunks[0] for name, chunks in encoder.tokenize("").items()}
        self.vectors: dict[str, Tensor] = {}
        for name in self.frame:
            tokens = [token for token, _ in self.noun[name]]
            self.vectors[f"concept.{name}"] = first_concept(encoder, name, scheme, tokens)
            for number in range(count if scheme.before + scheme.after else 0):
                self.vectors[f"picture {number}.{name}"] = first_own(encoder, name, scheme, generator)
        for name, vectors in self.vectors.items():
            self.vectors[name] = vectors.clone().requires_grad_()
        length = len(next(iter(self.noun.values()))) + scheme.before + scheme.after + scheme.concept
        if length + max(map(len, self.words.values()), default=0) > PLACES - 2:
            learnt = scheme.before + scheme.after + scheme.concept
            raise ValueError(
                f"The noun '{shortened(noun)}' and the {learnt} learnt words are too long for a prompt together; write "
                "a noun of one or two words, and let fewer words be learnt."
            )

    def tokens(self, number: int) -> Tokens:
        """Eq. 2 for a picture, as the host's tokens."""
        return {name: [self._chunk(name, number)] for name in self.frame}

    def _chunk(self, name: str, number: int) -> list[tuple[Any, float]]:
        def taken(vectors: Sequence[Tensor]) -> list[tuple[Any, float]]:
            return [(vector, 1.0) for vector in vectors]

        own = self.vectors.get(f"picture {number}.{name}", ())
        before, after = own[: self.scheme.before], own[self.scheme.before :]
        frame = self.frame[name]
        text = [
            *taken(before),
            *self.words.get(name, ()),
            *taken(self.vectors[f"concept.{name}"]),
            *self.noun[name],
            *taken(after),
        ]
        return [frame[0], *text, frame[1], *[frame[-1]] * (PLACES - 2 - len(text))]

    def encode(self, encoder: TextEncoder, numbers: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """The contexts (n, 77, width) of some pictures' prompts, and the pooled outputs where the family has them."""
        contexts, pooled = zip(*(encoder.encode(self.tokens(number)) for number in numbers), strict=True)
        return torch.cat(contexts), None if pooled[0] is None else torch.cat(pooled)

    @torch.no_grad()
    def spread(self, encoder: TextEncoder, sentences: Sequence[str]) -> Tensor:
        """The covariance (width, width) of the tokens of prompts that have the concept in them: those of `sentences`,
        which have its noun, and of the training."""
        contexts = [self.encode(encoder, [number])[0] for number in range(self.count)]
        contexts += [encoder.encode(self._with_concept(encoder, text))[0][:, :PLACES] for text in sentences]
        return covariance(torch.cat(contexts))

    def _with_concept(self, encoder: TextEncoder, text: str) -> Tokens:
        (start, _), *_ = find_spans(encoder.clip, text, [self.text])[self.text]
        made = {}
        for name, chunks in encoder.tokenize(text).items():
            words = [(vector, 1.0) for vector in self.vectors[f"concept.{name}"]]
            made[name] = [[*chunks[0][:start], *words, *chunks[0][start:]][:PLACES]]
        return made

    def embedding(self) -> dict[str, Tensor]:
        """[T] as a textual embedding of the host: (S, width) for each encoder, by the host's name of it."""
        found = {name: vectors for name, vectors in self.vectors.items() if name.startswith("concept.")}
        return {f"clip_{name.removeprefix('concept.')}": v.detach().cpu().clone() for name, v in found.items()}


def _words(encoder: TextEncoder, text: str) -> Mapping[str, list[tuple[Any, float]]]:
    """The tokens of a text without start, end and padding."""
    spans = find_spans(encoder.clip, text, [text])[text]
    if len(spans) > 1:
        raise ValueError(f"The noun '{shortened(text)}' is too long for a prompt; write one or two words.")
    ((start, stop),) = spans
    return {name: list(chunks[0][start:stop]) for name, chunks in encoder.tokenize(text).items()}


def key_value_weights(network: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The key and value projections of a U-Net's cross-attentions, by their names in it, as float32 parameters that
    want gradients."""
    found = {}
    for name, parameter in network.named_parameters():
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            parameter.data = parameter.data.float()
            found[name] = parameter.requires_grad_(True)
    return found


def hold_start(network: torch.nn.Module) -> None:
    """Keeps the start token's keys and values in a U-Net's cross-attentions out of the gradient, as the authors' code
    does: that token is every prompt's, the empty one's among them. For a private copy: the hooks go with it."""
    for name, layer in network.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            layer.register_forward_hook(_start_held)


def _start_held(_layer: torch.nn.Module, _inputs: tuple[Tensor, ...], projected: Tensor) -> Tensor:
    return torch.cat([projected[:, :1].detach(), projected[:, 1:]], 1)


def as_lora(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], spread: Tensor, rank: int = 0
) -> dict[str, Tensor]:
    """What a training changed, as the host's LoRA loaders take it, in float16, by the weights' names: of each weight
    two thin matrices of `rank`, or where that is 0 of the least rank that misses no more than ERROR of what the
    change does to prompts of the covariance `spread`; the whole change where they would be no smaller."""
    found = {}
    for name, weight in before.items():
        key = f"diffusion_model.{name.removesuffix('.weight')}"
        trained = after[name].detach()
        # Where the training was, a GPU does this in a fraction of the time; Apple's have no float64.
        trained = trained.cpu() if trained.device.type == "mps" else trained
        change = trained.float() - weight.to(trained.device).float()
        thin = factors(change, spread.to(change.device), rank, ERROR)
        if thin is None:
            found[f"{key}.diff"] = change.half().cpu()
        else:
            found[f"{key}.lora_up.weight"], found[f"{key}.lora_down.weight"] = (each.half().cpu() for each in thin)
    return found
