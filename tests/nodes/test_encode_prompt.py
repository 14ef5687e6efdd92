"""The node, with a small CLIP of random weights that really encodes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.hooks
import comfy.sd
import pytest
import torch
from comfy.sampler_helpers import convert_cond
from comfy.supported_models_base import ClipTarget
from comfy_extras.nodes_hooks import CreateHookKeyframe, SetClipHooks, SetHookKeyframes
from safetensors.torch import save_file
from subject_patches.nodes.embeddings import embeddings_state
from subject_patches.nodes.encode_prompt import EncodePromptWithSubjects
from subject_patches.patches.mechanisms.subject import Subject
from subject_patches.patches.parts.prompt import SPANS_KEY
from subject_patches.tests.shared.models import subject
from subject_patches.toy.family import WIDTH, ToyClip, ToyTokenizer

import nodes


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> comfy.sd.CLIP:
    folder: Path = tmp_path_factory.mktemp("embeddings")
    generator = torch.Generator().manual_seed(5)
    save_file({"emb_params": torch.randn(3, WIDTH, generator=generator)}, folder / "cat.safetensors")
    save_file({"emb_params": torch.randn(2, 2 * WIDTH, generator=generator)}, folder / "wide.safetensors")
    made = comfy.sd.CLIP(ClipTarget(ToyTokenizer, ToyClip), embedding_directory=str(folder))
    with torch.no_grad():
        for name, weight in made.cond_stage_model.named_parameters():
            weight.normal_(mean=float("norm" in name and name.endswith("weight")), std=0.2, generator=generator)
    return made


def encode(clip: comfy.sd.CLIP, text: str, phrases: str = "", subjects: tuple[Subject, ...] | None = None) -> list[Any]:
    (conditioning,) = EncodePromptWithSubjects.execute(clip=clip, text=text, phrases=phrases, subjects=subjects).args
    return conditioning


def first_change(clip: comfy.sd.CLIP, text: str, other: str) -> int:
    """The first position at which two prompts' contexts differ; attention in CLIP is causal."""
    contexts = [encode(clip, each)[0][0] for each in (text, other)]
    differs = (contexts[0] - contexts[1]).abs().amax(dim=(0, 2)) > 1e-4
    return int(differs.nonzero()[0])


# What stands before a phrase, the phrase, and what follows it.
PROMPTS = {
    "words": ("a red ", "dog", " on grass"),
    "a weight": ("a (red:1.3) ", "(dog:1.2)", " on grass"),
    "after an embedding": ("a embedding:cat ", "dog", " on grass"),
    "after an embedding of another width": ("a embedding:wide ", "dog", " on grass"),
    "the second chunk": ("so " * 80, "dog", " on grass"),
    "the last place of a chunk": ("so " * 74, "dog", " on grass"),
    "the first place of a chunk": ("so " * 75, "dog", " on grass"),
    "after a padded chunk": ("so " * 74 + "(very red:1.2) ", "dog", " on grass"),
}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_spans_are_where_the_context_changes(clip: comfy.sd.CLIP, prompt: tuple[str, str, str]) -> None:
    before, phrase, after = prompt
    text = before + phrase + after
    options = encode(clip, text, f"{phrase}; on")[0][1]
    ((start, stop),) = options[SPANS_KEY][phrase]
    assert stop == start + 1
    assert first_change(clip, text, before + phrase.replace("dog", "cat") + after) == start
    ((start, _),) = options[SPANS_KEY]["on"]
    assert first_change(clip, text, text.replace(" on ", " by ")) == start


def test_a_span_of_many_tokens_is_where_the_context_changes(clip: comfy.sd.CLIP) -> None:
    text = "a small embedding:cat dog on grass"
    ((start, stop),) = encode(clip, text, "small embedding:cat dog")[0][1][SPANS_KEY]["small embedding:cat dog"]
    assert (start, stop) == (2, 7)
    assert first_change(clip, text, text.replace("small", "large")) == start
    assert first_change(clip, text, text.replace("dog", "hat")) == stop - 1
    assert first_change(clip, text, text.replace("on", "by")) == stop


@pytest.mark.parametrize("text", ["", "a red dog", "a (red:1.3) embedding:cat (dog)", "so " * 100 + "dog"])
def test_the_conditioning_is_the_hosts_own(clip: comfy.sd.CLIP, text: str) -> None:
    ((plain, plain_options),) = nodes.CLIPTextEncode().encode(clip, text)[0]
    ((context, options),) = encode(clip, text, "dog" if "dog" in text else "")
    assert torch.equal(context, plain)
    assert torch.equal(options["pooled_output"], plain_options["pooled_output"])
    assert set(options) == {*plain_options, SPANS_KEY}


