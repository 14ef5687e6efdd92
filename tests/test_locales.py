"""What the page says in other languages: English word for word what the nodes say, German a name and a description."""

from __future__ import annotations

import json
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


@pytest.mark.parametrize("language", ["en", "de"])
def test_every_folder_of_the_menu_has_a_name(language: str) -> None:
    named = _read(language, "main.json")["nodeCategories"]
    folders = (types.SUBJECT, types.LAYOUT, types.SEVERAL, types.CONCEPT, types.RETOUCH, types.INSPECT)
    assert {part for folder in folders for part in folder.split("/")} == named.keys()
