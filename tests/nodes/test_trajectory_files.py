"""Save and Load Inversion Trajectory: a trajectory's file, alone and over a server's queue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from host import Server
from safetensors import safe_open
from safetensors.torch import save_file
from subject_patches.nodes.trajectory_files import LoadTrajectoryNode, SaveTrajectoryNode
from subject_patches.patches.mechanisms.inversion import from_file, to_file

from ..shared.inversions import invert
from ..shared.models import randn


@pytest.mark.parametrize("prefix", ["trajectories/pets/a picture", "pets/a picture"])
def test_saved_and_loaded(prefix: str, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    mask = torch.rand(2, 14, 20)
    inversion, _, _ = invert(model, randn(2, 4, 7, 10), mask=mask)
    # Wherever it is saved, it is offered.
    SaveTrajectoryNode.execute(inversion, prefix)
    (path,) = tmp_path.rglob("*.safetensors")
    assert path.stat().st_size < (inversion.states.numel() + mask.numel()) * 4 + 2000
    name = f"trajectories/pets/{path.name} [output]"
    assert name in LoadTrajectoryNode.define_schema().inputs[0].options
    loaded = LoadTrajectoryNode.execute(name).args[0]
    assert torch.equal(loaded.states, inversion.states)
    assert torch.equal(loaded.sigmas, inversion.sigmas)
    assert torch.equal(loaded.mask, mask)
    assert loaded.family == "SD 1.x"
    first = LoadTrajectoryNode.fingerprint_inputs(name, 1)
    path.touch()
    save_file({"x": torch.zeros(1)}, path)
    assert LoadTrajectoryNode.fingerprint_inputs(name, 1) != first
    with pytest.raises(ValueError, match=r"a picture_00001_\.safetensors \[output\] is no trajectory; choose one that"):
        LoadTrajectoryNode.execute(name)


@pytest.mark.parametrize("end", [0, 6, 60, -100])
def test_a_file_that_is_cut_off_is_named(end: int, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path))
    file = tmp_path / "trajectories" / "cut.safetensors"
    file.parent.mkdir()
    tensors, metadata = to_file(invert(model, randn(1, 4, 8, 8))[0])
    save_file(tensors, file, metadata)
    file.write_bytes(file.read_bytes()[:end])
    name = "trajectories/cut.safetensors"
    with pytest.raises(ValueError, match=rf"The file {name} cannot be read .*; choose another, or save the"):
        LoadTrajectoryNode.execute(name)
    file.unlink()
    with pytest.raises(ValueError, match=rf"There is no file {name} any more; choose another"):
        LoadTrajectoryNode.execute(name)


def test_a_file_whose_parts_do_not_fit(model: Any) -> None:
    tensors, metadata = to_file(invert(model, randn(1, 4, 8, 8))[0])
    with pytest.raises(ValueError, match=r"file x has 4 sigmas for states of shape \(5, 1, 4, 8, 8\); invert the"):
        from_file({**tensors, "sigmas": tensors["sigmas"][1:]}, metadata, "x", 1)
    with pytest.raises(ValueError, match=r"file x has masks of shape \(3, 8, 8\) for 1 pictures; invert the"):
        from_file({**tensors, "mask": torch.ones(3, 8, 8)}, metadata, "x", 1)
    assert from_file(tensors, metadata, "x", 1).mask is None
    with pytest.raises(ValueError, match=r"file x has sigmas that do not fall"):
        from_file({**tensors, "sigmas": tensors["sigmas"].flip(0)}, metadata, "x", 1)


def test_on_a_server(server: Server) -> None:
    """Inverted, saved, and sampled from the last latent in one run; loaded in the next."""
    prompt_ = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "subject-patches-toy.safetensors"}},
        "2": {"class_type": "EmptyImage", "inputs": {"width": 96, "height": 128, "batch_size": 1, "color": 3368550}},
        "3": {"class_type": "VAEEncode", "inputs": {"pixels": ["2", 0], "vae": ["1", 2]}},
        "4": {
            "class_type": "BasicScheduler",
            "inputs": {"model": ["1", 0], "scheduler": "normal", "steps": 3, "denoise": 1.0},
        },
        "5": {
            "class_type": "SubjectPatchesInvertToTrajectory",
            "inputs": {
                "model": ["1", 0], "latent": ["3", 0], "sigmas": ["4", 0], "clip": ["1", 1], "fixed_point_rounds": 1,
                "measure_replay": True, "cache_megabytes": 64,
            },
        },
        "6": {
            "class_type": "SubjectPatchesSaveTrajectory",
            "inputs": {"trajectory": ["5", 0], "filename_prefix": "trajectories/test"},
        },
        "7": {"class_type": "PreviewAny", "inputs": {"source": ["5", 2]}},
    }  # fmt: skip
    server.queue(prompt_)
    (path,) = (server.base / "output" / "trajectories").glob("test*.safetensors")
    again = {
        "1": {
            "class_type": "SubjectPatchesLoadTrajectory",
            "inputs": {"file": f"trajectories/{path.name} [output]", "cache_megabytes": 64},
        },
        "2": {
            "class_type": "SubjectPatchesSaveTrajectory",
            "inputs": {"trajectory": ["1", 0], "filename_prefix": "trajectories/again"},
        },
    }
    server.queue(again)
    (copy,) = (server.base / "output" / "trajectories").glob("again*.safetensors")
    # A file's header is in no fixed order.
    with safe_open(path, "pt") as first, safe_open(copy, "pt") as second:
        assert first.metadata() == second.metadata()
        assert sorted(first.keys()) == sorted(second.keys())
        assert all(torch.equal(first.get_tensor(name), second.get_tensor(name)) for name in sorted(first.keys()))
