"""Runs amended attention calls once, by the cheapest exact route. Pure tensor code: the attention is the caller's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice

import torch
from torch import Tensor
from torch.nn import functional

from .amendments import Extension
from .bias import Bias, mask_of
from .call import AttentionCall
from .forms import formed

# (query, key, value, mask) -> output (rows, queries, channels). The first three are (rows, tokens, channels), or have
# their heads apart, (rows, heads, tokens, width); the mask is additive and None or broadcastable to (rows, queries,
# keys).
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class _Job:
    """One attention to compute: some queries of `call`, as it was given them, at its `places` (None is all of them),
    over the call's own tokens and those of `seen`."""

    call: AttentionCall
    query: Tensor
    places: Tensor | None
    seen: Sequence[Extension]

    @cached_property
    def keys(self) -> int:
        return self.call.keys + sum(e.key.shape[1] for e in self.seen)

    @cached_property
    def masked(self) -> bool:
        return bool(self.call.biases) or any(e.bias is not None for e in self.seen)

    def attended(self) -> tuple[list[Tensor], list[Tensor]]:
        """Its keys and its values, in parts, as the call was given its own."""
        rows = self.query.shape[0]

        def lent(tokens: Tensor) -> Tensor:
            return formed(tokens.expand(rows, -1, -1), self.query)

        keys = [self.call.given("key"), *(lent(e.key) for e in self.seen)]
        return keys, [self.call.given("value"), *(lent(e.value) for e in self.seen)]

    def mask(self) -> Tensor | None:
        if not self.masked:
            return None
        biases, start = list(self.call.biases), self.call.keys
        for extension in self.seen:
            stop = start + extension.key.shape[1]
            biases += [] if extension.bias is None else [Bias(extension.bias, start, stop)]
            start = stop
        return mask_of([(each, self.places) for each in biases], start, self.query)


def _singles(call: AttentionCall) -> list[AttentionCall]:
    """The call, or one for each of its rows where these have routes of their own."""
    routes = {id(e.route): e.route for e in call.extensions if e.route is not None}
    count = max((len(route) for route in routes.values()), default=1)
    if count == 1 or all(torch.equal(route, route[:1].expand_as(route)) for route in routes.values()):
        return [call]

    def single(row: int) -> AttentionCall:
        def part(tensor: Tensor | None, dimensions: int = 3) -> Tensor | None:
            shared = tensor is None or tensor.ndim < dimensions or tensor.shape[0] == 1
            return tensor if shared else tensor[row : row + 1]

        own = {name: part(route, 2) for name, route in routes.items()} | {id(None): None}
        extensions = [Extension(part(e.key), part(e.value), part(e.bias), own[id(e.route)]) for e in call.extensions]
        tokens = (call.given(name)[row : row + 1] for name in ("query", "key", "value"))
        return AttentionCall(
            *tokens, call.heads, call.site, call.chunk, call.grid,
            extensions=extensions, biases=tuple(replace(b, values=part(b.values)) for b in call.biases),
        )  # fmt: skip

    return [single(row) for row in range(count)]


_BITS = 31


def _patterns(columns: Tensor) -> Tensor:
    """A number for each query from its routes (queries, routes), the same where these are the same. Numbers, bit by
    bit, because a sort of whole columns is slow; a few routes at a time, because a number has 63 bits."""
    numbers = columns.new_zeros(columns.shape[0], dtype=torch.int64)
    for several in columns.split(_BITS, 1):
        bits = torch.tensor([1 << bit for bit in range(several.shape[1])], device=columns.device)
        numbers = (numbers << _BITS) + (several * bits).sum(1)
        if columns.shape[1] > _BITS:
            numbers = numbers.unique(return_inverse=True)[1]
    return numbers


