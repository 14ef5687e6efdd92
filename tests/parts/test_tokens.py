"""Phrases in every kind of text encoder, by the host's own tokenizers and small encoders of its own classes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import comfy.sd
import pytest
import torch
from comfy.text_encoders import flux, sd3_clip
from comfy.text_encoders.hunyuan_image import ByT5SmallTokenizer
from host import ROOT
from safetensors.torch import save_file
from subject_patches.nodes.encode_prompt import EncodePromptWithSubjects
from subject_patches.patches.parts.prompt import SPANS_KEY, find_spans, positions_of, prompt_spans
from subject_patches.patches.parts.tokens import read_tokens
from subject_patches.tests.shared.clips import (
    ENCODERS,
    SMALL,
    T5,
    clip_of,
    mistral_vocabulary,
    small_encoder,
    tokenizer_data,
)

TEXT = "An old umbrella, and a small corgi by the blue umbrella."


@pytest.fixture(scope="module")
def t5() -> comfy.sd.CLIP:
    return clip_of("FLUX.1")


@pytest.fixture(scope="module")
def qwen() -> comfy.sd.CLIP:
    return clip_of("Qwen-Image")


def _encoders(clip: comfy.sd.CLIP) -> dict[str, tuple[Any, Any]]:
    """A CLIP's encoders by name: tokenizer and model."""
    found = {}
    for name in clip.tokenize(""):
        both = (clip.tokenizer, clip.cond_stage_model)
        found[name] = tuple(getattr(each, f"clip_{name}", None) or getattr(each, name, None) for each in both)
    return found


def _numbers(clip: comfy.sd.CLIP, name: str, phrase: str) -> set[int]:
    """The tokens of a phrase at a text's beginning and after a space, without any template."""
    tokenizer = _encoders(clip)[name][0]
    both = (tokenizer.tokenize_with_weights(text, return_word_ids=True) for text in (phrase, f"a {phrase}"))
    (first,), (second,) = both
    before = {value for value, _, _ in tokenizer.tokenize_with_weights("a", return_word_ids=True)[0]}
    return {value for value, _, group in (*first, *second) if group} - before


def _context(entry: list[Any]) -> torch.Tensor:
    """All that a model attends to of a conditioning's entry: (tokens, numbers)."""
    layers = entry[1].get("conditioning_llama3")
    context = entry[0][0]
    if layers is None:
        return context
    return torch.cat([context.repeat(1, len(layers[0])), layers[0].movedim(0, 1).flatten(1)])


@pytest.mark.parametrize("family", ENCODERS)
def test_spans_are_where_a_words_vector_acts(family: str) -> None:
    clip = small_encoder(family, mixing=False)

    def encode() -> list[Any]:
        (conditioning,) = EncodePromptWithSubjects.execute(clip, TEXT, "umbrella; small corgi").args
        assert torch.equal(conditioning[0][0], clip.encode_from_tokens_scheduled(clip.tokenize(TEXT))[0][0])
        return conditioning[0]

    before = encode()
    spans = before[1][SPANS_KEY]
    wanted = _numbers(clip, "t5xxl", "umbrella") if family == "Anima" else set()
    with torch.inference_mode():
        for name, (_, model) in _encoders(clip).items():
            words = model.transformer.get_input_embeddings().weight if model is not None else torch.empty(0, 1)
            sign = torch.ones(len(words), 1)
            for number in _numbers(clip, name, "umbrella") if len(words) else ():
                sign[number] = -1
            own = words.data[:, :1] if words.stride(1) == 0 else words.data
            words.data = (own * sign).expand_as(words) if len(words) else words
    after = encode()
    if wanted:
        # The adapter puts these in the place of the text encoder's tokens.
        changed = [place for place, number in enumerate(after[1]["t5xxl_ids"].tolist()) if number in wanted]
    else:
        changed = (_context(before) != _context(after)).any(-1).nonzero().flatten().tolist()
    assert changed
    assert positions_of(spans["umbrella"]) == changed
    assert not set(positions_of(spans["small corgi"])) & set(changed)
    assert {*changed, *positions_of(spans["small corgi"])} < set(positions_of(prompt_spans(clip, TEXT)))


PLACES = {
    "the first word": ("dog on grass", "dog", 1),
    "letter case": ("A Red DOG", "red dog", 1),
    "repeated": ("dog and dog, (dog)", "dog", 3),
    "before a comma": ("one dog, two", "dog", 1),
    "no end of a longer word": ("a bulldog and a dog", "dog", 1),
    "no beginning of one": ("a dogma, a dog's", "dog", 1),
    "a hyphen in it": ("a red-haired girl", "red-haired girl", 1),
    "across a comma": ("a dog, red and small", "dog, red", 1),
    "new lines": ("a red\n\ndog", "red dog", 1),
    "at the beginning of a line": ("\ndog", "dog", 1),
    "after 700 words": ("so " * 700 + "dog", "dog", 1),
    "Chinese": ("草地上有一只狗", "狗", 1),
    "braces": ("a {dog}", "dog", 1),
    "a word of the template": ("the image of a user", "image", 1),
}


