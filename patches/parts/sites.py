"""Attention sites: what they are called, and how a user names them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["self", "cross", "joint"]
Stage = Literal["encoder", "middle", "decoder"]
STAGE_OF_BLOCK: dict[str, Stage] = {"input": "encoder", "middle": "middle", "output": "decoder"}


@dataclass(frozen=True, order=True)
class Site:
    """One attention layer: its `kind`, the name and number of its block, and the layer's index in it.

    In a U-Net the block is the host's ("input", "middle" or "output") and the index that of the transformer block. In a
    transformer blocks are "double", "single" or "block"; "joint" attention is that of prompt and picture together, and
    `half` says in which half of the blocks it lies: "encoder" or "decoder"."""

    kind: Kind
    block: str
    number: int
    index: int
    half: Stage | None = field(default=None, compare=False)

    @property
    def stage(self) -> Stage:
        return self.half or STAGE_OF_BLOCK[self.block]

    @property
    def key(self) -> tuple[str, int, int]:
        """The host's key of this layer's replacement slot in a U-Net."""
        return (self.block, self.number, self.index)

    def __str__(self) -> str:
        named = f"{self.block}.{self.number}"
        return f"{named}.{self.index}" if self.index or self.block in STAGE_OF_BLOCK else named


# What the sites menu offers: what is usual for a node and a family, the paper's decoder (AnyLogo counts the middle
# block to it; of a transformer it is the second half), and its ablations.
USUAL = "usual"
CHOICES = (USUAL, "decoder", "encoder", "encoder and decoder", "named")
# What the swap's menu offers besides: the later two thirds of the decoder's blocks.
LATE = "late decoder"
_STAGES: dict[str, frozenset[Stage]] = {
    "decoder": frozenset({"middle", "decoder"}),
    "encoder": frozenset({"encoder"}),
    "encoder and decoder": frozenset({"encoder", "middle", "decoder"}),
}
_NAMED = re.compile(r"([a-z]+)(?:\.(\d+)(?:-(\d+))?)?(?:\.(\d+))?")


def acts_as(site: Site, kind: str) -> bool:
    """Whether a layer is one of a kind, "self" or "cross"; a joint one is both."""
    return site.kind in (kind, "joint")


def select_sites(sites: Iterable[Site], kind: str, choice: str, named: str = "") -> frozenset[Site]:
    """The sites of one kind that a menu choice means. With "named", `named` lists blocks in the host's words:
    "middle, output.3, output.4.0" or "double.3, single.0-12" (a block, a numbered block, a range of them, one
    transformer block of it). What is usual is for the family to say: see `families.chosen_sites`.

    Raises ValueError when the choice or a name means no site of this model."""
    mine = [site for site in sites if acts_as(site, kind)]
    if choice == LATE:
        return late_decoder(mine)
    if choice != "named":
        if choice not in _STAGES:
            raise ValueError(f"Sites are one of {', '.join(CHOICES)}, not '{choice}'.")
        return frozenset(site for site in mine if site.stage in _STAGES[choice])
    return sites_named(mine, named, f"{kind}-attention")


def late_decoder(sites: Iterable[Site]) -> frozenset[Site]:
    """The decoder's sites but those of the first third of its blocks, the middle not among them: of SD 1.x output.6 to
    output.11, its layers 10 to 15 of 16 (MasaCtrl; DreamMatcher); by the same rule output.2 to output.5 of SDXL, its
    layers 54 to 69 of 70, the middle one of the three choices that MasaCtrl's script for SDXL tries."""
    decoder = [site for site in sites if site.stage == "decoder"]
    blocks = sorted({(site.half is not None and site.block != "double", site.number, site.block) for site in decoder})
    kept = {(block, number) for _, number, block in blocks[len(blocks) // 3 :]}
    return frozenset(site for site in decoder if (site.block, site.number) in kept)


def sites_named(sites: Iterable[Site], named: str, kind: str = "attention") -> frozenset[Site]:
    """The sites that lie in blocks written in the host's words; see `select_sites`. `kind` is what errors call them.

    Raises ValueError when a name means none of them, or nothing is named."""
    mine, chosen = tuple(sites), set()
    for word in (word.strip() for word in named.split(",")):
        if not word:
            continue
        match = _NAMED.fullmatch(word)
        found = {site for site in mine if match and _is_named(site, match)}
        if not found:
            blocks = _listed(mine)
            raise ValueError(f"The block '{word}' names no {kind} of this model; it has {blocks}.")
        chosen |= found
    if not chosen:
        example = "middle, output.3" if any(site.half is None for site in mine) else _listed(mine)
        raise ValueError(f"Sites are set to named blocks but none is named; write for example: {example}.")
    return frozenset(chosen)


def _listed(sites: Sequence[Site]) -> str:
    """The names of blocks; of a transformer's many, their ranges."""
    if any(site.half is None for site in sites):
        return ", ".join(dict.fromkeys(str(site) for site in sorted(sites)))
    numbers: dict[str, list[int]] = {}
    for site in sites:
        numbers.setdefault(site.block, []).append(site.number)
    return ", ".join(f"{block}.{min(found)}-{max(found)}" for block, found in numbers.items())


def _is_named(site: Site, match: re.Match[str]) -> bool:
    block, first, last, index = match.groups()
    numbered = first is None or int(first) <= site.number <= int(last or first)
    return site.block == block and numbered and index in (None, str(site.index))
