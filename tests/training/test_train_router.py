"""AnyStory's second stage for real families: what it reads, that it goes on to the bit, learns, and what it writes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management
import numpy as np
import pytest
import torch
from host import ROOT
from safetensors.torch import load_file
from subject_patches.encoders.subject_encoder import SubjectEncoder, read_subject_encoder
from subject_patches.tests.shared.clips import small_clip
from subject_patches.tests.shared.forwards import counted_forwards
from subject_patches.tests.shared.models import CONTEXT, small_model
from subject_patches.tests.shared.samples import group_files, png, written_samples
from subject_patches.tests.shared.small_vaes import small_vae
from subject_patches.tests.shared.subject_encoders import file_for, written
from subject_patches.toy.pair_training import ENCODER
from subject_patches.toy.sampling import CHECKPOINT, Toy
from subject_patches.training.accelerated import Kind
from subject_patches.training.anylogo import AnyLogoTuning
from subject_patches.training.copies import loaded, with_gradients
from subject_patches.training.frozen import Frozen
from subject_patches.training.groups import decoded_group
from subject_patches.training.router import WEIGHT, intersection_over_union
from subject_patches.training.samples import Batches, Folder, decoded, parted
from subject_patches.training.subject_encoder import SubjectEncoderTraining
from subject_patches.training.subject_router import SubjectRouterTraining

COUNTS = (2, 1, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(3)
    return written_samples(tmp_path_factory.mktemp("groups"), [group_files(rng, count) for count in COUNTS])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder's file for the small model, which brings a vision model."""
    return written(tmp_path_factory.mktemp("encoder") / "small.safetensors", *file_for(small_model()))


# What is read


def wide(*middles: int) -> dict[str, bytes]:
    """A scene of 40 by 200 pixels with a subject of ten around each of these columns."""
    made = {"picture.png": png(torch.rand(40, 200, 3)), "txt": b" two things "}
    for number, middle in enumerate(middles, 1):
        mask, end = torch.zeros(40, 200), "" if number == 1 else number
        mask[10:20, middle - 5 : middle + 5] = 1
        made[f"mask{end}.png"] = png(mask)
        made[f"subject{end}.png"] = png(torch.full((20, 10, 3), number / 4))
        made[f"subject_mask{end}.png"] = png(torch.ones(20, 10))
    return made


def test_a_sample_of_several() -> None:
    """Masks in the square of the picture, subjects in squares of their own, in the order of their numbers; a training
    of one subject reads the first."""
    raw = parted(wide(80, 95, 65))
    made = decoded_group(raw, 40)
    assert made.caption == "two things"
    assert made.masks.shape == made.subject_masks.shape == (3, 40, 40)
    assert made.picture.shape == (40, 40, 3)
    assert made.subjects.shape == (3, 40, 40, 3)
    assert [int(each.sum()) for each in made.masks] == [100, 100, 100]
    assert made.subjects[:, 20, 20, 0].tolist() == pytest.approx([0.25, 0.5, 0.75], abs=0.01)
    assert made.subject_masks[0].sum() == 40 * 20
    assert torch.equal(decoded(raw, 40).subject, made.subjects[0])


def test_who_is_outside_the_square_is_left_out() -> None:
    """The square is where the most subjects are, rather two of them wholly than all in part."""
    for middles in ((10, 150, 170), (127, 150, 172)):
        made = decoded_group(parted(wide(*middles)), 40)
        assert [int(each.sum()) for each in made.masks] == [100, 100]
        middle = made.subjects[:, 20, 20, 0].tolist()
        assert middle in (pytest.approx([0.25, 0.5], abs=0.01), pytest.approx([0.5, 0.75], abs=0.01))


@pytest.mark.parametrize("kind", [AnyLogoTuning, SubjectEncoderTraining, SubjectRouterTraining], ids=lambda k: k.name)
def test_bad_samples_are_refused(kind: type[Kind]) -> None:
    """By every training in the same sentence, of a subject that it reads."""
    several, files = kind is SubjectRouterTraining, wide(20, 40)
    small = torch.zeros(400, 400)
    small[0, 0] = 1
    cases = [
        ({**files, "picture.png": png(torch.rand(400, 400, 3)), **dict.fromkeys(("mask.png", "mask2.png"), png(small))},
         "x has no subject that is to be seen at 40 pixels"),
        ({**files, "mask.png": b"none"}, "x has a picture that cannot be read"),
    ]  # fmt: skip
    for end in ("", "2") if several else ("",):
        nowhere, hidden = png(torch.full((40, 200), 0.4)), png(torch.full((20, 10), 0.4))
        cases.append(({**files, f"mask{end}.png": nowhere}, f"x has a mask{end} that is nowhere white"))
        cases.append(({**files, f"subject_mask{end}.png": hidden}, f"x has a subject{end} that is cut out to nothing"))
    for name in ("picture", "txt", "mask", "subject", *("mask2", "subject2") * several):
        cases.append(({k: v for k, v in files.items() if k.split(".")[0] != name}, f"x has no {name}; each needs"))
    if several:
        cases.append((wide(20, 30, 40, 50, 60), "x has files of a subject '5'; a sample has up to 4"))
    for bad, said in cases:
        with pytest.raises(ValueError, match=said):
            kind.decode(parted(bad), 40, "x")
    kind.decode(parted(files), 40, "x")


