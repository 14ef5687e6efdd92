"""The archive that the set-up downloads: what is checked before it is unpacked, and what is refused."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
from hosting import archive, private
from hosting.errors import ToolError


def _tar(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def _member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_unpack_takes_the_folder_asked_for(tmp_path: Path) -> None:
    """The folder inside is unpacked, the rest is not, and what was there before is replaced."""
    source = _tar(
        tmp_path / "a.tar.gz", (_member("a/in/x/y.txt"), b"text"), (_member("a/in/z.txt"), b""), (_member("a/b"), b"")
    )
    target = tmp_path / "tree"
    (target / "old").mkdir(parents=True)
    archive.unpack_folder(source, "a/in", target)
    assert sorted(path.relative_to(target).as_posix() for path in target.rglob("*")) == ["x", "x/y.txt", "z.txt"]
    assert (target / "x" / "y.txt").read_bytes() == b"text"


@pytest.mark.parametrize(
    "member",
    [
        _member("a/in/../../../escape"),
        _member("/escape"),
        _member("a/in/..\\escape"),
        _member("C:/escape"),
        _member("a/in/link", tarfile.SYMTYPE, "/etc"),
        _member("a/in/link", tarfile.LNKTYPE, "a/in/ok"),
        _member("a/in/device", tarfile.CHRTYPE),
        _member("elsewhere/link", tarfile.SYMTYPE, ".."),
    ],
    ids=lambda member: f"{member.name}-{member.type.decode()}",
)
def test_unsafe_archive_is_refused_whole(tmp_path: Path, member: tarfile.TarInfo) -> None:
    """One bad member, wherever it is, and nothing is written."""
    source = _tar(tmp_path / "a.tar.gz", (_member("a/in/ok"), b"text"), (member, b""))
    with pytest.raises(ToolError, match="was not unpacked because"):
        archive.unpack_folder(source, "a/in", tmp_path / "tree")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar.gz"]


def test_truncated_archive_is_refused(tmp_path: Path) -> None:
    """A download cut short leaves the target as it was."""
    source = _tar(tmp_path / "a.tar.gz", (_member("a/in/ok"), os.urandom(100_000)))
    source.write_bytes(source.read_bytes()[:50_000])
    with pytest.raises(ToolError, match="is no readable archive"):
        archive.unpack_folder(source, "a/in", tmp_path / "tree")
    assert not (tmp_path / "tree").exists()


def test_archive_without_the_folder_is_refused(tmp_path: Path) -> None:
    """An archive of something else is named."""
    source = _tar(tmp_path / "a.tar.gz", (_member("a/other"), b""))
    with pytest.raises(ToolError, match="holds no folder a/in"):
        archive.unpack_folder(source, "a/in", tmp_path / "tree")


def test_wrong_hash_deletes_the_download(tmp_path: Path) -> None:
    """A file with another content is refused and does not stay for the next run to trip over."""
    path = tmp_path / private.SOURCE_FILE
    path.write_bytes(b"something else")
    with pytest.raises(ToolError, match=r"has SHA-256 [0-9a-f]{64} where de5d0c32"):
        archive.verify(path, private.SOURCE_SHA256)
    assert not path.exists()
    path.write_bytes(b"abc")
    archive.verify(path, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    assert path.exists()
