"""Of which text encoders' tokens the context is made that a CLIP of the host's gives, and where each begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# The host's names of its CLIP text encoders, whose tokens line up.
CLIPS = frozenset({"l", "g", "h"})
# Text encoders of one kind of tokens, and whether the host cuts off what their template puts before the prompt.
_SINGLE = {
    "t5xxl": False,
    "umt5xxl": False,
    "gemma2_2b": False,
    "qwen3_4b": False,
    "qwen3_8b": False,
    "mistral3_24b": False,
    "qwen25_7b": True,
    "qwen3vl_4b": True,
}
KNOWN = (
    "those of SD 1.x, SD 2.x, SDXL, SD 3.5, FLUX.1, FLUX.2, Chroma, Qwen-Image, Z-Image, Lumina 2, HiDream, Krea 2, "
    "Cosmos-Predict2, Anima and Wan"
)
# What Qwen begins a message with.
_MESSAGE, _USER, _NEW_LINE = 151644, 872, 198
Tokenized = Mapping[str, list[list[tuple[Any, float, int]]]]


@dataclass(frozen=True)
class Stretch:
    """A stretch of the context: the text encoders that have a prompt's tokens there, all at the same positions, and
    those whose tokens are as many as the stretch is long. `cut` says that the host leaves out what a template puts
    before the prompt."""

    names: tuple[str, ...]
    counted: tuple[str, ...]
    cut: bool = False


def stretches_of(clip: Any, tokenized: Tokenized) -> tuple[tuple[Stretch, ...], str | None]:
    """The stretches of the context that a CLIP makes, and the encoder whose tokens are as many as the conditioning's
    own, where that is not all of them."""
    names = set(tokenized)
    t5 = Stretch(("t5xxl",), ("t5xxl",))
    if names <= CLIPS:
        return (Stretch(tuple(tokenized), tuple(tokenized)),), None
    if names == {"l", "t5xxl"}:
        # FLUX.1 reads CLIP's pooled output alone.
        return (t5,), None
    if names == {"qwen3_06b", "t5xxl"}:
        return (t5,), "qwen3_06b"
    if names == {"g", "l", "t5xxl"}:
        clips = tuple(name for name in ("g", "l") if _is_loaded(clip, name))
        parts = (*((Stretch(clips, clips),) if clips else ()), *((t5,) if _is_loaded(clip, "t5xxl") else ()))
        return parts, None
    if names == {"g", "l", "t5xxl", "llama"}:
        # The host puts zeros in the place of one that is not loaded: as many as T5's tokens, or one of Llama's.
        parts = (t5 if _is_loaded(clip, "t5xxl") else Stretch((), ("t5xxl",)),)
        return (*parts, *((Stretch(("llama",), ("llama",)),) if _is_loaded(clip, "llama") else ())), "t5xxl"
    if len(names) == 1 and names <= _SINGLE.keys():
        (name,) = names
        return (Stretch((name,), (name,), cut=_SINGLE[name]),), None
    raise ValueError(
        f"This CLIP has the text encoder {', '.join(names)}, in which phrases cannot be found; it can be done for "
        f"{KNOWN}: use one of those, or give no phrases."
    )


def _is_loaded(clip: Any, name: str) -> bool:
    """Whether a CLIP of several text encoders has the weights of one; the host loads it without, too."""
    model = getattr(clip, "cond_stage_model", None)
    return model is None or getattr(model, f"clip_{name}", getattr(model, name, None)) is not None


def tokenizer_of(clip: Any, name: str) -> Any:
    return getattr(clip.tokenizer, f"clip_{name}", None) or getattr(clip.tokenizer, name)


def cut_off(chunk: Sequence[tuple[Any, ...]]) -> int:
    """How many tokens the host leaves out before a prompt in Qwen-Image's and Krea 2's template: up to the second
    message, with what says that it is the user's."""
    values = [value if isinstance(value, int) else None for value, *_ in chunk]
    begins = [place for place, value in enumerate(values) if value == _MESSAGE][:2][-1]
    return begins + (3 if values[begins + 1 : begins + 3] == [_USER, _NEW_LINE] else 0)