def _jobs(call: AttentionCall) -> list[_Job]:
    """The attentions of a call whose rows share their routes. Queries that see the same extensions form a group; a
    group needs no mask to be kept from the others' keys."""
    routes = {id(e.route): e.route[0] for e in call.extensions if e.route is not None}
    query = call.given("query")
    if not routes:
        return [_Job(call, query, None, call.extensions)]
    columns = torch.stack(list(routes.values()), 1)
    patterns, order = _patterns(columns).sort()
    numbers, sizes = patterns.unique_consecutive(return_counts=True)
    firsts = order[sizes.cumsum(0) - sizes]
    members = [dict(zip(routes, column, strict=True)) for column in columns[firsts].tolist()]

    def seen(member: dict[int, bool]) -> list[Extension]:
        return [e for e in call.extensions if e.route is None or member[id(e.route)]]

    if len(numbers) == 1:
        return [_Job(call, query, None, seen(members[0]))]
    order = order.to(call.device)
    groups = zip(members, order.split(sizes.tolist()), strict=True)
    queries = query.index_select(-2, order).split(sizes.tolist(), -2)
    return [_Job(call, part, places, seen(member)) for part, (member, places) in zip(queries, groups, strict=True)]


# Attentions over as many keys run as one, their queries filled up to as many, while that costs less than a call of its
# own: in multiplications for what is filled up, in elements of keys that are then held at once. Big ones run alone, and
# the keys of one are let go before those of the next are made.
_FILLED_UP = 2**21
_HELD = 2**21


def _together(jobs: Sequence[_Job]) -> list[list[int]]:
    """The numbers of the jobs, in groups that run as one; a group's first has the most queries."""
    groups: list[list[int]] = []
    sizes = [(job.query.shape[0], job.keys, job.query.shape[-2]) for job in jobs]
    for number in sorted(range(len(jobs)), key=lambda n: (jobs[n].masked, sizes[n]), reverse=True):
        rows, keys, queries = sizes[number]
        if groups and not jobs[number].masked and not jobs[groups[-1][0]].masked:
            size = rows * keys * jobs[number].call.shape[2]
            alike = sizes[groups[-1][0]][:2] == (rows, keys)
            cheap = (sizes[groups[-1][0]][2] - queries) * size <= _FILLED_UP and (len(groups[-1]) + 1) * size <= _HELD
            if alike and cheap:
                groups[-1].append(number)
                continue
        groups.append([number])
    return groups


def _filled_up(query: Tensor, count: int) -> Tensor:
    missing = count - query.shape[-2]
    return functional.pad(query, (0, 0, 0, missing)) if missing else query


def _joined(parts: Sequence[Tensor], count: int) -> Tensor:
    """Parts (rows, ..., n, channels) of `count` attentions, in turn, as one batch: (rows * count, ..., n of each,
    channels)."""
    whole = parts[0] if len(parts) == 1 else torch.cat(list(parts), -2)
    return whole.unflatten(-2, (count, -1)).movedim(-3, 1).flatten(0, 1)


@dataclass
class _Kept:
    """The keys and values of the attentions of one call that run one after another. Its own are put there once; what an
    attention sees besides takes the place of what the one before saw."""

    whole: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, call: AttentionCall, keys: int) -> _Kept:
        """With room for so many keys."""
        given = call.given("key"), call.given("value")
        whole = tuple(each.new_empty((*each.shape[:-2], keys, each.shape[-1])) for each in given)
        for room, each in zip(whole, given, strict=True):
            room[..., : call.keys, :] = each
        return cls(whole)

    def attended(self, job: _Job) -> tuple[Tensor, Tensor]:
        """A job's keys and values."""
        start = job.call.keys
        for extension in job.seen:
            stop = start + extension.key.shape[1]
            for room, each in zip(self.whole, (extension.key, extension.value), strict=True):
                room[..., start:stop, :] = formed(each, room)
            start = stop
        return self.whole[0][..., :start, :], self.whole[1][..., :start, :]


