"""Diffusion transformers. The host lets every attention of theirs pass through one override: see `openings.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

from torch import Tensor

from ..parts.sites import Kind, Site
from .family import Family
from .rope import Rope


@dataclass(frozen=True)
class Blocks:
    """A list of blocks: the `word` that users name them by, the host's `block_type` in the options of an attention,
    and where in the network the list is."""

    word: str
    block_type: str
    path: str

    def of(self, network: Any) -> Any:
        return reduce(getattr, self.path.split("."), network)


@dataclass(frozen=True)
class Tokens:
    """Where tokens lie in one attention: the picture's among the queries (`picture`) and among the keys (`own`), and
    those of the context that the model was given, repetitions and all, among the keys (`prompt`); None where there are
    none of them, and for `own` where every key is its own."""

    picture: slice
    own: slice | None
    prompt: slice | None


@dataclass(frozen=True)
class Counts:
    """How many `queries` and `keys` an attention has, and how many tokens its `picture`, its `context` and the host's
    reference latents (`references`) have; `begins` is where the host says that the picture begins, if it does, and
    `ahead` how many tokens of the text come before the context's."""

    queries: int
    keys: int
    picture: int
    context: int
    references: int = 0
    begins: int | None = None
    ahead: int = 0


@dataclass(frozen=True)
class Transformer(Family):
    """A family of transformers over patches of `patch` latent pixels a side.

    `told` is how an attention is known to be a block's: by the "index" in its options, by a wrapper around the block in
    the host's slot for a "replacement" of it, or by the "order" of the calls. Where `tells`, the host's last
    `attn1_patch` before an attention is told where its picture begins, whatever others did to its tokens. `but` names
    descriptions of the host's that are made of the family's and are something else."""

    blocks: tuple[Blocks, ...]
    patch: int = 2
    told: Literal["index", "replacement", "order"] = "index"
    tells: bool = False
    but: tuple[str, ...] = ()

    def has(self, model: Any) -> bool:
        return super().has(model) and type(model.model.model_config).__name__ not in self.but

    def kinds(self, network: Any, word: str, number: int) -> tuple[Kind, ...]:
        """The attentions of a block in the order in which they run."""
        return ("joint",)

    def sites(self, network: Any) -> tuple[Site, ...]:
        blocks = [(each.word, number) for each in self.blocks for number in range(len(each.of(network)))]
        sites = []
        for done, (word, number) in enumerate(blocks):
            half = "encoder" if 2 * done < len(blocks) else "decoder"
            kinds = self.kinds(network, word, number)
            sites += [Site(kind, word, number, index, half) for index, kind in enumerate(kinds)]
        return tuple(sites)

    def usual(self, choice: str) -> str:
        # On the pack's small transformer all layers show a reference better than any part of them (docs/EFFECTS.md).
        return "encoder and decoder"

    def project(self, network: Any, site: Site, tokens: Tensor) -> tuple[Tensor, Tensor]:
        # The node asks for no image prompt where no layer reads prompts by themselves.
        raise NotImplementedError

    def shown(self, inner: Any, known: Tensor) -> dict[str, Tensor]:
        return {"latent_image": known}

    def grid(self, latent: tuple[int, int]) -> tuple[int, int]:
        """The (height, width) of the picture's tokens, of latents (height, width)."""
        return (-(-latent[0] // self.patch), -(-latent[1] // self.patch))

    def grid_at(self, network: Any, site: Site, latent: tuple[int, int]) -> tuple[int, int]:
        return self.grid(latent)

    def width(self, network: Any) -> int:
        """How many channels the tokens of a picture have."""
        return network.hidden_size

    def channels(self, network: Any, site: Site, part: str) -> int:
        return self.width(network) // (self.repeats(network) if part in ("key", "value") else 1)

    def tokens(self, kind: Kind, counts: Counts) -> Tokens | None:
        """Where tokens lie in an attention; None where another pack changed them.

        A joint attention's tokens are here the context, what others put before and behind it, the picture, the
        references."""
        count, context, ahead = counts.picture, counts.context, counts.ahead
        if kind == "self":
            return Tokens(slice(0, count), None, None) if counts.queries == count else None
        if kind == "cross":
            known = counts.queries == count and counts.keys >= context
            # Of more keys another pack's are some, and nothing says which.
            prompt = slice(0, context) if counts.keys == context else None
            return Tokens(slice(0, count), None, prompt) if known else None
        start = counts.queries - counts.references - count if counts.begins is None else counts.begins
        if start < ahead + context or start + count > min(counts.queries, counts.keys):
            return None
        return Tokens(slice(start, start + count), slice(start, start + count), slice(ahead, ahead + context))

    def context_length(self, context: Tensor | None, given: Mapping[str, Any]) -> int:
        """How many tokens the context of one forward has, by the model's arguments: `context`, and by name what else it
        is `given`."""
        return 0 if context is None else context.shape[1]

    def tokens_ahead(self, given: Mapping[str, Any]) -> int:
        """How many tokens of other prompts, those of the host's reference latents, come before the context's."""
        return 0

    def repeats(self, network: Any) -> int:
        """How often the model repeats each head of its keys and values before an attention; one of each is stored."""
        return 1

    def rope(self, network: Any) -> Rope | None:
        """The rotations by which its attentions know places, or None where they know them in another way."""
        return None

    def stands_at(self, context: int) -> int:
        """Where on the first axis of `rope` a picture stands, behind a context of so many tokens."""
        return 0

    def first(self, grid: tuple[int, int]) -> tuple[int, int]:
        """The place (row, column) of a picture's first token, of tokens (height, width), on the second and the third
        axis of `rope`."""
        return (0, 0)
