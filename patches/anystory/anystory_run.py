"""AnyStory in a sampling run: its edit of attention, and what it does to the host's calls of the model beside that.

Beside the engine's wrappers the node registers two of its own, inside them. PREDICT_NOISE finds the step, sees to the
references and marks the prompts that the subjects join; a mark keeps the host from batching those with others.
APPLY_MODEL puts the subjects' tokens behind the prompt of a marked call and lets the router's stream run along.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import comfy.conds
import torch
from comfy.patcher_extension import WrappersMP
from comfy.utils import repeat_to_batch_size
from torch import Tensor

from ..engine.call import AttentionCall
from ..engine.chunks import UNCONDITIONED
from ..engine.edit import Edit, Request
from ..engine.engine import SESSION, add_edit, wrap
from ..engine.session import Session
from ..engine.streams import Features, Stream
from ..parts.sites import Site
from ..parts.window import Window
from .anystory import step_at, steps_of
from .anystory_loras import Loras
from .anystory_references import PARTS, CleanReference, References
from .anystory_router import RouterStream, router_stream

KEY = MARK = "subject_patches_anystory"
NAME = "AnyStory"


@dataclass(frozen=True, eq=False)
class AnyStorySettings:
    """What a node asks for. Of each subject `tokens` are its own (1, subjects * n, context), times their scale, and
    `router` those of the router or None for no routing; `references` are theirs. The windows are shares of the steps,
    and `shift` is added to the logits of every reference's keys."""

    loras: Loras
    names: tuple[str, ...]
    tokens: Tensor
    router: Tensor | None
    references: tuple[CleanReference, ...]
    token_window: tuple[float, float]
    reference_window: tuple[float, float]
    shift: float = 0.0

    @property
    def count(self) -> int:
        return len(self.names)

    @property
    def weights(self) -> Any:
        """What holds the weights, for the host to move."""
        return self.loras.anystory.patcher


@dataclass
class _Forward:
    """One marked call of the model: its router, and where the subjects' tokens begin among its text, once known."""

    router: RouterStream | None
    begins: int = 0


