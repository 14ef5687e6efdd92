"""The auxiliary prompt (DCI, section 3.3): the query prompt with another noun in the place of "V* noun"."""

from __future__ import annotations

import re

from ..parts.writing import one_line, shortened

# Common nouns, as the paper presets them without naming them; the first that may stand in a prompt is taken.
PRESETS = ("cat", "dog", "man", "woman", "car", "chair", "flower", "house", "toy", "ball")


def words_of(text: str) -> set[str]:
    """The words of a text, in lower case."""
    return set(re.findall(r"\w+", text.casefold()))


def auxiliary_text(text: str, concept: str, noun: str) -> str:
    """The prompt with `noun` in the place of every occurrence of the concept's phrase, letter case aside.

    Raises ValueError when the phrase is empty or not in the prompt, or when the noun is empty, a word of the phrase (it
    would bring back what the model was tuned on), or elsewhere in the prompt (its tokens could not be told apart)."""
    concept, noun = one_line(concept), one_line(noun)
    if not concept:
        raise ValueError("The concept phrase is empty; write the concept's words as they stand in the prompt.")
    if not noun:
        raise ValueError("The auxiliary noun is empty; write a common noun, or choose a preset.")
    # A sign that is no letter, as an emoji, is a noun to the model too.
    if all(ord(sign) < 128 and not sign.isalnum() for sign in noun):
        raise ValueError(f"The auxiliary noun '{noun}' is no word; write a common noun, or choose a preset.")
    pattern = _whole(concept)
    rest = pattern.sub(" ", text)
    if rest == text:
        raise ValueError(
            f"The concept phrase '{concept}' is not in the prompt '{shortened(text)}'; write it as it stands there."
        )
    itself = re.compile(rf"\b{re.escape(noun)}\b", re.IGNORECASE) if words_of(noun) else re.compile(re.escape(noun))
    if words_of(noun) & words_of(concept) or itself.search(concept):
        raise ValueError(
            f"The auxiliary noun '{noun}' is part of the concept phrase '{concept}'; choose one that differs from it."
        )
    if itself.search(rest):
        raise ValueError(f"The auxiliary noun '{noun}' is already in the prompt; choose one that is not.")
    return pattern.sub(lambda _: noun, text)


def counterpart(phrase: str, concept: str, noun: str) -> str:
    """What stands in the auxiliary prompt for a phrase of the prompt: the noun for what is part of the concept's
    phrase, otherwise the phrase with the noun in the concept's place."""
    return noun if _whole(phrase).search(concept) else _whole(concept).sub(lambda _: noun, phrase)


def _whole(phrase: str) -> re.Pattern[str]:
    """A phrase as whole words, letter case aside."""
    words = r"\s+".join(map(re.escape, phrase.split()))
    return re.compile(rf"(?<![\w:.-]){words}(?![\w.-]*\w)", re.IGNORECASE)


def preset_noun(text: str) -> str:
    """The first preset that is no word of the prompt, plural or singular.

    Raises ValueError when the prompt has them all."""
    words = words_of(text)
    found = (noun for noun in PRESETS if not words & {noun, f"{noun}s", f"{noun}es"})
    noun = next(found, None)
    if noun is None:
        raise ValueError("The prompt has every preset noun in it; write an auxiliary noun of your own.")
    return noun
