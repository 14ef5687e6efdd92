"""What the study of dual-branch integration takes for lying above a training's curve."""

from __future__ import annotations

import pytest
from measuring.tradeoff import Score, above, best_on

ALONG, UP = (1.0, 0.8, 0.4), (0.0, 0.2, 0.6)


@pytest.mark.parametrize(("least", "right"), [(0.0, 0.6), (0.4, 0.6), (0.6, 0.4), (0.9, 0.1), (1.0, 0.0), (1.1, 0.0)])
def test_the_best_of_a_curve_at_no_less_following(least: float, right: float) -> None:
    assert best_on(ALONG, UP, least) == pytest.approx(right)
    # The curve may be walked from its other end.
    assert best_on(ALONG[::-1], UP[::-1], least) == pytest.approx(right)


def test_a_detour_does_not_lower_a_curve() -> None:
    assert best_on((1.0, 0.8, 0.7, 0.9), (0.0, 0.5, 0.1, 0.2), 0.8) == 0.5


def test_height_above_a_curve() -> None:
    def scores(identity: float, beside: int) -> list[Score]:
        return [Score(identity, True, True, number < beside) for number in range(10)]

    curve = [scores(0.0, 10), scores(0.6, 0)]
    height, error = map(float, above(curve, scores(0.5, 5)).split(" ± "))
    assert height == pytest.approx(0.2)
    assert 0 < error < 0.2
    assert above(curve, scores(0.6, 0)) == "+0.000 ± 0.000"
