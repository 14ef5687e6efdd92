"""What can be told of a prompt's phrases by their letters alone, when a workflow is queued and nothing is loaded yet.

The host asks a node whether its inputs are right before it runs anything, and tells it what is typed on the node
itself: what comes by a link, a CLIP above all, is not there yet. So this refuses only what no tokenizer could find; the
node asks the tokenizer itself when it runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from ..patches.parts.prompt import ONE_OF, split_phrases
from ..patches.parts.writing import shortened

EMBEDDING = "embedding:"
# A name of an embedding where the host reads one, without the commas after it.
_NAMED = re.compile(r"(?:(?<=\s)|^)embedding:\s*[^\s<\[]*?(?=,*(?:[\s<\[]|$))")
# Some tokenizers read "&eacute;" as the letter that it stands for.
_ENTITY = re.compile(r"&#?\w+;")
# After an apostrophe CLIP's tokens end within what looks like a word: "'sole" is "'s" and "ole".
_WORD = re.compile(r"(?<![a-z'])[a-z]+")


def refusal(check: Callable[..., Any], *values: Any) -> bool | str:
    """What a node's `validate_inputs` gives by one of its checks: True, or the sentence of the check's ValueError. True
    also where a value is None, as one that comes by a link is."""
    if any(value is None for value in values):
        return True
    try:
        check(*values)
    except ValueError as error:
        return str(error)
    return True


def typed(values: Any) -> Any:
    """The value of an input whose node takes lists, as `validate_inputs` gets it; None of one that comes by a link."""
    return values[0] if isinstance(values, (list, tuple)) and len(values) == 1 else None


def check_written(text: str, phrases: str) -> None:
    """Raises ValueError for a phrase of a text field that no tokenizer of the host's can find in the prompt `text`."""
    for phrase in split_phrases(phrases):
        if EMBEDDING in phrase or not (_is_plain(text) and _is_plain(phrase)) or _count(text, phrase):
            continue
        one = ONE_OF.fullmatch(phrase)
        wanted, number = (one["phrase"], int(one["number"])) if one else (phrase, 1)
        count = _count(text, wanted)
        if count == 0:
            raise ValueError(
                f"The phrase '{wanted}' is not in the prompt '{shortened(text)}'; write the phrase as it stands in the "
                "prompt."
            )
        if number > count:
            raise ValueError(
                f"The phrase '{phrase}' asks for occurrence {number} of '{wanted}', which the prompt has {count} "
                f"time{'s' if count > 1 else ''}; give a number from 1 to {count}, or none for every one."
            )


def _is_plain(text: str) -> bool:
    """Whether all tokenizers take the letters as they are written: others may be composed, widened or left out."""
    return all(" " <= letter <= "~" or letter in "\t\r\n" for letter in text) and not _ENTITY.search(text)


def _count(text: str, phrase: str) -> int:
    """At most how often a tokenizer finds a phrase in a text, both plain. Where some tokenizers see spaces, others see
    none, so only words have to end where the phrase does."""
    return max(
        sum(1 for _ in _places(text, phrase)) for text, phrase in zip(_readings(text), _readings(phrase), strict=True)
    )


def _readings(text: str) -> list[str]:
    """The text as it is written, and as a tokenizer reads it that knows weights; each also without what names an
    embedding, because one that is missing leaves nothing behind."""
    from comfy.sd1_clip import escape_important, token_weights, unescape_important

    escaped = escape_important(text)
    readings = []
    for parts in ([escaped], [part for part, _ in token_weights(escaped, 1.0)]):
        shown = [unescape_important(part) for part in parts]
        readings += [" ".join(shown), " ".join(_NAMED.sub("", part) for part in shown)]
    return readings


def _places(text: str, phrase: str) -> Iterator[int]:
    text, sought = text.lower(), "".join(phrase.lower().split())
    within = {place for word in _WORD.finditer(text) for place in range(word.start() + 1, word.end())}
    letters = [(place, letter) for place, letter in enumerate(text) if not letter.isspace()]
    solid = "".join(letter for _, letter in letters)
    inside = [place in within for place, _ in letters] + [False]
    for start in range(len(solid) - len(sought) + 1):
        if solid.startswith(sought, start) and not (inside[start] or inside[start + len(sought)]):
            yield start
