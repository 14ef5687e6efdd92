"""What the studies of dual-branch integration take for lying above a training's curve."""

from __future__ import annotations

import numpy as np
import pytest
from measuring.tradeoff import Score, above, on_curve, rising

ALONG, UP = (1.0, 0.8, 0.4), (0.0, 0.2, 0.6)


@pytest.mark.parametrize(("at", "right"), [(0.0, 0.6), (0.4, 0.6), (0.6, 0.4), (0.9, 0.1), (1.0, 0.0), (1.1, 0.0)])
def test_a_curve_is_straight_between_its_points_and_goes_on_level(at: float, right: float) -> None:
    assert on_curve(ALONG, UP, at) == pytest.approx(right)


def test_what_is_out_of_order_is_pooled() -> None:
    assert rising([0.0, 0.4, 0.2, 0.3, 0.9]) == pytest.approx([0.0, 0.3, 0.3, 0.3, 0.9])
    assert rising([3.0, 2.0, 1.0]) == [2.0, 2.0, 2.0]
    # The two points that follow alike count as one.
    assert on_curve((1.0, 0.7, 0.9), (0.0, 0.1, 0.5), 0.8) == pytest.approx(0.3)


def test_noise_does_not_raise_a_curve() -> None:
    """Of points that are all the same but for noise, the curve's height is on the average what they are; the best of
    them is higher."""
    drawn = np.random.default_rng(0).normal(size=(400, 2, 5))
    heights = [on_curve(along, up, 0.0) for along, up in drawn]
    assert abs(np.mean(heights)) < 0.1
    assert drawn[:, 1].max(1).mean() > 1


def test_height_above_a_curve() -> None:
    def scores(identity: float, beside: int) -> list[Score]:
        return [Score(identity, True, True, number < beside) for number in range(10)]

    curve = [scores(0.0, 10), scores(0.6, 0)]
    height, error = map(float, above(curve, scores(0.5, 5)).split(" ± "))
    assert height == pytest.approx(0.2)
    assert 0 < error < 0.2
    assert above(curve, scores(0.6, 0)) == "+0.000 ± 0.000"
