"""What each workflow for real models is made of: a function that fills a graph, and gives what its note says.

The same function makes it for each family, so that workflows differ in what a model needs alone: its files, the side
of its pictures, how it is sampled.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from .graphs import DISTILLED, FAMILIES, FLUX, NOUNS_IN_PROMPT, Family, FluxGraph, Graph, Link

# Of a canvas of 512 x 512; a layout fits a picture of any size.
LEFT, RIGHT = (32, 128, 208, 320), (272, 128, 208, 320)


def reference(graph: Graph) -> str:
    """The simplest graph: no phrase, no mask, nothing to download but the model."""
    subject = graph.subject("", graph.picture("Your subject", "emblem"))
    model = graph.add("SubjectPatchesRecycledSelfAttention", model=graph.model, subject=subject, strength=1.0)
    positive = graph.text("Prompt", "a photo of an emblem on a wooden table")
    negative = graph.negative(positive)
    latent = graph.empty(graph.family.side)
    graph.save("The picture", graph.sampled("", [model, 0], graph.guided(positive), negative, latent), "ref")
    return (
        "## Your subject in a new picture\nThe picture in **Your subject** is shown in what the prompt says: no "
        "training, no download.\n\n**Change first:** the picture, then the prompt, which should name what the picture "
        "shows. *strength* of Recycled Self-Attention says how much of it: 0 is the model alone, 1 the paper's."
        f"{graph.told_of_sizes()}"
    )


def two_subjects(graph: Graph) -> str:
    """Two subjects, each in its box."""
    side = graph.side()
    nouns = graph.noun("First noun", "dog"), graph.noun("Second noun", "cat")
    prompt, phrases = _prompt(graph, "a photo of a {a} and a {b} on a lawn", nouns)
    layout = _boxes(graph, (LEFT, RIGHT), phrases)
    first = graph.subject("First subject", graph.picture("First subject's picture", "emblem"), nouns[0])
    picture = graph.picture("Second subject's picture", "second_emblem")
    second = graph.subject("Second subject", picture, nouns[1], others=first)
    positive = [graph.add("SubjectPatchesEncodePrompt", clip=graph.clip, text=prompt, phrases=phrases), 0]
    negative = graph.negative(positive)
    model = [graph.add("SubjectPatchesLayoutBias", model=graph.model, layout=layout), 0]
    router = [graph.add("SubjectPatchesRouteByMasks", layout=layout), 0]
    routed = {"model": model, "subjects": second, "router": router}
    model = [graph.add("SubjectPatchesRoutedReferenceAttention", **routed), 0]
    image = graph.sampled("", model, graph.guided(positive), negative, graph.empty(side))
    graph.save("The picture", image, "two_subjects")
    return (
        "## Two subjects, each in its box\nEach picture is seen in its own box only, so that the two do not blend.\n\n"
        "**Change first:** the two pictures, the two nouns, then the prompt around them, then the boxes: the first box "
        f"is the first noun's. {NOUNS} {BOXES}{graph.told_of_sizes()}"
    )


def layout(graph: Graph) -> str:
    """Phrases in boxes, without pictures."""
    side = graph.side()
    nouns = graph.noun("First phrase", "red apple"), graph.noun("Second phrase", "green bottle")
    prompt, phrases = _prompt(graph, "a photo of a {a} and a {b} on a wooden table", nouns)
    placed = _boxes(graph, (LEFT, RIGHT), phrases)
    positive = [graph.add("SubjectPatchesEncodePrompt", clip=graph.clip, text=prompt, phrases=phrases), 0]
    negative = graph.negative(positive)
    latent = graph.empty(side)
    positive = graph.guided(positive)
    alone = graph.sampled("KSampler, the prompt alone", graph.model, positive, negative, latent)
    graph.save("Before: the prompt alone", alone, "before")
    model = [graph.add("SubjectPatchesLayoutBias", model=graph.model, layout=placed), 0]
    boxed = graph.sampled("KSampler, with the boxes", model, positive, negative, latent)
    graph.save("After: each in its box", boxed, "layout")
    return (
        "## Things where you say\nEach phrase of the prompt is drawn in its box.\n\n**Change first:** the two phrases, "
        "then the prompt around them, then the boxes: the first box is the first phrase's. "
        f"{NOUNS} *guidance_weight* of Layout Bias says how hard: 0.05 to 0.08 are the authors'. {BOXES}"
    )


def concept(graph: Graph) -> str:
    """A concept trained from pictures, and a prompt that the second branch brings back."""
    side = graph.side()
    shown = {f"images.image{n}": graph.picture("A picture of your concept", f"shield_{n + 1}") for n in range(4)}
    images = [graph.add("BatchImagesNode", **shown), 0]
    noun = graph.noun("Noun of your concept", "shield")
    text = graph.filled("Prompt of the others: {a} is the noun", "a photo of a {a}", noun)
    plain = graph.text("Others of the noun", text)
    negative = graph.negative(plain)
    several = {"width": side, "height": side, "batch_size": REGULARISING}
    latents = [graph.add("EmptyLatentImage", f"{REGULARISING} others of the noun", **several), 0]
    others = graph.sampled("KSampler, others of the noun", graph.model, plain, negative, latents)
    links = {"model": graph.model, "clip": graph.clip, "vae": graph.vae, "images": images}
    links["regularisation_images"] = others
    settings = {"noun": noun, "name": NAME, "preset": "for dual-branch"}
    automatic = {"steps": 0, "size": 0, "learning_rate": 0.0, "word_learning_rate": 0.0}
    trained = graph.add("SubjectPatchesTrainConcept", **links, **settings, **automatic)
    words = [trained, 2]
    text = graph.filled("Prompt: {a} is the concept", "a photo of {a} on a sandy beach", words)
    given = {"clip": [trained, 1], "text": text, "concept": words}
    prompts = graph.add("SubjectPatchesAuxiliaryPrompt", **given, preset="automatic", noun="")
    latent = graph.empty(side)
    alone = graph.sampled("KSampler, the concept alone", [trained, 0], [prompts, 0], negative, latent)
    graph.save("Before: the concept alone", alone, "concept")
    links = {"model": [trained, 0], "concept": [prompts, 0], "auxiliary": [prompts, 1]}
    model = [graph.add("SubjectPatchesDualBranchIntegration", **links, injection_strength=1.0, strength=1.0), 0]
    both = graph.sampled("KSampler, with its prompt", model, [prompts, 0], negative, latent)
    graph.save("After: with its prompt", both, "dual_branch")
    return (
        "## Teach the checkpoint your concept\nA few pictures become an embedding and a LoRA (900 steps, which want "
        "a GPU), and the second branch brings the rest of the prompt "
        f"back. Half of the training sees {REGULARISING} other shields, which the checkpoint draws by itself, so that "
        "the noun stays what it was.\n\n**Change first:** the pictures (one loader each, or Load Image (from Folder) "
        "in their place), the noun and the *name* of Train ICO Concept, then the prompt: {a} in it stands for the "
        "concept's words, the embedding and the noun. Steps and rates are 0, which takes the authors' for this "
        f"checkpoint; the log says what was taken. The workflow *use_a_concept_sd15* or *use_a_concept_sdxl* loads "
        f"both again: they are called {NAME}."
    )


def use_a_concept(graph: Graph) -> str:
    """A trained concept, loaded by the host's own nodes."""
    side = graph.side()
    model = [
        graph.add("LoraLoaderModelOnly", model=graph.model, lora_name=f"{NAME}.safetensors", strength_model=1.0),
        0,
    ]
    positive = graph.text("Prompt, with the concept's words", f"a photo of embedding:{NAME} shield on a sandy beach")
    negative = graph.negative(positive)
    graph.save("The picture", graph.sampled("", model, positive, negative, graph.empty(side)), "concept_again")
    return (
        "## A concept that was trained before\nTrain ICO Concept leaves an embedding, which the prompt names, and a "
        f"LoRA of the same name: here **{NAME}**, which the workflow *concept_sd15* or *concept_sdxl* makes. None of "
        "this pack's nodes is needed.\n\n"
        "**Change first:** the concept's name, in the LoRA's list and in the prompt, and the noun behind it."
    )


