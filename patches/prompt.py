"""Which tokens of a prompt are a phrase: their positions in the cross-attention context."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# The key of a conditioning's dictionary under which its phrases' spans lie.
SPANS_KEY = "subject_patches_spans"

# Half-open ranges of positions along the context's token axis, ascending and disjoint.
Spans = tuple[tuple[int, int], ...]

# The host's names of the CLIP text encoders whose tokens line up with the context.
ENCODERS = {"l": "SD 1.x and SDXL", "g": "SDXL", "h": "SD 2.x"}

_WORD_END = "</w>"
_EMBEDDING = "embedding:"


@dataclass(frozen=True)
class _Token:
    """A vocabulary number or a textual embedding's vector, at its position in the context.

    `group` is the host's word id; `starts_word` is False for what continues a word or an embedding."""

    value: int | Tensor
    position: int
    group: int
    starts_word: bool


def split_phrases(text: str) -> tuple[str, ...]:
    """The phrases of a text field, one a line or separated by semicolons; empty ones are left out."""
    return tuple(phrase.strip() for phrase in re.split(r"[;\r\n]", text) if phrase.strip())


def positions_of(spans: Spans) -> list[int]:
    """The positions of a phrase's tokens, occurrence by occurrence."""
    return [position for start, stop in spans for position in range(start, stop)]


def find_spans(clip: Any, text: str, phrases: Iterable[str]) -> dict[str, Spans]:
    """Where each phrase lies in the context that `clip`, a host CLIP, makes of `text`.

    The phrases are written as in a prompt; their weights do not count, nor does letter case. Empty phrases are left
    out. A phrase maps to all its occurrences, left to right and not overlapping. The start token counts, so a prompt's
    first word is at 1; an occurrence that runs on into the next chunk of 77 gives one range in each.

    Raises ValueError when the prompt lacks a phrase, a phrase has no tokens, two encoders of the CLIP have it at
    different positions, or the CLIP has an encoder other than those in ENCODERS."""
    wanted = tuple(dict.fromkeys(phrase.strip() for phrase in phrases if phrase.strip()))
    if not wanted:
        return {}
    prompt = _tokens(clip, text)
    return {phrase: _find(clip, prompt, phrase) for phrase in wanted}


def check_embeddings(clip: Any, phrase: str) -> None:
    """Raises ValueError when a phrase names a textual embedding that the host does not find, or that is made for a
    text encoder of another family, which the host itself leaves out of the prompt, or when the CLIP has an encoder
    other than those in ENCODERS."""
    _tokens(clip, phrase)
    for name in re.findall(rf"{_EMBEDDING}([^\s,:()]+)", phrase):
        for encoder, chunks in clip.tokenize(_EMBEDDING + name).items():
            widths = {value.shape[-1] for chunk in chunks for value, _ in chunk if torch.is_tensor(value)}
            wanted = _tokenizer(clip, encoder).embedding_size
            if not widths:
                raise ValueError(f"There is no embedding '{name}' in the embeddings folder; put its file there.")
            if widths != {wanted}:
                raise ValueError(
                    f"The embedding '{name}' has vectors of {', '.join(map(str, widths))} numbers but this CLIP takes "
                    f"{wanted}; use it with a checkpoint of the same family that it was trained on."
                )


def prompt_spans(clip: Any, text: str) -> Spans:
    """Where the prompt's own tokens lie in the context: all but start, end and padding, in every chunk of 77.

    Raises ValueError when two encoders of the CLIP have them at different positions, or it has one not in ENCODERS."""
    found = {name: tuple(_ranges(token.position for token in tokens)) for name, tokens in _tokens(clip, text).items()}
    spans = next(iter(found.values()))
    if any(other != spans for other in found.values()):
        places = " and ".join(f"{_places(each)} for the encoder {name}" for name, each in found.items())
        raise ValueError(
            f"The prompt's words are {places}, usually because an embedding has not as many vectors for one as for "
            "the other; use an embedding that is made for this CLIP."
        )
    return spans


