"""Trainings for real families: what they read, that one that goes on is the same to the bit, and two processes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from host import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file
from subject_patches.encoders.semantic_injection import read_semantic_maps
from subject_patches.encoders.subject_encoder import read_subject_encoder
from subject_patches.tests.shared.clips import small_clip
from subject_patches.tests.shared.forwards import counted_forwards
from subject_patches.tests.shared.models import CONTEXT, difference, sample, small_model, subject
from subject_patches.tests.shared.samples import png
from subject_patches.tests.shared.semantics import VISION, contents, told, vision
from subject_patches.tests.shared.small_vaes import small_vae
from subject_patches.toy.sampling import CHECKPOINT
from subject_patches.training.samples import Batches, Folder, Shards, decoded, loader, parted, source_of

COUNT = 5


def files_of(number: int) -> dict[str, bytes]:
    """One sample's: a wide scene whose subject is at its right, and a high picture of the subject."""
    source = torch.Generator().manual_seed(number)
    mask = torch.zeros(64, 96)
    mask[20:40, 70:90] = 1
    picture = torch.rand(64, 96, 3, generator=source)
    picture[mask > 0] = torch.tensor([1.0, 0.0, 0.0])
    own = torch.rand(60, 40, 4, generator=source)
    own[..., 3] = 1
    own[:10, :, 3] = 0
    words = f"thing {number}".encode()
    return {"picture.png": png(picture), "mask.png": png(mask), "subject.png": png(own), "txt": words}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("samples")
    for number in range(COUNT):
        for name, content in files_of(number).items():
            (made / f"{number:03}.{name}").write_bytes(content)
    return made


# What is read


def test_a_sample() -> None:
    """The square of the scene is around its subject; the subject's picture is whole, in the middle of a square."""
    made = decoded(parted(files_of(3)), 32)
    assert made.caption == "thing 3"
    assert made.picture.shape == made.subject.shape == (32, 32, 3)
    inside = made.mask > 0.9
    assert 60 <= int(inside.sum()) <= 110
    assert difference(made.picture[inside], torch.tensor([1.0, 0.0, 0.0]).expand(int(inside.sum()), 3)) < 0.1
    # 40 of 60 wide: 21 places, with 5 before them where there is no subject.
    assert float(made.subject_mask[:, :5].max()) == float(made.subject_mask[:, 26:].max()) == 0
    assert float(made.subject_mask[8:, 6:25].min()) > 0.9
    assert float(made.subject_mask[:4].max()) < 0.1


def test_what_is_transparent_is_white() -> None:
    """As the nodes show it, whatever lies under it, in scenes and in pictures of subjects."""
    scene, own = torch.zeros(64, 64, 4), torch.zeros(64, 64, 4)
    scene[:, 32:, 3] = own[:, :32, 3] = 1
    mask = torch.zeros(64, 64)
    mask[20:40, 40:60] = 1
    files = {"picture.png": png(scene), "mask.png": png(mask), "subject.png": png(own), "txt": b"a logo"}
    made = decoded(parted(files), 64)
    assert difference(made.subject, torch.cat([torch.zeros(64, 32, 3), torch.ones(64, 32, 3)], 1)) < 1e-6
    assert difference(made.picture, torch.cat([torch.ones(64, 32, 3), torch.zeros(64, 32, 3)], 1)) < 1e-6


def turned(content: bytes) -> bytes:
    """A picture as a camera on its side writes it: its rows are columns, and a tag says so."""
    stream, tag = io.BytesIO(), Image.Exif()
    tag[0x0112] = 6
    with Image.open(io.BytesIO(content)) as picture:
        picture.transpose(Image.Transpose.ROTATE_90).save(stream, "png", exif=tag)
    return stream.getvalue()


def test_a_picture_from_a_camera_on_its_side_is_read_upright() -> None:
    upright = files_of(3)
    whole, other = (
        decoded(parted({**upright, **{name: change(upright[name]) for name in ("picture.png", "subject.png")}}), 32)
        for change in (bytes, turned)
    )
    assert torch.equal(other.picture, whole.picture)
    assert torch.equal(other.subject, whole.subject)
    assert torch.equal(other.mask, whole.mask)


