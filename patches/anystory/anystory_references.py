"""AnyStory's stream of references: one pass of the FLUX over them at timestep 0, whose keys and values are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import comfy.conds
import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor

from ..engine.companion import OfThePictureError, companion_call, companion_options
from ..engine.engine import KEY, SESSION
from ..engine.passes import RECORDING
from ..engine.recording import Recording
from ..engine.session import Session
from ..engine.streams import NoiseScaling, Pass
from ..parts.cache import FeatureCache, Features
from ..parts.identity import Same
from ..parts.randomness import own_randomness
from ..parts.sites import Site
from .anystory import NEGLIGIBLE, reference_bias
from .anystory_loras import REFERENCES, Loras

PARTS = ("key", "value")
# Of a conditioning, what is of its text or of pictures of its own.
_OTHERS = frozenset({"c_crossattn", "attention_mask", "ref_latents", "ref_latents_method"})


@dataclass(eq=False)
class CleanReference:
    """One subject's reference as a companion stream. `clean` are its latents (1, channels, height, width) in the
    model's latent space. Of its tokens those are kept whose logits `bias` (tokens) does not lower to nothing; None
    keeps all."""

    clean: Tensor
    bias: Tensor | None
    weights: Any
    strength: float
    cache: FeatureCache | None
    conditioning: Any = None
    how: Pass = field(default_factory=lambda: Pass(1.0, without_cross_attention=True))
    pixels: ClassVar[None] = None

    @property
    def shape(self) -> torch.Size:
        return self.clean.shape

    @property
    def kept(self) -> Tensor | None:
        """Which tokens are kept, or None for all."""
        return None if self.bias is None else (self.bias > NEGLIGIBLE).nonzero().squeeze(1)

    def known(self) -> Tensor | None:
        return self.clean

    def identity(self) -> tuple[Any, ...] | None:
        kept = None if self.kept is None else tuple(self.kept.tolist())
        return ("AnyStory's reference", Same(self.weights), self.strength, kept)

    def latents(self, sigma: float, noise_scaling: NoiseScaling) -> Tensor:
        return self.clean

    def denoised(self, sigma: float, prediction: Tensor) -> None:
        """A clean picture needs no prediction."""

    def keep(self, site: Site, grid: tuple[int, int], features: Features) -> Features:
        if self.kept is None:
            return features
        return {part: tensor[:, self.kept.to(tensor.device)] for part, tensor in features.items()}


def clean_reference(
    clean: Tensor, mask: Tensor | None, shift: float, loras: Loras, cache: FeatureCache | None
) -> CleanReference:
    """A subject's reference; `mask` (1, tokens) of 0 to 1 says which of its tokens the picture may see, None all."""
    bias = None if mask is None else reference_bias(mask.flatten(), shift)
    strength = loras.strengths[REFERENCES]
    return CleanReference(clean, bias, loras.anystory.patcher.model, strength, cache)


