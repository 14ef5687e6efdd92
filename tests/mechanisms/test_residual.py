"""Residual tokens: Eq. 3, 5 and 6, applying them, and their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from hosting.random_models import generator
from subject_patches.nodes.encode_prompt import EncodePromptWithSubjects
from subject_patches.nodes.model_files import RESIDUAL_TOKENS
from subject_patches.nodes.residual import ApplyResidualTokens, LoadResidualToken, SaveResidualToken
from subject_patches.patches.mechanisms.residual import (
    ResidualToken,
    add_residual,
    in_doubled,
    mean_shift,
    preservation_loss,
    subject_spans,
)
from subject_patches.patches.parts.prompt import SPANS_KEY, Spans
from subject_patches.tests.shared.clips import FAMILIES, SMALL, small_clip

pytestmark = pytest.mark.usefixtures("in_inference_mode")

WIDTH = SMALL["hidden_size"]


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    RESIDUAL_TOKENS.register()
    places = ([str(tmp_path / "tokens")], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, RESIDUAL_TOKENS.name, places)
    return tmp_path


def residual(width: int = WIDTH, vectors: int = 1, noun: str = "dog", seed: int = 3) -> ResidualToken:
    return ResidualToken(torch.randn(vectors, width, generator=generator(seed)), noun, 7)


# Equations


def test_equation_3_leaves_the_subject_free() -> None:
    original = torch.randn(2, 5, 4, generator=generator(0))
    tuned = torch.randn(2, 5, 4, generator=generator(1))
    subject = torch.zeros(2, 5, dtype=torch.bool)
    subject[0, 2] = subject[1, 4] = True
    expected, count = 0.0, 0
    for row in range(2):
        for token in range(5):
            if not subject[row, token]:
                expected += float(((tuned - original)[row, token] ** 2).sum())
                count += 1
    assert float(preservation_loss(tuned, original, subject)) == pytest.approx(expected / count)
    tuned[subject] += 100
    assert float(preservation_loss(tuned, original, subject)) == pytest.approx(expected / count)


def test_equation_5_is_the_mean_over_sentences() -> None:
    original = torch.randn(3, 6, 4, generator=generator(0))
    tuned = torch.randn(3, 6, 4, generator=generator(1))
    places = [(1, 2), (3, 4), (4, 5)]
    subject = torch.zeros(3, 6, dtype=torch.bool)
    for row, tokens in enumerate(places):
        subject[row, list(tokens)] = True
    expected = [sum((tuned - original)[row, tokens[k]] for row, tokens in enumerate(places)) / 3 for k in range(2)]
    torch.testing.assert_close(mean_shift(tuned, original, subject), torch.stack(expected))


@pytest.mark.parametrize(("vectors", "positions"), [(1, [2]), (1, [2, 5, 6]), (2, [1, 2]), (2, [1, 2, 4, 5])])
def test_equation_6_adds_it_there_and_nowhere_else(vectors: int, positions: list[int]) -> None:
    context = torch.randn(2, 8, 4, generator=generator(0))
    shift = torch.randn(vectors, 4, generator=generator(1))
    result = add_residual(context, shift, positions, 0.5)
    for token in range(8):
        added = 0.5 * shift[positions.index(token) % vectors] if token in positions else torch.zeros(4)
        torch.testing.assert_close(result[:, token], context[:, token] + added)
    others = [token for token in range(8) if token not in positions]
    assert torch.equal(result[:, others], context[:, others])


def test_a_residual_of_two_does_not_fit_one_token() -> None:
    with pytest.raises(ValueError, match="The residual is 2 vectors, one for each token of its noun, and cannot be"):
        add_residual(torch.zeros(1, 4, 4), torch.zeros(2, 4), [1])


def test_a_prompt_that_another_node_cut_off() -> None:
    assert add_residual(torch.zeros(1, 4, 4), torch.ones(1, 4), [3])[0, 3, 0] == 1
    with pytest.raises(ValueError, match=r"The prompt has 3 tokens, but the noun's last is number 4: another node has"):
        add_residual(torch.zeros(1, 3, 4), torch.ones(1, 4), [1, 3])


KNOWN = {"dog": ((2, 3), (6, 7)), "brown dog": ((5, 7),), "puppy": ((8, 10),), "hot dog stand": ((12, 15),)}


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        ("", ((2, 3), (6, 7))),
        ("Dog ", ((2, 3), (6, 7))),
        ("brown dog", ((6, 7),)),
        ("brown\n dog", ((6, 7),)),
        ("puppy", ((8, 10),)),
        ("dogs", None),
        ("old dog", None),
    ],
)
def test_which_words_become_the_subject(phrase: str, expected: Spans | None) -> None:
    if expected is None:
        with pytest.raises(ValueError, match=rf"does not know where '{phrase}' is in its prompt \(it knows dog, brown"):
            subject_spans(KNOWN, "dog", phrase)
    else:
        assert subject_spans(KNOWN, "Dog", phrase) == expected


def test_a_phrase_around_the_noun_needs_the_noun_too() -> None:
    with pytest.raises(ValueError, match="does not know where 'dog' is"):
        subject_spans({"brown dog": ((1, 3),)}, "dog", "brown dog")
    with pytest.raises(ValueError, match=r"\(it knows none\); make it with Encode Prompt with Subjects, with 'dog'"):
        subject_spans({}, "dog")


# Applying


def encode(clip: Any, text: str, phrases: str = "dog") -> list[Any]:
    return EncodePromptWithSubjects.execute(clip, text, phrases).args[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("before", ["a ", "so " * 90], ids=["short", "over 77 tokens"])
def test_all_occurrences_in_every_family(family: str, before: str) -> None:
    clip = small_clip(family)
    plain = encode(clip, f"{before}dog and a (dog:1.2)")
    width = plain[0][0].shape[-1]
    token = residual(width)
    ((context, values),) = ApplyResidualTokens.execute(plain, token).args[0]
    changed = (context - plain[0][0])[0]
    places = [position for start, stop in values[SPANS_KEY]["dog"] for position in range(start, stop)]
    assert len(places) == 2
    assert changed.shape[0] == (77 if before == "a " else 154)
    for place in places:
        torch.testing.assert_close(changed[place], token.vectors[0], rtol=1e-4, atol=1e-4)
    changed[places] = 0
    assert not bool(changed.any())
    # In SDXL a residual is for both encoders at once.
    assert width == (2 * WIDTH if family == "SDXL" else WIDTH)
    assert torch.equal(values["pooled_output"], plain[0][1]["pooled_output"])


def test_chains_add_up_and_the_given_prompt_stays() -> None:
    clip = small_clip("SD 1.x")
    plain = encode(clip, "a dog and a cat", "dog; cat")
    kept = plain[0][0].clone()
    dog, cat = residual(), residual(noun="cat", seed=4)
    one = ApplyResidualTokens.execute(plain, dog).args[0]
    both = ApplyResidualTokens.execute(one, cat, 0.5).args[0]
    other = ApplyResidualTokens.execute(ApplyResidualTokens.execute(plain, cat, 0.5).args[0], dog).args[0]
    assert torch.equal(both[0][0], other[0][0])
    assert torch.equal(plain[0][0], kept)
    assert not torch.equal(both[0][0], one[0][0])
    assert torch.equal(ApplyResidualTokens.execute(plain, dog, 0.0).args[0][0][0], kept)


def test_a_prompt_that_has_each_token_twice() -> None:
    """Both of a token get its vector, at each occurrence of the noun."""
    token = residual(4, 2, "hot dog")
    spans = ((2, 6), (8, 12))
    ((context, _),) = ApplyResidualTokens.execute(
        [[torch.zeros(1, 14, 4), {SPANS_KEY: {"hot dog": spans}}]], token
    ).args[0]
    first, second = token.vectors
    for start, _ in spans:
        assert torch.equal(context[0, start : start + 4], torch.stack([first, first, second, second]))
    # One that the end of a chunk cuts in two is no shorter.
    assert in_doubled(token.vectors, ((75, 76), (78, 79))) is token.vectors
    assert torch.equal(in_doubled(token.vectors, ((2, 4), (6, 8))), token.vectors)


def test_what_cannot_be_applied() -> None:
    clip = small_clip("SD 1.x")
    plain = encode(clip, "a dog")
    wide = residual(768)
    with pytest.raises(ValueError, match=r"of 'dog' is for SD 1\.x \(768 wide\), .* encoded for a family 24 wide"):
        ApplyResidualTokens.execute(plain, wide)
    with pytest.raises(ValueError, match="does not know where 'cat' is in its prompt"):
        ApplyResidualTokens.execute(plain, residual(noun="cat"))
    for name, family in (("t5xxl_ids", "Anima"), ("conditioning_llama3", "HiDream")):
        with pytest.raises(
            ValueError, match=f"for SD 1.x, SD 2.x and SDXL, but this prompt is encoded for {family}; enc"
        ):
            ApplyResidualTokens.execute([[plain[0][0], {**plain[0][1], name: torch.zeros(7)}]], residual())
    for strength in (float("nan"), 11.0):
        with pytest.raises(ValueError, match=f"The strength is {strength}; give a number from -10 to 10"):
            ApplyResidualTokens.execute(plain, residual(), strength)


# Files


def test_a_file_of_a_few_kilobytes(folders: Path) -> None:
    token = residual(768, 2, "hot dog")
    name = SaveResidualToken.execute(token, "pets/hot").args[0]
    assert name == "pets/hot_00001_.safetensors"
    assert SaveResidualToken.execute(token, "pets/hot").args[0] == "pets/hot_00002_.safetensors"
    assert (folders / "tokens" / name).stat().st_size < 8000
    assert set(folder_paths.get_filename_list("residual_tokens")) == {name, "pets/hot_00002_.safetensors"}
    loaded = LoadResidualToken.execute(name).args[0]
    assert torch.equal(loaded.vectors, token.vectors)
    assert (loaded.noun, loaded.steps, loaded.width) == ("hot dog", 7, 768)


def test_a_file_of_another_family_is_refused(folders: Path) -> None:
    name = SaveResidualToken.execute(residual(768), "dog").args[0]
    with pytest.raises(ValueError, match=r"dog_00001_\.safetensors is for SD 1\.x \(768 wide\), but this CLIP is of a"):
        LoadResidualToken.execute(name, small_clip("SDXL"))
    own = SaveResidualToken.execute(residual(2 * WIDTH), "own").args[0]
    assert LoadResidualToken.execute(own, small_clip("SDXL")).args[0].width == 2 * WIDTH


@pytest.mark.parametrize("kind", ["no safetensors", "another file", "not finite"])
def test_what_is_no_residual(folders: Path, kind: str) -> None:
    from safetensors.torch import save_file

    path = folders / "tokens" / "broken.safetensors"
    path.parent.mkdir()
    if kind == "no safetensors":
        path.write_bytes(b"nothing")
    elif kind == "another file":
        save_file({"residual": torch.zeros(1, 4)}, path)
    else:
        SaveResidualToken.execute(ResidualToken(torch.full((1, 4), float("nan")), "dog", 1), "broken")
        (path.parent / "broken_00001_.safetensors").rename(path)
    with pytest.raises(ValueError, match=r"broken\.safetensors is no residual token \(.*\); choose another file"):
        LoadResidualToken.execute("broken.safetensors")
