"""Concepts that studies share: trained once, and taken again where nothing of the training differs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from host import Host
from measuring.concepts import _key, kept_or_trained
from measuring.given import Given
from safetensors.torch import load_file, save_file
from subject_patches.tests.shared.concepts import latents, matching_clip, others
from subject_patches.tests.shared.models import small_model
from subject_patches.toy import sampling
from subject_patches.toy.sampling import Toy
from subject_patches.toy.scenes import WHOLE
from subject_patches.training.concept_run import Settings
from subject_patches.training.concept_words import SCHEMES


def test_a_kept_concept_is_taken_by_the_same_training_alone(host: Host, tmp_path: Path) -> None:
    """The file is what the next run takes, to the number; another seed, other pictures or pictures for regularisation
    are trained with anew, and without a folder nothing is kept."""
    toy, pictures = Toy(small_model(), matching_clip(), None), latents(2, 1)
    given = Given(host, toy, None, 1, 1, WHOLE, tmp_path)
    settings = Settings("dog", SCHEMES["plain"], 1, learning_rate=1e-3)
    trained = kept_or_trained(given, pictures, settings)
    (file,) = tmp_path.iterdir()
    changed = {name: each + 1 for name, each in load_file(file).items()}
    save_file(changed, file)
    taken = kept_or_trained(given, pictures, settings)
    for part in ("embedding", "difference"):
        first, second = getattr(trained, part), getattr(taken, part)
        assert first.keys() == second.keys()
        assert all(torch.equal(each + 1, second[name]) for name, each in first.items())
    beside = kept_or_trained(given, pictures, settings, others=others())
    assert any(not torch.equal(each, beside.difference[name]) for name, each in trained.difference.items())
    kept_or_trained(given, pictures, replace(settings, seed=1))
    kept_or_trained(given, pictures + 1, settings)
    kept_or_trained(replace(given, kept=None), pictures - 1, settings)
    assert len(list(tmp_path.iterdir())) == 4


def test_what_a_kept_concept_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regularisation's captions and pictures, and the toy's weights, make others of it."""
    pictures, settings = latents(2, 1), Settings("dog", SCHEMES["plain"], 1)
    others = [None, *(SimpleNamespace(captions=[t], latents=pictures + n) for t, n in (("a", 0), ("b", 0), ("a", 1)))]
    keys = [_key(pictures, settings, each) for each in others]
    weights = tmp_path / "weights"
    weights.write_bytes(b"others")
    monkeypatch.setattr(sampling, "CHECKPOINT", weights)
    keys.append(_key(pictures, settings, None))
    assert len(set(keys)) == 5