@dataclass(eq=False)
class References:
    """The references of one run's subjects, and what they gave: for each layer the keys and values of each subject."""

    streams: Sequence[CleanReference]
    sites: Mapping[tuple[str, int], Site]
    loras: Loras
    _digest: str | None = None
    _features: list[dict[Site, Features]] = field(default_factory=list)

    def at(self, site: Site) -> list[tuple[Tensor, Tensor]]:
        """The keys and values (rows of the pooled prompt, tokens, channels) of each subject at a layer."""
        return [(features[site]["key"], features[site]["value"]) for features in self._features if site in features]

    def bias(self, number: int, shift: float) -> Tensor | None:
        """What is added to the logits of a subject's kept keys: (1, 1, tokens), or one number for all, or None."""
        stream = self.streams[number]
        values = None if stream.bias is None else stream.bias[stream.kept]
        if values is None or bool((values == shift).all()):
            return None if shift == 0 else torch.full((1, 1, 1), shift)
        return values[None, None]

    def load(self, session: Session, timestep: Tensor, model_options: Mapping[str, Any]) -> None:
        """Sees to the features for the prompt that is in force: from this run, from the subjects' caches, or by a pass.
        They do not depend on the noise level."""
        options = companion_options(model_options, KEY)
        _, digest = session.stream_conditioning(self.streams[0])
        if digest is not None and digest == self._digest:
            return
        sites = frozenset(self.sites.values())
        recordings = [session.recording(s, sites, PARTS, options, timestep.device) for s in self.streams]
        for several in _alike(recording for recording in recordings if not recording.complete):
            # What a control model is shown has the size of its picture.
            (own,), _ = session.stream_conditioning(several[0].stream)
            self._pass(session, several, own, timestep, options)
        for recording in recordings:
            recording.finish(comfy.model_management.intermediate_device())
        self._digest, self._features = digest, [recording.features for recording in recordings]

    def _pass(
        self,
        session: Session,
        recordings: Sequence[Recording],
        conditioning: Mapping[str, Any],
        timestep: Tensor,
        options: Mapping[str, Any],
    ) -> None:
        """One forward over references of one size, a row each, for every pooled prompt of the batch."""
        inner = session.guider.inner_model
        conds = {name: cond for name, cond in conditioning["model_conds"].items() if name not in _OTHERS}
        rows = conds["y"].cond.shape[0] if "y" in conds else 1
        latents = torch.cat([r.stream.clean.repeat(rows, 1, 1, 1) for r in recordings]).to(timestep)
        # The host's model needs a text token; nothing attends to it.
        width = inner.diffusion_model.params.context_in_dim
        conds["c_crossattn"] = comfy.conds.CONDRegular(torch.zeros(1, 1, width, device=timestep.device))
        (entry,) = session.at_level([{**conditioning, "model_conds": conds}], 0.0, timestep, options)
        grid = tuple(-(-size // inner.diffusion_model.patch_size) for size in latents.shape[-2:])
        recorder = _Recorder(recordings, self.sites, rows, grid)
        level = timestep.new_zeros(len(latents))
        # The host's node for torch.compile lets a network go on with the patches that it was traced with.
        with self.loras.on(REFERENCES), torch.compiler.set_stance("force_eager"):
            while True:
                given = recorder.options(options)
                try:
                    with own_randomness(timestep.device):
                        comfy.samplers.calc_cond_batch(inner, [[entry]], latents, level, given)
                    return
                except OfThePictureError as found:
                    for recording in recordings:
                        recording.begin_again(found.owner)


def _alike(recordings: Iterable[Recording]) -> list[list[Recording]]:
    found: dict[torch.Size, list[Recording]] = {}
    for recording in recordings:
        found.setdefault(recording.stream.shape, []).append(recording)
    return list(found.values())


@dataclass
class _Recorder:
    """Stands in the host's slot for attention during the pass: keeps keys and values, rotated already, and hides the
    text token."""

    recordings: Sequence[Recording]
    sites: Mapping[tuple[str, int], Site]
    rows: int
    grid: tuple[int, int]
    inner: Callable[..., Tensor] | None = None

    def options(self, model_options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of the pass, of those of companions. The references lie left of where the picture begins, all in
        one place."""
        options = model_options["transformer_options"]
        left_out = {owner for recording in self.recordings for owner in recording.left_out}
        options = companion_call({n: v for n, v in options.items() if n not in (SESSION, RECORDING)}, left_out)
        self.inner = options.get("optimized_attention_override")
        # Where the picture's places are stretched (the host's ScaleROPE), so are the references'.
        rope = options.get("rope_options") or {}
        rope = {**rope, "shift_x": rope.get("shift_x", 0.0) - self.grid[1] * rope.get("scale_x", 1.0)}
        options |= {"optimized_attention_override": self, "rope_options": rope}
        return {**model_options, "transformer_options": options}

    @torch.compiler.disable
    def __call__(
        self, function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, heads: int, **named: Any
    ) -> Tensor:
        k, v = k[:, :, 1:], v[:, :, 1:]
        told = named["transformer_options"]
        site = self.sites[told["block_type"], told["block_index"]]
        key, value = (each.transpose(1, 2).flatten(2).split(self.rows) for each in (k, v))
        for number, recording in enumerate(self.recordings):
            recording.record(site, self.grid, {"key": key[number].clone(), "value": value[number].clone()})
        if self.inner is None:
            return function(q, k, v, heads, **named)
        return self.inner(function, q, k, v, heads, **named)
