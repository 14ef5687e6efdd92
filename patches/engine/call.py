"""AttentionCall: one attention at one site for one chunk of the batch, and what edits amended in it.

An edit computes no attention. It amends the call, and `execution.execute` runs what came of it once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..parts.sites import Site
from .amendments import Blend, Extension, Note
from .bias import Bias, of_queries, per_head, summed
from .chunk import Chunk
from .forms import Given, formed, head_split

# What another pack may have changed in a layer, so that an edit cannot act there.
PLACES = "where its queries lie in the picture"
PROMPT = "the tokens of its prompt"
BATCH = "the rows of its batch"
# Logits (rows, heads, queries, keys) that are held at once, for whoever looks at an attention: 64 MB in float32. On a
# CPU 4 MB, which its caches hold, but not of so few queries that reading the keys anew for each lot would cost more.
_HELD = 2**24
_CACHED, _FEWEST = 2**20, 64


@dataclass(eq=False)
class AttentionCall:
    """One attention: query, key and value of shape (rows, tokens, channels), heads not yet split, or given with heads
    apart (rows, heads, tokens, width): see `given`. Of a joint attention of prompt and picture it has the picture's
    queries only, over all keys: queries do not know of each other.

    `grid` is the (height, width) of the query tokens, or None where another pack changed their number; an edit that
    needs places must then leave the call as it is. `prompt` is where among the keys the prompt's tokens are, as often
    as the host repeats them, and None where there are none or another pack changed their number; `own` where the
    picture's are, in a joint attention. `replaced` names which of query, key and value edits have put there in the
    place of the layer's own. `project` gives the layer's own keys and values of other tokens (rows, n, channels of what
    the layer attends to)."""

    query: Tensor = Given()  # noqa: RUF009 (a descriptor, no default)
    key: Tensor = Given()  # noqa: RUF009
    value: Tensor = Given()  # noqa: RUF009
    heads: int
    site: Site
    chunk: Chunk
    grid: tuple[int, int] | None
    prompt: slice | None = None
    own: slice | None = None
    amended: bool = False
    extensions: list[Extension] = field(default_factory=list)
    prompt_extensions: list[Extension] = field(default_factory=list)
    taken: int = 0
    biases: tuple[Bias, ...] = ()
    blends: list[Blend] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    replaced: set[str] = field(default_factory=set)
    project: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    left: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._like = self._query

    def given(self, name: str) -> Tensor:
        """The "query", "key" or "value" in the form in which the call was given its query."""
        return formed(vars(self)[f"_{name}"], self._like)

    @property
    def shape(self) -> tuple[int, int, int]:
        """How many rows, queries and channels it has."""
        query = self._query
        return query.shape[0], query.shape[-2], query.shape[-1] * (self.heads if query.ndim == 4 else 1)

    @property
    def keys(self) -> int:
        """How many keys it has of its own."""
        return self._key.shape[-2]

    @property
    def device(self) -> torch.device:
        return self._query.device

    def leave(self, node: str) -> None:
        """Tells that an edit of `node` leaves the call as it is, because another pack changed what it needs."""
        what = PLACES if self.grid is None else PROMPT
        if (node, what) not in self.left:
            self.left.append((node, what))

    @property
    def reads(self) -> bool:
        """Whether its attention to the prompt is known: it has the prompt's keys, and they are the layer's own."""
        return self.prompt is not None and (self.site.kind == "joint" or "key" not in self.replaced)

    def note(self, name: str, make: Callable[[], Tensor], labels: Sequence[str] = ()) -> None:
        """Tells what an edit decided here, as in `call.note("aggregation mask", lambda: mask)`; see `Note`.

        Costs nothing unless an observing edit asks: `make` is called then, after every edit has amended the call, or
        never. Two edits may note one name."""
        self.notes.append(Note(name, make, tuple(labels)))

    def replace(self, query: Tensor | None = None, key: Tensor | None = None, value: Tensor | None = None) -> None:
        """Puts other tensors in the place of query, key or value; key and value must stay of one length. A bias for
        the keys that go, goes with them. In a joint attention they take the place of the picture's own; the prompt's
        stay."""
        given = {"query": query, "key": key, "value": value}
        self.replaced.update(name for name, tensor in given.items() if tensor is not None)
        self.query = self.query if query is None else query
        if self.own is None:
            self.key = self.key if key is None else key
            self.value = self.value if value is None else value
            self.biases = self.biases if key is None else ()
        else:
            self._splice(self.own, key, value)
        if self.keys != self._value.shape[-2]:
            raise ValueError(f"{self.keys} keys cannot go with {self._value.shape[-2]} values at {self.site}.")
        self.amended = True

    def _splice(self, own: slice, key: Tensor | None, value: Tensor | None) -> None:
        def spliced(whole: Tensor, part: Tensor | None) -> Tensor:
            return whole if part is None else torch.cat([whole[:, : own.start], part, whole[:, own.stop :]], 1)

        count = self.keys
        if key is not None:
            self.biases = tuple(rest for b in self.biases for rest in b.without(own.start, own.stop, key.shape[1]))
        self.key, self.value = spliced(self.key, key), spliced(self.value, value)
        more = self.keys - count
        self.own = slice(own.start, own.stop + more)
        if more and self.prompt is not None and self.prompt.start >= own.stop:
            self.prompt = slice(self.prompt.start + more, self.prompt.stop + more)

    def extend(self, key: Tensor, value: Tensor, bias: Tensor | None = None, route: Tensor | None = None) -> None:
        """Attends over these keys and values besides its own, in one softmax; see `Extension`."""
        self.extensions.append(Extension(key, value, bias, route))
        self.amended = True

    def extend_prompt(self, key: Tensor, value: Tensor, bias: Tensor | None = None) -> None:
        """The same for the queries of a joint attention that stand before the picture's, the prompt's: `bias` is
        broadcastable to (rows, 1, n). They are not in `query`."""
        self.prompt_extensions.append(Extension(key, value, bias))
        self.amended = True

    def take(self, keys: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """Takes some of a joint attention's own keys, which are neither the prompt's nor the picture's, away from the
        picture's queries: keys, values and what edits have added to their logits, to `extend` some queries by."""
        taken = self.key[:, keys], self.value[:, keys], self.bias_of(keys)

        def rest(whole: Tensor) -> Tensor:
            return torch.cat([whole[:, : keys.start], whole[:, keys.stop :]], 1)

        self.biases = tuple(left for each in self.biases for left in each.without(keys.start, keys.stop))
        self.key, self.value = rest(self.key), rest(self.value)
        gone = keys.stop - keys.start
        self.taken += gone
        self.own, self.prompt = (
            slice(part.start - gone, part.stop - gone) if part is not None and part.start >= keys.stop else part
            for part in (self.own, self.prompt)
        )
        self.amended = True
        return taken

    def bias(self, bias: Tensor, tokens: Sequence[int] | slice | None = None) -> None:
        """Adds to the scaled logits of the call's own keys: `bias` is broadcastable to (rows, queries, keys), or to
        (rows, queries, len(tokens)) when `tokens` names the keys it is for."""
        tokens = slice(0, self.keys) if tokens is None else tokens
        if not isinstance(tokens, slice):
            first, tokens = min(tokens), list(tokens)
            full = bias.new_zeros((*bias.shape[:-1], max(tokens) + 1 - first))
            full[..., [token - first for token in tokens]] = bias
            bias, tokens = full, slice(first, max(tokens) + 1)
        self.biases = (*self.biases, Bias(bias, tokens.start, tokens.stop))
        self.amended = True

    def blend(self, function: Callable[[Tensor], Tensor], first: bool = False) -> None:
        """Passes the call's output (rows, queries, channels), before the output projection, through `function`; the
        `first` is given that of the attention alone, whatever other edits add to it."""
        self.blends.insert(0 if first else len(self.blends), Blend(function))
        self.amended = True

    def blend_prompt(self, function: Callable[[Tensor], Tensor]) -> None:
        """Passes the part of the output that the prompt's keys give through `function`: the sum of their values, each
        times its share of the attention. Of a cross-attention without extensions that is the whole output."""
        self.blends.append(Blend(function, self.own is not None))
        self.amended = True

    def widened(self, tokens: Tensor) -> Tensor:
        """A companion's tokens (..., channels) as wide as the call's, where a model repeats the heads of its keys and
        values and one of each was kept."""
        times = self.shape[2] // tokens.shape[-1]
        if times == 1:
            return tokens
        split = tokens.unflatten(-1, (self.heads // times, -1))
        return split.repeat_interleave(times, -2).flatten(-2)

    def parts(self, keys: int) -> Iterator[slice]:
        """The queries, some at a time: as many as have not too many logits over so many keys to be held at once."""
        rows, queries, _ = self.shape
        each = max(rows * self.heads * keys, 1)
        count = max(_HELD // each, 1)
        if self.device.type == "cpu":
            count = min(count, max(_CACHED // each, _FEWEST))
        return (slice(start, min(start + count, queries)) for start in range(0, queries, count))

    def scores(self, keys: slice = slice(None), queries: slice = slice(None)) -> Tensor:
        """The scaled logits of the call's own keys with their bias, of some keys and queries: (rows, heads, queries,
        keys) in float32."""
        return self._scores_of(keys)(queries)

    def _scores_of(self, keys: slice) -> Callable[[slice], Tensor]:
        """The same of some queries after others: what is alike for all of them is made once."""
        query, bias = self.given("query"), self.bias_of(keys)
        key = self._scaled(self.given("key")[..., keys, :]).transpose(-1, -2)

        def scores(queries: slice) -> Tensor:
            logits = head_split(query[..., queries, :], self.heads) @ key
            return logits if bias is None else logits + per_head(of_queries(bias, queries))

        return scores

    def _scaled(self, keys: Tensor) -> Tensor:
        """Keys whose products with queries are logits: (rows, heads, keys, width) in float32."""
        split = head_split(keys, self.heads)
        return split * split.shape[-1] ** -0.5

    def bias_of(self, keys: slice = slice(None)) -> Tensor | None:
        """What the model and edits add to the logits of some of the call's own keys: broadcastable to (rows, queries,
        keys) in float32, None for nothing."""
        start, stop, _ = keys.indices(self.keys)
        parts = [part.moved(-start) for each in self.biases if (part := each.part(start, stop)) is not None]
        return summed(parts, stop - start, self.device)

    def probabilities(self, keys: slice = slice(None), queries: slice = slice(None)) -> Tensor:
        """Attention over some of the call's own keys as if these were all: (rows, heads, queries, keys)."""
        return self.scores(keys, queries).softmax(-1)

    def probabilities_in_parts(self, keys: slice) -> Iterator[Tensor]:
        """The same of all queries, some at a time: see `parts`."""
        scores = self._scores_of(keys)
        return (scores(part).softmax(-1) for part in self.parts(len(range(*keys.indices(self.keys)))))

    def extension_share(self) -> Tensor:
        """Share of the attention mass that lies on the extensions: (rows, heads, queries), 0 to 1."""
        most = max(self.keys, *(extension.key.shape[1] for extension in self.extensions))
        own = self._scores_of(slice(None))
        keys = [self._scaled(extension.key).transpose(-1, -2) for extension in self.extensions]
        return torch.cat([self._extension_share(own(part), keys, part) for part in self.parts(most)], -1)

    def _extension_share(self, own: Tensor, keys: Sequence[Tensor], part: slice) -> Tensor:
        shares, queries = [own.logsumexp(-1)], head_split(self.given("query")[..., part, :], self.heads)
        for extension, key in zip(self.extensions, keys, strict=True):
            logits = queries @ key
            if extension.bias is not None:
                logits = logits + of_queries(per_head(extension.bias), part, 2).to(logits.device)
            if extension.route is not None:
                unseen = ~extension.route[:, part].to(logits.device)[:, None, :, None]
                logits = logits.masked_fill(unseen, -torch.inf)
            shares.append(logits.logsumexp(-1))
        return 1 - torch.stack(shares).softmax(0)[0]


def prompt_keys(site: Site, key: Tensor, chunk: Chunk) -> slice | None:
    """Which of a self- or cross-attention's keys (rows, tokens, channels) are the prompt's: all of a cross-attention's,
    unless another pack changed their number."""
    if site.kind == "cross" and chunk.keys is not None:
        return chunk.keys if chunk.keys.stop else None
    if site.kind != "cross" or "model_conds" not in chunk.conditioning or key.shape[1] % chunk.length:
        return None
    return slice(0, key.shape[1])
