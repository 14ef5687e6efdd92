"""The toy world's data: seeded 128 x 128 scenes with captions, boxes, masks and attributes.

A scene holds one to four things on a background. A thing is a shape with a named colour and texture, or an
emblem: a plate that carries a two-tone glyph which no caption describes. In training "emblem" always has
a fresh glyph, so a model learns the class and never the one; a personalisation method has to bring the one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .shapes import PLATES, SHAPES

SIZE = 128
# Pixels along a latent's side, and the radius from which on latents can hold an emblem's plate and glyph.
CELL = 8
LARGE = 3.5 * CELL
GLYPH_CELLS = 4

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (245, 134, 30),
    "yellow": (247, 212, 50),
    "green": (46, 154, 68),
    "cyan": (64, 200, 214),
    "blue": (40, 84, 200),
    "purple": (128, 56, 172),
    "pink": (245, 140, 186),
    "brown": (122, 78, 42),
    "black": (28, 28, 30),
    "gray": (132, 132, 136),
    "white": (246, 246, 244),
}
LIGHT = frozenset({"yellow", "cyan", "pink", "white", "orange"})
TEXTURES = ("plain", "striped", "dotted", "checkered")
TEXTURED_BACKGROUNDS = ("grass", "sky", "brick", "sand", "water")
BACKGROUNDS = ("plain", "gradient", *TEXTURED_BACKGROUNDS)
EMBLEM = "emblem"
NUMBERS = {2: "two", 3: "three", 4: "four"}

# The largest radius in pixels by the number of things; the smallest keeps a texture readable at 8 x 8 latents.
RADII = {1: (22.0, 42.0), 2: (20.0, 31.0), 3: (18.0, 26.0), 4: (17.0, 23.0)}


@dataclass(frozen=True)
class World:
    """What scenes are drawn from: shapes, all as likely, the shares of TEXTURES, and of one to four things."""

    shapes: tuple[str, ...] = tuple(SHAPES)
    textures: tuple[float, ...] = (0.34, 0.22, 0.22, 0.22)
    counts: tuple[float, ...] = (0.35, 0.35, 0.18, 0.12)


WHOLE = World()
# The DiT's: what a transformer learns in hours. Emblems, sets, boxes, colours and grounds are all there.
SMALL = World(
    shapes=("circle", "square", "triangle", "star", "heart", "ring", "cross"),
    textures=(0.75, 0.25, 0.0, 0.0),
    counts=(0.5, 0.35, 0.15, 0.0),
)


@dataclass(frozen=True)
class Emblem:
    """One particular emblem: its plate, its two colours and its glyph (4 x 4 cells, row by row)."""

    plate: str
    plate_colour: str
    glyph_colour: str
    cells: tuple[bool, ...]


@dataclass(frozen=True)
class Thing:
    """One object: x, y and radius in pixels, angle in radians. `emblem` is set when `shape` is "emblem"."""

    shape: str
    colour: str
    texture: str
    x: float
    y: float
    radius: float
    angle: float = 0.0
    emblem: Emblem | None = None


@dataclass(frozen=True)
class Background:
    """`kind` is one of BACKGROUNDS; plain has one colour, gradient two (top, bottom), textured ones none."""

    kind: str
    colours: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scene:
    """Things in caption order on a background. `seed` fixes the grain of the textured backgrounds."""

    things: tuple[Thing, ...]
    background: Background
    seed: int = 0
    caption: str = ""


def sample_emblem(rng: np.random.Generator) -> Emblem:
    """A random emblem: two colours of clearly different lightness, 5 to 11 of 16 glyph cells set."""
    light = sorted(LIGHT)
    dark = sorted(set(COLOURS) - LIGHT - {"gray"})
    pair = [light[rng.integers(len(light))], dark[rng.integers(len(dark))]]
    plate_colour, glyph_colour = pair if rng.random() < 0.5 else pair[::-1]
    cells = np.zeros(GLYPH_CELLS**2, dtype=bool)
    cells[rng.permutation(cells.size)[: rng.integers(5, 12)]] = True
    plates = tuple(PLATES)
    return Emblem(plates[rng.integers(len(plates))], plate_colour, glyph_colour, tuple(bool(c) for c in cells))


def sample_background(rng: np.random.Generator) -> Background:
    """A random background: a textured one half of the time, else a plain or a gradient one."""
    draw = rng.random()
    names = tuple(COLOURS)
    if draw < 0.5:
        return Background(TEXTURED_BACKGROUNDS[rng.integers(len(TEXTURED_BACKGROUNDS))])
    if draw < 0.8:
        return Background("plain", (names[rng.integers(len(names))],))
    first, second = rng.choice(len(names), size=2, replace=False)
    return Background("gradient", (names[first], names[second]))


def place(rng: np.random.Generator, count: int, smallest: float = 0.0) -> list[tuple[float, float, float]]:
    """`count` discs (x, y, radius in pixels, at least `smallest`) inside the picture that hardly touch one another."""
    low, high = RADII[count]
    low = max(low, smallest)
    while True:
        discs: list[tuple[float, float, float]] = []
        for _ in range(60):
            radius = rng.uniform(low, high)
            x, y = rng.uniform(radius * 0.95, SIZE - radius * 0.95, size=2)
            if all(np.hypot(x - a, y - b) > 0.97 * (radius + r) for a, b, r in discs):
                discs.append((float(x), float(y), float(radius)))
            if len(discs) == count:
                return discs


def sample_thing(rng: np.random.Generator, emblem_share: float, background: Background, world: World = WHOLE) -> Thing:
    """A random thing at the origin, of no colour of its background."""
    if rng.random() < emblem_share:
        emblem = sample_emblem(rng)
        while emblem.plate_colour in background.colours:
            emblem = sample_emblem(rng)
        return Thing(EMBLEM, emblem.plate_colour, "plain", 0.0, 0.0, 1.0, 0.0, emblem)
    free = [c for c in COLOURS if c not in background.colours]
    shape = world.shapes[rng.integers(len(world.shapes))]
    texture = TEXTURES[rng.choice(len(TEXTURES), p=world.textures)]
    return Thing(shape, free[rng.integers(len(free))], texture, 0.0, 0.0, 1.0)


def sample_scene(
    rng: np.random.Generator,
    count: int | None = None,
    emblem_share: float = 0.25,
    background: Background | None = None,
    set_share: float = 0.0,
    world: World = WHOLE,
    smallest: float = 0.0,
    twins: bool = False,
) -> Scene:
    """A random captioned scene of `count` things (one to four when not given) of a radius of at least `smallest`, each
    an emblem with probability `emblem_share`, or with `twins` all one and the same. With probability `set_share` it
    shows two to four of one and the same thing, emblems more often than not: what repeats in a picture is what a model
    learns to look for elsewhere in it."""
    is_set = rng.random() < set_share
    if is_set:
        count, emblem_share = int(rng.choice([2, 3, 4], p=[0.6, 0.25, 0.15])), 0.7
    count = count or int(rng.choice([1, 2, 3, 4], p=world.counts))
    background = background or sample_background(rng)
    things: list[Thing] = []
    for x, y, radius in place(rng, count, smallest):
        thing = things[0] if (is_set or twins) and things else sample_thing(rng, emblem_share, background, world)
        things.append(replace(thing, x=x, y=y, radius=radius, angle=float(rng.uniform(-0.45, 0.45))))
    scene = Scene(tuple(things), background, int(rng.integers(2**31)))
    return replace(scene, caption=describe(scene, rng))


def view(emblem: Emblem, rng: np.random.Generator, background: Background | None = None) -> Scene:
    """One more view of an emblem: alone, at a random place, size and angle, on a random background."""
    scene = sample_scene(rng, 1, 1.0, background)
    while background is None and emblem.plate_colour in scene.background.colours:
        scene = sample_scene(rng, 1, 1.0)
    thing = replace(scene.things[0], colour=emblem.plate_colour, emblem=emblem)
    return replace(scene, things=(thing,))


def phrase(thing: Thing, rng: np.random.Generator | None = None) -> str:
    """The words for one thing without its article: "red striped star", "emblem". With `rng` the wording varies."""
    if thing.shape == EMBLEM:
        return EMBLEM
    words = [thing.colour]
    if thing.texture != "plain":
        words.append(thing.texture)
    elif rng is not None and rng.random() < 0.1:
        words.append("plain")
    if rng is not None and rng.random() < 0.25:
        words.reverse()
    return " ".join([*words, thing.shape])


def plural(words: str) -> str:
    """The words for several things: "red crosses"."""
    return words + ("es" if words.endswith("s") else "s")


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def describe_background(background: Background, rng: np.random.Generator | None = None) -> str:
    """The words for a background, with their preposition."""
    if background.kind == "plain":
        return f"on {_with_article(background.colours[0])} background"
    if background.kind == "gradient":
        return f"on {_with_article(background.colours[0])} and {background.colours[1]} gradient"
    wordings = {
        "grass": ("on grass", "on the grass"),
        "sky": ("on sky", "in the sky"),
        "brick": ("on brick", "on a brick wall"),
        "sand": ("on sand", "on the sand"),
        "water": ("on water", "on the water"),
    }[background.kind]
    return wordings[0] if rng is None else wordings[rng.integers(2)]


def describe(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """A caption in plain English. With `rng` the wording varies and the background may go unsaid."""
    first = scene.things[0]
    kinds = {(t.shape, t.colour, t.texture, t.emblem) for t in scene.things}
    if len(scene.things) > 1 and len(kinds) == 1:
        text = f"{NUMBERS[len(scene.things)]} {plural(phrase(first, rng))}"
    else:
        parts = [_with_article(phrase(t, rng)) for t in scene.things]
        text = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    if rng is not None and rng.random() < 0.05:
        return text
    text = f"{text} {describe_background(scene.background, rng)}"
    return f"a picture of {text}" if rng is not None and rng.random() < 0.08 else text
