"""What a trainer of subjects reads: a picture, where the subject is in it, a picture of the subject, and a caption.

In a folder or in WebDataset shards, under one key each: `KEY.picture.png`, `KEY.mask.png` (white where the subject is),
`KEY.subject.png` (its opacity, or `KEY.subject_mask.png`, says where in it the subject is) and `KEY.txt`; pictures may
be png, jpg or webp. `groups.py` says how a sample has several subjects. Which samples a step takes depends on the seed,
the step and the number of processes alone, so a training that goes on reads what it would have read.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..patches.mechanisms.subject import composite

PICTURES = ("png", "jpg", "jpeg", "webp")
# Of shards that are no files of this machine.
_ELSEWHERE = re.compile(r"\w+://|pipe:")
Raw = Mapping[str, Path | bytes]
# The darkest that a subject's mask may be where it is brightest: less is next to nothing.
SEEN = 0.1


@dataclass(frozen=True)
class Sample:
    """One of them: `picture` (size, size, 3) and `mask` (size, size), the square around the subject; `subject` (size,
    size, 3) and `subject_mask` (size, size), all of it in a square; of 0 to 1. And its `caption`."""

    picture: Tensor
    mask: Tensor
    subject: Tensor
    subject_mask: Tensor
    caption: str


def parted(names: Mapping[str, Path | bytes]) -> dict[str, Path | bytes]:
    """The files of one key, by what they are: "picture" for "picture.png"."""
    found = {}
    for name, value in names.items():
        part, _, ending = name.partition(".")
        if name == "txt" or (part and ending.lower() in PICTURES):
            found[part] = value
    return found


def decoded(raw: Raw, size: int, key: str = "a sample") -> Sample:
    """The sample in its files; see `scene_of` and `subject_of`, which raise ValueError where it is none."""
    picture, masks = scene_of(raw, [""], size, key)
    whole = subject_of(raw, "", size, key)
    return Sample(picture.movedim(0, -1), masks[0], whole[:3].movedim(0, -1), whole[3], caption_of(raw))


def scene_of(raw: Raw, numbers: Sequence[str], size: int, key: str) -> tuple[Tensor, Tensor]:
    """Of the picture (3, size, size) the square in which the most of some subjects is, whose files have these `numbers`
    behind their names, and their masks (n, size, size) in it.

    Raises ValueError, calling the sample `key`, where a file is missing or no picture, where a mask has another form
    than its picture, or where a subject is nowhere, or all are too small to be seen."""
    for name in ("picture", "txt", *(f"{part}{number}" for number in numbers for part in ("mask", "subject"))):
        if name not in raw:
            raise ValueError(
                f"{key} has no {name}; each needs picture and txt, and for every subject mask and subject (see "
                "docs/TRAINING.md)."
            )
    picture = on_white(opened(raw["picture"], "RGBA", key))
    named = {f"mask{each}": opened(raw[f"mask{each}"], "L", key) for each in numbers}
    masks = torch.cat([fitted(mask, picture.shape[-2:], f"{key} has a {name}") for name, mask in named.items()])
    for number, mask in zip(numbers, masks, strict=True):
        if float(mask.max()) <= 0.5:
            raise ValueError(f"{key} has a mask{number} that is nowhere white; paint its subject white, or drop it.")
    scene = around(picture, masks, size)
    if not in_sight(scene[3:]).any():
        raise ValueError(f"{key} has no subject that is to be seen at {size} pixels; take larger ones, or drop it.")
    return scene[:3], scene[3:]


def in_sight(masks: Tensor) -> Tensor:
    """Which of the subjects with these masks (n, height, width) are anywhere: (n,) bool."""
    return masks.amax((1, 2)) > SEEN


def subject_of(raw: Raw, number: str, size: int, key: str) -> Tensor:
    """The picture of a subject, called so with its `number` behind, and its mask: (4, size, size).

    Raises ValueError, calling the sample `key`, where it is no picture, where its mask has another form, or where
    nothing of it is left by the mask."""
    subject, mask = opened(raw[f"subject{number}"], "RGBA", key), f"subject_mask{number}"
    own = opened(raw[mask], "L", key) if mask in raw else subject[3:]
    own = fitted(own, subject.shape[-2:], f"{key} has a {mask}")
    made = squared(torch.cat([on_white(subject), own]), size)
    if float(made[3].max()) <= 0.5:
        raise ValueError(f"{key} has a subject{number} that is cut out to nothing; mend its mask or its opacity.")
    return made


def caption_of(raw: Raw) -> str:
    text = raw["txt"] if isinstance(raw["txt"], bytes) else raw["txt"].read_bytes()
    return text.decode("utf-8").strip()


def opened(value: Path | bytes, mode: str, key: str) -> Tensor:
    """A picture as (channels, height, width) of 0 to 1, upright: turned as a camera said, as the host's Load Image
    does."""
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(value) if isinstance(value, bytes) else value) as image:
            pixels = np.array(ImageOps.exif_transpose(image).convert(mode))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{key} has a picture that cannot be read ({error}); replace it.") from error
    planes = torch.from_numpy(pixels).float() / 255
    return planes[None] if planes.ndim == 2 else planes.movedim(-1, 0)


def on_white(picture: Tensor) -> Tensor:
    """A picture (4, height, width) as the nodes show it, on white where it is transparent: (3, height, width)."""
    return composite(picture.movedim(0, -1)[None], None)[0][0].movedim(-1, 0)


def fitted(mask: Tensor, size: Sequence[int], what: str) -> Tensor:
    """A mask (1, height, width) at the size (height, width) of its picture. Raises ValueError, beginning with `what` it
    is, where it has another form."""
    (height, width), own = size, mask.shape[-2:]
    # Sides that were rounded to whole pixels differ by so much.
    if abs(own[0] * width - own[1] * height) > max(*own, height, width):
        raise ValueError(
            f"{what} of {own[1]} x {own[0]} pixels, of another form than its picture of {width} x {height}; paint it "
            "on the picture as it is shown."
        )
    return mask if mask.shape[-2:] == tuple(size) else functional.interpolate(mask[None], tuple(size), mode="area")[0]


def around(picture: Tensor, masks: Tensor, size: int) -> Tensor:
    """The largest square of a picture (3, h, w) that has as much of its subjects as can be, rather some wholly than
    more in part, with their masks (n, h, w) behind: (3 + n, size, size). The paper's zoom in, as far as nothing of the
    scene need be made up."""
    side = min(picture.shape[-2:])
    inside = (masks > 0.5).double()
    top, left = _from(inside.sum(2), side), _from(inside.sum(1), side)
    return _resized(torch.cat([picture, masks])[:, top : top + side, left : left + side], size)


def _from(places: Tensor, side: int) -> int:
    """Where a part of so many places begins in which the sum of the squares of the subjects' shares is the largest, of
    subjects with so much at each of their `places` (n, length); of such parts the one whose middle is nearest to
    theirs."""
    shares = places / places.sum(1, keepdim=True).clamp(min=1)
    before = functional.pad(shares.cumsum(1), (1, 0))
    held = (before[:, side:] - before[:, :-side]).square().sum(0)
    some = places.sum(0).nonzero()
    middle = int(some.min() + some.max()) // 2 if len(some) else places.shape[1] // 2
    best = (held > held.max() - 1e-6).nonzero()[:, 0]
    return int(best[(best - (middle - side // 2)).abs().argmin()])


def squared(planes: Tensor, size: int) -> Tensor:
    """All of some planes (4, h, w) in the middle of a square, filled up with their edge, and the mask with nothing."""
    height, width = planes.shape[-2:]
    scale = size / max(height, width)
    inner = (max(round(height * scale), 1), max(round(width * scale), 1))
    planes = functional.interpolate(planes[None], inner, mode="bicubic", antialias=scale < 1).clamp(0, 1)
    top, left = (size - inner[0]) // 2, (size - inner[1]) // 2
    more = (left, size - inner[1] - left, top, size - inner[0] - top)
    filled = functional.pad(planes, more, mode="replicate")[0]
    filled[3] = functional.pad(planes[0, 3], more)
    return filled


def _resized(planes: Tensor, size: int) -> Tensor:
    shrinks = size < planes.shape[-1]
    return functional.interpolate(planes[None], (size, size), mode="bicubic", antialias=shrinks)[0].clamp(0, 1)


# Which samples a step takes


class Folder:
    """Samples in a folder and the folders in it."""

    def __init__(self, folder: Path) -> None:
        self.found: dict[str, dict[str, Path | bytes]] = {}
        for path in sorted(folder.rglob("*")):
            key, _, rest = path.name.partition(".")
            if path.is_file() and key and rest:
                self.found.setdefault(str(path.with_name(key)), {})[rest] = path
        self.found = {key: files for key, files in self.found.items() if "picture" in parted(files)}
        if not self.found:
            raise ValueError(f"There is no sample (KEY.picture.png and so on) in {folder}; see docs/TRAINING.md.")

    def epoch(self, number: int, seed: int, rank: int, count: int) -> Iterator[tuple[str, Raw]]:
        """One pass over all of them in a new order, of which each of `count` processes takes its own."""
        keys = list(self.found)
        order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(_mixed(seed, number)))
        for place in order[: len(keys) - len(keys) % count or None].tolist()[rank::count]:
            yield keys[place], parted(self.found[keys[place]])


class Shards:
    """Samples in the tar files of a WebDataset, by their names or addresses, `{000..127}` meaning so many."""

    def __init__(self, names: str) -> None:
        import webdataset

        self.names = list(webdataset.shardlists.expand_urls(names))

    def epoch(self, number: int, seed: int, rank: int, count: int) -> Iterator[tuple[str, Raw]]:
        """One pass over all shards in a new order; each process takes shards of its own, or of too few every sample in
        turn."""
        import webdataset

        order = torch.randperm(len(self.names), generator=torch.Generator().manual_seed(_mixed(seed, number)))
        names = [self.names[place] for place in order.tolist()]
        apart = len(names) >= count
        chosen = names[rank::count] if apart else names
        whole = webdataset.WebDataset(
            chosen, shardshuffle=False, nodesplitter=None, workersplitter=None, empty_check=False
        )
        for place, sample in enumerate(whole):
            if apart or place % count == rank:
                yield sample["__key__"], parted({k: v for k, v in sample.items() if not k.startswith("__")})


def source_of(data: str) -> Folder | Shards:
    """The samples at a path: a folder, or WebDataset shards. Raises ValueError where neither is there, or what reads
    shards is not."""
    if Path(data).is_dir():
        return Folder(Path(data))
    if importlib.util.find_spec("webdataset") is None:
        raise ValueError(
            f"There is no folder {data}, and for shards webdataset is not installed; give the folder of the samples, "
            f"or run {sys.executable} -m pip install webdataset."
        )
    shards = Shards(data)
    missing = [name for name in shards.names if not (_ELSEWHERE.match(name) or Path(name).is_file())]
    if missing:
        raise ValueError(f"There is no folder and no file {missing[0]}; give the folder of the samples, or its shards.")
    return shards


class Batches(IterableDataset):
    """Endless batches of a source for one of `count` processes, from batch number `start` on; `decode` makes a sample
    of its files. A loader's workers share them so that they come in the same order for any start."""

    def __init__(
        self,
        source: Folder | Shards,
        size: int,
        batch: int,
        seed: int,
        rank: int,
        count: int,
        start: int,
        decode: Callable[[Raw, int, str], Any] = decoded,
    ) -> None:
        self.source, self.size, self.batch, self.seed = source, size, batch, seed
        self.rank, self.count, self.start, self.decode = rank, count, start, decode

    def _stream(self) -> Iterator[tuple[str, Raw]]:
        number = 0
        while True:
            some = False
            for each in self.source.epoch(number, self.seed, self.rank, self.count):
                some = True
                yield each
            if not some:
                raise ValueError("A process has no samples of its own; give more samples, or fewer processes.")
            number += 1

    def __iter__(self) -> Iterator[list[Any]]:
        worker = get_worker_info()
        workers, mine = (worker.num_workers, worker.id) if worker else (1, 0)
        stream = self._stream()
        for number in itertools.count():
            found = list(itertools.islice(stream, self.batch))
            if number >= self.start and (number - self.start) % workers == mine:
                yield [self.decode(raw, self.size, key) for key, raw in found]


class _Telling(IterableDataset):
    """Batches, and in the place of one that cannot be made the ValueError that says why: thrown, it would come out of a
    worker process wrapped in the worker's own trace."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[Any] | ValueError]:
        try:
            yield from self.batches
        except ValueError as error:
            yield error


def loader(batches: Batches, workers: int) -> Iterator[list[Any]]:
    """The batches, decoded by so many worker processes, or in this one."""
    for made in DataLoader(_Telling(batches), batch_size=None, num_workers=workers, collate_fn=_as_they_are):
        if isinstance(made, ValueError):
            raise made
        yield made


def _as_they_are(batch: list[Any]) -> list[Any]:
    return batch


def _mixed(seed: int, number: int) -> int:
    return (seed * 1_000_003 + number) % 2**62
