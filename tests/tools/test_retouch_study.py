"""How the studies of the swap share their pictures out, and what they say of places."""

from __future__ import annotations

import pytest
from measuring.concepts import Score
from measuring.cut_references import risen, shared_out


@pytest.mark.parametrize(
    ("count", "least", "right"),
    [(160, 6, (8, 20)), (24, 6, (4, 6)), (48, 12, (4, 12)), (30, 6, (5, 6)), (3, 6, (1, 3)), (999, 6, (8, 20))],
)
def test_pairs_are_shared_out(count: int, least: int, right: tuple[int, int]) -> None:
    assert shared_out(count, least) == right


def test_how_much_more_places_vary() -> None:
    """Of two concepts places vary by 2 and 8 thousandths more; one that is found once only in a row is left out."""

    def placed(half: float) -> list[Score]:
        return [Score(1.0, True, True, (64 + sign * half * 128, 64.0)) for sign in (-1, 1)]

    lost = [Score(1.0, False, True, None)]
    first, other = [placed(0.0), placed(0.0), lost], [placed(0.002**0.5), placed(0.008**0.5), placed(0.1)]
    assert risen(first, other) == "+0.0050 ± 0.0030"
