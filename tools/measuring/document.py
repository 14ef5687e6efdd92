"""A document whose tables are a command's: which studies its text quotes, and its tables anew from what they print.

A table belongs to the last command in backquotes before it ("`--only oracle --count 192`"). It keeps its columns and
rows, as many of the study's as it has, in its own order: to show one more, write its title with empty cells.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

QUOTED = re.compile(r"`((?:--toy\s+\w+\s+)?--only\s[^`]+)`")
LINE = re.compile(r"^\|.*\|$")

# Gives the names of the studies that a command line is of, and how many cases and steps.
Reads = Callable[[Sequence[str]], "Command"]


@dataclass(frozen=True)
class Command:
    """What a quoted command measures: the names of its studies of a toy, the cases of each and the steps."""

    toy: str
    studies: tuple[str, ...]
    count: int
    steps: int


@dataclass
class Table:
    """A table: the titles of its columns but the first, the cells of its rows by the first one's, and its line."""

    titles: list[str]
    rows: dict[str, list[str]]
    line: int

    def columns(self, titles: Sequence[str]) -> list[int] | None:
        """Where columns of these titles are, from left to right; None where one is not."""
        found, at = [], 0
        for title in titles:
            if title not in self.titles[at:]:
                return None
            at = self.titles.index(title, at) + 1
            found.append(at - 1)
        return found


def tables_of(text: str) -> list[Table]:
    """All tables of a text."""
    found: list[Table] = []
    before = False
    for number, line in enumerate(text.split("\n")):
        inside = bool(LINE.match(line))
        if inside:
            first, *cells = (cell.strip() for cell in line[1:-1].split("|"))
            if not before:
                found.append(Table(cells, {}, number))
            elif number > found[-1].line + 1:
                found[-1].rows[first] = cells
        before = inside
    return found


def commands_of(text: str, reads: Reads) -> Iterator[tuple[int, Command]]:
    """The quoted commands of a text with the lines they end in."""
    for quoted in QUOTED.finditer(text):
        yield text.count("\n", 0, quoted.end()), reads(shlex.split(quoted[1]))


def made_anew(text: str, command: Command, printed: str, reads: Reads) -> tuple[str, list[str]]:
    """The text with the tables of one command as its studies `printed` them, and what of them was not printed: a
    sentence for each such table."""
    lines, sources, missed = text.split("\n"), tables_of(printed), []
    quoted = list(commands_of(text, reads))
    for table in tables_of(text):
        owners = [each for line, each in quoted if line < table.line]
        if not owners or owners[-1] != command:
            continue
        made = _from(table, sources)
        if made is None:
            missed.append(f"line {table.line + 1}: none of the study's tables has all of its columns and rows")
            continue
        for row, (name, cells) in enumerate(made.items()):
            lines[table.line + 2 + row] = f"| {name} | {' | '.join(cells)} |"
    return "\n".join(lines), missed


def _from(table: Table, sources: list[Table]) -> dict[str, list[str]] | None:
    """A table's rows as the first source has them that has all, which is taken out, or as several have them."""
    fitting = [(each, columns) for each in sources if (columns := each.columns(table.titles)) is not None]
    having = [pair for pair in fitting if table.rows.keys() <= pair[0].rows.keys()]
    if having:
        fitting = having[:1]
        sources.remove(having[0][0])
    found = {
        name: [cells[column] for column in columns]
        for source, columns in reversed(fitting)
        for name, cells in source.rows.items()
    }
    return {name: found[name] for name in table.rows} if table.rows.keys() <= found.keys() else None
