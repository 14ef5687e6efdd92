"""Which tokens of a prompt are a phrase: their positions in the context that a model attends to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .context import KNOWN, Tokenized, cut_off, stretches_of, tokenizer_of
from .tokens import TokenText, read_tokens, written

# The key of a conditioning's dictionary under which its phrases' spans lie.
SPANS_KEY = "subject_patches_spans"

# Half-open ranges of positions along the context's token axis, ascending and disjoint.
Spans = tuple[tuple[int, int], ...]

# "emblem#2": the second emblem of the prompt.
ONE_OF = re.compile(r"(?P<phrase>.*\S)#(?P<number>[1-9]\d*)", re.DOTALL)
_EMBEDDING = "embedding:"
# A word that is in no template, to see where a template puts the prompt.
_PROBE = "zebra"


def split_phrases(text: str) -> tuple[str, ...]:
    """The phrases of a text field, one a line or separated by semicolons; empty ones are left out."""
    return tuple(phrase.strip() for phrase in re.split(r"[;\r\n]", text) if phrase.strip())


def canonical(phrase: str) -> str:
    """A phrase without what does not count in it: letter case and the width of gaps."""
    return " ".join(phrase.casefold().split())


def positions_of(spans: Spans) -> list[int]:
    """The positions of a phrase's tokens, occurrence by occurrence."""
    return [position for start, stop in spans for position in range(start, stop)]


def find_spans(clip: Any, text: str, phrases: Iterable[str]) -> dict[str, Spans]:
    """Where each phrase lies in the context that `clip`, a host CLIP, makes of `text`.

    The phrases are written as in a prompt; letter case does not count, nor do weights where the text encoder reads any.
    Empty phrases are left out. A phrase maps to all its occurrences, left to right and not overlapping; one that runs
    on into the next chunk of 77 gives a range in each. "dog#2", where the prompt itself has no such words, is the
    second "dog" alone. CLIP's start token counts, so a prompt's first word is at 1; what a template puts before the
    prompt counts where the host keeps it.

    Positions are those of the conditioning's context. SD 3.5's is CLIP's tokens and then T5's: a phrase has its
    occurrences in both. HiDream's Llama tokens, a tensor of their own, count on after T5's. In Anima's, an adapter puts
    the T5 tokens in the place of the text encoder's: those count.

    Raises ValueError when the prompt lacks a phrase, a phrase has no tokens or ends inside of one, two encoders have it
    at different positions of one stretch, or the CLIP has text encoders that are not known."""
    wanted = tuple(dict.fromkeys(phrase.strip() for phrase in phrases if phrase.strip()))
    if not wanted:
        return {}
    prompt = _Prompt(clip, text)
    return {phrase: _find(prompt, phrase) for phrase in wanted}


def in_context(clip: Any, text: str, context: Tensor, spans: Spans) -> Spans:
    """Spans of a text's tokens in the context (1, tokens, width) that a CLIP made of it, where another pack may have
    put each token twice, once for keys and once for values, which are turned round where its weight is negative.

    Raises ValueError when the context is not as long as its tokens are many: positions among them would be wrong."""
    expected = _Prompt(clip, text).length
    if context.shape[1] == 2 * expected and torch.equal(context[:, ::2].abs(), context[:, 1::2].abs()):
        return tuple((2 * start, 2 * stop) for start, stop in spans)
    if context.shape[1] != expected:
        raise ValueError(
            f"This text encoder made {context.shape[1]} tokens of the prompt where {expected} were expected, so "
            f"phrases cannot be found in it; leave the phrases empty, or use one of {KNOWN}."
        )
    return spans


def check_embeddings(clip: Any, phrase: str) -> None:
    """Raises ValueError when a phrase names a textual embedding that the host does not find, or that is made for a
    text encoder of another family, which the host itself leaves out of the prompt, or when the CLIP has text encoders
    that are not known."""
    known = _Prompt(clip, phrase).texts
    for name in re.findall(rf"{_EMBEDDING}([^\s,:()]+)", phrase):
        tokenized = clip.tokenize(_EMBEDDING + name)
        for encoder in known:
            widths = {value.shape[-1] for chunk in tokenized[encoder] for value, _ in chunk if torch.is_tensor(value)}
            wanted = tokenizer_of(clip, encoder).embedding_size
            if not widths:
                raise ValueError(f"There is no embedding '{name}' in the embeddings folder; put its file there.")
            if widths != {wanted}:
                raise ValueError(
                    f"The embedding '{name}' has vectors of {', '.join(map(str, widths))} numbers but this CLIP takes "
                    f"{wanted}; use it with a checkpoint of the same family that it was trained on."
                )


def prompt_spans(clip: Any, text: str) -> Spans:
    """Where the prompt's own tokens lie in the context: all but start, end, padding and template.

    Raises ValueError when two encoders have them at different positions of one stretch, or the CLIP has text encoders
    that are not known."""
    prompt = _Prompt(clip, text)
    whole = {name: [(0, len(each.symbols))] for name, each in prompt.texts.items()}
    return prompt.spans(whole, "The prompt's words are", "use an embedding that is made for this CLIP")