def retouch(graph: Graph) -> str:
    """A picture's subject gets a reference's details."""
    side = graph.side()
    unprompted = graph.unprompted()

    def inverted(title: str, name: str) -> tuple[Link, str]:
        loaded = graph.picture(title, name)
        square = {"upscale_method": "lanczos", "crop": "center", "width": side, "height": side}
        scaled = [graph.add("ImageScale", f"{title}, to the size", image=loaded, **square), 0]
        latent = [graph.add("VAEEncode", pixels=scaled, vae=graph.vae), 0]
        links = {"model": graph.model, "latent": latent, "sigmas": sigmas, **unprompted}
        return scaled, graph.add("SubjectPatchesInvertToTrajectory", f"Invert: {title.lower()}", **links)

    sigmas = [graph.add("BasicScheduler", "The steps of all three", model=graph.model, **graph.steps()), 0]
    _, source = inverted("Your picture", "another_emblem")
    _, details = inverted("The details", "emblem")
    noun = graph.noun("Noun of what both pictures show", "emblem")
    text = graph.filled("Prompt: {a} is the noun", "a photo of the {a}", noun)
    positive = [graph.add("SubjectPatchesEncodePrompt", clip=graph.clip, text=text, phrases=noun), 0]
    negative = graph.negative(positive, "")
    positive = graph.guided(positive)
    mask = {"phrase": noun, "threshold": 0.3, "join": "OR"}
    links = {"layout": [source, 0], "reference": [details, 0]}
    links["blend_mask"] = [graph.add("SubjectPatchesAdaptiveBlendMask", **mask), 0]
    swap = {"model": graph.model, **links, "lambda2": 0.2, "mask_blend_start": 0.6}
    model = [graph.add("SubjectPatchesMultiSourceSwap", **swap), 0]
    guider = graph.add("CFGGuider", model=model, positive=positive, negative=negative, cfg=graph.family.cfg)
    given = {**graph.begun(source, side), "guider": [guider, 0]}
    given["sampler"] = [graph.add("KSamplerSelect", "Sampler", sampler_name="euler"), 0]
    latent = graph.add("SamplerCustomAdvanced", **given, sigmas=sigmas)
    graph.save("After: with the details", graph.decoded([latent, 0]), "retouched")
    return (
        "## Give a picture's subject the details of another\n**Your picture** keeps its structure; its subject takes "
        f"the look of **The details** ({graph.steps()['steps']} steps; lambda2 0.2 and the mask from 0.6 are the "
        "paper's).\n\n**Change first:** the two pictures, then the noun of what both show, which stands nowhere else. "
        "More *lambda2* keeps more of the picture. A painted mask, connected to Adaptive Swap Mask, says where; a "
        "picture that is not square has to be cropped before it is painted, since the graph takes its middle."
    )


