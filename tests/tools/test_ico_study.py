"""The study of ICO: its prompts, and its table, whose errors are those of emblems."""

from __future__ import annotations

import pytest
from measuring.ico import ALL, GROUNDS, ICO, ROWS, TEMPLATE, UNTRAINED, Asked, Means, background, table


def test_every_row_is_compared_with_one_before_it() -> None:
    names = list(ROWS)
    for number, (name, (_, base)) in enumerate(ROWS.items()):
        assert not base or base in names[:number], name
    # What is measured by itself is what all together have.
    alone = [set(training) for name, (training, base) in ROWS.items() if base == ICO and name != ALL]
    assert set.union(*alone) == set(ROWS[ALL][0])


def test_prompts() -> None:
    assert Asked(background("grass"), None).text("emblem") == "an emblem on grass"
    asked = Asked(background("white"), ("blue", "ring"))
    assert asked.text("embedding:study emblem") == "an embedding:study emblem and a blue ring on a white background"
    assert len({background(name) for name in GROUNDS}) == len(GROUNDS)


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Two emblems: their rises are 0.1 and 0.3, so 0.2 with an error of 0.1."""
    first = [Means(0.1, 0.5, 1.0, 0.5, 0.5, 0.4), Means(0.2, 0.7, 0.8, 0.5, 0.5, 0.2)]
    other = [Means(0.2, 0.5, 1.0, 0.5, 0.5, 0.0), Means(0.5, 0.7, 0.8, 0.5, 0.5, 0.0)]
    table({UNTRAINED: first, TEMPLATE: first, ICO: other}, {ICO: TEMPLATE})
    head, line, *rows = capsys.readouterr().out.splitlines()
    assert head.count("|") == line.count("|") == 11
    assert rows[1] == "| fixed template | 0.150 | 60% | 90% | 50% | 50% | 30% |  |  |  |"
    assert rows[2].endswith("| 0% | +0.200 ± 0.100 | +0.000 ± 0.000 | -0.300 ± 0.100 |")