def test_a_mask_has_the_form_of_its_picture() -> None:
    """In any size; one that would be stretched is refused."""
    upright, smaller = files_of(3), torch.zeros(21, 32)
    smaller[7:13, 23:30] = 1
    assert decoded(parted({**upright, "mask.png": png(smaller)}), 32).mask.max() > 0.9
    for name, size, what in (
        ("mask", (96, 64), "64 x 96 pixels, of another form than its picture of 96 x 64"),
        ("subject_mask", (40, 60), "60 x 40 pixels, of another form than its picture of 40 x 60"),
    ):
        with pytest.raises(ValueError, match=f"x has a {name} of {what}; paint it on the picture as it is shown"):
            decoded(parted({**upright, f"{name}.png": png(torch.ones(size))}), 32, "x")


def captions(source: Any, rank: int, count: int, start: int, batches: int) -> list[list[str]]:
    made = Batches(source, 32, 2, 0, rank, count, start)
    return [[each.caption for each in batch] for batch in islice(made, batches)]


def flat(batches: list[list[str]]) -> list[str]:
    return [each for batch in batches for each in batch]


def test_what_a_process_reads_does_not_depend_on_where_it_begins(folder: Path) -> None:
    source = Folder(folder)
    whole = captions(source, 0, 1, 0, 6)
    assert captions(source, 0, 1, 3, 3) == whole[3:]
    assert set(flat(whole)) == {f"thing {number}" for number in range(COUNT)}
    # Two processes share an epoch.
    mine, others = (flat(captions(source, rank, 2, 0, 1)) for rank in (0, 1))
    assert not set(mine) & set(others)


def test_shards_are_read_as_a_folder_is(tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="the extra `train` is not installed")
    for shard in range(2):
        with tarfile.open(tmp_path / f"data-{shard:03}.tar", "w") as tar:
            for number in range(2 * shard, 2 * shard + 2):
                for name, content in files_of(number).items():
                    info = tarfile.TarInfo(f"{number:03}.{name}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    source = source_of(str(tmp_path / "data-{000..001}.tar"))
    assert isinstance(source, Shards)
    whole = captions(source, 0, 1, 0, 4)
    assert sorted(flat(whole[:2])) == [f"thing {number}" for number in range(4)]
    assert captions(source, 0, 1, 2, 2) == whole[2:]
    mine, others = (flat(captions(source, rank, 2, 0, 1)) for rank in (0, 1))
    assert sorted(mine + others) == [f"thing {number}" for number in range(4)]
    # Fewer shards than processes: every sample in turn.
    each = [flat(captions(source, rank, 4, 0, 1)) for rank in range(4)]
    assert len({name for names in each for name in names}) == 4


def test_what_is_missing_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"There is no sample .* see docs/TRAINING.md"):
        Folder(tmp_path)
    (tmp_path / "a.picture.png").write_bytes(files_of(0)["picture.png"])
    with pytest.raises(ValueError, match="a has no txt; each needs picture and txt, and for every subject mask"):
        next(iter(Batches(Folder(tmp_path), 32, 1, 0, 0, 1, 0)))
    with pytest.raises(ValueError, match="A process has no samples of its own"):
        next(iter(Batches(Folder(folder), 32, 1, 0, 9, 10, 0)))
    pytest.importorskip("webdataset", reason="the extra `train` is not installed")
    with pytest.raises(ValueError, match=r"There is no folder and no file .*data-000.tar; give the folder of the"):
        source_of(str(tmp_path / "data-{000..001}.tar"))


def test_workers_tell_what_is_wrong_as_one_process_does(tmp_path: Path) -> None:
    (tmp_path / "a.picture.png").write_bytes(files_of(0)["picture.png"])
    said = []
    for workers in (0, 1):
        with pytest.raises(ValueError, match="a has no txt") as error:
            next(loader(Batches(Folder(tmp_path), 32, 1, 0, 0, 1, 0), workers))
        said.append(str(error.value))
    assert said[0] == said[1]


# What is trained