def small_region(graph: Graph) -> str:
    """A small region of a large picture: enlarged to the model's own size, generated, and put back."""
    side = graph.side()
    scene = graph.picture("Your scene", "scene")
    left, top, region = (
        [graph.add("PrimitiveInt", title, value=value), 0]
        for title, value in (("Left of the region", 24), ("Top of the region", 24), ("Side of the region", 64))
    )
    box = {"x": left, "y": top, "width": region, "height": region}
    cut = [graph.add("ImageCropV2", image=scene, crop_region=[graph.add("PrimitiveBoundingBox", **box), 0]), 0]

    def scaled(title: str, image: Link, to: Link) -> Link:
        square = {"upscale_method": "lanczos", "crop": "disabled", "width": to, "height": to}
        return [graph.add("ImageScale", title, image=image, **square), 0]

    whole = [graph.add("SolidMask", "All of the region", value=1.0, width=region, height=region), 0]
    edges = dict.fromkeys(("left", "top", "right", "bottom"), 8)
    mask = [graph.add("FeatherMask", "Its edge", mask=whole, **edges), 0]
    latent = [graph.add("VAEEncode", pixels=scaled("Zoom in", cut, side), vae=graph.vae), 0]
    latent = [graph.add("SetLatentNoiseMask", samples=latent, mask=mask), 0]
    subject = graph.subject("", graph.picture("Your subject", "emblem"))
    recycled = {"model": graph.model, "subject": subject, "strength": 1.0, "region_mask": mask}
    model = [graph.add("SubjectPatchesRecycledSelfAttention", **recycled), 0]
    positive = graph.text("What is in the region", "a photo of an emblem on a wall")
    image = graph.sampled("", model, positive, graph.negative(positive), latent)
    graph.save("The region by itself", image, "region")
    links = {"destination": scene, "source": scaled("Back to its size", image, region), "x": left, "y": top}
    stitched = [graph.add("ImageCompositeMasked", "Put back", **links, resize_source=False, mask=mask), 0]
    graph.save("The scene with it", stitched, "stitched")
    return (
        "## A subject in a small region of a large picture\nA checkpoint draws badly what is much smaller than its own "
        "pictures, and a reference does not carry across scales. So the region is cut out, enlarged to the "
        "checkpoint's own size, generated with the subject, made small again and put back: all else stays as it is, "
        "to the pixel.\n\n**Change first:** the two pictures, the region (its left, top and side in pixels of the "
        "scene), then the prompt, which says what the region shows, not the scene. Leave some of the surroundings in "
        "the region. A painted mask in the place of *Its edge* says more exactly where, through **Crop Mask** with the "
        "region's numbers."
    )


