"""docs/EFFECTS.md's tables are those of the commands that it quotes, and are made anew by them."""

from __future__ import annotations

from collections.abc import Sequence

import effects
import pytest
from host import ROOT
from measuring.document import Command, commands_of, made_anew, tables_of

EFFECTS = (ROOT / "docs" / "EFFECTS.md").read_text(encoding="utf-8")
ONE, TWO = Command("first", ("one",), 5, 12), Command("first", ("two",), 5, 12)
TEXT = """Of the first (`--only
one`):

| | identity | against masks | blended | against masks |
|---|---|---|---|---|
| masks | 0.100 |  | 9% |  |
| maps | 0.200 | +0.100 | 8% | -1 |

- Words stay.

| | found |
|---|---|
| masks | 1% |

And of the second (`--only two`), both in one:

| | identity |
|---|---|
| free | 0.3 |
| placed | 0.4 |
"""
PRINTED = """## One

A line.

| | identity | rise | against masks | blended | against masks |
|---|---|---|---|---|---|
| unpatched | 0.000 |  | -0.150 | 20% | +15 |
| maps | 0.250 | +0.250 | +0.100 | 6% | +1 |
| masks | 0.150 | +0.150 |  | 5% |  |
"""


def reads(words: Sequence[str]) -> Command:
    return {"one": ONE, "two": TWO}[words[1]]


def test_a_table_keeps_its_columns_and_rows() -> None:
    """Of the study's rows and columns a table takes its own, in its own order; what is not printed is told and left."""
    made, missed = made_anew(TEXT, ONE, PRINTED, reads)
    expected = TEXT.replace("| masks | 0.100 |  | 9% |  |", "| masks | 0.150 |  | 5% |  |")
    expected = expected.replace("| maps | 0.200 | +0.100 | 8% | -1 |", "| maps | 0.250 | +0.100 | 6% | +1 |")
    assert made == expected
    assert missed == ["line 11: none of the study's tables has all of its columns and rows"]


def test_tables_alike_are_taken_in_order() -> None:
    """Two tables of one shape go to two tables of the text, the first to the first."""
    text = "`--only one`\n\n| | a |\n|---|---|\n| x | 0 |\n\nand\n\n| | a |\n|---|---|\n| x | 0 |\n"
    printed = "| | a |\n|---|---|\n| x | 1 |\n\n| | a |\n|---|---|\n| x | 2 |\n"
    made, missed = made_anew(text, ONE, printed, reads)
    assert [table.rows for table in tables_of(made)] == [{"x": ["1"]}, {"x": ["2"]}]
    assert not missed


def test_rows_of_several_tables_make_one() -> None:
    """A table may have rows of two that are printed; another command's tables stay as they are."""
    printed = "| | identity |\n|---|---|\n| free | 0.5 |\n\n| | identity |\n|---|---|\n| placed | 0.6 |\n"
    made, missed = made_anew(TEXT, TWO, printed, reads)
    assert made == TEXT.replace("| free | 0.3 |", "| free | 0.5 |").replace("| placed | 0.4 |", "| placed | 0.6 |")
    assert not missed


def test_every_command_of_the_effects_is_of_one_study() -> None:
    """What the document quotes the command line takes, and names one study by it."""
    quoted = [command for _, command in commands_of(EFFECTS, effects._reads)]
    assert len(quoted) > 20
    assert all(len(command.studies) == 1 for command in quoted)


def test_every_table_of_the_effects_has_a_command_before_it() -> None:
    """But the first, which sums up."""
    first, *_ = (line for line, _ in commands_of(EFFECTS, effects._reads))
    summary, *others = tables_of(EFFECTS)
    assert summary.line < first < others[0].line


def test_a_command_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """A mistyped option in the document ends with a sentence, not with a table of something else."""
    with pytest.raises(SystemExit):
        effects._reads(["--only", "oracle", "--cases", "3"])
    assert "--cases" in capsys.readouterr().err
