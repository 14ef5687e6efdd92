"""What somebody writes on a node: how it is read, how messages quote it, and how long a file's name may be."""

from __future__ import annotations

# Bytes: file systems take 255, with a number and an ending.
NAME_MAX = 200
# How messages say so.
NAME_LIMIT = f"at most {NAME_MAX} bytes (a plain letter is one, é two, 犬 three)"
_QUOTED = 40


def one_line(text: str) -> str:
    """Words with one space between them: a link may bring several lines where one is written."""
    return " ".join(text.split())


def shortened(text: str) -> str:
    """A text as a message quotes it, on one line; of a long one the first words, of a long word its first letters."""
    words = text.split()
    quoted = " ".join(words if len(words) <= _QUOTED else [*words[:_QUOTED], "…"])
    return quoted if len(quoted) <= 10 * _QUOTED else f"{quoted[: 10 * _QUOTED]}…"
