"""What the page says in other languages: English word for word what the nodes say, German all that English does.

Names of inputs stay as they are, because tooltips and help pages call them so; the page translates no options."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hosting.paths import ROOT
from subject_patches.nodes import types

from locales import as_text, english

WORDS = english()
FOLDER = ROOT / "locales"


def _read(language: str, name: str) -> dict[str, Any]:
    return json.loads((FOLDER / language / name).read_text(encoding="utf-8"))


def test_english_is_what_the_nodes_say() -> None:
    """If not, run `python tools/locales.py`."""
    assert (FOLDER / "en" / "nodeDefs.json").read_text(encoding="utf-8") == as_text(WORDS)


def test_german_has_every_node() -> None:
    german = _read("de", "nodeDefs.json")
    assert german.keys() == WORDS.keys()
    for words in german.values():
        assert words["display_name"]
        assert words["description"].endswith(".")
    assert len({words["display_name"] for words in german.values()}) == len(german)


def _tooltips(words: dict[str, Any]) -> dict[tuple[str, str, str], str]:
    """By node, part and name, what stands at every input and output."""
    return {
        (node, part, name): each["tooltip"]
        for node, parts in words.items()
        for part in ("inputs", "outputs")
        for name, each in parts.get(part, {}).items()
    }


def test_german_has_every_input_and_output() -> None:
    """None is left out or outlives what it is for, and what is one tooltip in English is one in German."""
    english, german = _tooltips(WORDS), _tooltips(_read("de", "nodeDefs.json"))
    assert german.keys() == english.keys()
    assert [place for place, text in german.items() if not text.endswith(".") or text == english[place]] == []
    pairs = {(english[place], german[place]) for place in english}
    assert len(pairs) == len(set(english.values())) == len(set(german.values()))


def test_german_quotes_what_english_quotes() -> None:
    """Choices and examples are typed or chosen as they stand there, whatever the language."""
    english, german = _tooltips(WORDS), _tooltips(_read("de", "nodeDefs.json"))
    quoted = {place: set(re.findall(r"(?<!\w)'([^']+)'(?!\w)", text)) for place, text in english.items()}
    assert [
        (place, word) for place, words in quoted.items() for word in words if f"'{word}'" not in german[place]
    ] == []


@pytest.mark.parametrize("language", ["en", "de"])
def test_every_folder_of_the_menu_has_a_name(language: str) -> None:
    named = _read(language, "main.json")["nodeCategories"]
    folders = (types.SUBJECT, types.LAYOUT, types.SEVERAL, types.CONCEPT, types.RETOUCH, types.INSPECT)
    assert {part for folder in folders for part in folder.split("/")} == named.keys()
