"""Identity against prompt following: a training's trade-off curve, and what lies above it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .given import heading, paired, row, share

RESAMPLINGS = 1000
MEASURES = ("identity", "prompt followed", "emblem found", "background right", "thing beside")


@dataclass(frozen=True)
class Score:
    """One picture: identity of its most alike emblem with the training pictures' (cosine; 0 where no emblem is found,
    because that of anything else means nothing), whether one was found, whether the background is the prompt's, and
    whether the thing beside the concept is there."""

    identity: float
    emblem: bool
    background: bool
    beside: bool

    @property
    def followed(self) -> float:
        """The share of what the prompt adds to the concept that is in the picture."""
        return (self.background + self.beside) / 2


def identities(scores: Sequence[Score]) -> list[float]:
    """Each picture's identity."""
    return [score.identity for score in scores]


def following(scores: Sequence[Score]) -> list[float]:
    """How much of each picture's prompt is followed, 0 to 1."""
    return [score.followed for score in scores]


def table(
    rows: Mapping[str, Sequence[Score]],
    bases: Mapping[str, Sequence[Score]],
    curve: Sequence[Sequence[Score]] = (),
) -> None:
    """Prints rows of scores; those with a base, compared with it picture by picture and, where a curve is given, with
    that."""
    rises = ["identity, paired", "following, paired", *(["above the curve"] if curve else [])]
    print(heading(*MEASURES, *rises))
    for name, scores in rows.items():
        cells = [""] * len(rises)
        if name in bases:
            cells = [paired(of(bases[name]), of(scores)) for of in (identities, following)]
            cells += [above(curve, scores)] if curve else []
        print(row(name, *means(scores), *cells))


def means(scores: Sequence[Score]) -> list[str]:
    """What a row has under MEASURES."""
    import numpy as np

    found = [f"{np.mean(identities(scores)):.3f}", f"{np.mean(following(scores)):.0%}"]
    return found + [share([getattr(s, what) for s in scores]) for what in ("emblem", "background", "beside")]


def above(curve: Sequence[Sequence[Score]], scores: Sequence[Score]) -> str:
    """How far scores lie above a training's curve, whose points, from the shortest training to the longest, are of the
    same pictures: their identity less the curve's at the same prompt following, with the standard error by resampling
    the pictures."""
    import numpy as np

    points = np.array([[following(each), identities(each)] for each in (*curve, scores)])
    draw = np.random.default_rng(0)

    def height(cases: np.ndarray) -> float:
        along, up = points[:, :, cases].mean(2).T
        return float(up[-1] - on_curve(along[:-1], up[:-1], along[-1]))

    everything = np.arange(len(scores))
    resampled = [height(draw.choice(everything, len(everything))) for _ in range(RESAMPLINGS)]
    return f"{height(everything):+.3f} ± {np.std(resampled):.3f}"


def on_curve(along: Sequence[float], up: Sequence[float], at: float) -> float:
    """`up` at a place of a training's curve, whose points come with the training's length: `along` falls, `up` rises.

    A maximum of noisy points would be too high. So both are first brought into that order by the nearest values that
    have it (`rising`), which takes no maximum; between points the curve is straight, beyond its ends it stays."""
    import numpy as np

    falling, heights = [-each for each in rising([-each for each in along])], rising(up)
    # From right to left; of points that were brought together the mean.
    places = sorted(set(falling))
    means = [np.mean([high for place, high in zip(falling, heights, strict=True) if place == each]) for each in places]
    return float(np.interp(at, places, means))


def rising(values: Sequence[float]) -> list[float]:
    """The numbers nearest to `values`, by least squares, of which none is less than the one before (pool adjacent
    violators)."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        blocks.append((float(value), 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (second, more), (first, some) = blocks.pop(), blocks.pop()
            blocks.append(((first * some + second * more) / (some + more), some + more))
    return [value for value, count in blocks for _ in range(count)]
