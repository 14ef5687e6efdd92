"""AttentionCall: one attention at one site for one chunk of the batch, and what edits amended in it.

An edit computes no attention. It amends the call, and `execution.execute` runs what came of it once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .sites import Site

if TYPE_CHECKING:
    from .streams import Stream

# The name of a chunk that is the pass of a branch beside the generation.
BRANCH = "branch"


@dataclass(frozen=True)
class Chunk:
    """One conditioning's share of a batch: `rows` of it, the conditioning's dictionary as the sampler holds it, the
    name of the guider's list it stands in ("positive", ...; "" where it is unknown) and whether that list conditions on
    a prompt. The pass of a branch that denoises beside the generation is one chunk of the name BRANCH, and `stream` is
    the branch.

    `area` is (height, width, y, x) in latent pixels where the host cropped the latent, else None; `latent` is the
    whole latent's (height, width)."""

    rows: slice
    name: str
    conditioned: bool
    conditioning: dict[str, Any]
    latent: tuple[int, int]
    area: tuple[int, int, int, int] | None = None
    stream: Stream | None = None

    @property
    def generated(self) -> bool:
        """Whether it is known to be one of the generation's."""
        return self.name not in ("", BRANCH)


@dataclass(frozen=True)
class Extension:
    """Keys and values (rows or 1, n, channels) that a call attends over besides its own.

    `bias` is added to their logits, broadcastable to (rows, queries, n). `route`, of shape (rows or 1, queries), says
    which queries see them at all; None is every query. A route is best on the CPU, where it can be looked at without
    waiting for a GPU."""

    key: Tensor
    value: Tensor
    bias: Tensor | None = None
    route: Tensor | None = None


@dataclass(frozen=True)
class Note:
    """What an edit decided at a call, for whoever looks inside: `make` gives maps over the call's places, float,
    (rows or 1, height, width) or (rows or 1, k, height, width); `labels` says what each of the k is, where that is
    known."""

    name: str
    make: Callable[[], Tensor]
    labels: tuple[str, ...] = ()

    def maps(self) -> Tensor:
        """The maps, made now: (rows or 1, k, height, width) in float32."""
        made = self.make().detach().float()
        made = made if made.ndim == 4 else made[:, None]
        if made.ndim != 4 or len(self.labels) not in (0, made.shape[1]):
            raise ValueError(
                f"The note '{self.name}' made a tensor of shape {tuple(made.shape)} for {len(self.labels)} labels."
            )
        return made


@dataclass
class AttentionCall:
    """One attention: query, key and value of shape (rows, tokens, channels), heads not yet split.

    `grid` is the (height, width) of the query tokens, or None where another pack changed their number; an edit that
    needs places must then leave the call as it is. `replaced` names which of query, key and value edits have put
    there in the place of the layer's own. `project` gives the layer's own keys and values of other tokens (rows, n,
    channels of what the layer attends to)."""

    query: Tensor
    key: Tensor
    value: Tensor
    heads: int
    site: Site
    chunk: Chunk
    grid: tuple[int, int] | None
    amended: bool = False
    extensions: list[Extension] = field(default_factory=list)
    own_bias: Tensor | None = None
    blends: list[Callable[[Tensor], Tensor]] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    replaced: set[str] = field(default_factory=set)
    project: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None

    def note(self, name: str, make: Callable[[], Tensor], labels: Sequence[str] = ()) -> None:
        """Tells what an edit decided here, as in `call.note("aggregation mask", lambda: mask)`; see `Note`.

        Costs nothing unless an observing edit asks: `make` is called then, after every edit has amended the call, or
        never. Two edits may note one name."""
        self.notes.append(Note(name, make, tuple(labels)))

    def replace(self, query: Tensor | None = None, key: Tensor | None = None, value: Tensor | None = None) -> None:
        """Puts other tensors in the place of query, key or value; key and value must stay of one length. A bias for
        the keys that go, goes with them."""
        self.query = self.query if query is None else query
        self.key = self.key if key is None else key
        self.value = self.value if value is None else value
        given = {"query": query, "key": key, "value": value}
        self.replaced.update(name for name, tensor in given.items() if tensor is not None)
        self.own_bias = self.own_bias if key is None else None
        if self.key.shape[1] != self.value.shape[1]:
            raise ValueError(f"{self.key.shape[1]} keys cannot go with {self.value.shape[1]} values at {self.site}.")
        self.amended = True

    def extend(self, key: Tensor, value: Tensor, bias: Tensor | None = None, route: Tensor | None = None) -> None:
        """Attends over these keys and values besides its own, in one softmax; see `Extension`."""
        self.extensions.append(Extension(key, value, bias, route))
        self.amended = True

    def bias(self, bias: Tensor, tokens: Sequence[int] | None = None) -> None:
        """Adds to the scaled logits of the call's own keys: `bias` is broadcastable to (rows, queries, keys), or to
        (rows, queries, len(tokens)) when `tokens` names the keys it is for."""
        if tokens is not None:
            full = bias.new_zeros((*bias.shape[:-1], self.key.shape[1]))
            full[..., list(tokens)] = bias
            bias = full
        self.own_bias = bias if self.own_bias is None else self.own_bias + bias
        self.amended = True

    def blend(self, function: Callable[[Tensor], Tensor]) -> None:
        """Passes the call's output (rows, queries, channels), before the output projection, through `function`."""
        self.blends.append(function)
        self.amended = True

    def scores(self) -> Tensor:
        """The scaled logits of the call's own keys with their bias: (rows, heads, queries, keys) in float32."""
        logits = head_split(self.query, self.heads) @ head_split(self.key, self.heads).transpose(-1, -2)
        logits = logits * (self.query.shape[-1] // self.heads) ** -0.5
        return logits if self.own_bias is None else logits + per_head(self.own_bias)

    def probabilities(self) -> Tensor:
        """Attention over the call's own keys: (rows, heads, queries, keys)."""
        return self.scores().softmax(-1)

    def extension_share(self) -> Tensor:
        """Share of the attention mass that lies on the extensions: (rows, heads, queries), 0 to 1."""
        own = self.scores().logsumexp(-1)
        shares = [own]
        queries = head_split(self.query, self.heads) * (self.query.shape[-1] // self.heads) ** -0.5
        for extension in self.extensions:
            logits = queries @ head_split(extension.key, self.heads).transpose(-1, -2)
            if extension.bias is not None:
                logits = logits + per_head(extension.bias).to(logits.device)
            if extension.route is not None:
                unseen = ~extension.route.to(logits.device)[:, None, :, None]
                logits = logits.masked_fill(unseen, -torch.inf)
            shares.append(logits.logsumexp(-1))
        return 1 - torch.stack(shares).softmax(0)[0]


def head_split(tokens: Tensor, heads: int) -> Tensor:
    """(rows, tokens, channels) to (rows, heads, tokens, channels / heads) in float32."""
    return tokens.float().unflatten(-1, (heads, -1)).transpose(1, 2)


def per_head(bias: Tensor) -> Tensor:
    """A bias broadcastable to (rows, queries, keys), made broadcastable to (rows, heads, queries, keys)."""
    return bias.float().expand(*(1,) * max(0, 3 - bias.ndim), *bias.shape).unsqueeze(1)
