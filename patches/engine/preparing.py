"""The conditionings of one run's streams, as the host prepares its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import comfy.samplers
import torch
from comfy.sampler_helpers import convert_cond

from ..families import Family
from ..parts.identity import digest_of
from ..parts.randomness import own_randomness
from .conditionings import entries_of, of_the_stream
from .denoising import Denoising
from .hooks import loaded_of
from .streams import Stream

# A conditioning ready for the model, and a digest of its contents; None where hooks change the model with the
# conditioning, which no key can tell.
Prepared = tuple[list[dict[str, Any]], str | None]


class Preparing:
    """Prepares each conditioning of a stream once; `warn` says something to the person at the graph."""

    def __init__(self, family: Family, warn: Callable[[str], None]) -> None:
        self.family, self.warn = family, warn
        self._made: dict[tuple[int, int], Prepared] = {}

    def clear(self) -> None:
        """Lets everything go."""
        self._made.clear()

    def prepared(self, stream: Stream, source: Any, guider: Any, latent: tuple[int, int]) -> Prepared:
        """A CONDITIONING that was given for a stream, or an entry of the guider's lists, for a pass over the stream;
        `latent` is the (height, width) of the generation's latents."""
        place = (id(stream), id(source))
        if place not in self._made:
            given = not isinstance(source, dict)
            (raw,) = convert_cond(source)[:1] if given else [source]
            self._made[place] = self._encoded(stream, raw, given, guider, latent)
        return self._made[place]

    def _encoded(
        self, stream: Stream, source: Mapping[str, Any], given: bool, guider: Any, latent: tuple[int, int]
    ) -> Prepared:
        entry = of_the_stream(stream, source, given, entries_of(guider, conditioned=True), latent)
        if given and entry.get("hooks") is not None:
            entry["hooks"] = self._loaded(entry["hooks"], guider)
        entry.update(model_conds={}, uuid=object())
        inner, noise = guider.inner_model, torch.zeros(stream.shape)
        device = guider.model_patcher.load_device
        kind = "negative" if any(source is each for each in entries_of(guider, conditioned=False)) else "positive"
        # unCLIP's pictures are noised by the seed, with the global random numbers.
        shown = {"latent_image": noise, "denoise_mask": None, "seed": 0, **self._shown(stream, inner)}
        with own_randomness(device):
            encoded = comfy.samplers.encode_model_conds(inner.extra_conds, [entry], noise, device, kind, **shown)
        if encoded[0].get("hooks") is not None:
            return encoded, None
        # What only cross-attention reads decides nothing in a pass without it.
        unread = {"c_crossattn"} if stream.how.without_cross_attention else set()
        return encoded, digest_of({k: v for k, v in encoded[0]["model_conds"].items() if k not in unread})

    def _loaded(self, hooks: Any, guider: Any) -> Any:
        """What of a given conditioning's hooks can act; None for none of them."""
        loaded = loaded_of(hooks, guider.model_options, guider.inner_model)
        if len(loaded) < len(hooks):
            self.warn(
                "A conditioning given to a node of Subject Patches has hooks that are on none of the sampler's own "
                "prompts, and ComfyUI loads only those; set the hooks on the positive prompt too, or load the LoRA "
                "into the MODEL."
            )
        return loaded if len(loaded) else None

    def _shown(self, stream: Stream, inner: Any) -> dict[str, Any]:
        """What the encoding is given besides a conditioning; of a branch, what the host gives it of the generation."""
        if isinstance(stream, Denoising):
            latents, mask = stream.picture or (torch.zeros(stream.shape), None)
            return {"latent_image": latents, "denoise_mask": mask}
        known = stream.known()
        return {} if known is None else self.family.shown(inner, known)
