"""Workflows that nobody would make: each of the pack's nodes in turn, or several in any order, with inputs drawn from
what the server publishes of them, some of them odd. What is drawn depends on that, the seed and the case's number."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hosting.client import ApiPrompt

from .values import COSTLY, ODD_NUMBERS, ODD_TEXTS, ODD_WIDGETS, TEXTS, WELL, WINDOWS

Link = list[Any]
PACK = "SubjectPatches"
# What each model's loaders are, and the link of its MODEL, CLIP and VAE.
TOY, TOY_DIT = "subject-patches-toy.safetensors", "subject-patches-toy-dit.safetensors"
HOMES: dict[str, tuple[dict[str, tuple[str, dict[str, Any]]], dict[str, Link]]] = {
    **{
        name: ({name: (kind, inputs)}, {"MODEL": [name, 0], "CLIP": [name, 1], "VAE": [name, 2]})
        for name, kind, inputs in (
            ("toy", "CheckpointLoaderSimple", {"ckpt_name": TOY}),
            ("toy dit", "CheckpointLoaderSimple", {"ckpt_name": TOY_DIT}),
            ("sd15", "SmallCheckpoint", {"family": "sd15"}),
            ("sdxl", "SmallCheckpoint", {"family": "sdxl"}),
        )
    },
    "flux": (
        {
            "flux": ("UNETLoader", {"unet_name": "flux1-dev.safetensors", "weight_dtype": "default"}),
            "flux clip": ("SmallClip", {"family": "FLUX.1"}),
            "flux vae": ("VAELoader", {"vae_name": "ae.safetensors"}),
        },
        {"MODEL": ["flux", 0], "CLIP": ["flux clip", 0], "VAE": ["flux vae", 0]},
    ),
    "zimage": (
        {
            "zimage": ("SmallModel", {"family": "Z-Image"}),
            "zimage clip": ("SmallClip", {"family": "Z-Image"}),
            "flux vae": ("VAELoader", {"vae_name": "ae.safetensors"}),
        },
        {"MODEL": ["zimage", 0], "CLIP": ["zimage clip", 0], "VAE": ["flux vae", 0]},
    ),
}
# How often each is the model of a case.
WEIGHTS = {"toy": 10, "toy dit": 4, "sd15": 2, "sdxl": 2, "flux": 1, "zimage": 1}
# Other patches of the host's, which stand before and behind the pack's.
HOST_PATCHES = ("RescaleCFG", "CFGZeroStar")
# Those that U-Nets alone have openings for.
HOST_UNET_PATCHES = ("FreeU_V2", "TomePatchModel", "HyperTile", "PerturbedAttentionGuidance", *HOST_PATCHES)
UNETS = ("toy", "sd15", "sdxl")
PICTURES = tuple(f"subject_patches_{name}.png" for name in ("emblem", "second_emblem", "scene", "shield_1"))
SAMPLERS = ("euler", "euler", "dpmpp_2m", "heun", "dpmpp_2s_ancestral", "uni_pc", "euler_cfg_pp")
# Links of the host's that the probe makes odd.
SPOILT = ("IMAGE", "MASK", "LATENT", "CONDITIONING", "SIGMAS", "BOUNDING_BOX")
# Of inputs that may be left alone, those of which a node needs one.
ONE_OF = {
    "SubjectPatchesLayout": ("boxes", "boxes", "mask"),
    "SubjectPatchesRouteByMasks": ("masks", "layout"),
    "SubjectPatchesInvertToTrajectory": ("clip", "conditioning"),
    "SubjectPatchesMultiSourceSwap": ("layout", "reference"),
    "SubjectPatchesSemanticInjection": ("clip_vision",),
    "SubjectPatchesSubject": ("mask",),
    "SubjectPatchesAnyStorySubject": ("mask",),
    "SubjectPatchesAdaptiveBlendMask": ("mask",),
}
# Types whose files are for the toy.
OF_THE_TOY = ("RESIDUAL_TOKEN", "IMAGE_PROMPT_ADAPTER", "SEMANTICS", "SUBJECT_ENCODER")
_DEEP = 3


@dataclass
class Case:
    """A workflow; `told` says which of its inputs are odd, `home` whose model it begins with."""

    number: int
    home: str
    nodes: tuple[str, ...]
    prompt: ApiPrompt = field(default_factory=dict)
    told: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = " > ".join(kind.removeprefix(PACK) for kind in self.nodes)
        return f"case {self.number}, {self.home}: {kinds}: {'; '.join(self.told) or 'nothing odd'}"


def case_of(seed: int, number: int, known: dict[str, Any]) -> Case:
    """The case of a number; `known` is the server's object_info."""
    rng = random.Random(f"{seed} {number}")  # noqa: S311, nothing is to be kept secret
    kinds = sorted(name for name in known if name.startswith(PACK))
    patches = [kind for kind in kinds if "Train" not in kind and _gives(known, kind, "MODEL")]
    chained = number % 4 == 3
    # Each node in turn: every fourth case is a chain, so the others count three of four.
    chosen = [kinds[(number - number // 4) % len(kinds)]]
    if chained:
        chosen = [rng.choice(patches) for _ in range(rng.randint(2, 4))]
    home = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    types = " ".join(kind for node in chosen for kind in _types(known, node))
    if "ANYSTORY" in types:
        home = "flux"
    elif any(kind in types for kind in OF_THE_TOY) and rng.random() < 0.85:
        home = "toy"
    case = Case(number, home, tuple(chosen))
    _Builder(rng, known, case).build(chained)
    return case


def home_nodes(home: str) -> tuple[ApiPrompt, dict[str, Link]]:
    """The loaders of a home, and its links."""
    loaders, links = HOMES[home]
    return {name: {"class_type": kind, "inputs": dict(inputs)} for name, (kind, inputs) in loaders.items()}, links


def _inputs(known: dict[str, Any], kind: str) -> dict[str, tuple[Any, dict[str, Any], bool]]:
    """Of a node's inputs the type, options, and whether it has to be given."""
    found = {}
    for category in ("required", "optional"):
        for name, (type_, *more) in known[kind]["input"].get(category, {}).items():
            found[name] = (type_, more[0] if more else {}, category == "required")
    return found


def _types(known: dict[str, Any], kind: str) -> set[str]:
    taken = {part for type_, *_ in _inputs(known, kind).values() for part in str(type_).split(",")}
    return taken | set(known[kind]["output"])


def _gives(known: dict[str, Any], kind: str, type_: str) -> bool:
    return type_ in known[kind]["output"]


def _takes(known: dict[str, Any], kind: str, type_: str) -> bool:
    return any(type_ in str(given).split(",") for given, *_ in _inputs(known, kind).values())


def _file_of(choice: Any) -> str:
    """What kind of file it is, as an output's type says it, for one that is whole."""
    begins, _, kind = str(choice).rpartition("/")[2].partition("-")
    return kind.partition(".")[0].upper() if begins == "soak" else str(choice)


def _within(value: Any, type_: str, least: float, most: float) -> bool:
    """Whether the host takes a value for a number between two."""
    try:
        return least <= (int if type_ == "INT" else float)(value) <= most
    except (TypeError, ValueError, OverflowError):
        return False


def _passes(value: Any, type_: str, least: float, most: float) -> bool:
    """Whether the host finds nothing wrong with a value, as it does not with one that is no number."""
    return _within(value, type_, least, most) or (type_ == "FLOAT" and str(value) == "nan")


class _Builder:
    def __init__(self, rng: random.Random, known: dict[str, Any], case: Case) -> None:
        self.rng, self.known, self.case = rng, known, case
        self.home(case.home)
        self.links = HOMES[case.home][1]
        self.positive: Link | None = None

    def build(self, chained: bool) -> None:
        """Fills the case."""
        odd = self.rng.choice((0, 1, 1, 1, 2, 3))
        if not chained:
            self.finish(self.node(self.case.nodes[0], odd))
            return
        link = self.links["MODEL"]
        for kind in self.case.nodes:
            if self.rng.random() < 0.3:
                link = self.patched(link)
            number = self.node(kind, odd if kind == self.case.nodes[-1] else 0, given={"model": link})
            link = [number, self.known[kind]["output"].index("MODEL")]
        self.digest(self.sampled(model=self.patched(link) if self.rng.random() < 0.3 else link))

    # Nodes

    def add(self, kind: str, /, **inputs: Any) -> str:
        """A node; the number is its own."""
        number = str(len(self.case.prompt))
        self.case.prompt[number] = {"class_type": kind, "inputs": inputs}
        return number

    def home(self, name: str) -> dict[str, Link]:
        """The links of a model's parts, whose loaders join the workflow."""
        loaders, links = home_nodes(name)
        self.case.prompt |= {number: node for number, node in loaders.items() if number not in self.case.prompt}
        return links

    def node(self, kind: str, odd: int = 0, depth: int = 0, given: dict[str, Link] | None = None) -> str:
        """One of the pack's nodes, `odd` of its inputs odd."""
        described, inputs = _inputs(self.known, kind), dict(given or {})
        free = [name for name in described if name not in inputs]
        chosen = set(self.rng.sample(free, min(odd, len(free))))
        one = self.rng.choice(ONE_OF.get(kind, ("",)))
        for name in free:
            type_, options, needed = described[name]
            widget = isinstance(type_, list) or type_ in WELL
            if not needed and name in ONE_OF.get(kind, ()):
                needed = name == one and not chosen.intersection(ONE_OF[kind])
                if not needed and name not in chosen and kind == "SubjectPatchesRouteByMasks":
                    # It takes one of the two and not both.
                    continue
            if name in chosen:
                inputs[name] = self.odd_widget(name, type_, options) if widget else self.odd_link(type_, kind, name)
                shown = inputs[name] if widget else self.case.prompt[inputs[name][0]]
                self.case.told.append(f"{name} = {shown!r}"[:120])
            elif widget and (needed or name == "phrases" or (depth == 0 and self.rng.random() < 0.5)):
                inputs[name] = self.widget(name, type_, options, depth, self.known[kind]["output"])
            elif not widget and (needed or self.rng.random() < (0.3 if depth == 0 else 0.05)):
                inputs[name] = self.link(type_, name, depth, inputs, kind)
        if isinstance(inputs.get("concept"), list):
            # Which has to be the sampler's prompt, too.
            self.positive = inputs["concept"]
        return self.add(kind, **inputs)

    def patched(self, model: Link) -> Link:
        """A MODEL with a patch of the host's."""
        kind = self.rng.choice(HOST_UNET_PATCHES if self.case.home in UNETS else HOST_PATCHES)
        widgets = {
            name: self.widget(name, type_, options, 1)
            for name, (type_, options, _) in _inputs(self.known, kind).items()
            if isinstance(type_, list) or type_ in WELL
        }
        return [self.add(kind, model=model, **widgets), 0]

    # Widgets

    def widget(self, name: str, type_: Any, options: dict[str, Any], depth: int, outputs: Sequence[str] = ()) -> Any:
        """A value that the page would let somebody choose, of files one that the node can load."""
        choices = type_ if isinstance(type_, list) else options.get("options", [])
        if choices:
            good = [choice for choice in choices if any(_file_of(choice) in output for output in outputs)]
            if good or (depth == 0 and self.rng.random() < 0.4) or "default" not in options:
                return self.rng.choice(good or choices)
        if name in TEXTS:
            return self.rng.choice(TEXTS[name])
        if name in COSTLY:
            return self.rng.choice(COSTLY[name])
        for end, share in WINDOWS.items():
            if name.endswith(end) and depth == 0:
                return round(self.rng.uniform(*share), 2)
        default, least, most = options.get("default", ""), options.get("min"), options.get("max")
        if type_ == "BOOLEAN":
            return self.rng.random() < 0.5
        if type_ not in ("INT", "FLOAT") or depth > 0 or least is None or most is None or self.rng.random() < 0.4:
            return default
        return self.rng.randint(least, most) if type_ == "INT" else self.rng.uniform(least, most)

    def odd_widget(self, name: str, type_: Any, options: dict[str, Any]) -> Any:
        """A value at a bound, beyond it, or of another kind."""
        if type_ == "STRING":
            return self.rng.choice(ODD_TEXTS)
        if type_ not in ("INT", "FLOAT"):
            # The host refuses what is not among the choices.
            choices = type_ if isinstance(type_, list) else options.get("options", [True, False])
            return self.rng.choice(choices if choices and self.rng.random() < 0.9 else ODD_WIDGETS)
        least, most, step = options.get("min", 0), options.get("max", 1), options.get("step", 1)
        odd = [least - step, most + step, *ODD_NUMBERS]
        if name in COSTLY:
            return self.rng.choice([value for value in odd if not _within(value, type_, least, most)])
        # What the host itself refuses says nothing of the pack.
        taken = [least, most, *(value for value in ODD_NUMBERS if _passes(value, type_, least, most))]
        return self.rng.choice(odd if self.rng.random() < 0.1 else taken)

    # Links

    def link(self, type_: str, name: str, depth: int, beside: dict[str, Any], kind: str = "") -> Link:
        """What is usually connected to an input."""
        type_ = self.rng.choice(type_.split(","))
        if type_ == "IMAGE":
            # An inspector's picture is of the model that it records.
            for number, *_ in (value for value in beside.values() if isinstance(value, list)):
                maker = self.case.prompt[number]["class_type"]
                if maker.startswith(PACK) and _gives(self.known, maker, "MODEL"):
                    return self.sampled(model=[number, self.known[maker]["output"].index("MODEL")])
        vision = "dinov2" if "Semantic" in kind else "siglip"
        own = {
            "MODEL": lambda: self.patched(self.links["MODEL"]) if self.rng.random() < 0.1 else self.links["MODEL"],
            "CLIP": lambda: self.links["CLIP"],
            "VAE": lambda: self.links["VAE"],
            "IMAGE": self.image,
            "MASK": lambda: [self.add("InvertMask", mask=[self.image()[0], 1]), 0],
            "LATENT": lambda: [self.add("VAEEncode", pixels=self.small(), vae=self.links["VAE"]), 0],
            "SIGMAS": self.sigmas,
            "SAMPLER": lambda: [self.add("KSamplerSelect", sampler_name=self.rng.choice(SAMPLERS)), 0],
            "CLIP_VISION": lambda: [self.add("SmallVision", kind=vision), 0],
            "STYLE_MODEL": lambda: [self.add("SmallStyle", kind="redux"), 0],
            "BOUNDING_BOX": lambda: [self.add("SoakBoxes"), 0],
            "ARRAY": lambda: [self.add("SoakBoxes"), 0],
        }
        if type_ in own:
            return own[type_]()
        return self.produced(type_, name, depth)

    def produced(self, type_: str, name: str, depth: int) -> Link:
        """What one of the pack's nodes gives, one whose output has the input's name if there is one."""
        makers = [kind for kind in self.known if kind.startswith(PACK) and _gives(self.known, kind, type_)]
        named = [kind for kind in makers if name in self.known[kind]["output_name"]]
        if type_ == "CONDITIONING" and not named:
            return self.text()
        makers = named or makers
        if self.case.home != "toy":
            makers = [kind for kind in makers if not self.of_the_toy(kind)] or makers
        if depth >= _DEEP or self.rng.random() < 0.6:
            makers = [kind for kind in makers if not _takes(self.known, kind, type_)] or makers
        # A training takes longer than a file.
        makers = [kind for kind in makers if "Train" not in kind or self.rng.random() < 0.1] or makers[:1]
        kind = self.rng.choice(makers)
        slots = [slot for slot, given in enumerate(self.known[kind]["output"]) if given == type_]
        slot = next((slot for slot in slots if self.known[kind]["output_name"][slot] == name), slots[0])
        return [self.node(kind, depth=depth + 1), slot]

    def of_the_toy(self, kind: str) -> bool:
        """Whether what a node gives depends on a file, which is for the toy."""
        types = " ".join(_types(self.known, kind))
        return "LoadTrajectory" in kind or any(name in types for name in OF_THE_TOY)

    def odd_link(self, type_: str, kind: str, name: str) -> Link:
        """Of the right type, and wrong: another family's, spoilt, or from the wrong output."""
        type_ = self.rng.choice(type_.split(","))
        if type_ in ("MODEL", "CLIP", "VAE"):
            if type_ != "MODEL" and self.rng.random() < 0.25:
                return [self.add("SoakNothing"), ("CLIP", "VAE").index(type_)]
            return self.home(self.rng.choice([home for home in HOMES if home != self.case.home]))[type_]
        if type_ == "CONDITIONING" and self.rng.random() < 0.3:
            # Of another family, or one of the two that belong elsewhere.
            other = self.home(self.rng.choice([home for home in HOMES if home != self.case.home]))["CLIP"]
            prompts = self.node("SubjectPatchesAuxiliaryPrompt", depth=1)
            return self.rng.choice([self.text(other), [prompts, 0], [prompts, 1]])
        if type_ in SPOILT:
            spoilt = f"SoakOdd{type_}"
            ways = _inputs(self.known, spoilt)["way"][0]
            value = self.link(type_, name, 1, {})
            return [self.add(spoilt, value=value, way=self.rng.choice(ways)), 0]
        if type_ == "CLIP_VISION":
            return [self.add("SmallVision", kind=self.rng.choice(("siglip", "dinov2"))), 0]
        if type_ == "STYLE_MODEL":
            return [self.add("SmallStyle", kind="adapter"), 0]
        if type_ in ("SIGMAS", "SAMPLER", "ARRAY"):
            return self.link(type_, name, 1, {})
        # One of the pack's own, of another family's model or made of odd things itself.
        links, self.links = self.links, HOMES[self.rng.choice(list(HOMES))][1]
        for home, (_, own) in HOMES.items():
            if own is self.links:
                self.home(home)
        made = self.produced(type_, name, 1)
        self.links = links
        return made

    def image(self) -> Link:
        """A picture; its opacity is the second output."""
        return [self.add("LoadImage", image=self.rng.choice(PICTURES)), 0]

    def small(self) -> Link:
        """A picture of a size that a run at full length can have."""
        width, height = self.rng.choice(((64, 64), (96, 64), (72, 104)))
        sides = {"width": width, "height": height, "upscale_method": "area", "crop": "disabled"}
        return [self.add("ImageScale", image=self.image(), **sides), 0]

    def text(self, clip: Link | None = None) -> Link:
        """A prompt that knows its phrases."""
        given = {"clip": clip or self.links["CLIP"], "text": TEXTS["text"][0], "phrases": TEXTS["phrases"][0]}
        return [self.add("SubjectPatchesEncodePrompt", **given), 0]

    def sigmas(self) -> Link:
        steps = self.rng.randint(2, 4)
        return [self.add("BasicScheduler", model=self.links["MODEL"], scheduler="normal", steps=steps, denoise=1.0), 0]

    # To a picture

    def finish(self, number: str, depth: int = 0) -> None:
        """Has what a node gives used until there is a picture."""
        kind = self.case.prompt[number]["class_type"]
        outputs = list(enumerate(self.known[kind]["output"]))
        # All of them would take long.
        for slot, type_ in self.rng.sample(outputs, min(2, len(outputs))) if depth == 0 else outputs[:1]:
            self.use([number, slot], type_, depth)

    def use(self, link: Link, type_: str, depth: int) -> None:
        ends = {
            "MODEL": lambda: self.digest(self.sampled(model=link)),
            "CONDITIONING": lambda: self.digest(self.sampled(positive=link)),
            "LATENT": lambda: self.digest(self.sampled(latent_image=link)),
            "CLIP": lambda: self.digest(self.sampled(positive=self.text(link))),
            "IMAGE": lambda: self.digest(link),
            "MASK": lambda: self.digest([self.add("MaskToImage", mask=link), 0]),
            "GUIDER": lambda: self.digest(self.custom(guider=link)),
            "SAMPLER": lambda: self.digest(self.custom(sampler=link)),
            "NOISE": lambda: self.digest(self.custom(noise=link)),
        }
        users = [kind for kind in self.known if kind.startswith(PACK) and _takes(self.known, kind, type_)]
        if type_ in ends:
            ends[type_]()
        elif type_ == "STRING" and self.rng.random() < 0.7:
            self.add("PreviewAny", source=link)
        elif users and depth < _DEEP:
            kind = self.rng.choice(users)
            given = {
                name: link for name, (taken, *_) in _inputs(self.known, kind).items() if type_ in str(taken).split(",")
            }
            name = self.rng.choice(list(given))
            self.finish(self.node(kind, depth=depth + 1, given={name: link}), depth + 1)
        else:
            self.add("PreviewAny", source=link)

    def sampled(self, **given: Link) -> Link:
        """A picture in two steps."""
        sampling = {"seed": 5, "steps": 2, "cfg": self.rng.choice((1.0, 3.0)), "denoise": 1.0}
        usual = {"model": self.links["MODEL"], "sampler_name": self.rng.choice(SAMPLERS), "scheduler": "normal"}
        usual |= {"positive": self.positive or self.text(), "latent_image": self.empty()} | given
        negative = [self.add("CLIPTextEncode", clip=self.links["CLIP"], text=""), 0]
        return self.decoded([self.add("KSampler", negative=negative, **sampling, **usual), 0])

    def custom(self, **given: Link) -> Link:
        """The same by the sampler that takes its parts apart."""
        usual = {"noise": [self.add("RandomNoise", noise_seed=5), 0], "sampler": self.link("SAMPLER", "", 1, {})}
        if "guider" not in given:
            prompts = {"positive": self.positive or self.text(), "negative": self.text()}
            usual["guider"] = [self.add("CFGGuider", model=self.links["MODEL"], cfg=3.0, **prompts), 0]
        usual |= {"sigmas": self.sigmas(), "latent_image": self.empty()} | given
        return self.decoded([self.add("SamplerCustomAdvanced", **usual), 0])

    def empty(self) -> Link:
        width, height = self.rng.choice(((64, 64), (96, 64), (72, 104)))
        count = self.rng.choice((1, 1, 2))
        return [self.add("EmptyLatentImage", width=width, height=height, batch_size=count), 0]

    def decoded(self, latent: Link) -> Link:
        return [self.add("VAEDecode", samples=latent, vae=self.links["VAE"]), 0]

    def digest(self, images: Link) -> None:
        self.add("SoakDigest", images=images)


def without_patches(prompt: ApiPrompt, known: dict[str, Any]) -> ApiPrompt:
    """The same workflow without the pack's patches: what takes a patched MODEL takes the one that was given."""
    given = {
        number: node["inputs"]["model"]
        for number, node in prompt.items()
        if node["class_type"].startswith(PACK)
        and _gives(known, node["class_type"], "MODEL")
        and isinstance(node["inputs"].get("model"), list)
    }

    def bare(value: Any) -> Any:
        while isinstance(value, list) and value and value[0] in given and _is_model(prompt, known, value):
            value = given[value[0]]
        return value

    return {
        number: {**node, "inputs": {name: bare(value) for name, value in node["inputs"].items()}}
        for number, node in prompt.items()
    }


def _is_model(prompt: ApiPrompt, known: dict[str, Any], link: Sequence[Any]) -> bool:
    return known[prompt[link[0]]["class_type"]]["output"][link[1]] == "MODEL"
