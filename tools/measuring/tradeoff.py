"""Identity against prompt following: a training's trade-off curve, and what lies above it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .given import paired, share

RESAMPLINGS = 1000
MEASURES = "identity | prompt followed | emblem found | background right | thing beside"


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
    print(f"| | {MEASURES} | {' | '.join(rises)} |\n|{'---|' * (6 + len(rises))}")
    for name, scores in rows.items():
        cells = [""] * len(rises)
        if name in bases:
            cells = [paired(of(bases[name]), of(scores)) for of in (identities, following)]
            cells += [above(curve, scores)] if curve else []
        print(f"| {name} | {_means(scores)} | {' | '.join(cells)} |")


def _means(scores: Sequence[Score]) -> str:
    import numpy as np

    means = f"{np.mean(identities(scores)):.3f} | {np.mean(following(scores)):.0%}"
    return " | ".join(
        [means, *(share([getattr(s, what) for s in scores]) for what in ("emblem", "background", "beside"))]
    )


def above(curve: Sequence[Sequence[Score]], scores: Sequence[Score]) -> str:
    """How far scores lie above a training's curve, whose points are of the same pictures: their identity less the best
    of the curve at no less prompt following, with the standard error by resampling the pictures."""
    import numpy as np

    points = np.array([[following(each), identities(each)] for each in (*curve, scores)])
    draw = np.random.default_rng(0)

    def height(cases: np.ndarray) -> float:
        along, up = points[:, :, cases].mean(2).T
        return float(up[-1] - best_on(along[:-1], up[:-1], along[-1]))

    everything = np.arange(len(scores))
    resampled = [height(draw.choice(everything, len(everything))) for _ in range(RESAMPLINGS)]
    return f"{height(everything):+.3f} ± {np.std(resampled):.3f}"


def best_on(along: Sequence[float], up: Sequence[float], least: float) -> float:
    """The highest `up` on a curve of straight lines from point to point where `along` is at least so much; where it
    never is, the `up` of the point that is furthest along."""
    found = [height for place, height in zip(along, up, strict=True) if place >= least]
    for number in range(len(along) - 1):
        first, second = along[number], along[number + 1]
        if min(first, second) < least <= max(first, second):
            part = (least - first) / (second - first)
            found.append(up[number] + part * (up[number + 1] - up[number]))
    return max(found) if found else up[max(range(len(along)), key=lambda number: along[number])]
