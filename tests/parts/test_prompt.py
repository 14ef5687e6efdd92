"""Token spans, with the host's own tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd
import pytest
import torch
from comfy.sd1_clip import SD1Tokenizer
from comfy.sdxl_clip import SDXLTokenizer
from comfy.text_encoders.aura_t5 import AuraT5Tokenizer
from comfy.text_encoders.sd2_clip import SD2Tokenizer
from safetensors.torch import save_file
from subject_patches.patches.parts.prompt import check_embeddings, find_spans, split_phrases


def clip_with(tokenizer: Any) -> comfy.sd.CLIP:
    """A CLIP of the host that can tokenize but has no weights to encode with."""
    clip = comfy.sd.CLIP(no_init=True)
    clip.tokenizer, clip.tokenizer_options = tokenizer, {}
    return clip


def vectors(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embeddings")
    files = {
        "cat": {"emb_params": vectors(3, 768)},
        "kitten": {"emb_params": vectors(3, 768)[:1]},
        "tail": {"emb_params": vectors(3, 768)[2:]},
        "single": {"emb_params": vectors(1, 768, seed=1)[0]},
        "wide": {"emb_params": vectors(2, 1024)},
        "both": {"clip_l": vectors(2, 768), "clip_g": vectors(2, 1280)},
        "uneven": {"clip_l": vectors(2, 768), "clip_g": vectors(3, 1280)},
    }
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def sd1(embeddings: Path) -> comfy.sd.CLIP:
    return clip_with(SD1Tokenizer(embedding_directory=str(embeddings)))


@pytest.fixture(scope="module")
def sdxl(embeddings: Path) -> comfy.sd.CLIP:
    return clip_with(SDXLTokenizer(embedding_directory=str(embeddings)))


@pytest.fixture(scope="module")
def sd2() -> comfy.sd.CLIP:
    return clip_with(SD2Tokenizer())


def test_phrases_are_split_at_lines_and_semicolons() -> None:
    assert split_phrases(" red dog;cat \r\n\n; ;a hat, blue\n") == ("red dog", "cat", "a hat, blue")
    assert split_phrases("") == ()


PLACES = {
    "a word": ("a red dog", "dog", ((3, 4),)),
    "the first word": ("dog", "dog", ((1, 2),)),
    "letter case": ("a RED dog", "Red Dog", ((2, 4),)),
    "a weight": ("a (dog:1.2) here", "dog", ((2, 3),)),
    "through weights": ("a (very (red:1.3)) dog", "very red dog", ((2, 5),)),
    "a weight in the phrase": ("a red dog", "(red:1.5) dog", ((2, 4),)),
    "escaped parentheses": (r"a \(red\) dog", r"\(red\) dog", ((2, 6),)),
    "escaped within weighted": (r"a (cat \(red\):1.2) dog", r"\(red\) dog", ((3, 7),)),
    "repeated": ("dog and dog, dog", "dog", ((1, 2), (3, 4), (5, 6))),
    "the second of several": ("dog and dog, dog", "dog#2", ((3, 4),)),
    "the first of several": ("a (red dog:1.2) and a red dog", "Red dog#1", ((2, 4),)),
    "a number sign of its own": ("dog#2 and dog", "dog#2", ((1, 4),)),
    "never overlapping": ("a dog dog dog", "dog dog", ((2, 4),)),
    "a false start": ("red red dog", "red dog", ((2, 4),)),
    "a word of several tokens": ("an emblemish thing", "emblemish", ((2, 5),)),
    "no end of a longer word": ("emblemish mish", "mish", ((4, 5),)),
    "a comma in it": ("a dog, red and small", "dog, red", ((2, 5),)),
    "other letters": ("a café 犬 here", "犬", ((3, 6),)),
    "new lines": ("a red\ndog", "red dog", ((2, 4),)),
}


@pytest.mark.parametrize(("text", "phrase", "spans"), PLACES.values(), ids=PLACES)
def test_spans_in_every_family(
    sd1: comfy.sd.CLIP,
    sd2: comfy.sd.CLIP,
    sdxl: comfy.sd.CLIP,
    text: str,
    phrase: str,
    spans: tuple[tuple[int, int], ...],
) -> None:
    for clip in (sd1, sd2, sdxl):
        assert find_spans(clip, text, [phrase]) == {phrase: spans}


def test_a_phrase_within_another_and_empty_phrases(sd1: comfy.sd.CLIP) -> None:
    found = find_spans(sd1, "a red dog and a dog", ["red dog", "", " dog ", "  ", "dog"])
    assert found == {"red dog": ((2, 4),), "dog": ((3, 4), (6, 7))}
    assert find_spans(sd1, "", ["", " "]) == {}


def test_chunks_of_77(sd1: comfy.sd.CLIP, sdxl: comfy.sd.CLIP) -> None:
    text = "so " * 74 + "red dog and a red dog " + "so " * 80 + "dog"
    for clip in (sd1, sdxl):
        found = find_spans(clip, text, ["red dog", "dog"])
        # 75 tokens fit a chunk; each has a start token before and an end token after them.
        assert found["red dog"] == ((75, 76), (78, 79), (81, 83))
        assert found["dog"] == ((78, 79), (82, 83), (2 * 77 + 11, 2 * 77 + 12))
        assert find_spans(clip, text, ["red dog#1", "red dog#2"]) == {
            "red dog#1": ((75, 76), (78, 79)),
            "red dog#2": ((81, 83),),
        }


def test_a_short_group_is_moved_to_the_next_chunk_whole(sd1: comfy.sd.CLIP) -> None:
    # The host pads the first chunk rather than break the weighted group in two.
    assert find_spans(sd1, "so " * 74 + "(red dog:1.2)", ["red dog"]) == {"red dog": ((78, 80),)}


EMBEDDED = {
    "several vectors": ("a embedding:cat here", "embedding:cat", ((2, 5),)),
    "words after it": ("a embedding:cat, red dog", "red dog", ((6, 8),)),
    "one vector": ("embedding:single dog", "embedding:single", ((1, 2),)),
    "with words": ("a red embedding:cat dog", "red embedding:cat dog", ((2, 7),)),
    "weighted": ("a (embedding:cat:1.2) dog", "embedding:cat dog", ((2, 6),)),
    "repeated": ("embedding:cat embedding:cat", "embedding:cat", ((1, 4), (4, 7))),
    "another of one vector": ("embedding:kitten embedding:single", "embedding:single", ((2, 3),)),
    "not in a longer one": ("embedding:cat embedding:kitten", "embedding:kitten", ((4, 5),)),
    "not at the end of one": ("embedding:cat embedding:tail", "embedding:tail", ((4, 5),)),
    "of another width is left out": ("a embedding:wide dog", "dog", ((2, 3),)),
    "that is missing is left out": ("a embedding:nobody dog", "dog", ((2, 3),)),
}


@pytest.mark.parametrize(("text", "phrase", "spans"), EMBEDDED.values(), ids=EMBEDDED)
def test_embeddings(sd1: comfy.sd.CLIP, text: str, phrase: str, spans: tuple[tuple[int, int], ...]) -> None:
    assert find_spans(sd1, text, [phrase]) == {phrase: spans}


def test_an_embedding_split_over_chunks(sd1: comfy.sd.CLIP) -> None:
    text = "so " * 74 + "embedding:cat dog"
    # Too small to be split: the host pads the first chunk.
    assert find_spans(sd1, text, ["embedding:cat", "dog"]) == {"embedding:cat": ((78, 81),), "dog": ((81, 82),)}


def test_the_two_encoders_of_sdxl(sdxl: comfy.sd.CLIP) -> None:
    assert find_spans(sdxl, "embedding:both dog", ["embedding:both", "dog"]) == {
        "embedding:both": ((1, 3),),
        "dog": ((3, 4),),
    }
    # Before the embedding on which they differ, the encoders agree.
    assert find_spans(sdxl, "dog embedding:uneven", ["dog"]) == {"dog": ((1, 2),)}


WRONG = {
    "absent": (
        "a (red:1.2) dog",
        "blue dog",
        r"The phrase 'blue dog' is not in the prompt; its tokens are blue \| dog and the prompt's are a \| red \| dog;",
    ),
    "absent from an empty prompt": ("", "dog", r"'dog' is not in the prompt;.* are dog and the prompt's are \(none\);"),
    "in a longer word only": ("an emblemish", "mish", r"are mish and the prompt's are an \| emblemish;"),
    "an embedding that is not used": (
        "an Émblem with embedding:cat",
        "embedding:single",
        r"\[embedding of 1 vector\] and the prompt's are an \| émblem \| with \| \[embedding of 3 vectors\];",
    ),
    "one too many": ("dog and dog", "dog#3", r"asks for occurrence 3 of 'dog', which the prompt has 2 times; give"),
    "one of none": ("a red dog", "cat#2", r"The phrase 'cat' is not in the prompt"),
    "the start of an embedding": ("embedding:cat", "embedding:kitten", "is not in the prompt"),
    "the end of an embedding": ("embedding:cat", "embedding:tail", "is not in the prompt"),
    "an embedding that is missing": ("a dog", "embedding:nobody", "'embedding:nobody' has no tokens;"),
    "an embedding of another width": ("embedding:wide", "embedding:wide", "'embedding:wide' has no tokens;"),
    "an embedding without a name": ("a dog", "embedding:", "'embedding:' names no embedding;"),
    "parentheses around nothing": ("a dog", "()", r"'\(\)' has no tokens;"),
}


@pytest.mark.parametrize(("text", "phrase", "message"), WRONG.values(), ids=WRONG)
def test_errors(sd1: comfy.sd.CLIP, text: str, phrase: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_spans(sd1, text, ["", phrase])


@pytest.mark.parametrize(
    ("text", "phrase", "places"),
    [
        ("embedding:uneven red dog", "red dog", ("at 4-5 for the encoder g", "at 3-4 for the encoder l")),
        ("embedding:uneven", "embedding:uneven", ("at 1-3 for the encoder g", "at 1-2 for the encoder l")),
        ("embedding:cat", "embedding:cat", ("nowhere for the encoder g", "at 1-3 for the encoder l")),
        ("dog " + "so " * 71 + "embedding:uneven dog", "dog", ("at 1, 78 for the encoder g", "at 1, 75 for")),
    ],
)
def test_encoders_that_disagree(sdxl: comfy.sd.CLIP, text: str, phrase: str, places: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=f"The phrase '{phrase}' is ") as error:
        find_spans(sdxl, text, [phrase])
    assert all(place in str(error.value) for place in places), error.value


def test_an_encoder_that_is_not_known_is_named() -> None:
    clip = clip_with(AuraT5Tokenizer())
    with pytest.raises(ValueError, match=r"has the text encoder pile_t5xl, .*SD 1\.x, .* or give no phrases"):
        find_spans(clip, "a dog", ["dog"])
    with pytest.raises(ValueError, match="has the text encoder pile_t5xl"):
        check_embeddings(clip, "embedding:x dog")
    assert find_spans(clip, "a dog", [""]) == {}
