"""Checking and unpacking a source archive that came over the network."""

from __future__ import annotations

import hashlib
import shutil
import tarfile
from pathlib import Path, PurePosixPath

from .errors import ToolError

_CHUNK = 1 << 20


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def verify(path: Path, sha256: str) -> None:
    """Raise ToolError unless the file at `path` has this SHA-256; a file that has not is deleted."""
    found = sha256_of(path)
    if found != sha256:
        path.unlink()
        raise ToolError(
            f"The download {path.name} has SHA-256 {found} where {sha256} was expected; it was deleted, "
            "run the command again, and if that does not help look for what alters your downloads."
        )


def unpack_folder(archive: Path, inside: str, target: Path) -> None:
    """Unpack the folder `inside` of a tar archive to `target`, all of it or nothing.

    The whole archive is refused if any of its members is a link or a device or would land outside its folder,
    also where that member is not in the part wanted.

    Raises:
        ToolError: the archive is unsafe, no archive, or has no such folder.
    """
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    prefix = PurePosixPath(inside).parts
    try:
        with tarfile.open(archive) as tar:
            members = tar.getmembers()
            for member in members:
                _refuse_unsafe(archive, member)
            for member in members:
                parts = PurePosixPath(member.name).parts
                if parts[: len(prefix)] == prefix:
                    _write(tar, member, partial.joinpath(*parts[len(prefix) :]))
    except (tarfile.TarError, EOFError) as error:
        raise ToolError(f"{archive} is no readable archive ({error}); delete it and run the command again.") from error
    if not partial.is_dir():
        raise ToolError(f"{archive} holds no folder {inside}; delete it and run the command again.")
    shutil.rmtree(target, ignore_errors=True)
    partial.replace(target)


def _refuse_unsafe(archive: Path, member: tarfile.TarInfo) -> None:
    path = PurePosixPath(member.name)
    # A backslash or a colon is harmless here and leads out of the folder on Windows.
    escapes = path.is_absolute() or ".." in path.parts or "\\" in member.name or ":" in member.name
    if escapes or not (member.isfile() or member.isdir()):
        what = "a path that leads out of its folder" if escapes else "a link or a device"
        raise ToolError(f"{archive.name} was not unpacked because {member.name!r} in it is {what}; delete the archive.")


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    if member.isdir():
        path.mkdir(parents=True, exist_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    source = tar.extractfile(member)
    if source is None:
        raise ToolError(f"{member.name!r} in the archive could not be read; delete the archive and try again.")
    with source, path.open("wb") as file:
        shutil.copyfileobj(source, file, _CHUNK)