# What is trained


def kind_of(encoder: SubjectEncoder, checkpointing: bool = False, small_one: bool = True) -> Any:
    from subject_patches.toy.routing import ROUTER

    with with_gradients():
        if small_one:
            parts = small_model(), small_clip("SD 1.x", 0, hidden_size=CONTEXT), small_vae()
        else:
            toy = Toy.load(CHECKPOINT)
            parts = toy.model, toy.clip, toy.vae
        frozen = Frozen(*parts, encoder.vision, torch.float32, checkpointing, encoder)
    torch.manual_seed(0)
    return SubjectRouterTraining(frozen, ROUTER)


def trained(folder: Path, small: Path, out: Path, steps: int) -> tuple[Any, list[float]]:
    accelerate = pytest.importorskip("accelerate", reason="the extra `train` is not installed")
    from subject_patches.training.accelerated import Accelerated, Plan

    plan = Plan(out, steps, 2, 64, 1e-3, accumulation=2, average=0.5)
    kind = kind_of(read_subject_encoder(small))
    made = Accelerated(kind, Folder(folder), plan, accelerate.Accelerator(cpu=True, mixed_precision="no"))
    return kind, made.run()


def test_one_that_goes_on_is_the_same_to_the_bit(folder: Path, small: Path, tmp_path: Path) -> None:
    """And the file is the encoder's with a router in it, of which every part has learned."""
    whole, losses = trained(folder, small, tmp_path / "whole", 2)
    trained(folder, small, tmp_path / "parts", 1)
    later, again = trained(folder, small, tmp_path / "parts", 2)
    assert again == losses
    mine, theirs = whole.modules.state_dict(), later.modules.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    first = kind_of(read_subject_encoder(small)).modules.state_dict()
    assert [name for name in mine if torch.equal(mine[name], first[name])] == []
    one, other = (tmp_path / name / "anystory-sd1x.safetensors" for name in ("whole", "parts"))
    tensors, before = load_file(one), load_file(small)
    assert all(torch.equal(tensors[name], each.half()) for name, each in before.items())
    assert all(torch.equal(each, tensors[name]) for name, each in load_file(other).items())
    made = read_subject_encoder(one)
    assert (made.form, made.family) == (whole.encoder.form, "the tests")
    assert made.vision.config == whole.encoder.vision.config
    assert made.router.model.sites == frozenset(made.modules.cross)
    other = written(tmp_path / "other.safetensors", *file_for(small_model(), seed=4))
    with pytest.raises(ValueError, match=r"was begun with encoder \w+, now it is"):
        trained(folder, other, tmp_path / "parts", 3)


def test_an_encoder_for_something_else_is_refused(small: Path) -> None:
    with pytest.raises(ValueError, match="is for another U-Net, of the toy, than the checkpoint's"):
        kind_of(read_subject_encoder(ENCODER))
    encoder = read_subject_encoder(small)
    strange = SubjectEncoder("e", "", encoder.form, encoder.patcher, read_subject_encoder(ENCODER).vision)
    with pytest.raises(ValueError, match="'e' reads 32 channels of a vision model, but the one connected gives 96"):
        kind_of(strange)


def test_all_that_stays_as_it_is_is_loaded(small: Path) -> None:
    """Also the encoder, whose modules a pass calls: left where it lay, a GPU would refuse it."""
    frozen = kind_of(read_subject_encoder(small)).frozen
    parts = (frozen.denoiser.patcher, frozen.clip.patcher, frozen.vae.patcher, frozen.vision.patcher)
    with with_gradients(), loaded(*frozen.patchers):
        there = {id(each.model) for each in comfy.model_management.loaded_models()}
    assert {id(each.model) for each in (*parts, frozen.encoder.patcher)} <= there