def test_phrases_of_the_field_and_of_subjects(clip: comfy.sd.CLIP) -> None:
    ((_, options),) = encode(
        clip, "a red dog and a hat", " dog ;\n", (subject(phrase="hat"), subject(phrase=""), subject(phrase="red dog"))
    )
    assert options[SPANS_KEY] == {"dog": ((3, 4),), "hat": ((6, 7),), "red dog": ((2, 4),)}
    assert encode(clip, "a dog")[0][1][SPANS_KEY] == {}


@pytest.fixture
def scheduled_clip(clip: comfy.sd.CLIP) -> Iterator[comfy.sd.CLIP]:
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    lora = {f"{name}.lora_up.weight": torch.ones(4 * WIDTH, 1), f"{name}.lora_down.weight": torch.ones(1, WIDTH)}
    (keyframes,) = CreateHookKeyframe().create_hook_keyframe(strength_mult=0.0, start_percent=0.0)
    (keyframes,) = CreateHookKeyframe().create_hook_keyframe(1.0, 0.5, keyframes)
    (hooks,) = SetHookKeyframes().set_hook_keyframes(comfy.hooks.create_hook_lora(lora, 1.0, 1.0), keyframes)
    (hooked,) = SetClipHooks().apply_hooks(clip, schedule_clip=True, apply_to_conds=True, hooks=hooks)
    yield hooked
    hooked.patcher.unpatch_hooks()


def test_every_entry_of_a_hook_schedule_knows_the_spans(scheduled_clip: comfy.sd.CLIP) -> None:
    conditioning = encode(scheduled_clip, "a red dog", "dog")
    assert [(options["clip_start_percent"], options["clip_end_percent"]) for _, options in conditioning] == [
        (0.0, 0.5),
        (0.5, 1.0),
    ]
    assert not torch.equal(conditioning[0][0], conditioning[1][0])
    assert all(options[SPANS_KEY] == {"dog": ((3, 4),)} for _, options in conditioning)
    # The form that a sampler gives to its chunks.
    assert all(chunk[SPANS_KEY] == {"dog": ((3, 4),)} for chunk in convert_cond(conditioning))


def test_errors_end_at_the_node(clip: comfy.sd.CLIP) -> None:
    with pytest.raises(ValueError, match="The phrase 'cat' is not in the prompt"):
        encode(clip, "a dog", "dog", (subject(phrase="cat"),))
    with pytest.raises(ValueError, match="The clip input is None"):
        EncodePromptWithSubjects.execute(clip=None, text="a dog")


def test_the_schema_explains_itself() -> None:
    schema = EncodePromptWithSubjects.GET_SCHEMA()
    assert (schema.node_id, schema.category) == ("SubjectPatchesEncodePrompt", "Subject Patches/subject")
    assert [(each.id, each.optional) for each in schema.inputs] == [
        ("clip", False),
        ("text", False),
        ("phrases", False),
        ("subjects", True),
    ]
    page = Path(__file__).parents[2] / "web" / "docs" / f"{schema.node_id}.md"
    assert all(f"`{each.id}`" in page.read_text(encoding="utf-8") for each in schema.inputs)


def test_tokens_that_another_pack_puts_twice(clip: comfy.sd.CLIP) -> None:
    """Once for keys and once for values, which a negative weight turns round."""
    text = "a red dog on a beach"
    (plain,) = encode(clip, text, "red dog; beach")
    made = clip.clone()
    name = next(iter(clip.tokenize(text)))
    encoder = getattr(clip.cond_stage_model, f"clip_{name}")
    own = encoder.encode_token_weights

    def twice(pairs: Any) -> tuple[Any, ...]:
        tokens, *rest = own(pairs)
        turned = tokens.clone()
        turned[:, 3] *= -1
        return (torch.stack([tokens, turned], 2).flatten(1, 2), *rest)

    made.patcher.add_object_patch(f"clip_{name}.encode_token_weights", twice)
    (doubled,) = encode(made, text, "red dog; beach")
    assert doubled[0].shape[1] == 2 * plain[0].shape[1]
    for phrase, spans in plain[1][SPANS_KEY].items():
        assert doubled[1][SPANS_KEY][phrase] == tuple((2 * start, 2 * stop) for start, stop in spans)
        for start, stop in spans:
            assert torch.equal(doubled[0][:, 2 * start : 2 * stop : 2], plain[0][:, start:stop])


def test_embeddings_that_a_prompt_depends_on(host_folders: Path) -> None:
    """In subfolders, too, where the host looks; what no file can be called is none."""
    file = host_folders / "embeddings" / "people" / "anna.pt"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"one")
    before = embeddings_state("a embedding:anna on grass")
    assert [path for path, *_ in before] == [str(file)] == [path for path, *_ in embeddings_state(None)]
    file.write_bytes(b"other")
    assert embeddings_state("a embedding:anna on grass") != before
    assert embeddings_state("a dog", f"embedding:{'x' * 300}", "embedding:berta") == []
