"""Attention sites: what they are called, and how a user names them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Stage = Literal["encoder", "middle", "decoder"]
STAGE_OF_BLOCK: dict[str, Stage] = {"input": "encoder", "middle": "middle", "output": "decoder"}


@dataclass(frozen=True, order=True)
class Site:
    """One attention layer: `kind` "self" or "cross", the host's block ("input", "middle" or "output") and its number,
    and the index of the transformer block in it."""

    kind: Literal["self", "cross"]
    block: str
    number: int
    index: int

    @property
    def stage(self) -> Stage:
        return STAGE_OF_BLOCK[self.block]

    @property
    def key(self) -> tuple[str, int, int]:
        """The host's key of this layer's replacement slot."""
        return (self.block, self.number, self.index)

    def __str__(self) -> str:
        return f"{self.block}.{self.number}.{self.index}"


# What the sites menu offers: the paper's decoder (AnyLogo counts the middle block to it), and its ablations.
CHOICES = ("decoder", "encoder", "encoder and decoder", "named")
_STAGES: dict[str, frozenset[Stage]] = {
    "decoder": frozenset({"middle", "decoder"}),
    "encoder": frozenset({"encoder"}),
    "encoder and decoder": frozenset({"encoder", "middle", "decoder"}),
}
_NAMED = re.compile(r"(input|middle|output)(?:\.(\d+))?(?:\.(\d+))?")


def select_sites(sites: Iterable[Site], kind: str, choice: str, named: str = "") -> frozenset[Site]:
    """The sites of one kind that a menu choice means. With "named", `named` lists blocks in the host's words:
    "middle, output.3, output.4.0" (a block, a numbered block, one transformer block of it).

    Raises ValueError when the choice or a name means no site of this model."""
    mine = [site for site in sites if site.kind == kind]
    if choice != "named":
        if choice not in _STAGES:
            raise ValueError(f"Sites are one of {', '.join(CHOICES)}, not '{choice}'.")
        return frozenset(site for site in mine if site.stage in _STAGES[choice])
    return sites_named(mine, named, f"{kind}-attention")


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
            blocks = ", ".join(dict.fromkeys(str(site) for site in sorted(mine)))
            raise ValueError(f"The block '{word}' names no {kind} of this model; it has {blocks}.")
        chosen |= found
    if not chosen:
        raise ValueError("Sites are set to named blocks but none is named; write for example: middle, output.3")
    return frozenset(chosen)


def _is_named(site: Site, match: re.Match[str]) -> bool:
    block, number, index = match.groups()
    return site.block == block and number in (None, str(site.number)) and index in (None, str(site.index))
