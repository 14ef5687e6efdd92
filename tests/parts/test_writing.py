"""What messages quote of what somebody wrote."""

from __future__ import annotations

from subject_patches.patches.parts.writing import one_line, shortened


def test_a_text_on_one_line() -> None:
    assert one_line(" a red\n\tdog ") == "a red dog"


def test_long_texts_are_quoted_from_their_beginning() -> None:
    """Forty words and four hundred letters are whole."""
    for text in (" ".join(["dog"] * 40), "x" * 400):
        assert shortened(text) == text
    assert shortened("dog\n" * 41) == " ".join(["dog"] * 40 + ["…"])
    assert shortened("x" * 401) == "x" * 400 + "…"