class _Prompt:
    """A prompt in the tokens of every text encoder of a CLIP: `texts` are its own, without a template. `length` is that
    of the conditioning's context."""

    def __init__(self, clip: Any, text: str) -> None:
        self.clip, self.text = clip, text
        tokenized: Tokenized = clip.tokenize(text, return_word_ids=True)
        template: Tokenized = clip.tokenize(_PROBE, return_word_ids=True)
        self.parts, measured = stretches_of(clip, tokenized)
        self.texts: dict[str, TokenText] = {}
        self._starts: dict[str, int] = {}
        self._lengths = {name: sum(map(len, chunks)) for name, chunks in tokenized.items()}
        end = 0
        for part in self.parts:
            start = end - (cut_off(tokenized[part.names[0]][0]) if part.cut else 0)
            for name in part.names:
                tokenizer = tokenizer_of(clip, name)
                probe = read_tokens(template[name], tokenizer).symbols
                before = "".join(str(symbol.value) for symbol in probe).index(_PROBE)
                after = len(probe) - before - len(_PROBE)
                self.texts[name] = read_tokens(tokenized[name], tokenizer).without(before, after)
                self._starts[name] = start
            end = start + min(self._lengths[name] for name in part.counted)
        self.length = end if measured is None else self._lengths[measured]

    def spans(self, found: Mapping[str, Sequence[tuple[int, int]]], what: str, else_do: str) -> Spans:
        """The positions of some ranges of each encoder's symbols. Raises ValueError where the encoders of one stretch
        have them at different ones."""
        spans: list[tuple[int, int]] = []
        for part in self.parts:
            each = {name: self._spans(name, found[name]) for name in part.names}
            if len(set(each.values())) > 1:
                places = " and ".join(f"{_places(spans)} for the encoder {name}" for name, spans in each.items())
                raise ValueError(
                    f"{what} {places}, usually because an embedding has not as many vectors for one as for the other; "
                    f"{else_do}."
                )
            spans += next(iter(each.values()), ())
        return tuple(spans)

    def _spans(self, name: str, found: Sequence[tuple[int, int]]) -> Spans:
        first = self._starts[name]
        return tuple(
            (first + start, first + stop)
            for symbols in found
            for start, stop in _ranges(self.texts[name].positions(*symbols))
        )


def _find(prompt: _Prompt, phrase: str, number: int = 0) -> Spans:
    """All occurrences of a phrase, or the one of this number, counted from 1."""
    if phrase.endswith(_EMBEDDING):
        raise ValueError(f"The phrase '{phrase}' names no embedding; write its file name after the colon.")
    sought = _Prompt(prompt.clip, phrase).texts
    # An encoder that an embedding is not made for knows no tokens of it.
    fullest = max(sought, key=lambda name: len(sought[name].symbols))
    if not sought[fullest].symbols:
        raise ValueError(
            f"The phrase '{phrase}' has no tokens; write at least one word, or an embedding that is made for this CLIP "
            "and lies in the embeddings folder."
        )
    found = {name: _occurrences(prompt, name, sought[name], phrase) for name in prompt.texts}
    if not any(found.values()) and (one := ONE_OF.fullmatch(phrase)):
        return _find(prompt, one["phrase"], int(one["number"]))
    if number and any(found.values()):
        count = max(map(len, found.values()))
        if number > count:
            raise ValueError(
                f"The phrase '{phrase}#{number}' asks for occurrence {number} of '{phrase}', which the prompt has "
                f"{count} time{'s' if count > 1 else ''}; give a number from 1 to {count}, or none for every one."
            )
        found = {name: ranges[number - 1 : number] for name, ranges in found.items()}
    spans = prompt.spans(
        found, f"The phrase '{phrase}' is", "use an embedding that is made for this CLIP, or put the phrase before it"
    )
    if not spans:
        raise ValueError(
            f"The phrase '{phrase}' is not in the prompt; its tokens are {sought[fullest].words()} and the prompt's "
            f"are {prompt.texts[fullest].words()}; write the phrase as it stands in the prompt."
        )
    return spans


def _occurrences(prompt: _Prompt, name: str, sought: TokenText, phrase: str) -> list[tuple[int, int]]:
    text = prompt.texts[name]
    # Some versions of transformers lose the spaces between Llama's words, and tokens go from one word to the next.
    spaceless = text.is_solid and len(prompt.text.split()) > 1
    found = text.occurrences(sought.symbols, in_words=spaceless)
    unsure = spaceless or any(symbol.is_unknown for symbol in sought.symbols)
    places = written(prompt.text, phrase) if found and unsure else []
    if len(found) != len(places) and unsure:
        raise ValueError(
            f"The text encoder {name} cannot tell the phrase '{phrase}' from other parts of the prompt, whose tokens "
            f"for it are {text.words()}; write another word in its place."
        )
    if spaceless:
        # Where words are, only the prompt itself tells.
        found = [each for each, whole in zip(found, places, strict=True) if whole]
    for start, stop in found:
        token = None if spaceless else text.cut(start, stop)
        if token is not None:
            raise ValueError(
                f"The phrase '{phrase}' is only a part of the token '{token}' of the text encoder {name}, which knows "
                f"that as one; write '{token}' as the phrase, or another word in the prompt."
            )
    return found


def _ranges(positions: Iterable[int]) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    for position in positions:
        if ranges and ranges[-1][1] == position:
            ranges[-1] = (ranges[-1][0], position + 1)
        else:
            ranges.append((position, position + 1))
    return ranges


def _places(spans: Spans) -> str:
    if not spans:
        return "nowhere"
    return "at " + ", ".join(str(start) if stop == start + 1 else f"{start}-{stop - 1}" for start, stop in spans)
