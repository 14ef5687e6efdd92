"""Small CLIPs of the host's own families, made in inference mode as the host makes them.

The tokenizers are the host's own, which it brings along, but for Gemma's, umT5's and Mistral's: those come with the
weights, and a small one stands for them here.
"""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.text_encoders.sd2_clip as sd2_clip
import sentencepiece
import torch
from comfy.supported_models_base import ClipTarget
from comfy.text_encoders import (
    anima,
    cosmos,
    flux,
    hidream,
    krea2,
    lumina2,
    pixart_t5,
    qwen_image,
    sd3_clip,
    wan,
    z_image,
)
from hosting.random_models import generator

SMALL = {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3}
# The host's names of the settings that each encoder of a family looks for, and its classes.
FAMILIES: dict[str, tuple[type, type, tuple[str, ...]]] = {
    "SD 1.x": (comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel, ("clip_l",)),
    "SD 2.x": (sd2_clip.SD2Tokenizer, sd2_clip.SD2ClipModel, ("clip_h",)),
    "SDXL": (comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel, ("clip_l", "clip_g")),
}


@torch.inference_mode()
def small_clip(family: str, seed: int = 0, **config: int) -> Any:
    """A CLIP with an encoder of random weights, or two of one width; `config` goes over SMALL."""
    tokenizer, model, names = FAMILIES[family]
    options: dict[str, Any] = {f"{name}_model_config": {**SMALL, **config} for name in names}
    clip = comfy.sd.CLIP(ClipTarget(tokenizer, model), model_options=options)
    source = generator(seed)
    for name, weight in clip.cond_stage_model.named_parameters():
        weight.normal_(mean=float("norm" in name and name.endswith("weight")), std=0.2, generator=source)
    return clip


@dataclass(frozen=True)
class Encoders:
    """The text encoders of a transformer family: the host's tokenizer, its model, and what makes each small."""

    tokenizer: type
    model: type
    small: dict[str, dict[str, Any]]
    data: str = ""


def mistral_vocabulary(data: Any) -> dict[str, Any]:
    """What the host makes of Mistral's vocabulary, also with transformers 5.15 and newer, whose converter takes a file
    where the host gives it a dictionary."""
    try:
        return flux.load_mistral_tokenizer(data)
    except TypeError as error:
        if "vocab_file" not in str(error):
            raise
    from transformers.integrations.mistral import MistralConverter

    with TemporaryDirectory() as folder:
        path = Path(folder) / "tekken.json"
        path.write_bytes(data.numpy().tobytes())
        return {"tokenizer_object": MistralConverter(str(path)).converted(), "legacy": False}


