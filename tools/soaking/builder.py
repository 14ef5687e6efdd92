"""The pack's nodes in a case, with what they need, and all the way to a picture."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from .described import PACK, gives, inputs_of, takes, types_of
from .drawn import is_widget, odd_widget, widget
from .homes import HOMES, Link
from .usual import Usual

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
# The vision models that nodes read with these words in their ids; others read a SigLIP.
_VISIONS = {"Semantic": "dinov2", "ImagePrompt": "clip"}
_DEEP = 3


class Builder(Usual):
    """Draws a workflow; `told` says which of its inputs are odd."""

    def __init__(self, rng: random.Random, known: dict[str, Any], home: str) -> None:
        super().__init__(rng, known, home)
        self.told: list[str] = []

    def build(self, kinds: Sequence[str], chained: bool) -> None:
        """One of the pack's nodes, or several patches one behind the other, and all that they need."""
        odd = self.rng.choice((0, 1, 1, 1, 2, 3))
        if not chained:
            self.finish(self.node(kinds[0], odd))
            return
        link = self.links["MODEL"]
        for kind in kinds:
            if self.rng.random() < 0.3:
                link = self.patched(link)
            number = self.node(kind, odd if kind == kinds[-1] else 0, given={"model": link})
            link = [number, self.known[kind]["output"].index("MODEL")]
        self.digest(self.sampled(model=self.patched(link) if self.rng.random() < 0.3 else link))

    def node(self, kind: str, odd: int = 0, depth: int = 0, given: dict[str, Link] | None = None) -> str:
        """One of the pack's nodes, `odd` of its inputs odd."""
        described, inputs = inputs_of(self.known, kind), dict(given or {})
        free = [name for name in described if name not in inputs]
        chosen = set(self.rng.sample(free, min(odd, len(free))))
        one = self.rng.choice(ONE_OF.get(kind, ("",)))
        for name in free:
            type_, options, needed = described[name]
            written = is_widget(type_)
            if not needed and name in ONE_OF.get(kind, ()):
                needed = name == one and not chosen.intersection(ONE_OF[kind])
                if not needed and name not in chosen and kind == "SubjectPatchesRouteByMasks":
                    # It takes one of the two and not both.
                    continue
            if name in chosen:
                if written:
                    shown = inputs[name] = odd_widget(self.rng, name, type_, options)
                else:
                    inputs[name] = self.odd_link(type_, kind, name)
                    shown = self.prompt[inputs[name][0]]
                self.told.append(f"{name} = {shown!r}"[:120])
            elif written and (needed or name == "phrases" or (depth == 0 and self.rng.random() < 0.5)):
                inputs[name] = widget(self.rng, name, type_, options, depth, self.known[kind]["output"])
            elif not written and (needed or self.rng.random() < (0.3 if depth == 0 else 0.05)):
                inputs[name] = self.link(type_, name, depth, inputs, kind)
        if isinstance(inputs.get("concept"), list):
            # Which has to be the sampler's prompt, too.
            self.positive = inputs["concept"]
        return self.add(kind, **inputs)

    # Links

    def link(self, type_: str, name: str, depth: int, beside: dict[str, Any], kind: str = "") -> Link:
        """What is usually connected to an input."""
        type_ = self.rng.choice(type_.split(","))
        if type_ == "IMAGE":
            # An inspector's picture is of the model that it records.
            for number, *_ in (value for value in beside.values() if isinstance(value, list)):
                maker = self.prompt[number]["class_type"]
                if maker.startswith(PACK) and gives(self.known, maker, "MODEL"):
                    return self.sampled(model=[number, self.known[maker]["output"].index("MODEL")])
        vision = next((kinds for words, kinds in _VISIONS.items() if words in kind), "siglip")
        own = {
            "MODEL": lambda: self.patched(self.links["MODEL"]) if self.rng.random() < 0.1 else self.links["MODEL"],
            "CLIP": lambda: self.links["CLIP"],
            "VAE": lambda: self.links["VAE"],
            "IMAGE": self.image,
            "MASK": lambda: [self.add("InvertMask", mask=[self.image()[0], 1]), 0],
            "LATENT": lambda: [self.add("VAEEncode", pixels=self.small(), vae=self.links["VAE"]), 0],
            "SIGMAS": self.sigmas,
            "SAMPLER": self.sampler,
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
        makers = [kind for kind in self.known if kind.startswith(PACK) and gives(self.known, kind, type_)]
        named = [kind for kind in makers if name in self.known[kind]["output_name"]]
        if type_ == "CONDITIONING" and not named:
            return self.text()
        makers = named or makers
        if self.home != "toy":
            makers = [kind for kind in makers if not self.of_the_toy(kind)] or makers
        if depth >= _DEEP or self.rng.random() < 0.6:
            makers = [kind for kind in makers if not takes(self.known, kind, type_)] or makers
        # A training takes longer than a file.
        makers = [kind for kind in makers if "Train" not in kind or self.rng.random() < 0.1] or makers[:1]
        kind = self.rng.choice(makers)
        slots = [slot for slot, given in enumerate(self.known[kind]["output"]) if given == type_]
        slot = next((slot for slot in slots if self.known[kind]["output_name"][slot] == name), slots[0])
        return [self.node(kind, depth=depth + 1), slot]

    def of_the_toy(self, kind: str) -> bool:
        """Whether what a node gives depends on a file, which is for the toy."""
        types = " ".join(types_of(self.known, kind))
        return "LoadTrajectory" in kind or any(name in types for name in OF_THE_TOY)

    def odd_link(self, type_: str, kind: str, name: str) -> Link:
        """Of the right type, and wrong: another family's, spoilt, or from the wrong output."""
        type_ = self.rng.choice(type_.split(","))
        if type_ in ("MODEL", "CLIP", "VAE"):
            if type_ != "MODEL" and self.rng.random() < 0.25:
                return [self.add("SoakNothing"), ("CLIP", "VAE").index(type_)]
            return self.parts(self.rng.choice([home for home in HOMES if home != self.home]))[type_]
        if type_ == "CONDITIONING" and self.rng.random() < 0.3:
            # Of another family, or one of the two that belong elsewhere.
            other = self.parts(self.rng.choice([home for home in HOMES if home != self.home]))["CLIP"]
            prompts = self.node("SubjectPatchesAuxiliaryPrompt", depth=1)
            return self.rng.choice([self.text(other), [prompts, 0], [prompts, 1]])
        if type_ in SPOILT:
            spoilt = f"SoakOdd{type_}"
            ways = inputs_of(self.known, spoilt)["way"][0]
            value = self.link(type_, name, 1, {})
            return [self.add(spoilt, value=value, way=self.rng.choice(ways)), 0]
        if type_ == "CLIP_VISION":
            return [self.add("SmallVision", kind=self.rng.choice(("siglip", *_VISIONS.values()))), 0]
        if type_ == "STYLE_MODEL":
            return [self.add("SmallStyle", kind="adapter"), 0]
        if type_ in ("SIGMAS", "SAMPLER", "ARRAY"):
            return self.link(type_, name, 1, {})
        # One of the pack's own, of another family's model or made of odd things itself.
        links, self.links = self.links, self.parts(self.rng.choice(list(HOMES)))
        made = self.produced(type_, name, 1)
        self.links = links
        return made

    # To a picture

    def finish(self, number: str, depth: int = 0) -> None:
        """Has what a node gives used until there is a picture."""
        kind = self.prompt[number]["class_type"]
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
        users = [kind for kind in self.known if kind.startswith(PACK) and takes(self.known, kind, type_)]
        if type_ in ends:
            ends[type_]()
        elif type_ == "STRING" and self.rng.random() < 0.7:
            self.add("PreviewAny", source=link)
        elif users and depth < _DEEP:
            kind = self.rng.choice(users)
            described = inputs_of(self.known, kind)
            name = self.rng.choice([name for name, (taken, *_) in described.items() if type_ in str(taken).split(",")])
            self.finish(self.node(kind, depth=depth + 1, given={name: link}), depth + 1)
        else:
            self.add("PreviewAny", source=link)