def anystory(graph: FluxGraph) -> str:
    """Two subjects by the weights that AnyStory's authors released, and the same prompt without them."""
    links = {"anystory": [graph.add("SubjectPatchesLoadAnyStory", file="anystory_flux.safetensors"), 0]}
    vision = graph.add("CLIPVisionLoader", clip_name="sigclip_vision_patch14_384.safetensors")
    style = graph.add("StyleModelLoader", style_model_name="flux1-redux-dev.safetensors")
    seen = {**links, "vae": graph.vae, "clip_vision": [vision, 0], "style_model": [style, 0]}
    subjects: dict[str, Link] = {}
    for title, name in (("First subject", "emblem"), ("Second subject", "second_emblem")):
        image = graph.picture(f"{title}'s picture", name)
        mask = graph.add("InvertMask", "For a transparent ground: bypass it for a painted mask", mask=[image[0], 1])
        given = {**seen, "image": image, "mask": [mask, 0], **subjects}
        subjects = {"others": [graph.add("SubjectPatchesAnyStorySubject", title, **given), 0]}
    positive = graph.text(
        "Describe every subject and the scene",
        "A red shield with a white emblem and a blue shield with a yellow emblem hang side by side on an old brick "
        "wall.",
    )
    sizes = dict.fromkeys(("width", "height"), graph.side(ANYSTORY_SIDE))
    shift = graph.add("ModelSamplingFlux", "The schedule for the picture's size", model=graph.model, **sizes)
    sampled = {
        "noise": [graph.add("RandomNoise", noise_seed=1), 0],
        "sampler": [graph.add("KSamplerSelect", sampler_name="euler"), 0],
        "sigmas": [graph.add("BasicScheduler", model=[shift, 0], scheduler="simple", steps=25), 0],
        "latent_image": graph.empty(sizes["width"]),
    }
    conditioning = graph.guided(positive)
    # The authors' window for several subjects.
    window = {"reference_start": 0.09}
    patched = graph.add("SubjectPatchesAnyStory", model=[shift, 0], **links, subjects=subjects["others"], **window)
    for title, model, prefix in (
        ("Without AnyStory", [shift, 0], "anystory_without"),
        ("With both subjects", [patched, 0], "anystory"),
    ):
        guider = graph.add("BasicGuider", model=model, conditioning=conditioning)
        latent = graph.add("SamplerCustomAdvanced", **sampled, guider=[guider, 0])
        graph.save(title, graph.decoded([latent, 0]), prefix)
    return (
        "## Two subjects by AnyStory's own weights\nTwo subjects in a picture of FLUX.1 dev by the weights that "
        "AnyStory's authors released, and the same prompt without them.\n\n**Change first:** the two pictures, what "
        "of them is the subject, then the prompt, which describes each of them. A picture with a transparent ground "
        "says itself where its subject is. In any other one paint over the subject (right-click the picture, Open in "
        "Mask Editor), and bypass the *Invert Mask* behind it (Ctrl-B).\n\n**It needs three files more** than FLUX.1: "
        "AnyStory's weights, converted once by *tools/convert.py* (*subject_encoders/anystory_flux.safetensors*), and "
        "FLUX.1 Redux (*style_models/flux1-redux-dev.safetensors*) with its vision model "
        "(*clip_vision/sigclip_vision_patch14_384.safetensors*). The help page of Load AnyStory says where they are."
    )