def frozen_of(checkpointing: bool = False, seed: int = 0, channels: int = 4) -> Any:
    from subject_patches.training.copies import with_gradients
    from subject_patches.training.frozen import Frozen

    clip = small_clip("SD 1.x", 0, hidden_size=CONTEXT)
    with with_gradients():
        return Frozen(small_model(seed), clip, small_vae(channels), vision(), torch.float32, checkpointing)


def kind_of(checkpointing: bool = False, seed: int = 0, rank: int = 2, **values: Any) -> Any:
    from subject_patches.training.anylogo import AnyLogoTuning

    torch.manual_seed(0)
    return AnyLogoTuning(frozen_of(checkpointing, seed), rank, **values)


def encoder_of(tokens: int = 3) -> Any:
    from subject_patches.training.subject_encoder import SubjectEncoderTraining

    torch.manual_seed(0)
    return SubjectEncoderTraining(frozen_of(), 64, tokens)


def trained(folder: Path, out: Path, steps: int, make: Any = kind_of, **values: Any) -> tuple[Any, list[float]]:
    accelerate = pytest.importorskip("accelerate", reason="the extra `train` is not installed")
    from subject_patches.training.accelerated import Accelerated, Plan

    plan = Plan(out, steps, 2, 64, values.pop("rate", 3e-3), average=0.5, **values)
    made = Accelerated(make(), Folder(folder), plan, accelerate.Accelerator(cpu=True, mixed_precision="no"))
    return made.kind, made.run()


def test_a_vae_of_another_family_is_refused() -> None:
    with pytest.raises(ValueError, match=r"of the shape \(1, 16, 8, 8\), but this model takes pictures of 4 channels"):
        frozen_of(channels=16).latents(torch.rand(1, 64, 64, 3))


def test_what_the_host_moves_away_comes_back() -> None:
    """On a small GPU it makes room for the VAE and the text encoder by unloading what trains."""
    import comfy.model_management
    from subject_patches.training.copies import loaded, with_gradients

    frozen = frozen_of()
    patcher = frozen.denoiser.patcher
    with with_gradients(), loaded(*frozen.patchers):
        # What it computes in is set with the loading.
        assert patcher.model.manual_cast_dtype == torch.float32
        for read in (
            lambda: frozen.latents(torch.rand(1, 64, 64, 3)),
            lambda: frozen.prompts(["a dog"], torch.tensor([False])),
        ):
            comfy.model_management.unload_all_models()
            assert patcher not in comfy.model_management.loaded_models()
            read()
            assert patcher in comfy.model_management.loaded_models()
            assert patcher.model.manual_cast_dtype == torch.float32


def test_one_that_goes_on_is_the_same_to_the_bit(folder: Path, tmp_path: Path) -> None:
    whole, losses = trained(folder, tmp_path / "whole", 3, accumulation=2)
    trained(folder, tmp_path / "parts", 1, accumulation=2)
    later, again = trained(folder, tmp_path / "parts", 3, accumulation=2)
    assert again == losses
    mine, theirs = whole.modules.state_dict(), later.modules.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("whole", "parts")]
    assert files[0] == files[1] == ["anylogo-sd1x-lora.safetensors", "anylogo-sd1x.safetensors", "state.pt"]
    for name in files[0][:2]:
        one, other = (load_file(tmp_path / each / name) for each in ("whole", "parts"))
        assert all(torch.equal(one[key], other[key]) for key in one)
    with pytest.raises(ValueError, match="was begun with seed 0, now it is 1; take the same, or another folder"):
        trained(folder, tmp_path / "parts", 3, accumulation=2, seed=1)
    for values, said in (
        ({"rank": 3}, "rank 2, now it is 3"),
        ({"keep": 0.5}, "keep 0.6, now it is 0.5"),
        ({"through": False}, "detached False, now it is True"),
    ):
        with pytest.raises(ValueError, match=f"was begun with {said}"):
            trained(folder, tmp_path / "parts", 3, partial(kind_of, **values), accumulation=2)
    with pytest.raises(ValueError, match=r"was begun with checkpoint \w+, now it is"):
        trained(folder, tmp_path / "parts", 3, partial(kind_of, seed=1), accumulation=2)
    # What came of it the nodes and the host's LoRA loader take.
    import comfy.sd

    model = small_model()
    maps = read_semantic_maps(tmp_path / "whole" / "anylogo-sd1x.safetensors")
    lora = load_file(tmp_path / "whole" / "anylogo-sd1x-lora.safetensors")
    tuned, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    assert len(tuned.patches) == len(lora) // 2
    plain = sample(model, steps=1)
    assert difference(sample(tuned, steps=1), plain) > 1e-4
    assert difference(sample(told(model, (subject(),), semantics=maps), steps=1), plain) > 1e-5


