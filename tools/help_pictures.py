"""Draw the pictures of help pages that no workflow's run gives: `python tools/help_pictures.py [NAME ...]`.

What Align Reference makes of a picture, what AnyStory Subject makes of one before any weights are asked, and what
Attention Inspector shows of routers. The released weights are not needed: the preprocessing has none, and their router
runs with random ones on the pack's second small model, so that its maps show the form alone. That of the first one's
encoder is trained. They go to web/docs/.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from host import ROOT, ToolError, find_host
from hosting.command import Parser, enter, run
from hosting.pack import import_host, load_pack

if TYPE_CHECKING:
    from torch import Tensor

HELP = ROOT / "web" / "docs"
EMBLEMS = ("emblem", "second_emblem")
# What FLUX.1 Redux's SigLIP sees, in patches of 14, and what AnyStory was trained with, in tokens of 16.
SEEN, PATCHES, SIDE, TOKENS = 384, 27, 512, 32
# A picture with a subject that stands elsewhere in it, and is transparent there.
LAYOUT = "another_emblem"
CAPTION = "an emblem and an emblem on grass"
STEPS, LAYERS = 8, "double.0, single.5"
UNET_LAYERS = "output.3, output.5"
ALIGNED = "A reference, moved to where the subject of another picture stands"
SUBJECT = "What AnyStory Subject makes of a picture"
CUT = "The picture and its mask, and both cut out: a square 4 % wider than the subject, white around it"
FOR_VISION = f"For the vision model, {SEEN} x {SEEN}, and which of its {PATCHES} x {PATCHES} places the subject touches"
FOR_FLUX = f"For the FLUX, {SIDE} x {SIDE}, and which of its {TOKENS} x {TOKENS} tokens the subject touches"


def main() -> int:
    """The command line; see the module's text."""
    parser = Parser(prog="help_pictures.py", description="Draw the help pages' pictures that no workflow gives.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these (by default all)")
    names = parser.parse_args().names
    host = find_host()
    enter(host, Path(__file__), sys.argv[1:])
    import_host(host.tree)
    load_pack(ROOT)
    import torch
    from hosting.sheet import draw_sheet

    sheets: dict[str, tuple[str, Callable[[], list[Any]]]] = {
        "align_reference": (ALIGNED, aligned_groups),
        "anystory_subject": (SUBJECT, subject_groups),
        "anystory_routes": ("Routes, by a router with random weights", route_groups),
        "learned_routes": ("Routes, by the trained router of the toy's encoder", learned_route_groups),
    }
    if unknown := sorted({*names} - {*sheets}):
        raise ToolError(f"There is no picture {', '.join(unknown)}; the names are: {', '.join(sheets)}.")
    for name in names or sheets:
        title, groups = sheets[name]
        target = HELP / f"{name}.jpg"
        with torch.inference_mode():
            draw_sheet([(title, groups())]).save(target, quality=88)
        print(target)
    return 0


def aligned_groups() -> list[Any]:
    """A reference, a picture whose subject stands elsewhere, and what Align Reference to Layout makes of them."""
    from hosting.sheet import Group
    from subject_patches.encoders.preprocessing import to_bytes
    from subject_patches.nodes.align import AlignReferenceNode

    picture, mask = _emblem(EMBLEMS[1])
    layout, around = _emblem(LAYOUT)
    place = 1 - around
    made = AlignReferenceNode.execute(picture[None], mask[None], place[None]).args
    return [
        Group("The reference and its mask", tuple(_png(to_bytes(each)) for each in (picture, mask))),
        Group("The layout picture and its subject", tuple(_png(to_bytes(each)) for each in (layout, place))),
        Group("The reference that it makes, and its mask", tuple(_png(to_bytes(each[0])) for each in made)),
    ]


