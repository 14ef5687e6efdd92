"""Trains the DiT and its text encoder together on the autoencoder's latents."""

from __future__ import annotations

from pathlib import Path

import torch
from comfy.clip_model import CLIPTextModel
from comfy.ldm.flux.model import Flux
from comfy.ops import disable_weight_init
from comfy.taesd.taesd import TAESD
from torch import Tensor
from torch.nn import functional

from . import joint
from .data import batches, small_scene, vocabulary
from .dit_family import DIT_TEXT, FLUX, HIDDEN, TOKENS
from .family import LATENT_CHANNELS, TEXT, WIDTH
from .labels import SCORES, label_loss
from .optimisers import MuonAndAdamW
from .runs import Peers, Run, held_rate
from .train_diffusion import Latents, encode_text, thing_weights

CAPTION_DROPOUT = 0.1
LABEL_WEIGHT = 0.1
# The block whose image tokens must name what they show, of six single ones.
MIDDLE = 2
# The normal that the noise level's logit is drawn from: more noise than not, where the caption decides.
LOGIT_MEAN, LOGIT_SPREAD = 0.5, 1.2
# How much higher Muon's rate is: brought to AdamW's size of step, it bears three times as much here.
MUON_FACTOR = 3.0
SIDE = 16 // FLUX["patch_size"]


class Model(torch.nn.Module):
    """The two trained parts under one roof, with a table of so many words, and a head that only training needs: it
    reads from a middle block's image tokens what fills each latent cell."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.dit = Flux(**FLUX, operations=disable_weight_init)
        self.text = CLIPTextModel(DIT_TEXT, None, None, disable_weight_init)
        self.text.text_model.embeddings.token_embedding = disable_weight_init.Embedding(words, WIDTH)
        # Nothing uses the projection; an identity keeps it defined.
        self.text.text_projection.requires_grad_(False)
        self.labels = torch.nn.Linear(HIDDEN, FLUX["patch_size"] ** 2 * SCORES)
        self.turns = joint.positions(self.dit, TOKENS, SIDE, SIDE)

    def forward(self, noisy: Tensor, sigma: Tensor, words: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        """The velocity, and the scores of all labels (n, SCORES, 16, 16). `words` (n, TOKENS) are rows of the table,
        `ends` (n,) the place of each caption's end, whose vector is the pooled one."""
        context = encode_text(self.text.text_model, words)
        pooled = context[torch.arange(len(context), device=context.device), ends]
        velocity, tokens = joint.forward(self.dit, noisy, sigma, context, pooled, self.turns, MIDDLE)
        scores = self.labels(tokens).unflatten(1, (SIDE, SIDE)).permute(0, 3, 1, 2)
        return velocity.float(), functional.pixel_shuffle(scores, FLUX["patch_size"]).float()


def initialise(model: Model, text: dict[str, Tensor], ids: Tensor) -> None:
    """FLUX's usual initial weights (modulations and output zero, so that every block starts as nothing), and the first
    toy's text encoder `text`, of whose table the words `ids` are taken."""
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(layer.weight)
            if "_mod.lin" in name or "modulation" in name or name == "dit.final_layer.linear":
                torch.nn.init.zeros_(layer.weight)
            if layer.bias is not None:
                torch.nn.init.zeros_(layer.bias)
        elif name.endswith(("query_norm", "key_norm")):
            torch.nn.init.ones_(layer.weight)
    with torch.no_grad():
        for name, tensor in text.items():
            if name.endswith("token_embedding.weight"):
                tensor = tensor[ids]
            elif name.endswith("position_embedding.weight"):
                tensor = tensor[:TOKENS]
            model.text.get_parameter(name).copy_(tensor)


def inside(name: str) -> bool:
    """Whether a parameter is of the transformer's blocks, and not of their modulation."""
    return "_blocks." in name and "_mod." not in name and ".modulation." not in name


