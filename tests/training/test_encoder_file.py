"""The one writer of subject encoders' files: what it writes is what earlier ones wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from subject_patches.encoders.subject_encoder import read_subject_encoder
from subject_patches.tests.shared.models import small_model
from subject_patches.tests.shared.subject_encoders import file_for, written
from subject_patches.toy import train_router, train_subjects
from subject_patches.toy.pair_training import ENCODER
from subject_patches.training.encoder_file import write_encoder


def told(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_a_file_written_before_is_written_the_same(tmp_path: Path) -> None:
    """The toy's: its tensors to the bit, its metadata word for word; as the first stage writes it, all but the
    router."""
    encoder, before = read_subject_encoder(ENCODER), load_file(ENCODER)
    train_router.write(encoder.router.model, encoder, tmp_path / "second.safetensors")
    train_subjects.write(encoder.modules, encoder.vision.model, tmp_path / "first.safetensors")
    second, first = (load_file(tmp_path / f"{name}.safetensors") for name in ("second", "first"))
    assert second.keys() == before.keys()
    assert all(torch.equal(second[name], each) for name, each in before.items())
    about = told(ENCODER)
    assert told(tmp_path / "second.safetensors") == {**about, "trained_by": train_router.TRAINED_BY}
    assert first.keys() == {name for name in before if not name.startswith("router.")}
    assert all(torch.equal(each, before[name]) for name, each in first.items())
    about.pop("router")
    assert told(tmp_path / "first.safetensors") == {**about, "trained_by": train_subjects.TRAINED_BY}


@pytest.mark.parametrize("sees", [True, False], ids=["with a vision model", "without"])
def test_an_encoder_without_a_router(sees: bool, tmp_path: Path) -> None:
    """Only what it is given is in the file, in half precision, and the loader takes it."""
    encoder = read_subject_encoder(written(tmp_path / "given.safetensors", *file_for(small_model())))
    vision = (encoder.vision.model, encoder.vision.config) if sees else None
    write_encoder(tmp_path / "made.safetensors", encoder.modules, encoder.form, "the tests", "nobody", vision)
    about, given = told(tmp_path / "made.safetensors"), told(tmp_path / "given.safetensors")
    assert about == (given if sees else {name: each for name, each in given.items() if name != "vision"})
    tensors = load_file(tmp_path / "made.safetensors")
    assert {each.dtype for each in tensors.values()} == {torch.float16}
    made = read_subject_encoder(tmp_path / "made.safetensors")
    assert (made.form, made.router, made.vision is not None) == (encoder.form, None, sees)