@dataclass(eq=False)
class AnyStoryRun:
    """One run: what acts at the present step, and the marked call of the model that is under way."""

    settings: AnyStorySettings
    references: References
    shows_tokens: bool = False
    shows_references: bool = False
    has_acted: bool = False
    _forward: _Forward | None = None
    _marked: dict[int, tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=dict)

    def enter(self, session: Session, timestep: Tensor, model_options: Mapping[str, Any]) -> None:
        """The sampler is about to call the model at a noise level."""
        sigmas = session.levels.sigmas
        step, steps = step_at(session.sigma, sigmas), len(sigmas) - 1
        self.shows_tokens = step in steps_of(*self.settings.token_window, steps)
        self.shows_references = step in steps_of(*self.settings.reference_window, steps)
        self.has_acted = self.has_acted or self.acts
        if self.shows_references:
            self.references.load(session, timestep, model_options)

    @property
    def acts(self) -> bool:
        return self.shows_tokens or self.shows_references

    def marked(self, conds: Mapping[str, Any], runs: tuple[AnyStoryRun, ...]) -> dict[str, Any]:
        """The guider's lists, with a mark in the entries that condition on a prompt: the session's `runs`."""
        return {
            name: listed if name in UNCONDITIONED or not listed else [self._mark(entry, runs) for entry in listed]
            for name, listed in conds.items()
        }

    def _mark(self, entry: dict[str, Any], runs: tuple[AnyStoryRun, ...]) -> dict[str, Any]:
        # One marked entry for each: others know entries by identity, so both have to stay.
        if id(entry) not in self._marked:
            conds = {**entry["model_conds"], MARK: comfy.conds.CONDConstant(runs)}
            self._marked[id(entry)] = entry, {**entry, "model_conds": conds}
        return self._marked[id(entry)][1]

    @torch.compiler.disable
    def opened(self, network: Any, x: Tensor, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a marked call of the model on latents `x`; `closed` when it ends."""
        router = None
        if self.settings.router is not None:
            places = math.prod(-(-size // network.patch_size) for size in x.shape[-2:])
            router = router_stream(network, self.settings.loras, self.settings.count, places)
        self._forward = _Forward(router)
        patches = options.get("patches", {})
        join = self._joining(weakref.ref(network))
        options = {**options, "patches": {**patches, "post_input": [*patches.get("post_input", ()), join]}}
        if router is not None:
            slots = options.get("patches_replace", {})
            blocks = dict(slots.get("dit", {}))
            for kind, number in self.references.sites:
                place = (f"{kind}_block", number)
                blocks[place] = router.around(kind, number, blocks.get(place))
            options["patches_replace"] = {**slots, "dit": blocks}
        return options

    def closed(self) -> None:
        self._forward = None

    def _joining(self, network: Callable[[], Any]) -> Callable[..., Any]:
        """Puts the subjects' tokens behind the prompt's, embedded as these are."""
        settings, forward = self.settings, self._forward

        def join(streams: dict[str, Any]) -> dict[str, Any]:
            text, ids = streams["txt"], streams["txt_ids"]
            forward.begins = text.shape[1]
            if forward.router is not None:
                behind = sum(streams["transformer_options"].get("reference_image_num_tokens", ()))
                forward.router.begin(settings.router, text, behind)
            if not self.shows_tokens:
                return streams
            more = network().txt_in(settings.tokens.to(text)).expand(len(text), -1, -1)
            nowhere = ids.new_zeros((len(ids), more.shape[1], ids.shape[2]))
            return {**streams, "txt": torch.cat([text, more], 1), "txt_ids": torch.cat([ids, nowhere], 1)}

        return join

    def amend(self, call: AttentionCall) -> None:
        """Lets a call of the picture's attend as the settings say."""
        forward, count = self._forward, self.settings.count
        if forward is None:
            return
        if call.grid is None or call.own is None:
            call.leave(NAME)
            return
        maps: Sequence[Tensor | None] = [None] * count
        if forward.router is not None:
            forward.router.see(call.chunk.rows.start, call.key[:, call.own], call.value[:, call.own])
            routed = forward.router.maps[call.chunk.rows]
            maps = routed.unbind(1)
            call.note("routing map", lambda: routed.float().unflatten(-1, call.grid), self.settings.names)
        if self.shows_tokens and forward.router is not None:
            self._route_tokens(call, forward.begins, maps)
        if self.shows_references:
            for number, (key, value) in enumerate(self.references.at(call.site)):
                key, value = (repeat_to_batch_size(each, len(call.query)) for each in (key, value))
                bias = self.references.bias(number, self.settings.shift)
                call.extend_prompt(key, value, bias)
                if maps[number] is None or bool(maps[number].any()):
                    call.extend(key, value, bias, maps[number])

    def _route_tokens(self, call: AttentionCall, begins: int, maps: Sequence[Tensor]) -> None:
        """Each place sees the tokens of its own subject alone."""
        size = self.settings.tokens.shape[1]
        # Another AnyStory node's tokens stood before ours.
        begins -= call.taken
        taken = call.take(slice(begins, begins + size))
        for number, mine in enumerate(maps):
            if bool(mine.any()):
                part = slice(number * size // len(maps), (number + 1) * size // len(maps))
                key, value, bias = taken
                call.extend(key[:, part], value[:, part], None if bias is None else bias[..., part], mine)


@dataclass(frozen=True, eq=False)
class AnyStoryAttention(Edit):
    """The edit of one AnyStory node."""

    settings: AnyStorySettings
    run: AnyStoryRun | None = None
    node: ClassVar[str] = NAME

    def begin(self) -> AnyStoryAttention:
        sites = {(site.block, site.number): site for site in self.sites}
        references = References(self.settings.references, sites, self.settings.loras)
        return replace(self, run=AnyStoryRun(self.settings, references))

    def keeps(self, sigma: float) -> Iterable[Request]:
        return [(stream, self.sites, PARTS) for stream in self.settings.references]

    def amend(self, call: AttentionCall, sigma: float, recorded: Callable[[Stream], Features | None]) -> None:
        self.run.amend(call)


def add_anystory(model: Any, sites: frozenset[Site], settings: AnyStorySettings) -> Any:
    """A clone of MODEL with AnyStory; the given MODEL stays as it is."""
    patched = add_edit(model, AnyStoryAttention(sites, Window(), settings), (settings.weights,))
    patched.set_injections(KEY, [*(patched.get_injections(KEY) or ()), settings.loras.injection()])
    wrappers = {
        WrappersMP.OUTER_SAMPLE: _sample,
        WrappersMP.PREDICT_NOISE: _predict_noise,
        WrappersMP.APPLY_MODEL: _apply_model,
    }
    wrap(patched, KEY, wrappers)
    return patched


def _runs_of(session: Session | None) -> tuple[AnyStoryRun, ...]:
    """AnyStory's runs in a session, in the order of their nodes."""
    edits = () if session is None else session.edits
    return tuple(edit.run for edit in edits if isinstance(edit, AnyStoryAttention))


def _sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
    session = executor.class_obj.model_options["transformer_options"].get(SESSION)
    try:
        result = executor(*args, **kwargs)
        for run in _runs_of(session):
            if not run.has_acted:
                steps = len(session.levels.sigmas) - 1
                session.warn_once(
                    f"{NAME} did nothing: none of this run's {steps} steps lies in its windows, which are shares of "
                    "the steps, rounded. Widen a window, or take more steps."
                )
        return result
    finally:
        # The host would leave the LoRAs hung for as long as the model is loaded; it hangs them again before a run.
        executor.class_obj.model_patcher.eject_model()


def _predict_noise(
    executor: Any, x: Tensor, timestep: Tensor, model_options: dict[str, Any], seed: Any = None
) -> Tensor:
    session = model_options.get("transformer_options", {}).get(SESSION)
    runs = _runs_of(session)
    for run in runs:
        run.enter(session, timestep, model_options)
    if not any(run.acts for run in runs):
        return executor(x, timestep, model_options, seed)
    guider = executor.class_obj
    conds = guider.conds
    guider.conds = runs[0].marked(conds, runs)
    try:
        return executor(x, timestep, model_options, seed)
    finally:
        guider.conds = conds


def _apply_model(
    executor: Any,
    x: Tensor,
    t: Tensor,
    c_concat: Any = None,
    c_crossattn: Any = None,
    control: Any = None,
    transformer_options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Tensor:
    options = transformer_options or {}
    runs = [run for run in kwargs.pop(MARK, ()) if run.acts]
    more = sum(run.settings.tokens.shape[1] for run in runs if run.shows_tokens)
    if more and kwargs.get("attention_mask") is not None:
        kwargs["attention_mask"] = widened(kwargs["attention_mask"], c_crossattn.shape[1], more)
    try:
        for run in runs:
            options = run.opened(executor.class_obj.diffusion_model, x, options)
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    finally:
        for run in runs:
            run.closed()


def widened(mask: Tensor, place: int, count: int) -> Tensor:
    """A mask over tokens (rows, n, n) with `count` more tokens at a place, of which it says nothing."""
    none = 0.0 if mask.dtype != torch.bool else True
    for dimension in (1, 2):
        before, after = mask.tensor_split((place,), dimension)
        shape = list(mask.shape)
        shape[dimension] = count
        mask = torch.cat([before, mask.new_full(shape, none), after], dimension)
    return mask