def training_loss(model: Model, latents: Tensor, words: Tensor, ends: Tensor, labels: Tensor) -> Tensor:
    """Rectified flow's loss (Liu et al. 2023): the squared error of the velocity, noise - latents, at a noise level
    whose logit is normal (Esser et al. 2024), weighted by `thing_weights`; and the label loss times LABEL_WEIGHT."""
    sigma = (torch.randn(len(latents), device=latents.device) * LOGIT_SPREAD + LOGIT_MEAN).sigmoid()
    noise = torch.randn_like(latents)
    with torch.autocast(latents.device.type, torch.bfloat16):
        velocity, scores = model(torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1)), sigma, words, ends)
    error = (thing_weights(labels) * (velocity - (noise - latents)) ** 2).mean()
    return error + LABEL_WEIGHT * label_loss(scores, labels)


class Words:
    """Token ids (n, 77) as the model takes them: rows of its table (n, TOKENS), and where each caption ends (n,)."""

    def __init__(self, ids: Tensor, device: torch.device) -> None:
        self.end = TEXT["eos_token_id"]
        self.rows = torch.zeros(self.end + 1, dtype=torch.long, device=device)
        self.rows[ids.to(device)] = torch.arange(len(ids), device=device)

    def __call__(self, tokens: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
        """`dropped` (n,) captions are made empty."""
        empty = tokens.new_full((TOKENS,), self.end)
        empty[0] = self.end - 1
        tokens = torch.where(dropped[:, None], empty, tokens[:, :TOKENS])
        return self.rows[tokens], (tokens == self.end).int().argmax(1)


def train(
    given: dict[str, Tensor],
    start: dict[str, Tensor] | None,
    minutes: float,
    file: Path,
    device: torch.device,
    peers: Peers,
    workers: int,
    batch: int,
    rate: float,
    seed: int,
    resume: bool,
) -> tuple[dict[str, Tensor], Tensor]:
    """Trains for `minutes`, none of which may be left of a resumed run; gives the averaged weights, named as `Model`
    names them, and the ids of the words in the table. `given` is the first toy's autoencoder ("vae.") and text encoder
    ("text."), `start` are weights to train on from, as given back; `file` keeps the run's state.

    Encoding a picture costs about as much as a training step on it, so every fourth step adds a quarter of a batch of
    new pictures to the store, and each trains on a batch drawn from all of it.
    """
    torch.manual_seed(seed)
    autoencoder = TAESD(latent_channels=LATENT_CHANNELS).to(device)
    autoencoder.load_state_dict(under(given, "vae."))
    autoencoder.requires_grad_(False)
    ids = vocabulary(sample=small_scene)
    model = Model(len(ids))
    initialise(model, under(given, "text."), ids)
    if start is not None:
        model.load_state_dict(start, strict=False)
    model.to(device)
    optimiser = MuonAndAdamW(model, rate, inside, MUON_FACTOR)
    run = Run("dit", model, file, minutes, rate, peers, 100, 0.998, optimiser, held_rate)
    if resume:
        run.resume(device)
    if run.clock.share < 1:
        # From here on every peer draws for itself.
        own = (seed * peers.count + peers.rank) * 2**20 + run.step
        torch.manual_seed(own)
        data = batches(max(batch // 4, 1), workers, own, tokenize=True, sample=small_scene)
        store = Latents(autoencoder, data, device, 2_000_000 if device.type == "cuda" else 60_000)
        # So many that the first steps do not rehearse a few.
        while store.written < 30 * batch:
            store.add()
        words, going = Words(ids, device), True
        while going:
            if run.step % 4 == 0:
                store.add()
            latents, tokens, labels = store.draw(batch)
            taken = words(tokens, torch.rand(batch, device=device) < CAPTION_DROPOUT)
            going = run.advance(training_loss(model, latents, *taken, labels), batch)
    print(f"dit: {run.step} steps of {batch * peers.count}", flush=True)
    return run.average.module.state_dict(), ids


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
