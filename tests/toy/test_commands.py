"""What the trainers' command lines take where little is given."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from subject_patches.toy import (
    train,
    train_anylogo,
    train_dit,
    train_router,
    train_subjects,
    train_vision,
)
from subject_patches.toy.pair_training import ENCODER

TRAINERS = {
    train: train.CHECKPOINT,
    train_dit: train_dit.CHECKPOINT,
    train_vision: train_vision.FILE,
    train_subjects: ENCODER,
    train_anylogo: train_anylogo.MAPS,
}


def options(trainer: Any, monkeypatch: pytest.MonkeyPatch, **given: Path) -> Namespace:
    """What a trainer's command would train by."""
    seen: list[Namespace] = []
    monkeypatch.setattr(sys, "argv", ["trainer", *(f"--{name}={path}" for name, path in given.items())])
    monkeypatch.setattr(trainer, "together", lambda _, arguments: seen.append(arguments))
    monkeypatch.setattr(train, "unpack", lambda *_: None)
    trainer.main()
    return seen[0]


@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda trainer: trainer.__name__.rpartition(".")[2])
def test_what_goes_on_from_a_file_writes_that_file(
    trainer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And not what comes with the pack, unless it is told to."""
    begun, shipped = tmp_path / "begun.safetensors", TRAINERS[trainer]
    begun.touch()
    assert options(trainer, monkeypatch).checkpoint == shipped
    assert options(trainer, monkeypatch, start=begun).checkpoint == begun
    assert options(trainer, monkeypatch, start=begun, checkpoint=shipped).checkpoint == shipped


def test_the_lora_goes_with_its_maps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begun, other = tmp_path / "begun.safetensors", tmp_path / "lora.safetensors"
    begun.touch()
    lora = train_anylogo.LORA
    assert options(train_anylogo, monkeypatch).lora == lora
    beside = options(train_anylogo, monkeypatch, start=begun)
    assert beside.lora == beside.start_lora == tmp_path / lora.name
    assert options(train_anylogo, monkeypatch, start=begun, lora=lora).lora == lora
    assert options(train_anylogo, monkeypatch, start=begun, **{"start-lora": other}).lora == other


def test_a_router_is_written_into_its_encoders_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whosever router it begins with."""
    begun, encoder = tmp_path / "begun.safetensors", tmp_path / "encoder.safetensors"
    for path in (begun, encoder):
        path.touch()
    assert options(train_router, monkeypatch, start=begun).checkpoint == ENCODER
    assert options(train_router, monkeypatch, start=begun, encoder=encoder).checkpoint == encoder
    assert options(train_router, monkeypatch, encoder=encoder, checkpoint=begun).checkpoint == begun
