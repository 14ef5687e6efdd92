"""Pictures of what AttentionRecord holds: maps as heat, over the picture they belong to; the plot of ASA and SLD."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..mechanisms.attention_maps import normalised
from ..parts.sites import Site
from .attention_record import CROSS_ATTENTION, AttentionRecord, Row, Shown

# Dark blue over orange to white.
_STOPS = ((20, 24, 60), (170, 60, 90), (245, 150, 50), (255, 255, 240))
_DARK, _GREY, _LIGHT = (24, 26, 32), (90, 90, 90), (225, 225, 225)
BY_STEP, BY_LAYER = "subjects by steps", "layers by steps"
_WIDTH, _LEAST, _MOST = 1400, 40, 144
# Letters are as high as a seventh of a cell is wide, so that they can be read where the whole grid is shown smaller.
_LETTERS = 10, 20

Place = tuple[Shown, Site, float]


def heat(values: Tensor) -> Tensor:
    """Values of 0 to 1, any shape, as colours (..., 3) of 0 to 1."""
    stops = torch.tensor(_STOPS, dtype=torch.float32) / 255
    position = values.float().clamp(0, 1) * (len(stops) - 1)
    low = position.long().clamp(max=len(stops) - 2)
    return torch.lerp(stops[low], stops[low + 1], (position - low)[..., None])


def overlay(values: Tensor, picture: Tensor, opacity: float) -> Tensor:
    """A map (height, width) of 0 to 1 as heat over a picture (h, w, 3) of 0 to 1, at the picture's size; its cells are
    not smoothed. `opacity` 1 is the heat alone."""
    large = functional.interpolate(values[None, None], tuple(picture.shape[:2]), mode="nearest")[0, 0]
    return torch.lerp(picture, heat(large), opacity)


# Which maps


@dataclass(frozen=True)
class Selection:
    """Which of a record's maps: in some layers (all where None), from one step to another, counted from 1, with or
    without single tokens, of labels that contain one of `labels` (all where empty)."""

    sites: frozenset[Site] | None = None
    first_step: int = 1
    last_step: int = 10**6
    tokens: bool = False
    labels: tuple[str, ...] = ()

    def of(self, record: AttentionRecord, kind: str) -> dict[Place, Tensor]:
        """The maps of a kind (height, width): a mask's as they are, those of attention each stretched to 0 to 1."""
        levels = record.sigmas[self.first_step - 1 : self.last_step]
        found = {
            (shown, site, sigma): kept.value
            for (shown, site, sigma), kept in record.maps.items()
            if shown.kind == kind and (self.tokens or not shown.token) and self._is_named(shown)
            if (self.sites is None or site in self.sites) and sigma in levels
        }
        return {place: normalised(values) for place, values in found.items()} if kind == CROSS_ATTENTION else found

    def _is_named(self, shown: Shown) -> bool:
        return not self.labels or any(label.casefold() in shown.label.casefold() for label in self.labels)


def mean_map(maps: Sequence[Tensor]) -> Tensor:
    """The mean of maps of several sizes, at the size of the finest."""
    size = max((tuple(each.shape) for each in maps), key=lambda shape: shape[0] * shape[1])
    resized = [functional.interpolate(each[None, None], size, mode="bilinear")[0, 0] for each in maps]
    return torch.stack(resized).mean(0)


def by_shown(maps: Mapping[Place, Tensor]) -> dict[Shown, list[Tensor]]:
    """The maps of each phrase or subject."""
    groups: dict[Shown, list[Tensor]] = {}
    for (shown, _, _), values in maps.items():
        groups.setdefault(shown, []).append(values)
    return groups


# Sheets


@dataclass(frozen=True)
class Sheet:
    """A grid of maps under a title; `cells` are by row and column."""

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: dict[tuple[int, int], Tensor]


def sheets(maps: Mapping[Place, Tensor], sigmas: Sequence[float], arrange: str) -> list[Sheet]:
    """Sheets whose columns are steps: one with a row for each phrase or subject, its layers averaged (BY_STEP), or one
    for each of them with a row for each layer, as AnyStory's Figure 4 (BY_LAYER). `sigmas` are all of the run's."""
    if arrange == BY_STEP:
        shown, _, _ = next(iter(maps))
        return [_sheet(shown.kind, maps, sigmas, lambda shown, site: shown)]
    return [
        _sheet(
            f"{shown.kind}: {shown}",
            {place: values for place, values in maps.items() if place[0] == shown},
            sigmas,
            lambda _, site: site,
        )
        for shown in by_shown(maps)
    ]


def _sheet(
    title: str, maps: Mapping[Place, Tensor], sigmas: Sequence[float], row_of: Callable[[Shown, Site], Any]
) -> Sheet:
    rows = list(dict.fromkeys(row_of(shown, site) for shown, site, _ in maps))
    levels = [sigma for sigma in sigmas if any(sigma == other for _, _, other in maps)]
    cells: dict[tuple[int, int], list[Tensor]] = {}
    for (shown, site, sigma), values in maps.items():
        cells.setdefault((rows.index(row_of(shown, site)), levels.index(sigma)), []).append(values)
    names = tuple(f"step {sigmas.index(level) + 1}" for level in levels)
    return Sheet(title, tuple(map(str, rows)), names, {place: mean_map(found) for place, found in cells.items()})