class MistralTokenizer(flux.Mistral3Tokenizer):
    """The host's, with its settings, over that vocabulary. The host takes it by its place in the tokenizer's data."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
        self.tekken_data = tokenizer_data["tekken_model"]
        comfy.sd1_clip.SDTokenizer.__init__(
            self, "", pad_with_end=False, embedding_directory=embedding_directory, embedding_size=5120,
            embedding_key="mistral3_24b", tokenizer_class=flux.MistralTokenizerClass, has_end_token=False,
            pad_to_max_length=False, pad_token=11, start_token=1, max_length=99999999, min_length=1, pad_left=True,
            disable_weights=True, tokenizer_args=mistral_vocabulary(self.tekken_data), tokenizer_data=tokenizer_data,
        )  # fmt: skip


T5 = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 4, "num_layers": 2}
_LLAMA: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
}
_CLIP = {"hidden_size": 768, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3}
# The host takes these layers' outputs by number.
_DEEP = {**_LLAMA, "num_hidden_layers": 36}
ENCODERS: dict[str, Encoders] = {
    "SD 3.5": Encoders(
        sd3_clip.SD3Tokenizer,
        sd3_clip.sd3_clip(),
        # The host puts CLIP's 768 and 1280 numbers side by side, and fills up to T5's 4096.
        {"clip_l": _CLIP, "clip_g": {**_CLIP, "hidden_size": 1280}, "t5xxl": {**T5, "d_model": 4096}},
    ),
    "FLUX.1": Encoders(flux.FluxTokenizer, flux.flux_clip(), {"clip_l": SMALL, "t5xxl": T5}),
    "Chroma": Encoders(pixart_t5.PixArtTokenizer, pixart_t5.pixart_te(), {"t5xxl": T5}),
    "FLUX.2": Encoders(
        flux.Flux2Tokenizer,
        flux.flux2_te(),
        {"mistral3_24b": {**_LLAMA, "num_hidden_layers": 40}},
        data="tekken_model",
    ),
    "Klein": Encoders(flux.KleinTokenizer, flux.klein_te(), {"qwen3_4b": _DEEP}),
    "Qwen-Image": Encoders(qwen_image.QwenImageTokenizer, qwen_image.te(), {"qwen25_7b": _LLAMA}),
    "Z-Image": Encoders(z_image.ZImageTokenizer, z_image.te(), {"qwen3_4b": _LLAMA}),
    "Lumina 2": Encoders(lumina2.LuminaTokenizer, lumina2.te(), {"gemma2_2b": _LLAMA}, data="spiece_model"),
    "HiDream": Encoders(
        hidream.HiDreamTokenizer,
        hidream.hidream_clip(),
        {"clip_l": SMALL, "clip_g": SMALL, "t5xxl": T5, "llama": {**_LLAMA, "vocab_size": 128256}},
    ),
    "Krea 2": Encoders(krea2.Krea2Tokenizer, krea2.te(), {"qwen3vl_4b": _DEEP}),
    "Cosmos-Predict2": Encoders(cosmos.CosmosT5Tokenizer, cosmos.te(), {"t5xxl": T5}),
    "Anima": Encoders(anima.AnimaTokenizer, anima.te(), {"qwen3_06b": _LLAMA}),
    "Wan": Encoders(wan.WanT5Tokenizer, wan.te(), {"umt5xxl": T5}, data="spiece_model"),
}


_SENTENCE = "a red umbrella and a small corgi on the green grass, it said"


@cache
def tokenizer_data(kind: str) -> dict[str, Any]:
    """What a text encoder's weights bring along of its tokenizer: a small sentencepiece, or Mistral's vocabulary and
    what reads it."""
    if not kind:
        return {}
    made = {"spiece_model": _sentencepiece, "tekken_model": _tekken}[kind]()
    data: dict[str, Any] = {kind: torch.frombuffer(bytearray(made), dtype=torch.uint8)}
    return data | ({"mistral3_24b_tokenizer_class": MistralTokenizer} if kind == "tekken_model" else {})


def _sentencepiece() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([_SENTENCE] * 9),
        model_writer=model,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    return model.getvalue()


def _tekken() -> bytes:
    """All bytes, and every beginning of some words, with and without the space before them. A thousand special tokens
    stand before, as in the published ones, those of the host's template among them."""
    words = dict.fromkeys(bytes([byte]) for byte in range(256))
    for word in (f"{space}{word}".encode() for word in _SENTENCE.split() for space in ("", " ")):
        words |= dict.fromkeys(word[:end] for end in range(2, len(word) + 1))
    named = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    special = [*named, *(f"<SPECIAL_{number}>" for number in range(len(named), 1000))]
    # Letters, digits, signs and spaces apart, as in the published pattern.
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    sizes = {"default_vocab_size": len(special) + len(words), "default_num_special_tokens": len(special)}
    known = [{"rank": rank, "token_bytes": base64.b64encode(word).decode()} for rank, word in enumerate(words)]
    specials = [{"rank": rank, "token_str": text, "is_control": True} for rank, text in enumerate(special)]
    told = {"config": {"pattern": pattern, **sizes}, "vocab": known, "special_tokens": specials}
    return json.dumps(told).encode()


@cache
def clip_of(family: str) -> Any:
    """A CLIP of a family that can tokenize but has no weights to encode with."""
    encoders = ENCODERS[family]
    clip = comfy.sd.CLIP(no_init=True)
    clip.tokenizer, clip.tokenizer_options = encoders.tokenizer(tokenizer_data=tokenizer_data(encoders.data)), {}
    return clip


@torch.inference_mode()
def small_encoder(
    family: str, seed: int = 0, mixing: bool = True, kind: type[comfy.sd.CLIP] = comfy.sd.CLIP, **options: Any
) -> Any:
    """A CLIP of a transformer family, of random weights; without `mixing` no token sees another, so that a position of
    the context tells of its own token alone."""
    encoders = ENCODERS[family]
    sizes = {f"{name}_model_config": config for name, config in encoders.small.items()}
    target = ClipTarget(encoders.tokenizer, encoders.model)
    clip = kind(target, tokenizer_data=tokenizer_data(encoders.data), model_options={**sizes, **options})
    source = generator(seed)
    for name, weight in clip.cond_stage_model.named_parameters():
        if ".visual." in name:
            # What sees pictures is big and of no use here.
            continue
        if weight.numel() > 10**7:
            # The words at SD 3.5's widths: one number each.
            weight.data = torch.rand(len(weight), 1, generator=source).expand(weight.shape)
        elif not mixing and name.endswith((".o.weight", ".o_proj.weight", ".out_proj.weight", ".out_proj.bias")):
            weight.zero_()
        else:
            weight.normal_(mean=float("norm" in name and name.endswith("weight")), std=0.2, generator=source)
    return clip
