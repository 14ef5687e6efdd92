"""A text's tokens as the host's tokenizers make them, and the letters they stand for.

Three spellings of vocabularies cover the host's text encoders: CLIP's, that of Qwen, Llama 3 and Mistral (bytes), and
that of T5 and Gemma (sentencepiece). Each tells of every token which bytes of the text it is, so a phrase can be found
by its letters, whatever the tokenizer makes of a space before it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

# What stands for a letter that a vocabulary has no token for.
UNKNOWN = "\ufffd"

_WORD_END = "</w>"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
# Letters of scripts that put no space between words: South East Asian, kana and Chinese.
_SPACELESS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\ua4cf\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)
# What makes another emoji of the one before it.
_JOINERS = re.compile("[\u200d\U0001f3fb-\U0001f3ff]")


@dataclass(frozen=True)
class Token:
    """A token at its position among an encoder's tokens. `group` is the host's word id: of one embedding's vectors it
    is the same."""

    position: int
    group: int


@dataclass(frozen=True)
class Symbol:
    """A letter of a text in lower case, a space for any run of them, or a vector of a textual embedding, with the first
    and the last of the tokens that it lies in, by their places in the list."""

    value: str | Tensor
    first: int
    last: int

    def same(self, other: Symbol) -> bool:
        """Whether the two stand for the same."""
        if torch.is_tensor(self.value) and torch.is_tensor(other.value):
            return torch.equal(self.value, other.value)
        return type(self.value) is type(other.value) and self.value == other.value

    @property
    def is_unknown(self) -> bool:
        return not torch.is_tensor(self.value) and self.value == UNKNOWN

    @property
    def is_word(self) -> bool:
        return torch.is_tensor(self.value) or self.value.isalnum() or self.is_unknown


@dataclass(frozen=True)
class TokenText:
    """The tokens of a text without start, end and padding, and the symbols they spell."""

    tokens: tuple[Token, ...]
    symbols: tuple[Symbol, ...]

    def without(self, before: int, after: int) -> TokenText:
        """Without the first and the last of the symbols; those that are left begin and end with no space."""
        inside = list(self.symbols[before : len(self.symbols) - after])
        while inside and inside[-1].value == " ":
            inside.pop()
        while inside and inside[0].value == " ":
            inside.pop(0)
        return TokenText(self.tokens, tuple(inside))

    def positions(self, start: int, stop: int) -> list[int]:
        """Where the tokens of some symbols lie."""
        part = self.symbols[start:stop]
        return [token.position for token in self.tokens[part[0].first : part[-1].last + 1]] if part else []

    @property
    def is_solid(self) -> bool:
        """Whether there is nothing but letters, without any space."""
        return not any(torch.is_tensor(symbol.value) or symbol.value == " " for symbol in self.symbols)

    def occurrences(self, sought: Sequence[Symbol], in_words: bool = False) -> list[tuple[int, int]]:
        """Where the symbols stand as whole words, or in longer ones too, left to right and not overlapping: half-open
        ranges of symbols."""
        found, at = [], 0
        while sought and (stop := at + len(sought)) <= len(self.symbols):
            same = all(a.same(b) for a, b in zip(self.symbols[at:stop], sought, strict=True))
            if same and (in_words or not (self._joined(at) or self._joined(stop))):
                found.append((at, stop))
                at = stop
            else:
                at += 1
        return found

    def cut(self, start: int, stop: int) -> str | None:
        """The text of a token that lies in some symbols and in a word beside them, if there is one."""
        part = self.symbols[start:stop]
        for token in (part[0].first, part[-1].last):
            places = [n for n, symbol in enumerate(self.symbols) if symbol.first <= token <= symbol.last]
            if any(not start <= n < stop and self.symbols[n].is_word for n in places):
                return "".join(str(self.symbols[n].value) for n in places).strip()
        return None

    def words(self) -> str:
        """The text word by word: "a | red | [embedding of 2 vectors]"."""
        written: list[str] = []
        vectors = 0
        for at, symbol in enumerate(self.symbols):
            joined = self._joined(at)
            if torch.is_tensor(symbol.value):
                vectors = vectors + 1 if joined else 1
                word = f"[embedding of {vectors} vector{'s' if vectors > 1 else ''}]"
                written[len(written) - joined :] = [word]
            elif symbol.value != " ":
                before = self.symbols[at - 1].value if at else " "
                if torch.is_tensor(before) or before == " ":
                    written.append(symbol.value)
                else:
                    written[-1] += symbol.value
        return " | ".join(written) or "(none)"

    def _joined(self, at: int) -> bool:
        """Whether the symbol there goes on with the word or the embedding of the one before it."""
        if not 0 < at < len(self.symbols):
            return False
        before, after = self.symbols[at - 1], self.symbols[at]
        if torch.is_tensor(before.value) or torch.is_tensor(after.value):
            both = torch.is_tensor(before.value) and torch.is_tensor(after.value)
            return both and self.tokens[before.first].group == self.tokens[after.first].group
        return _are_joined(before.value, after.value)


def written(text: str, phrase: str) -> list[bool]:
    """The places where a phrase's letters stand in a text, left to right and not overlapping: of each whether it is
    whole words there, and not within a longer one."""
    text = text.casefold()
    places = [found.span() for found in re.finditer(re.escape(phrase.casefold()), text)]
    ends = [(text[max(start - 1, 0) : start + 1], text[stop - 1 : stop + 1]) for start, stop in places]
    return [not any(len(pair) == 2 and _are_joined(*pair) for pair in both) for both in ends]


def _are_joined(before: str, after: str) -> bool:
    """Whether a letter goes on with the word of the one before it."""
    if _JOINERS.match(after) or _JOINERS.match(before):
        return True
    return all(each.isalnum() and not _SPACELESS.match(each) for each in (before, after))


def read_tokens(chunks: Sequence[Sequence[tuple[Any, float, int]]], tokenizer: Any) -> TokenText:
    """The text of what an SDTokenizer of the host gives with word ids.

    Raises ValueError when its vocabulary is spelled in a way that is not known."""
    spell = _speller(tokenizer)
    tokens: list[Token] = []
    symbols: list[Symbol] = []
    spelled: list[tuple[int, int]] = []
    first = 0
    for chunk in chunks:
        position = first
        for value, _, group in chunk:
            if torch.is_tensor(value) and value.shape[-1] != tokenizer.embedding_size:
                # The text encoder leaves out a vector of another width, and what follows it in the chunk moves up.
                continue
            if group != 0:
                if torch.is_tensor(value):
                    symbols += _symbols(spelled)
                    spelled = []
                    symbols.append(Symbol(value, len(tokens), len(tokens)))
                else:
                    spelled += [(byte, len(tokens)) for byte in spell(value)]
                tokens.append(Token(position, group))
            position += 1
        first += len(chunk)
    return TokenText(tuple(tokens), (*symbols, *_symbols(spelled))).without(0, 0)


def _symbols(spelled: Sequence[tuple[int, int]]) -> Iterator[Symbol]:
    space = False
    for letter, first, last in _letters(spelled):
        if not letter.isspace():
            yield from (Symbol(each, first, last) for each in letter.lower())
        elif not space:
            yield Symbol(" ", first, last)
        space = letter.isspace()


def _letters(spelled: Sequence[tuple[int, int]]) -> Iterator[tuple[str, int, int]]:
    """The letters that bytes spell, each with the first and the last of the tokens it lies in."""
    at = 0
    while at < len(spelled):
        letter, part = UNKNOWN, spelled[at : at + 1]
        for size in range(1, 5):
            with suppress(UnicodeDecodeError):
                tried = spelled[at : at + size]
                letter, part = bytes(byte for byte, _ in tried).decode(), tried
                break
        yield letter, part[0][1], part[-1][1]
        at += len(part)


@cache
def _byte_alphabet() -> dict[str, int]:
    """The letters by which vocabularies of bytes spell each byte: itself where it can be printed, else the next of the
    letters from 256 on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _speller(tokenizer: Any) -> Callable[[int], bytes]:
    """What gives the bytes of a token's text."""
    pieces = tokenizer.inv_vocab
    # The lowest numbers are bytes and short pieces; those of Mistral begin after a thousand special ones.
    usual = [pieces.get(number, "") for number in range(3000)]
    alphabet = _byte_alphabet()

    def in_bytes(piece: str) -> bytes:
        spelled = [alphabet.get(letter) for letter in piece]
        return piece.encode() if None in spelled else bytes(spelled)

    def of_clip(number: int) -> bytes:
        piece = pieces[number]
        return in_bytes(piece.removesuffix(_WORD_END)) + b" " * piece.endswith(_WORD_END)

    def of_sentencepiece(number: int) -> bytes:
        piece = pieces[number]
        byte = _BYTE.fullmatch(piece)
        if byte:
            return bytes([int(byte[1], 16)])
        return b"\xff" if piece == "<unk>" else piece.replace("\u2581", " ").encode()

    if any(piece.endswith(_WORD_END) for piece in usual):
        return of_clip
    if any(piece.startswith("\u0120") for piece in usual):
        return lambda number: in_bytes(pieces[number])
    if any(piece.startswith("\u2581") for piece in usual):
        return of_sentencepiece
    raise ValueError(
        f"The vocabulary of the text encoder {tokenizer.embedding_key} does not say which letters its tokens are, so "
        "phrases cannot be found in it; leave the phrases empty."
    )