NAME = "my_concept"
# How many pictures for regularisation the checkpoint makes of the noun.
REGULARISING = 12
# AnyStory was trained at this size.
ANYSTORY_SIDE = 512
NOUNS = "Each stands in one place: {a} and {b} in the prompt stand for them."
BOXES = (
    "Draw them in *Create Bounding Boxes*, whose editor needs Nodes 2.0 (a switch in the menu of the ComfyUI logo, top "
    "left); without it, edit the numbers in *The boxes in numbers*, of a 512 x 512 canvas."
)
_GUIDED, _ALL = FAMILIES | FLUX, FAMILIES | FLUX | DISTILLED
# Each workflow, and the models that it is for. What a distilled model lacks it can't do without guidance: invert a
# picture, learn a concept.
WORKFLOWS: dict[str, tuple[Callable[[Any], str], dict[str, Family]]] = {
    "reference": (reference, _ALL),
    "small_region": (small_region, FAMILIES),
    "two_subjects": (two_subjects, _ALL),
    "layout": (layout, _ALL),
    "concept": (concept, FAMILIES),
    "use_a_concept": (use_a_concept, FAMILIES),
    "retouch": (retouch, _GUIDED),
    "anystory": (anystory, FLUX),
}


def _prompt(graph: Graph, text: str, nouns: tuple[Link, Link]) -> tuple[Link, Link]:
    """The prompt with its nouns, and the nouns as phrases."""
    filled = graph.filled(NOUNS_IN_PROMPT, text, *nouns)
    return filled, graph.filled("Both as phrases, one a line", "{a}\n{b}", *nouns)


def _boxes(graph: Graph, boxes: tuple[tuple[int, int, int, int], ...], phrases: Link) -> Link:
    """A layout of boxes for the editor, and in numbers for who has none. The phrases are not written into the boxes."""
    drawn = [
        {
            **dict(zip(("x", "y", "width", "height"), box, strict=True)),
            "metadata": {"type": "obj", "text": "", "desc": "", "palette": ["#d62828"]},
        }
        for box in boxes
    ]
    numbers = [graph.add("PrimitiveStringMultiline", "The boxes in numbers", value=json.dumps(drawn, indent=1)), 0]
    state = {"bboxes": numbers, "width": 512, "height": 512}
    editor = graph.add("CreateBoundingBoxes", "Create Bounding Boxes: draw here", **state)
    canvas = {"width": 512, "height": 512, "phrases": phrases, "boxes": [editor, 2]}
    return [graph.add("SubjectPatchesLayout", **canvas), 0]