def _find(clip: Any, prompt: Mapping[str, list[_Token]], phrase: str) -> Spans:
    if phrase.endswith(_EMBEDDING):
        raise ValueError(f"The phrase '{phrase}' names no embedding; write its file name after the colon.")
    sought = _tokens(clip, phrase)
    if not any(sought.values()):
        raise ValueError(
            f"The phrase '{phrase}' has no tokens; write at least one word, or an embedding that is made for this CLIP "
            "and lies in the embeddings folder."
        )
    found = {name: _occurrences(prompt[name], sought[name]) for name in prompt}
    spans = next(iter(found.values()))
    if any(other != spans for other in found.values()):
        places = " and ".join(f"{_places(each)} for the encoder {name}" for name, each in found.items())
        raise ValueError(
            f"The phrase '{phrase}' is {places}, usually because an embedding has not as many vectors for one as for "
            "the other; use an embedding that is made for this CLIP, or put the phrase before it."
        )
    if not spans:
        # An encoder that an embedding is not made for knows no tokens of it.
        name = max(sought, key=lambda each: len(sought[each]))
        raise ValueError(
            f"The phrase '{phrase}' is not in the prompt; its tokens are {_readable(clip, name, sought[name])} and the "
            f"prompt's are {_readable(clip, name, prompt[name])}; write the phrase as it stands in the prompt."
        )
    return spans


def _tokens(clip: Any, text: str) -> dict[str, list[_Token]]:
    """For each encoder, the tokens of a text without start, end and padding."""
    tokenized: dict[str, list[list[tuple[Any, float, int]]]] = clip.tokenize(text, return_word_ids=True)
    unknown = [name for name in tokenized if name not in ENCODERS]
    if unknown:
        known = ", ".join(f"{name} ({family})" for name, family in ENCODERS.items())
        raise ValueError(
            f"This CLIP has the text encoder {', '.join(unknown)}, in which phrases cannot be found; it can be done "
            f"for the CLIP encoders {known}: use one of those, or give no phrases."
        )
    return {name: _placed(chunks, _tokenizer(clip, name)) for name, chunks in tokenized.items()}


def _tokenizer(clip: Any, name: str) -> Any:
    return getattr(clip.tokenizer, f"clip_{name}")


def _placed(chunks: list[list[tuple[Any, float, int]]], tokenizer: Any) -> list[_Token]:
    tokens: list[_Token] = []
    first = 0
    for chunk in chunks:
        position = first
        for value, _, group in chunk:
            if torch.is_tensor(value) and value.shape[-1] != tokenizer.embedding_size:
                # The text encoder leaves out a vector of another width, and what follows it in the chunk moves up.
                continue
            if group != 0:
                before = tokens[-1] if tokens else None
                tokens.append(_Token(value, position, group, _starts_word(before, group, tokenizer)))
            position += 1
        first += len(chunk)
    return tokens


def _starts_word(before: _Token | None, group: int, tokenizer: Any) -> bool:
    if before is None or before.group != group:
        return True
    return not torch.is_tensor(before.value) and tokenizer.inv_vocab[before.value].endswith(_WORD_END)


def _occurrences(prompt: list[_Token], phrase: list[_Token]) -> Spans:
    spans: list[tuple[int, int]] = []
    at = 0
    while phrase and (stop := at + len(phrase)) <= len(prompt):
        part = prompt[at:stop]
        whole_words = part[0].starts_word and (stop == len(prompt) or prompt[stop].starts_word)
        if whole_words and all(_same(a.value, b.value) for a, b in zip(part, phrase, strict=True)):
            spans += _ranges(token.position for token in part)
            at = stop
        else:
            at += 1
    return tuple(spans)


def _same(a: int | Tensor, b: int | Tensor) -> bool:
    if torch.is_tensor(a) and torch.is_tensor(b):
        return torch.equal(a, b)
    return not torch.is_tensor(a) and not torch.is_tensor(b) and a == b


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


def _readable(clip: Any, name: str, tokens: list[_Token]) -> str:
    """The tokens as words: "a | red | [embedding of 2 vectors]"."""
    words: list[list[_Token]] = []
    for token in tokens:
        if words and not token.starts_word:
            words[-1].append(token)
        else:
            words.append([token])
    if not words:
        return "(none)"
    return " | ".join(_word(_tokenizer(clip, name), word) for word in words)


def _word(tokenizer: Any, word: list[_Token]) -> str:
    if torch.is_tensor(word[0].value):
        return f"[embedding of {len(word)} vector{'s' if len(word) > 1 else ''}]"
    return tokenizer.decode([token.value for token in word], skip_special_tokens=False).strip()