def _attended(jobs: Sequence[_Job], attend: Attend) -> list[Tensor]:
    """The output of each job."""
    results: dict[int, Tensor] = {}
    groups = _together(jobs)
    alone = [jobs[numbers[0]] for numbers in groups if len(numbers) == 1]
    kept: dict[int, _Kept] = {}
    for numbers in groups:
        group = [jobs[number] for number in numbers]
        job, others = group[0], [each for each in alone if each.call is group[0].call and each.seen]
        if len(group) == 1 and job.seen and len(others) > 1:
            if id(job.call) not in kept:
                kept[id(job.call)] = _Kept.of(job.call, max(each.keys for each in others))
            results[numbers[0]] = attend(job.query, *kept[id(job.call)].attended(job), job.mask())
            continue
        queries = [_filled_up(each.query, job.query.shape[-2]) for each in group]
        keys, values = zip(*(each.attended() for each in group), strict=True)
        parts = (_joined(each, len(group)) for each in (queries, list(chain(*keys)), list(chain(*values))))
        outputs = attend(*parts, job.mask()).unflatten(0, (-1, len(group)))
        for place, (number, each) in enumerate(zip(numbers, group, strict=True)):
            results[number] = outputs[:, place, : each.query.shape[-2]]
    return [results[number] for number in range(len(jobs))]


def _output(jobs: Sequence[_Job], results: Sequence[Tensor]) -> Tensor:
    """What the attentions of one call say of its queries, in their own order."""
    if jobs[0].places is None:
        return results[0]
    joined = torch.cat(list(results), 1)
    return torch.empty_like(joined).index_copy_(1, torch.cat([job.places for job in jobs]), joined)


def execute(calls: Sequence[AttentionCall], attend: Attend) -> list[Tensor]:
    """The outputs (rows, queries, channels) of the calls.

    Equal to the softmax over own and extended keys with all biases (a query that a route leaves out has minus
    infinity there). Small attentions without a mask run as one."""
    prompts = [prompt_only(call) for call in calls if any(blend.of_prompt for blend in call.blends)]
    plans = [[_jobs(single) for single in _singles(call)] for call in (*calls, *prompts)]
    results = iter(_attended([job for plan in plans for jobs in plan for job in jobs], attend))
    attended = []
    for plan in plans:
        parts = [_output(jobs, list(islice(results, len(jobs)))) for jobs in plan]
        attended.append(parts[0] if len(parts) == 1 else torch.cat(parts))
    of_prompts = iter(attended[len(calls) :])
    return [_blended(call, output, of_prompts) for call, output in zip(calls, attended, strict=False)]


def extended(
    attend: Attend, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, more: Sequence[Extension]
) -> Tensor:
    """The attention of queries that see everything, over keys and `more` of them, all of a form that `attend` takes;
    `mask` is for the former, and a bias of the latter the same for every query."""
    if not more:
        return attend(query, key, value, mask)
    rows, start = len(query), key.shape[-2]
    biases = [] if mask is None else [Bias(mask, 0, start)]
    for each in more:
        stop = start + each.key.shape[1]
        biases += [] if each.bias is None else [Bias(each.bias, start, stop)]
        start = stop
    key, value = (
        torch.cat([own, *(formed(getattr(each, name).to(own).expand(rows, -1, -1), own) for each in more)], -2)
        for own, name in ((key, "key"), (value, "value"))
    )
    return attend(query, key, value, mask_of([(each, None) for each in biases], start, query) if biases else None)


def prompt_only(call: AttentionCall) -> AttentionCall:
    """A call of the same attention in which only the prompt's keys have values: its output is the prompt's part of the
    output, exactly, because an output is linear in the values."""
    query, key, given = (call.given(name) for name in ("query", "key", "value"))
    value = torch.zeros_like(given)
    value[..., call.prompt, :] = given[..., call.prompt, :]
    extensions = [replace(e, value=torch.zeros_like(e.value)) for e in call.extensions]
    return replace(call, query=query, key=key, value=value, extensions=extensions, blends=[])


def _blended(call: AttentionCall, output: Tensor, of_prompts: Iterator[Tensor]) -> Tensor:
    part = next(of_prompts) if any(blend.of_prompt for blend in call.blends) else None
    for blend in call.blends:
        if blend.of_prompt:
            other = blend.function(part)
            output, part = output + (other - part), other
        else:
            output = blend.function(output)
    return output
