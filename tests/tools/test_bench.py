"""The benchmark's own runs; what it measures is asserted nowhere."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
from bench import RUNS, SHAPES, parser
from measuring import COSTS
from measuring.given import chosen


@pytest.mark.parametrize("arguments", RUNS)
def test_a_run_of_the_document_has_its_rows(arguments: str) -> None:
    options = parser().parse_args(shlex.split(arguments))
    names: list[Any] = [name for rows in COSTS for name in rows(SHAPES[options.shape])]
    assert chosen(options.only, names)
    # Nothing is compared with itself.
    other = chosen(options.against, names)[:1] if options.against else []
    assert not set(other) & set(chosen(options.only, names))
