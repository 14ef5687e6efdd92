"""What a run's attention to its references was like: ASA and SLD by layer and step (AnyLogo, Figure 1, Appendix E)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .call import AttentionCall
from .edit import Edit
from .sites import Site
from .streams import Features, Stream


@dataclass(frozen=True)
class Row:
    """One layer at one noise level: `asa` the share of attention mass on the references (0 to 1), `sld` the L1
    distance between mean delivered features and mean own features."""

    sigma: float
    site: Site
    asa: float
    sld: float


@dataclass
class AttentionRecord:
    """The rows of the last run."""

    rows: list[Row] = field(default_factory=list)


def subject_attention(call: AttentionCall) -> float:
    """ASA: the share of all attention mass that lies on reference keys, averaged over rows, heads and queries."""
    return float(call.extension_share().mean())


def latent_difference(call: AttentionCall) -> float:
    """SLD: the mean over channels of |mean reference feature - mean own feature|. The appendix speaks of latents in
    the delivered layer; the features compared here are the values, what a layer delivers."""
    delivered = torch.cat([extension.value.flatten(0, 1) for extension in call.extensions]).float().mean(0)
    return float((delivered - call.value.float().mean((0, 1))).abs().mean())


@dataclass(frozen=True, eq=False)
class RecordAttention(Edit):
    """Amends nothing; looks at every call that attends to a reference."""

    record: AttentionRecord

    def begin(self) -> RecordAttention:
        self.record.rows.clear()
        return self

    def observe(self, call: AttentionCall, sigma: float, recorded: Callable[[Stream], Features | None]) -> None:
        if call.extensions:
            self.record.rows.append(Row(sigma, call.site, subject_attention(call), latent_difference(call)))


def table(rows: Iterable[Row]) -> str:
    """CSV with a heading: sigma, layer, asa, sld."""
    lines = [f"{row.sigma:.4f},{row.site},{row.asa:.5f},{row.sld:.5f}" for row in rows]
    return "\n".join(["sigma,layer,asa,sld", *lines])


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
    white the largest value; layers that saw no reference at a level are grey."""
    import numpy as np
    from PIL import Image, ImageDraw

    cell, label, heading = 28, 110, 34
    panels = []
    for name, title in (("asa", "ASA: share of attention on the reference"), ("sld", "SLD: distance of mean features")):
        values, sites, sigmas = _matrix(rows, name)
        most = float(values[values.isfinite()].max())
        width = label + max(cell * len(sigmas) + 10, 260)
        panel = Image.new("RGB", (width, heading + cell * len(sites) + 26), (24, 26, 32))
        pen = ImageDraw.Draw(panel)
        pen.text((8, 10), f"{title}, 0 to {most:.3g}", fill=(235, 235, 235))
        for down, site in enumerate(sites):
            pen.text((8, heading + down * cell + 8), site, fill=(200, 200, 200))
            for across in range(len(sigmas)):
                value = float(values[down, across]) / max(most, 1e-12)
                shade = (90, 90, 90) if value != value else _shade(value)
                x, y = label + across * cell, heading + down * cell
                pen.rectangle((x, y, x + cell - 2, y + cell - 2), fill=shade)
        below = heading + cell * len(sites) + 6
        pen.text((label, below), f"sigma {sigmas[0]:.2f}", fill=(200, 200, 200))
        pen.text((label + cell * len(sigmas) - 60, below), f"{sigmas[-1]:.2f}", fill=(200, 200, 200))
        panels.append(panel)
    sheet = Image.new("RGB", (max(p.width for p in panels), sum(p.height for p in panels)), (24, 26, 32))
    top = 0
    for panel in panels:
        sheet.paste(panel, (0, top))
        top += panel.height
    return torch.from_numpy(np.asarray(sheet, dtype=np.float32) / 255)[None]


def _shade(value: float) -> tuple[int, int, int]:
    """Dark blue over orange to white."""
    stops = ((20, 24, 60), (170, 60, 90), (245, 150, 50), (255, 255, 240))
    position = min(max(value, 0.0), 1.0) * (len(stops) - 1)
    low = min(int(position), len(stops) - 2)
    share = position - low
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(stops[low], stops[low + 1], strict=True))
    return red, green, blue