def test_checkpointing_changes_nothing(folder: Path, small: Path) -> None:
    """The layers that are computed again choose what they chose, and go by the maps that they went by."""
    batch = next(iter(Batches(Folder(folder), 64, 3, 0, 0, 1, 0, decoded_group)))
    found, forwards = [], []
    for checkpointing in (False, True):
        kind = kind_of(read_subject_encoder(small), checkpointing)
        with with_gradients(), loaded(*kind.frozen.patchers), counted_forwards() as counted:
            loss = kind.loss(batch, torch.Generator().manual_seed(1))
            loss.backward()
        found.append((float(loss.detach()), [each.grad for each in kind.modules.parameters()]))
        forwards.append(counted.count)
    # The ReferenceNet, which has as many, learns nothing.
    transformers = len(kind.encoder.modules.cross)
    assert forwards == [2 * transformers, 3 * transformers]
    assert found[0][0] == found[1][0]
    assert all(
        torch.allclose(one, other, rtol=1e-4, atol=1e-6) for one, other in zip(*(g for _, g in found), strict=True)
    )


def test_what_the_loss_depends_on(folder: Path, small: Path) -> None:
    """Eq. 1 and WEIGHT times Eq. 4; captions and what of subjects is inside their masks, not what is outside."""
    batch = next(iter(Batches(Folder(folder), 64, 2, 0, 0, 1, 0, decoded_group)))
    kind = kind_of(read_subject_encoder(small))

    def loss(samples: Any) -> float:
        return float(kind.loss(samples, torch.Generator().manual_seed(1)))

    def repainted(inside: bool) -> list[Any]:
        made = []
        for each in batch:
            mask = ((each.subject_masks > 0) == inside).float()[..., None]
            made.append(replace(each, subjects=each.subjects * (1 - mask) + (1 - each.subjects) * mask))
        return made

    with torch.no_grad(), loaded(*kind.frozen.patchers):
        first, source = loss(batch), torch.Generator().manual_seed(1)
        error, routed, masks, present = kind.routed(
            kind.modules, batch, kind.frozen.denoiser.levels(len(batch), source), source
        )
        assert float(error) > 0
        assert first == pytest.approx(float(error + WEIGHT * routed.loss(masks, present)))
        assert loss([replace(each, caption="another") for each in batch]) != first
        assert loss(repainted(True)) != first
        assert loss(repainted(False)) == pytest.approx(first, rel=1e-6)


def test_it_learns_whose_place_is_whose(folder: Path) -> None:
    """On the toy, the same few scenes again and again, with little noise: from chance to maps that fit them."""
    batch = next(iter(Batches(Folder(folder), 128, 2, 0, 0, 1, 0, decoded_group)))
    kind = kind_of(read_subject_encoder(ENCODER), small_one=False)
    with with_gradients(), loaded(*kind.frozen.patchers):
        schedule = kind.frozen.denoiser.patcher.model.model_sampling.sigmas
        sigmas = schedule[[100]].expand(len(batch)).float()
        optimiser = torch.optim.AdamW(kind.groups_of_parameters(4e-3))

        def step() -> tuple[Any, float, float]:
            _, routed, masks, present = kind.routed(kind.modules, batch, sigmas, torch.Generator().manual_seed(1))
            overlaps = intersection_over_union(routed.maps, masks, present, kind.modules.sites)
            refined = torch.cat([each for _, each in overlaps.values()]).mean()
            return (loss := routed.loss(masks, present)), float(loss.detach()), float(refined)

        told = []
        for _ in range(8):
            loss, *numbers = step()
            told.append(numbers)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
    assert told[-1][0] < 0.6 * told[0][0]
    assert told[-1][1] > told[0][1] + 0.2


def test_the_tool_trains_the_second_stage(folder: Path, tmp_path: Path) -> None:
    """Two processes, on the toy; what is asked wrongly is told at once."""
    pytest.importorskip("accelerate", reason="the extra `train` is not installed")
    tool = str(ROOT / "tools" / "train_subjects.py")
    given = {"kind": "anystory", "stage": 2, "checkpoint": CHECKPOINT, "encoder": ENCODER, "data": folder}
    given |= {"folder": tmp_path / "out", "steps": 2, "batch": 1, "size": 64, "precision": "fp32", "workers": 0}
    options = [*(f"--{name}={value}" for name, value in given.items()), "--cpu"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    how = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([*launch, tool, *options], **how)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 2 of 2, loss" in done.stdout
    state = torch.load(tmp_path / "out" / "state.pt", weights_only=True)
    assert (state["step"], state["about"]["processes"]) == (2, 2)
    (made,) = (tmp_path / "out").glob("anystory-*.safetensors")
    assert read_subject_encoder(made).router is not None
    for wrong, said in (
        ([f"--folder={ENCODER.parent}"], "--folder is where"),
        (["--kind=anylogo"], "--stage 2 needs --kind anystory"),
        (["--stage=1"], "--encoder is for --stage 2"),
    ):
        refused = subprocess.run([sys.executable, tool, *options, *wrong], **how)
        assert refused.returncode != 0
        assert said in refused.stderr