@pytest.mark.parametrize(("text", "phrase", "count"), PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("family", ["Qwen-Image", "Chroma"])
def test_places(family: str, text: str, phrase: str, count: int) -> None:
    if family == "Chroma" and phrase == "狗":
        pytest.skip("T5 knows no Chinese")
    clip = clip_of(family)
    spans = find_spans(clip, text, [phrase])[phrase]
    assert len(spans) == count
    ((name, chunks),) = clip.tokenize(text, return_word_ids=True).items()
    (tokens,) = chunks
    cut = len(tokens) - prompt_length(clip, text)
    tokenizer = getattr(clip.tokenizer, clip.tokenizer.clip)
    for start, stop in spans:
        part = tokens[start + cut : stop + cut]
        spelled = read_tokens([part], tokenizer)
        letters = "".join(str(symbol.value) for symbol in spelled.symbols).strip(" -,'({}).")
        assert letters.split() == phrase.lower().split(), name


def prompt_length(clip: comfy.sd.CLIP, text: str) -> int:
    """The length of the context as the host makes it: Qwen-Image's lacks what comes before the user's words."""
    ((name, ((*tokens,),)),) = clip.tokenize(text).items()
    if name != "qwen25_7b":
        return len(tokens)
    starts = [place for place, (value, _) in enumerate(tokens) if value == 151644]
    # The template ends with "<|im_start|>user\n", unless the new line is one with that of the text.
    return len(tokens) - starts[1] - (3 if tokens[starts[1] + 2][0] == 198 else 0)


def test_weights_where_they_are_read(t5: comfy.sd.CLIP, qwen: comfy.sd.CLIP) -> None:
    assert find_spans(t5, "a (red:1.3) dog", ["(red) dog"]) == {
        "(red) dog": find_spans(t5, "a red dog", ["red dog"])["red dog"]
    }
    # Qwen is shown the parentheses.
    with pytest.raises(ValueError, match=r"its tokens are red \| dog and the prompt's are a \| \(red:1\.3\) \| dog;"):
        find_spans(qwen, "a (red:1.3) dog", ["red dog"])
    assert len(find_spans(qwen, "a (red:1.3) dog", ["red", "(red:1.3) dog"])) == 2


def test_emoji(t5: comfy.sd.CLIP, qwen: comfy.sd.CLIP) -> None:
    found = find_spans(qwen, "a 🐶 and a 👩‍🚀", ["🐶", "👩‍🚀"])
    assert [len(spans) for spans in found.values()] == [1, 1]
    with pytest.raises(ValueError, match="'👩' is not in the prompt"):
        find_spans(qwen, "a 👩‍🚀", ["👩"])
    (span,) = find_spans(t5, "a 🐶 on grass", ["🐶"])["🐶"]
    assert span[1] - span[0] <= 2
    with pytest.raises(ValueError, match="The text encoder t5xxl cannot tell the phrase '🐶'"):
        find_spans(t5, "a 🐶 and a 🐱", ["🐶"])


def test_a_phrase_that_is_a_part_of_a_token(qwen: comfy.sd.CLIP) -> None:
    with pytest.raises(ValueError, match="'狗' is only a part of the token '狗狗' of the text encoder qwen25_7b"):
        find_spans(qwen, "一只可爱的狗狗", ["狗"])


def test_words_of_a_vocabulary_without_spaces() -> None:
    """Llama's, with some versions of transformers: the prompt itself says where its words end."""
    clip = clip_of("HiDream")
    with pytest.raises(ValueError, match="'dog' is not in the prompt"):
        find_spans(clip, "two dogs here", ["dog"])
    alone = find_spans(clip, "some dogma, a dog", ["dog"])["dog"]
    # T5's tokens, and Llama's behind them: the last words of the prompt, without its "dogma".
    last = find_spans(clip, "some dogma, a dog", ["a dog"])["a dog"]
    assert [stop for _, stop in alone] == [stop for _, stop in last]


@pytest.mark.parametrize("phrase", ["describe", "im_start", "assistant"])
def test_the_template_is_no_part_of_the_prompt(qwen: comfy.sd.CLIP, phrase: str) -> None:
    with pytest.raises(ValueError, match=rf"'{phrase}' is not in the prompt; .* the prompt's are a \| dog;"):
        find_spans(qwen, "a dog", [phrase])


def test_mistral_without_the_template() -> None:
    """FLUX.2 dev's positions count the template, which the host keeps; the prompt's words alone are looked at."""
    clip = clip_of("FLUX.2")
    (chunk,) = clip.tokenize("a small corgi")["mistral3_24b"]
    spelled = [clip.tokenizer.mistral3_24b.inv_vocab[value] for value, _ in chunk]
    assert spelled[-5:] == ["[INST]", "a", "\u0120small", "\u0120corgi", "[/INST]"]
    assert find_spans(clip, "a small corgi", ["small corgi"])["small corgi"] == ((len(chunk) - 3, len(chunk) - 1),)
    for phrase in ("objects", "INST", "speculation"):
        with pytest.raises(ValueError, match=rf"'{phrase}' is not in the prompt; .* are a \| small \| corgi;"):
            find_spans(clip, "a small corgi", [phrase])


def test_the_hosts_mistral_loads_or_says_why() -> None:
    """With transformers up to 5.14 the host's own loading gives the vocabulary that is tested here. From 5.15 on it
    stops in the host's loader, before any node of this pack, with the words that the help page quotes."""
    data = tokenizer_data("tekken_model")["tekken_model"]
    told = (ROOT / "web" / "docs" / "SubjectPatchesEncodePrompt.md").read_text(encoding="utf-8")
    (words,) = re.findall(r"`(missing [^`]+)`", told)
    wanted = mistral_vocabulary(data)["tokenizer_object"].get_vocab()
    try:
        own = flux.load_mistral_tokenizer(data)
    except TypeError as error:
        # Only that error may keep the host from it.
        stopped = str(error)
    else:
        stopped, found = words, own["tokenizer_object"].get_vocab()
        assert found == wanted
    assert words in stopped


def test_a_vocabulary_of_another_kind() -> None:
    tokenizer = ByT5SmallTokenizer()
    with pytest.raises(ValueError, match="byt5_small does not say which letters"):
        read_tokens(tokenizer.tokenize_with_weights("a", return_word_ids=True), tokenizer)


def test_only_what_is_loaded_of_sd3() -> None:
    clip = clip_of.__wrapped__("SD 3.5")
    sizes = {"clip_l_model_config": SMALL, "t5xxl_model_config": T5}

    def spans(**loaded: bool) -> Any:
        clip.cond_stage_model = sd3_clip.sd3_clip(clip_g=False, **loaded)(model_options=sizes)
        return find_spans(clip, "a dog", ["dog"])["dog"]

    both = find_spans(clip, "a dog", ["dog"])["dog"]
    (alone,) = spans(clip_l=False)
    assert both == ((2, 3), (alone[0] + 77, alone[1] + 77))
    assert spans(clip_l=True) == both
    assert spans(t5=False) == ((2, 3),)


class Shorter(comfy.sd.CLIP):
    """Another pack's CLIP, which gives a token less than its encoder made."""

    def encode_from_tokens_scheduled(self, *args: Any, **named: Any) -> list[list[Any]]:
        return [[context[:, 1:], values] for context, values in super().encode_from_tokens_scheduled(*args, **named)]


def test_a_context_of_another_length() -> None:
    clip = small_encoder("Chroma", kind=Shorter)
    with pytest.raises(ValueError, match="made 3 tokens of the prompt where 4 were expected"):
        EncodePromptWithSubjects.execute(clip, "a dog", "dog")
    EncodePromptWithSubjects.execute(clip, "a dog", "")


def test_embeddings_within_a_template(tmp_path: Path) -> None:
    """What stands behind an embedding goes through the host's parser, which takes white space apart."""
    save_file({"emb_params": torch.randn(3, 2560)}, tmp_path / "cat.safetensors")
    save_file({"emb_params": torch.randn(3, 768)}, tmp_path / "wide.safetensors")
    clip = comfy.sd.CLIP(no_init=True)
    clip.tokenizer, clip.tokenizer_options = ENCODERS["Klein"].tokenizer(embedding_directory=str(tmp_path)), {}
    (first,) = find_spans(clip, "one dog", ["one"])["one"]
    for text in ("one embedding:cat", "one embedding:cat dog", "one embedding:cat, a dog"):
        # The space before it is a token.
        assert find_spans(clip, text, ["embedding:cat"]) == {"embedding:cat": ((first[1] + 1, first[1] + 4),)}
        ((start, stop),) = prompt_spans(clip, text)
        assert start == first[0]
        assert stop == find_spans(clip, text, [text.rsplit(" ", 1)[1]])[text.rsplit(" ", 1)[1]][-1][1]
    with pytest.raises(ValueError, match="'embedding:wide' has no tokens; write at least one word"):
        find_spans(clip, "one embedding:cat", ["embedding:wide"])