def test_the_loss_falls_and_checkpointing_changes_nothing(folder: Path) -> None:
    """The same batch and noise, again and again: from no difference at all to one that fits them."""
    pytest.importorskip("accelerate", reason="the extra `train` is not installed")
    from subject_patches.training.copies import loaded, with_gradients

    batch = next(iter(Batches(Folder(folder), 64, 3, 0, 0, 1, 0)))
    gradients, forwards = [], []
    for checkpointing in (False, True):
        kind = kind_of(checkpointing=checkpointing)
        with with_gradients(), loaded(*kind.frozen.patchers):
            optimiser = torch.optim.Adam(kind.groups_of_parameters(3e-3))
            losses = []
            for _ in range(6 if not checkpointing else 1):
                with counted_forwards() as counted:
                    loss = kind.loss(batch, torch.Generator().manual_seed(1))
                    loss.backward()
                if not losses:
                    gradients.append([each.grad.clone() for each in kind.modules.parameters()])
                    forwards.append(counted.count)
                optimiser.step()
                optimiser.zero_grad()
                losses.append(float(loss.detach()))
            if not checkpointing:
                assert losses[-1] < 0.97 * losses[0]
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*gradients, strict=True))
    assert forwards[1] == 2 * forwards[0] > 0


def test_a_subject_encoder_is_trained_and_loads(folder: Path, tmp_path: Path) -> None:
    """AnyStory's first stage: at first the tokens are nothing; every part learns; the file is what the loader takes."""
    kind, losses = trained(folder, tmp_path, 2, encoder_of)
    again, _ = trained(folder, tmp_path / "parts", 1, encoder_of)
    again, later = trained(folder, tmp_path / "parts", 2, encoder_of)
    with pytest.raises(ValueError, match="was begun with tokens 3, now it is 4"):
        trained(folder, tmp_path / "parts", 3, partial(encoder_of, 4))
    assert later == losses
    first = encoder_of().modules.state_dict()
    mine, theirs = kind.modules.state_dict(), again.modules.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    moved = {name.split(".")[0] for name in mine if not torch.equal(mine[name], first[name])}
    assert moved == {"qformer", "image", "reference_net", "reference"}
    encoder = read_subject_encoder(tmp_path / "anystory-sd1x.safetensors")
    assert (encoder.family, encoder.form) == ("SD 1.x", kind.form)


def test_two_processes_share_their_gradients(folder: Path, tmp_path: Path) -> None:
    """The tool itself, on the toy: both processes end with the same weights, which only rank 0 writes."""
    pytest.importorskip("accelerate", reason="the extra `train` is not installed")
    tensors, about = contents("SD 1.x", 64)
    weights = {f"vision.{key}": each.half() for key, each in vision().model.state_dict().items()}
    save_file({**tensors, **weights}, tmp_path / "vision.safetensors", {**about, "vision": json.dumps(VISION)})
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(ROOT / "tools" / "train_subjects.py")]
    given = {"checkpoint": CHECKPOINT, "vision": tmp_path / "vision.safetensors", "data": folder}
    given |= {"folder": tmp_path / "out", "steps": 2, "batch": 1, "size": 64, "precision": "fp32", "workers": 0}
    given |= {"rank": 2}
    command += [f"--{name}={value}" for name, value in given.items()]
    done = subprocess.run(
        [*command, "--cpu"], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 2 of 2, loss" in done.stdout
    state = torch.load(tmp_path / "out" / "state.pt", weights_only=True)
    assert (state["step"], state["about"]["processes"]) == (2, 2)
    assert any(float(each.abs().max()) > 0 for name, each in state["modules"].items() if ".up." in name)
