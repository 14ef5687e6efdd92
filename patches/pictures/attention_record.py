"""What a run's attention was like: maps of phrases and of what edits decided, and how much it lay on references.

ASA and SLD are AnyLogo's (Figure 1, Appendix E).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional

from ..engine.call import AttentionCall
from ..engine.chunk import Chunk
from ..engine.edit import Edit
from ..engine.streams import Features, Stream
from ..mechanisms.attention_maps import MeanMap, attention_maps
from ..parts.prompt import Spans, canonical, positions_of
from ..parts.sites import Site, acts_as

CROSS_ATTENTION = "cross-attention"
# Finer maps than this say nothing more to the eye and fill the memory: 70 layers times 25 steps is an SDXL run.
FINEST = 64
# Two samplers and a few turns of each; a run takes some 10 MB.
MOST_RUNS = 8


@dataclass(frozen=True)
class Row:
    """One layer at one noise level: `asa` the share of attention mass on the references (0 to 1), `sld` the L1
    distance between mean delivered features and mean own features."""

    sigma: float
    site: Site
    asa: float
    sld: float


@dataclass(frozen=True)
class Shown:
    """What a map is of: `kind` is CROSS_ATTENTION or the name that an edit gave its note, `label` the phrase or
    subject; `token` is the number of one token in a phrase, from 1, or 0 for all of them."""

    kind: str
    label: str
    token: int = 0

    def __str__(self) -> str:
        return f"{self.label}, token {self.token}" if self.token else self.label


@dataclass
class AttentionRecord:
    """A run: its rows, and its maps by what they show, layer and noise level, in the order they came. `sites` are the
    recorded layers, `picture` the recorded one of the batch, from 0."""

    sites: tuple[Site, ...] = ()
    picture: int = 0
    rows: list[Row] = field(default_factory=list)
    maps: dict[tuple[Shown, Site, float], MeanMap] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        return not self.rows and not self.maps

    def add(self, shown: Shown, site: Site, sigma: float, values: Tensor) -> None:
        """Keeps a map (height, width), on the CPU and at most FINEST cells on a side. A layer that is called several
        times at a noise level gives their mean."""
        if max(values.shape) > FINEST:
            scale = FINEST / max(values.shape)
            size = [max(round(side * scale), 1) for side in values.shape]
            values = functional.interpolate(values[None, None], size, mode="area")[0, 0]
        place = (shown, site, sigma)
        if place not in self.maps:
            self.maps[place] = MeanMap(values.cpu())
        elif values.shape == self.maps[place].value.shape:
            self.maps[place].add(values.cpu())

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of map there are, in the order they came."""
        return tuple(dict.fromkeys(shown.kind for shown, _, _ in self.maps))

    @property
    def sigmas(self) -> list[float]:
        """The noise levels of the run's steps, falling."""
        levels = {sigma for _, _, sigma in self.maps} | {row.sigma for row in self.rows}
        return sorted(levels, reverse=True)


@dataclass
class AttentionRuns:
    """The records of the last MOST_RUNS runs of a model, by what stands for each, the latest last. The value on an
    ATTENTION_RECORD link: a link is cached while several samplers run with it, so a record has to say whose it is."""

    sites: tuple[Site, ...] = ()
    picture: int = 0
    kept: dict[Hashable, AttentionRecord] = field(default_factory=dict)

    def begin(self, run: Hashable) -> AttentionRecord:
        """A record for a run. One that stands for the same and holds nothing is of a run around this one."""
        record = self.kept.pop(run, None)
        if record is None or not record.empty:
            record = AttentionRecord(self.sites, self.picture)
        self.kept[run] = record
        for old in list(self.kept)[:-MOST_RUNS]:
            del self.kept[old]
        return record

    @property
    def last(self) -> AttentionRecord | None:
        """The record of the last run, None before the first."""
        return next(reversed(self.kept.values()), None)


def subject_attention(call: AttentionCall, picture: int) -> float:
    """ASA: the share of a picture's attention mass that lies on reference keys, averaged over heads and queries."""
    return float(_of(call.extension_share(), picture).mean())


