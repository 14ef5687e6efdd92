"""One sampling run of a patched MODEL: which edits act now, what a batch's chunks are, what the streams recorded."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from ..families import Family
from ..parts.identity import Same, foreign_patches
from ..parts.sites import Site
from ..parts.window import Levels
from .call import AttentionCall
from .chunk import BRANCH, Chunk
from .chunks import UNCONDITIONED, chunks_of
from .companion import acting_on_companions
from .conditionings import entries_of
from .edit import Edit, Request
from .heeding import Heeding
from .hooks import HeldHooks
from .preparing import Prepared, Preparing
from .recording import Recording
from .standing import standing_as
from .streams import UNCONDITIONAL, Features, Stream
from .tally import Tally


@dataclass(frozen=True)
class Forward:
    """One call of the model: its batch rows, its chunks in order, and the sites that some edit wants in it."""

    rows: int
    chunks: tuple[Chunk, ...]
    sites: frozenset[Site]


class Session:
    """Opened with a sampling run and closed with it; `edits` are in the order of their nodes, `levels` those of the
    run's steps."""

    def __init__(self, edits: Iterable[Edit], own_key: str, family: Family, levels: Levels) -> None:
        self.edits = tuple(edits)
        self.family = family
        self.levels = levels
        self.own_key = own_key
        # Stands for this run in caches, which outlive it.
        self.run = object()
        self.guider: Any = None
        self.sigma = float("nan")
        # The latents that the sampler last gave.
        self.whole = torch.empty(0, 0)
        self.active: tuple[Edit, ...] = ()
        self.recordings: dict[tuple[int, tuple[str, ...]], Recording] = {}
        # Those of the noise level before that may serve this one too.
        self._earlier: dict[tuple[int, tuple[str, ...]], Recording] = {}
        self._preparing = Preparing(family, self.warn_once)
        self._held = HeldHooks()
        self._model_key: tuple[Any, ...] | None = None
        self._warned: set[str] = set()
        self._acted: set[int] = set()
        self.heeding = Heeding(self._tell_of_masks)
        self._tally = Tally()
        self._left: dict[tuple[str, str], set[Site]] = {}

    @property
    def latent(self) -> tuple[int, int]:
        """The (height, width) of the latents that the sampler last gave."""
        return (self.whole.shape[-2], self.whole.shape[-1])

    def close(self) -> None:
        """Lets go of everything the run held."""
        self.guider = None
        self.whole = torch.empty(0, 0)
        self.active = ()
        self.recordings.clear()
        self._earlier.clear()
        self._preparing.clear()
        self._held.clear()
        self._model_key = None

    def enter(self, guider: Any, x: Tensor, timestep: Tensor) -> None:
        """The sampler is about to call the model on `x` at this noise level."""
        sigma = float(timestep[0])
        if sigma != self.sigma:
            self._earlier = {place: r for place, r in self.recordings.items() if r.stream.how.serves_several}
            self.recordings = {}
        self.guider, self.sigma, self.whole = guider, sigma, x
        self._model_key = None
        self.active = tuple(edit for edit in self.edits if self.levels.lie_in(edit.window, sigma))
        self._acted.update(id(edit) for edit in self.active)
        self._tally.acts(self.active, sigma)

    def runs(self, model: Any) -> bool:
        """Whether the run's sampler has begun, and calls this model of the host's."""
        return self.guider is not None and model is self.guider.inner_model

    def tell(self) -> None:
        """Says, when the run is over, what each node did in it, and which did nothing because no step was in their
        window."""
        for line in self._tally.lines():
            logging.info(line)
        for edit in self.edits:
            if edit.node and self.guider is not None and id(edit) not in self._acted and not edit.window.empty:
                self.warn_once(f"{edit.node} did nothing: {self.levels.none_in(edit.window)}")

    def leave(self, site: Site, forward: Forward, what: str) -> None:
        """Notes that a layer is left as it is because another pack changed `what` in it."""
        for edit in self.active:
            if edit.node and site in edit.sites and any(edit.wants(chunk) for chunk in forward.chunks):
                self._left.setdefault((edit.node, what), set()).add(site)

    def warn_of_left(self) -> None:
        """Says, when the run is over, which nodes left layers as they are because of what other packs did there."""
        if not self._left:
            return
        parts = [
            f"{node} in {len(sites)} ({what} changed)" for (node, what), sites in sorted(self._left.items())
        ]  # fmt: skip
        self.warn_once(
            "Other packs changed what some attention layers work on, and these nodes left them as they are: "
            f"{'; '.join(parts)}. Leave out one of the nodes, or the other pack's."
        )

    def requests(self, model_options: Mapping[str, Any]) -> list[Request]:
        """What the active edits want recorded in this call of the model."""
        found = []
        for edit in self.active:
            for request in edit.requests(self.sigma):
                if request[0].conditioning is not UNCONDITIONAL or self._is_guided(model_options):
                    found.append(request)
                    self._tally.asks(edit, request[0])
        return found

    def _is_guided(self, model_options: Mapping[str, Any]) -> bool:
        """Whether the model is about to run on a negative conditioning: at CFG 1 the host's guider leaves it out."""
        plain = type(self.guider).predict_noise is comfy.samplers.CFGGuider.predict_noise
        if plain and math.isclose(self.guider.cfg, 1.0) and not model_options.get("disable_cfg1_optimization", False):
            return False
        return any(self.guider.conds.get(name) for name in UNCONDITIONED)

    def warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logging.warning(message)

    def _tell_of_masks(self) -> None:
        self.warn_once(
            "Another pack's attention function leaves masks away, so the host's own computes the attention where nodes "
            "of Subject Patches add to it (Layout Bias, strengths other than 1)."
        )

    def noise_scaling(self, sigma: float, noise: Tensor, latents: Tensor) -> Tensor:
        """The model's own forward process: `latents` with `noise` at `sigma`."""
        return self.guider.inner_model.model_sampling.noise_scaling(torch.tensor(sigma), noise, latents)

    def level(self, stream: Stream) -> float:
        """The noise level at which the model runs on a stream: the sampler's, that of an earlier step of it, or a
        fixed one."""
        how = stream.how
        if how.level is None:
            return self.levels.looked_at(self.sigma, how.every)
        sampling = self.guider.inner_model.model_sampling
        level = float(sampling.percent_to_sigma(how.level))
        # The host's first share of a schedule is without bound.
        return min(max(level, float(sampling.sigma_min)), float(sampling.sigma_max))

    def heads(self, site: Site) -> int:
        """How many heads a layer has, where another pack's block does not tell."""
        return self.family.heads(self.guider.inner_model.diffusion_model, site)

    def project(self, site: Site, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's own keys and values of other tokens (rows, n, channels of what it attends to)."""
        return self.family.project(self.guider.inner_model.diffusion_model, site, tokens)

    # Chunks

    def forward(self, options: dict[str, Any], x: Tensor, context: Tensor | None, sigma: float) -> Forward | None:
        """What a call of the model is made of, or None when no edit has anything to do in it. Another pack's extra
        pass at another noise level than the sampler's is passed over: the streams have nothing for it."""
        uuids = options.get("uuids")
        if not uuids or not self.active or sigma != self.sigma:
            return None
        return self._wanted(len(x), *chunks_of(self.guider.conds, self.family, self.whole, uuids, x, context))

    def branch(self, stream: Stream, rows: int) -> Forward | None:
        """What the pass of a branch that denoises by itself is made of, or None when no edit has anything to do in
        it."""
        (conditioning,), _ = self.stream_conditioning(stream)
        latent = tuple(stream.shape[-2:])
        before, again = self.family.before(conditioning), self.family.again(conditioning)
        chunk = Chunk(slice(0, rows), BRANCH, False, conditioning, latent, None, stream, before=before, again=again)
        return self._wanted(rows, chunk)

    def _wanted(self, rows: int, *chunks: Chunk) -> Forward | None:
        sites = [edit.sites for edit in self.active if any(edit.wants(chunk) for chunk in chunks)]
        return Forward(rows, chunks, frozenset().union(*sites)) if sites else None

    def amend(self, call: AttentionCall) -> None:
        """Lets every active edit that wants a call amend it, in the order of their nodes, and then look at it."""
        edits = [edit for edit in self.active if call.site in edit.sites and edit.wants(call.chunk)]

        def recorded(stream: Stream) -> Features | None:
            # Several edits may have asked for different parts of one stream's features.
            found = (r.features.get(call.site, {}) for r in self.recordings.values() if r.stream is stream)
            features = {part: call.widened(tensor) for each in found for part, tensor in each.items()}
            if not features or call.site.kind != "joint":
                return features or None
            (theirs,), _ = self.stream_conditioning(stream)
            return standing_as(call, features, theirs, self.family, self.guider.inner_model.diffusion_model)

        self._tally.amends(edits, call.site)
        for edit in edits:
            edit.amend(call, self.sigma, recorded)
        for edit in edits:
            edit.observe(call, self.sigma, recorded)
        for left in call.left:
            self._left.setdefault(left, set()).add(call.site)

    # Streams

    def recording(
        self, stream: Stream, sites: frozenset[Site], parts: tuple[str, ...], options: dict[str, Any], device: Any
    ) -> Recording:
        """The recording of a stream at this noise level, with what its cache has; what is missing is in `sites`.
        `options` are those of companions' passes. The one of the noise level before goes on where it is of the same
        pass: a cache may be too small for it, or hold it where it must be brought from."""
        place = (id(stream), parts)
        if place in self.recordings:
            self.recordings[place].load(sites, device)
            return self.recordings[place]
        key, recording = self._cache_key(stream, options), self._earlier.pop(place, None)
        if recording is None or key is None or recording.key != key:
            recording = Recording(stream, parts, key, self.run)
        self.recordings[place] = recording
        recording.load(sites, device)
        self._tally.recorded(stream, recording.complete)
        return recording

    def _cache_key(self, stream: Stream, options: dict[str, Any]) -> tuple[Any, ...] | None:
        identity = stream.identity()
        if stream.cache is None or identity is None:
            return None
        _, digest = self.stream_conditioning(stream)
        if digest is None:
            return None
        if self._model_key is None:
            # The same for every stream of one call of the model.
            inner, patcher = self.guider.inner_model, self.guider.model_patcher
            objects = tuple((name, Same(patch)) for name, patch in sorted(patcher.object_patches.items()))
            # How the host's bypassed LoRAs act.
            injected = foreign_patches(patcher.injections, self.own_key)
            weights = (Same(inner), patcher.patches_uuid, objects, injected, inner.get_dtype_inference())
            acting = acting_on_companions(options, patcher.model_options)
            self._model_key = (weights, foreign_patches(acting, self.own_key))
        return (self._model_key, digest, self.level(stream), identity)

    def stream_conditioning(self, stream: Stream) -> Prepared:
        """A stream's conditioning, prepared as the host prepares its own, and a digest of its contents."""
        source = stream.conditioning
        if source is None or source is UNCONDITIONAL:
            source = self._of_the_guider(conditioned=source is None)
        return self._prepared(stream, source)

    def at_level(
        self, conditioning: list[dict[str, Any]], level: float, timestep: Tensor, model_options: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """A stream's conditioning for a pass at a noise level. Its hooks stay at the strengths of the sampler's step,
        `timestep`, also where the level is another."""
        if level == self.sigma:
            return conditioning
        return self._held.held(conditioning, self.guider.inner_model.current_patcher, timestep, model_options)

    def stripped(self, stream: Stream, entry: dict[str, Any]) -> list[dict[str, Any]]:
        """An entry of the guider's lists, prepared for a stream."""
        return self._prepared(stream, entry)[0]

    def _prepared(self, stream: Stream, source: Any) -> Prepared:
        return self._preparing.prepared(stream, source, self.guider, self.latent)

    def _of_the_guider(self, conditioned: bool) -> dict[str, Any]:
        """The generation's conditioning, or its negative one, that is in force at this noise level."""
        entries = entries_of(self.guider, conditioned)
        if not entries:
            raise ValueError("The sampler has no positive conditioning; connect a reference conditioning to this node.")
        return self.in_force(entries)

    def in_force(self, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The first of a prompt's entries whose part of the schedule this noise level is in."""
        for entry in entries:
            start, end = entry.get("timestep_start"), entry.get("timestep_end")
            if (start is None or self.sigma <= start) and (end is None or self.sigma >= end):
                return entry
        return entries[0]
