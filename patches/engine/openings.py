"""Opens the attentions of a transformer for one forward of the model, by the host's attention override.

The host calls one function in the place of every attention and says in the attention's options, at best, which block it
is of. Like a slot it holds one function, so ours is composed at run time around whatever stands there by then. An
`Opening` holds sites and never the network: a compiled model must not be reached through its own options.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..families import Counts, Tokens, Transformer
from ..parts.sites import Site
from .amendments import Extension
from .attention import OVERRIDE, Attention
from .call import BATCH, PLACES, AttentionCall
from .execution import Attend, execute, extended, prompt_only
from .rearranging import Joined, Rearranging
from .recording import Recording
from .session import Forward, Session

# In the options of an attention that is of no picture: edits have nothing to do there.
APART = "subject_patches_apart"


def opened(
    session: Session,
    forward: Forward | None,
    recording: Recording | None,
    network: Any,
    x: Tensor,
    context: int,
    ahead: int,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """The options of one forward on latents `x`, with a context of so many tokens that so many others come before, with
    its attentions opened."""
    family: Transformer = session.family
    opening = Opening(
        session, family, family.sites(network), forward, recording, (x.shape[-2], x.shape[-1]),
        context, family.repeats(network), options.get(OVERRIDE), ahead,
    )  # fmt: skip
    return opening.options(options)


@dataclass
class Opening:
    """One forward of a transformer: what it is made of, what is recorded of it, and which attention is next. It stands
    in the host's slot for that forward."""

    session: Session
    family: Transformer
    sites: tuple[Site, ...]
    forward: Forward | None
    recording: Recording | None
    latent: tuple[int, int]
    context: int
    repeats: int
    inner: Callable[..., Tensor] | None
    ahead: int = 0
    block: tuple[str, int] | None = None
    calls: int = 0
    joined: Joined = field(default_factory=Joined, init=False)
    around: Rearranging = field(init=False)

    def __post_init__(self) -> None:
        self.around = Rearranging(math.prod(self.family.grid(self.latent)), self.context, self.joined)

    def options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The forward's options with this opening in them."""
        made = {**options, OVERRIDE: self}
        if self.family.tells:
            patches = made.get("patches", {})
            others, joining = patches.get("attn1_patch", ()), patches.get("post_input", ())
            watched = [self.around.first, *others] if others else []
            made["patches"] = {**patches, "attn1_patch": [*watched, self.around.last]}
            if joining:
                made["patches"]["post_input"] = [self.joined.first, *joining, self.joined.last]
        if self.family.told == "replacement":
            slots = {name: dict(slot) for name, slot in made.get("patches_replace", {}).items()}
            replaced = slots.setdefault("dit", {})
            for blocks in self.family.blocks:
                for number in {site.number for site in self.sites if site.block == blocks.word}:
                    place = (blocks.block_type, number)
                    replaced[place] = self._naming((blocks.word, number), replaced.get(place))
            made["patches_replace"] = slots
        return made

    def _naming(self, block: tuple[str, int], other: Any) -> Callable[..., Any]:
        def named(arguments: Any, extra: Mapping[str, Any]) -> Any:
            self.block, self.calls = block, 0
            result = extra["original_block"](arguments) if other is None else other(arguments, extra)
            self.block = None
            return result

        return named

    def _site(self, options: Mapping[str, Any]) -> Site | None:
        """Which layer the attention that is called is; None of one that the pack has no name for."""
        if self.family.told == "order":
            number, self.calls = self.calls, self.calls + 1
            return self.sites[number] if number < len(self.sites) else None
        if self.family.told == "index":
            block = self._told(options)
            if block != self.block:
                self.block, self.calls = block, 0
        if self.block is None:
            return None
        number, self.calls = self.calls, self.calls + 1
        return next((s for s in self.sites if (s.block, s.number, s.index) == (*self.block, number)), None)

    def _told(self, options: Mapping[str, Any]) -> tuple[str, int] | None:
        number = options.get("block_index")
        if number is None:
            return None
        several = len(self.family.blocks) > 1
        words = [b.word for b in self.family.blocks if not several or b.block_type == options.get("block_type")]
        return (words[0], number) if words else None

    def __call__(self, function: Callable[..., Tensor], *args: Any, **named: Any) -> Tensor:
        attention = Attention(function, self.inner, args, named)
        options = named.get("transformer_options") or {}
        if APART in options:
            return attention.plain()
        site = self._site(options)
        wanted = site is not None and self.forward is not None and site in self.forward.sites
        recorded = site is not None and self.recording is not None and site in self.recording.sites
        if not (wanted or recorded):
            return attention.plain()
        grid, change = self.family.grid(self.latent), self.around.change
        tokens = self._tokens(attention, site, grid, sum(options.get("reference_image_num_tokens", ())))
        rows = attention.values["q"].shape[0]
        if tokens is None or (wanted and change is None and rows != self.forward.rows):
            if wanted:
                self.session.leave(site, self.forward, PLACES if tokens is None else BATCH)
            return attention.plain()
        calls = self._calls(attention, site, tokens, grid) if wanted else []
        amended = [call for call in calls if call.amended]
        output = self._amended(attention, tokens, amended) if amended else attention.plain()
        # A companion's pass whose prompt another pack changed has nothing of it to keep.
        if recorded and (site.kind == "self" or tokens.prompt is not None):
            self._record(attention, site, tokens, grid, calls, output)
        return output

    def _tokens(self, attention: Attention, site: Site, grid: tuple[int, int], references: int) -> Tokens | None:
        """Where tokens lie in an attention, after what other packs did to it; None where that cannot be told."""
        around = self.around
        if around.lost:
            return None
        if around.change is None:
            begins = self.joined.begins
            counts = Counts(
                attention.count("q"), attention.count("k"), math.prod(grid), 0 if begins is None else self.context,
                references, around.begins, self.ahead + (begins or 0),
            )  # fmt: skip
            tokens = self.family.tokens(site.kind, counts)
            return replace(tokens, prompt=None) if begins is None and tokens is not None else tokens
        queries, keys, prompts = around.change.queries, around.change.keys, set(around.change.prompts)
        prompt = self._prompt(prompts.pop()) if len(prompts) == 1 else None
        return Tokens(slice(queries, queries + around.count), slice(keys, keys + around.count), prompt)

    def _prompt(self, begins: int | None) -> slice | None:
        return None if begins is None else slice(begins, begins + self.context)

    def _calls(self, attention: Attention, site: Site, tokens: Tokens, grid: tuple[int, int]) -> list[AttentionCall]:
        """The attention of each chunk of the forward, as the session's edits amend it."""
        calls, change = [], self.around.change
        chunks = [(chunk, tokens.prompt) for chunk in self.forward.chunks]
        if change is not None:
            chunks = [(chunk, self._prompt(begins)) for chunk, begins in change.chunks(self.forward.chunks)]
        for chunk, prompt in chunks:
            query = attention.some("q", chunk.rows, tokens.picture)
            key, value = attention.keys_and_values(chunk.rows)
            places = grid if chunk.known_places else None
            call = AttentionCall(
                query, key, value, attention.heads, site, chunk, places, prompt, tokens.own,
                biases=attention.biases(chunk.rows, tokens.picture), project=partial(self.session.project, site),
            )  # fmt: skip
            self.session.amend(call)
            calls.append(call)
        return calls

    def _amended(self, attention: Attention, tokens: Tokens, amended: list[AttentionCall]) -> Tensor:
        """The attention with some of its calls amended. What these leave alone, other chunks and the queries that are
        not the picture's, is attended to as it was."""
        count, picture = attention.count("q"), tokens.picture
        rows, last = attention.values["q"].shape[0], 0
        output: Tensor | None = None
        pieces: list[tuple[slice, slice, Tensor]] = []
        for call, result in zip(amended, execute(amended, self._attend(attention)), strict=True):
            here = call.chunk.rows
            pieces.append((here, picture, result))
            pieces += self._left(attention, slice(last, here.start), slice(0, count))
            pieces += self._left(attention, here, slice(0, picture.start), call.prompt_extensions)
            pieces += self._left(attention, here, slice(picture.stop, count))
            last = here.stop
        pieces += self._left(attention, slice(last, rows), slice(0, count))
        for here, queries, piece in pieces:
            output = piece.new_empty((rows, count, piece.shape[-1])) if output is None else output
            output[here, queries] = piece
        return attention.returned(output)

    def _attend(self, attention: Attention) -> Attend:
        """The attention for what edits amended, whose masks another pack's function may not leave away."""
        if self.inner is None:
            return attention.attend
        return self.session.heeding.attend(attention.attend, attention.hosts, attention.heads)

    def _left(
        self, attention: Attention, rows: slice, queries: slice, more: Sequence[Extension] = ()
    ) -> list[tuple[slice, slice, Tensor]]:
        if rows.start >= rows.stop or queries.start >= queries.stop:
            return []
        query = attention.some("q", rows, queries)
        key, value = attention.keys_and_values(rows)
        return [(rows, queries, extended(attention.attend, query, key, value, attention.bias(rows, queries), more))]

    def _record(
        self,
        attention: Attention,
        site: Site,
        tokens: Tokens,
        grid: tuple[int, int],
        calls: list[AttentionCall],
        output: Tensor,
    ) -> None:
        """Keeps the picture's features for a stream, and what the prompt gave it."""
        every, own = slice(None), tokens.own or slice(None)
        features = {
            "query": lambda: attention.tokens("q", every, tokens.picture),
            "key": lambda: self._kept(attention.tokens("k", every, own), attention.heads),
            "value": lambda: self._kept(attention.tokens("v", every, own), attention.heads),
            "output": lambda: attention.flat(output)[:, tokens.picture],
            "prompt_key": lambda: attention.tokens("k", every, tokens.prompt),
            "prompt_output": lambda: self._of_prompt(attention, site, tokens, grid, calls, output),
        }
        # Parts are copied: they would else hold on to whole tensors.
        self.recording.record(site, grid, {part: features[part]().clone() for part in self.recording.parts})

    def _kept(self, tokens: Tensor, heads: int) -> Tensor:
        """One of each of the heads that the model repeats."""
        if self.repeats == 1:
            return tokens
        return tokens.unflatten(-1, (heads, -1))[:, :, :: self.repeats].flatten(2)

    def _of_prompt(
        self,
        attention: Attention,
        site: Site,
        tokens: Tokens,
        grid: tuple[int, int],
        calls: list[AttentionCall],
        output: Tensor,
    ) -> Tensor:
        """What of the picture's output the prompt's keys give, as edits have amended it."""
        if site.kind == "cross":
            return attention.flat(output)
        if not calls:
            every = slice(None)
            query, biases = attention.some("q", every, tokens.picture), attention.biases(every, tokens.picture)
            key, value = attention.keys_and_values(every)
            calls = [
                AttentionCall(
                    query, key, value, attention.heads, site, None, grid, tokens.prompt, tokens.own, biases=biases
                )
            ]
        return torch.cat(execute([prompt_only(call) for call in calls], self._attend(attention)))