def draw_sheets(made: Sequence[Sheet], picture: Tensor, opacity: float) -> Tensor:
    """The sheets below one another, (1, height, width, 3) of 0 to 1; what a layer did not show at a step is grey.
    `picture` is (h, w, 3) of 0 to 1."""
    from PIL import Image, ImageDraw, ImageFont

    columns = max(len(sheet.columns) for sheet in made)
    width = min(max(_WIDTH // columns, _LEAST), _MOST)
    height = max(round(width * picture.shape[0] / picture.shape[1]), 8)
    small = functional.interpolate(picture.movedim(-1, 0)[None], (height, width), mode="bilinear", antialias=True)
    small = small[0].movedim(0, -1)
    letters = min(max(width // 7, _LETTERS[0]), _LETTERS[1])
    label, heading, gap = 9 * letters, 3 * letters, 3
    font = ImageFont.load_default(letters)
    panels = []
    for sheet in made:
        size = (label + columns * (width + gap), heading + len(sheet.rows) * (height + gap) + 8)
        panel = Image.new("RGB", size, _DARK)
        pen = ImageDraw.Draw(panel)
        pen.text((8, letters // 3), sheet.title, fill=_LIGHT, font=font)
        for across, name in enumerate(sheet.columns):
            x, y = label + across * (width + gap), heading - letters - letters // 3
            pen.text((x, y), name, fill=_LIGHT, font=font)
        for down, name in enumerate(sheet.rows):
            y = heading + down * (height + gap)
            pen.multiline_text((8, y + 2), _wrapped(name), fill=_LIGHT, font=font)
            for across in range(len(sheet.columns)):
                x = label + across * (width + gap)
                values = sheet.cells.get((down, across))
                if values is None:
                    pen.rectangle((x, y, x + width - 1, y + height - 1), fill=_GREY)
                    continue
                pixels = (overlay(values, small, opacity) * 255).round().byte().numpy()
                panel.paste(Image.fromarray(pixels), (x, y))
        panels.append(panel)
    return _stacked(panels)


def _wrapped(name: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(name, 15))


def _stacked(panels: Sequence[Any]) -> Tensor:
    import numpy as np
    from PIL import Image

    sheet = Image.new("RGB", (max(p.width for p in panels), sum(p.height for p in panels)), _DARK)
    top = 0
    for panel in panels:
        sheet.paste(panel, (0, top))
        top += panel.height
    return torch.from_numpy(np.asarray(sheet, dtype=np.float32) / 255)[None]


# ASA and SLD


def _matrix(rows: Sequence[Row], name: str) -> tuple[Tensor, list[str], list[float]]:
    sites = list(dict.fromkeys(row.site for row in rows))
    sigmas = sorted({row.sigma for row in rows}, reverse=True)
    sums, counts = torch.zeros(len(sites), len(sigmas)), torch.zeros(len(sites), len(sigmas))
    for row in rows:
        place = (sites.index(row.site), sigmas.index(row.sigma))
        sums[place] += getattr(row, name)
        counts[place] += 1
    return sums / counts, [str(site) for site in sites], sigmas


def plot(rows: Sequence[Row]) -> Tensor:
    """A picture (1, height, width, 3) of 0 to 1: for ASA and SLD a map of layers (down) by noise levels (across),
    white the largest value; layers that saw no reference at a level are grey. Without rows, a line that says so."""
    from PIL import Image, ImageDraw

    if not rows:
        panel = Image.new("RGB", (380, 34), _DARK)
        ImageDraw.Draw(panel).text((8, 10), "The picture attended to no reference.", fill=_LIGHT)
        return _stacked([panel])
    cell, label, heading = 28, 110, 34
    panels = []
    for name, title in (
        ("asa", "ASA: share of attention on the references"),
        ("sld", "SLD: distance of mean features"),
    ):
        values, sites, sigmas = _matrix(rows, name)
        most = float(values[values.isfinite()].max())
        width = label + max(cell * len(sigmas) + 10, 260)
        panel = Image.new("RGB", (width, heading + cell * len(sites) + 26), _DARK)
        pen = ImageDraw.Draw(panel)
        pen.text((8, 10), f"{title}, 0 to {most:.3g}", fill=_LIGHT)
        shades = (heat(values.nan_to_num() / max(most, 1e-12)) * 255).round().int()
        for down, site in enumerate(sites):
            pen.text((8, heading + down * cell + 8), site, fill=_LIGHT)
            for across in range(len(sigmas)):
                seen = bool(values[down, across].isfinite())
                shade = tuple(shades[down, across].tolist()) if seen else _GREY
                x, y = label + across * cell, heading + down * cell
                pen.rectangle((x, y, x + cell - 2, y + cell - 2), fill=shade)
        below = heading + cell * len(sites) + 6
        pen.text((label, below), f"sigma {sigmas[0]:.2f}", fill=_LIGHT)
        pen.text((label + cell * len(sigmas) - 60, below), f"{sigmas[-1]:.2f}", fill=_LIGHT)
        panels.append(panel)
    return _stacked(panels)