def latent_difference(call: AttentionCall, picture: int) -> float:
    """SLD: the mean over channels of |mean reference feature - mean own feature|, of one picture. The appendix speaks
    of latents in the delivered layer; the features compared here are the values, what a layer delivers."""
    delivered = torch.cat([_of(extension.value, picture) for extension in call.extensions]).float().mean(0)
    own = call.value if call.own is None else call.value[:, call.own]
    return float((delivered - _of(own, picture).float().mean(0)).abs().mean())


def _of(rows: Tensor, picture: int) -> Tensor:
    return rows[min(picture, len(rows) - 1)]


def phrase_tokens(spans: Mapping[str, Spans], phrases: Iterable[str]) -> dict[Shown, list[int]]:
    """The tokens of each phrase of a prompt, together and one by one; without `phrases`, of all that it knows."""
    wanted = {canonical(phrase) for phrase in phrases}
    groups: dict[Shown, list[int]] = {}
    for phrase, found in spans.items():
        if wanted and canonical(phrase) not in wanted:
            continue
        tokens = positions_of(found)
        groups[Shown(CROSS_ATTENTION, phrase)] = tokens
        if len(tokens) > 1:
            groups |= {Shown(CROSS_ATTENTION, phrase, number): [token] for number, token in enumerate(tokens, 1)}
    return groups


@dataclass(frozen=True, eq=False)
class RecordAttention(Edit):
    """Amends nothing; looks at every call for the maps of `phrases` (all that a prompt knows, without any), for what
    the other edits note, and for attention to references. Of a batch it keeps one picture's, the last one's where
    there are fewer. `run` says what stands for the run that begins."""

    runs: AttentionRuns
    phrases: tuple[str, ...] = ()
    run: Callable[[], Hashable] = field(default=lambda: None, repr=False)
    record: AttentionRecord = field(default_factory=AttentionRecord, repr=False)

    def begin(self) -> RecordAttention:
        return replace(self, record=self.runs.begin(self.run()))

    def observe(self, call: AttentionCall, sigma: float, recorded: Callable[[Stream], Features | None]) -> None:
        row = self._row(call.chunk)
        if row is None:
            return
        if call.extensions:
            measures = subject_attention(call, row), latent_difference(call, row)
            self.record.rows.append(Row(sigma, call.site, *measures))
        if acts_as(call.site, "cross"):
            self._keep_phrases(call, sigma, row)
        for note in call.notes:
            maps = _of(note.maps(), row)
            labels = note.labels or tuple(f"{n}" if len(maps) > 1 else note.name for n in range(1, len(maps) + 1))
            for label, values in zip(labels, maps, strict=True):
                self.record.add(Shown(note.name, _placed(label, call.chunk)), call.site, sigma, values)

    def _row(self, chunk: Chunk) -> int | None:
        """Which row of a chunk is the recorded picture; None where another pack's call is without it."""
        if chunk.pictures is None:
            return self.record.picture
        picture = min(self.record.picture, chunk.count - 1)
        return chunk.pictures.index(picture) if picture in chunk.pictures else None

    def _keep_phrases(self, call: AttentionCall, sigma: float, row: int) -> None:
        groups = phrase_tokens(call.chunk.spans, self.phrases)
        maps = attention_maps(call, list(groups.values())) if groups else None
        if maps is None:
            return
        maps = _of(maps, row)
        for shown, values in zip(groups, maps, strict=True):
            placed = Shown(shown.kind, _placed(shown.label, call.chunk), shown.token)
            self.record.add(placed, call.site, sigma, values)


def _placed(label: str, chunk: Chunk) -> str:
    """A label that says which part of the picture a map is of, where area conditioning or a tile cut one out."""
    if chunk.lines is not None:
        return f"{label} (part of the picture)"
    if chunk.area is None:
        return label
    height, width, y, x = chunk.area
    return f"{label} (area {8 * width} x {8 * height} at {8 * x}, {8 * y})"


def table(rows: Iterable[Row]) -> str:
    """CSV with a heading: sigma, layer, asa, sld."""
    lines = [f"{row.sigma:.4f},{row.site},{row.asa:.5f},{row.sld:.5f}" for row in rows]
    return "\n".join(["sigma,layer,asa,sld", *lines])