def subject_groups() -> list[Any]:
    """A picture and its mask, and what the vision model and the FLUX get of them."""
    from hosting.sheet import Group
    from subject_patches.encoders.preprocessing import cut_out, latent_pixels, places, to_bytes, vision_pixels

    picture, mask = (to_bytes(each) for each in _emblem(EMBLEMS[0]))
    square, inside = cut_out(picture, mask)
    groups = [Group(CUT, tuple(_png(each) for each in (picture, mask, square, inside)))]
    for caption, made, cells in (
        (FOR_VISION, vision_pixels(square, inside, SEEN), PATCHES),
        (FOR_FLUX, latent_pixels(square, inside, SIDE), TOKENS),
    ):
        pixels, shares = made
        touched = places(shares, (cells, cells)).view(cells, cells)
        tiles = ((pixels[0].movedim(0, -1) + 1) / 2, touched.repeat_interleave(8, 0).repeat_interleave(8, 1))
        groups.append(Group(caption, tuple(_png(to_bytes(each)) for each in tiles)))
    return groups


def route_groups() -> list[Any]:
    """A router's maps on the second small model, as Attention Inspector draws them."""
    from measuring.anystory import form_for, random_subjects, random_weights
    from subject_patches.nodes.anystory import AnyStoryNode
    from subject_patches.toy.sampling import DIT_CHECKPOINT, Toy

    toy = Toy.load(DIT_CHECKPOINT)
    pictures = [_emblem(name)[0] for name in EMBLEMS]
    anystory = random_weights(form_for(toy.model))
    subjects = random_subjects(anystory, [toy.vae.encode(each[None]) for each in pictures])
    model = AnyStoryNode.execute(toy.model, anystory, subjects).args[0]
    return _shown_routes(toy, model, LAYERS, pictures)


def learned_route_groups() -> list[Any]:
    """Those of the first small model's encoder, of a picture in which both emblems are shown by them."""
    from subject_patches.encoders.subject_encoder import read_subject_encoder
    from subject_patches.nodes.routed_reference import RoutedReferenceAttentionNode
    from subject_patches.nodes.router import RouteByEncoderNode
    from subject_patches.nodes.subject import SubjectNode
    from subject_patches.nodes.subject_encoder import EncodeSubjectsNode
    from subject_patches.toy.pair_training import ENCODER
    from subject_patches.toy.sampling import Toy

    toy, encoder, subjects = Toy.load(), read_subject_encoder(ENCODER), ()
    shown = [_emblem(name) for name in EMBLEMS]
    for picture, mask in shown:
        subjects += SubjectNode.made([picture[None]], toy.vae, size=96, margin=0.15, mask=[mask[None]]).args[0]
    coded = EncodeSubjectsNode.execute(subjects, encoder, toy.vae).args[0]
    router = RouteByEncoderNode.execute(encoder).args[0]
    model = RoutedReferenceAttentionNode.execute(toy.model, coded, router).args[0]
    return _shown_routes(toy, model, UNET_LAYERS, [picture for picture, _ in shown])


def _shown_routes(toy: Any, model: Any, layers: str, references: list[Tensor]) -> list[Any]:
    """The references, the picture that a patched MODEL makes, and its routes in some layers."""
    from hosting.sheet import Group
    from subject_patches.encoders.preprocessing import to_bytes
    from subject_patches.nodes.attention_inspector import AttentionInspectorNode, RecordAttentionNode

    model, record = RecordAttentionNode.execute(model).args
    made = toy.sample([CAPTION], [2], model, steps=STEPS)
    shown = {"show": "routing map", "layers": layers, "arrange": "layers by steps"}
    grid = AttentionInspectorNode.execute(record, made, **shown, first_step=1, last_step=STEPS).args[0]
    return [
        Group("The two references, and the picture", tuple(_png(to_bytes(each)) for each in (*references, made[0]))),
        Group("Which places some blocks give to each of them, step by step (light)", (_png(to_bytes(grid[0])),)),
    ]


def _emblem(name: str) -> tuple[Tensor, Tensor]:
    """A shipped picture (height, width, 3) and its mask (height, width), of 0 to 1."""
    import numpy as np
    import torch
    from PIL import Image

    with Image.open(ROOT / "workflows" / "input" / f"subject_patches_{name}.png") as opened:
        whole = torch.from_numpy(np.array(opened.convert("RGBA"))).float() / 255
    return whole[..., :3], whole[..., 3]


def _png(values: Any) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


if __name__ == "__main__":
    run(main)
