"""Where nodes that save write, and what no file can be called."""

from __future__ import annotations

from pathlib import Path

import folder_paths
import pytest
import torch
from safetensors.torch import save_file
from subject_patches.nodes.residual import SaveResidualToken
from subject_patches.nodes.saved_files import next_file
from subject_patches.nodes.trajectory_files import SaveTrajectoryNode
from subject_patches.patches.mechanisms.residual import ResidualToken
from subject_patches.patches.parts.writing import NAME_MAX
from subject_patches.tests.shared.models import randn, trajectory
from subject_patches.training.files import save_whole


def test_each_save_is_a_new_file(tmp_path: Path) -> None:
    top = tmp_path / "kept"
    for prefix, name in (("dog", "dog_00001_"), ("pets\\dog", "pets/dog_00001_"), ("./pets//dog", "pets/dog_00002_")):
        file = next_file(prefix, top)
        assert file == top / f"{name}.safetensors"
        save_file({"x": torch.zeros(1)}, file)


@pytest.mark.parametrize(
    "prefix",
    ["", " / ", ".", "..", "/outside", "../outside", "a/../../outside", "C:\\outside", "a\0b", f"{'x' * 300}/dog"],
)
def test_what_names_no_file_in_the_folder(prefix: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"names no file in the folder kept; write a name of at most 200 bytes [(]"):
        next_file(prefix.strip(" "), tmp_path / "kept")
    assert list(tmp_path.iterdir()) == []


def test_a_long_name(tmp_path: Path) -> None:
    """As long as the sentence says, each letter counted as it says, and one more."""
    for letter, size in (("x", 1), ("é", 2), ("犬", 3)):
        longest = letter * (NAME_MAX // size)
        next_file(longest, tmp_path)
        with pytest.raises(ValueError, match=r"names no file in the folder .* bytes"):
            next_file(f"{longest}{letter}", tmp_path)


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "dog").write_text("")
    with pytest.raises(ValueError, match=r"'dog/x' cannot be saved under in the folder .*; write another"):
        next_file("dog/x", tmp_path)


def test_the_nodes_that_save(host_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both refuse what is outside; a trajectory is always where it can be loaded from."""
    tokens = ([str(host_folders / "tokens")], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "residual_tokens", tokens)
    for node, value in (
        (SaveResidualToken, ResidualToken(torch.zeros(1, 8), "dog", 1)),
        (SaveTrajectoryNode, trajectory(randn(1, 4, 8, 8))),
    ):
        with pytest.raises(ValueError, match=r"The filename_prefix '/outside' names no file"):
            node.execute(value, "/outside")
    SaveTrajectoryNode.execute(trajectory(randn(1, 4, 8, 8)), "trajectories")
    (file,) = host_folders.rglob("*.safetensors")
    folder = host_folders / "output" / "trajectories"
    assert file == folder / "trajectories_00001_.safetensors"
    for prefix in ("trajectories/dog", "./trajectories//dog", "dog"):
        SaveTrajectoryNode.execute(trajectory(randn(1, 4, 8, 8)), prefix)
    assert {each.name for each in folder.glob("dog_*")} == {f"dog_0000{number}_.safetensors" for number in (1, 2, 3)}


def test_what_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    """Where a folder stands in the file's place, or a file in the folder's."""
    (tmp_path / "dog.safetensors" / "x").mkdir(parents=True)
    (tmp_path / "file").touch()
    for path in (tmp_path / "dog.safetensors", tmp_path / "file" / "dog.safetensors"):
        with pytest.raises(ValueError, match=r"dog.safetensors cannot be written [(].*; see that its folder may be"):
            save_whole(path, {"x": torch.zeros(1)})
