"""Trains the toy's U-Net and text encoder together on the autoencoder's latents."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from comfy.clip_model import CLIPTextModel, CLIPTextModel_
from comfy.ldm.modules.attention import attention_pytorch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.ops import disable_weight_init
from comfy.taesd.taesd import TAESD
from safetensors.torch import load_file
from subject_patches.training.files import save_whole
from torch.nn import functional

from .data import batches, vocabulary
from .family import LATENT_CHANNELS, TEXT, UNET, WIDTH
from .labels import ROWS, SCORES, UNLABELLED, label_loss
from .optimisers import MuonAndAdamW
from .runs import Peers, Run, held_rate
from .train_autoencoder import to_signal

CAPTION_DROPOUT = 0.1
SNR_CAP = 5.0
LABEL_WEIGHT = 0.1
THING_WEIGHT = 4.0


def alphas_cumprod(device: torch.device) -> torch.Tensor:
    """Stable Diffusion's schedule: 1,000 betas, evenly spaced in their square root."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float().to(device)


def noise_weights(schedule: torch.Tensor) -> torch.Tensor:
    """How much an error of the predicted noise counts at each timestep: as v prediction's would, (SNR + 1) / SNR
    (Salimans and Ho 2022), times min(SNR, 5) / SNR (Hang et al. 2023)."""
    snr = schedule / (1 - schedule)
    return (snr + 1) / snr * snr.clamp(max=SNR_CAP) / snr


def noised(latents: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Latents (n, channels, h, w) with noise, of each row the share `alpha` (n) of the schedule."""
    alpha = alpha.view(-1, 1, 1, 1)
    return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise


class Model(torch.nn.Module):
    """The two trained parts under one roof, and a head that only training needs: it reads from the U-Net's second
    last block what fills each latent cell. The noise alone is slow to teach what a word's shape is."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = UNetModel(**UNET, operations=disable_weight_init)
        self.text = CLIPTextModel(TEXT, None, None, disable_weight_init)
        self.labels = torch.nn.Conv2d(WIDTH, SCORES, 1)
        self.features: list[torch.Tensor] = []
        self.unet.output_blocks[-2][-1].register_forward_hook(lambda layer, args, out: self.features.append(out))

    def forward(self, noisy: torch.Tensor, timestep: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The predicted noise, and the scores of what fills each latent cell (n, SCORES, 16, 16)."""
        self.features.clear()
        predicted = self.unet(noisy, timestep, context=encode_text(self.text.text_model, tokens))
        return predicted.float(), self.labels(self.features.pop()).float()


def initialise(model: Model) -> None:
    """Usual initial weights, since the host's layers are made without any: residual branches start at zero,
    and so do the embeddings of words that no caption uses, which keeps them compressible."""
    for layer in model.modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
            torch.nn.init.xavier_uniform_(layer.weight.view(layer.weight.shape[0], -1))
            if layer.bias is not None:
                torch.nn.init.zeros_(layer.bias)
        elif isinstance(layer, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            torch.nn.init.ones_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
        elif isinstance(layer, torch.nn.Embedding):
            torch.nn.init.zeros_(layer.weight)
    torch.nn.init.normal_(model.text.text_model.embeddings.position_embedding.weight, std=0.05)
    for name, layer in model.unet.named_modules():
        if name.endswith(("out_layers.3", "proj_out")) or name == "out.2":
            torch.nn.init.zeros_(layer.weight)


def inside(name: str) -> bool:
    """Whether a parameter is of the U-Net's blocks, and neither of its first layer nor of how it takes timesteps."""
    return name.startswith("unet.") and "_block" in name and not re.search("emb_layers|input_blocks[.]0[.]", name)


def initialise_words(model: Model, used: torch.Tensor) -> None:
    """Random embeddings for those of these token ids that have none yet."""
    table = model.text.text_model.embeddings.token_embedding.weight
    fresh = used[(table[used] == 0).all(1)]
    with torch.no_grad():
        table[fresh] = torch.randn(len(fresh), table.shape[1], device=table.device) * 0.5


def encode_text(text: CLIPTextModel_, tokens: torch.Tensor) -> torch.Tensor:
    """The host's CLIP text model on token ids (n, 77), giving (n, 77, width). Written with sums that make new
    tensors: the host's own forward adds in place, which autograd refuses."""
    x = text.embeddings(tokens)
    length = tokens.shape[1]
    mask = torch.full((length, length), -torch.finfo(x.dtype).max, dtype=x.dtype, device=x.device).triu(1)
    for layer in text.encoder.layers:
        x = x + layer.self_attn(layer.layer_norm1(x), mask, attention_pytorch)
        x = x + layer.mlp(layer.layer_norm2(x))
    return text.final_layer_norm(x)


class Latents:
    """A store of encoded scenes on the device: every batch adds fresh ones and trains on a random draw of all."""

    def __init__(self, autoencoder: TAESD, data: object, device: torch.device, capacity: int) -> None:
        self.autoencoder, self.data, self.device, self.capacity = autoencoder, data, device, capacity
        self.latents = torch.empty(capacity, LATENT_CHANNELS, 16, 16, dtype=torch.float16, device=device)
        self.tokens = torch.empty(capacity, TEXT["max_position_embeddings"], dtype=torch.int32, device=device)
        self.labels = torch.empty(capacity, ROWS, 16, 16, dtype=torch.uint8, device=device)
        self.written = 0

    @torch.no_grad()
    def add(self) -> None:
        """Encodes one more batch of pictures into the store."""
        images, tokens, labels = next(self.data)
        with torch.autocast(self.device.type, torch.bfloat16):
            latents = self.autoencoder.encode(to_signal(images, self.device))
        rows = (self.written + torch.arange(len(images), device=self.device)) % self.capacity
        self.latents[rows] = latents.to(self.latents.dtype)
        self.tokens[rows] = tokens.to(self.device, torch.int32)
        self.labels[rows] = labels.to(self.device)
        self.written += len(images)

    def draw(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = torch.randint(min(self.written, self.capacity), (count,), device=self.device)
        return self.latents[rows].float(), self.tokens[rows].long(), self.labels[rows].long()


def thing_weights(labels: torch.Tensor) -> torch.Tensor:
    """How much the noise of each latent cell counts (n, 1, 16, 16), 1 on average: THING_WEIGHT times as much in and
    right beside a thing, whose outline is the hardest to learn, as on the ground, which takes most of the picture."""
    things = (labels[:, :1] != UNLABELLED).float()
    weights = 1 + (THING_WEIGHT - 1) * functional.max_pool2d(things, 3, 1, 1)
    return weights / weights.mean()


def training_loss(
    model: Model, latents: torch.Tensor, tokens: torch.Tensor, labels: torch.Tensor, schedule: torch.Tensor
) -> torch.Tensor:
    """The label loss, times LABEL_WEIGHT, and the denoising loss on the predicted noise, weighted by `thing_weights`
    and by `noise_weights`.

    Flat grounds shine through the strongest noise: there the noise is predicted to half a percent without a look at
    the caption, and unweighted its error teaches next to nothing of words."""
    weights = noise_weights(schedule)
    timestep = torch.randint(len(schedule), (len(latents),), device=latents.device)
    noise = torch.randn_like(latents)
    noisy = noised(latents, noise, schedule[timestep])
    with torch.autocast(latents.device.type, torch.bfloat16):
        predicted, scores = model(noisy, timestep, tokens)
    error = (thing_weights(labels) * (predicted - noise) ** 2).mean((1, 2, 3))
    return ((weights[timestep] * error).mean() + LABEL_WEIGHT * label_loss(scores, labels)) / weights.mean()


def train(
    minutes: float, folder: Path, device: torch.device, peers: Peers, workers: int, batch: int, seed: int, resume: bool
) -> Path:
    """Trains for `minutes` and writes `folder/diffusion.safetensors`; gives its path.

    Encoding a picture costs about as much as a training step on it, so each step adds a twelfth of a batch of
    new pictures to the store and trains on a batch drawn from all of it.
    """
    torch.manual_seed(seed)
    autoencoder = TAESD(latent_channels=LATENT_CHANNELS).to(device)
    autoencoder.load_state_dict(load_file(folder / "autoencoder.safetensors"))
    autoencoder.requires_grad_(False)
    model = Model().to(device)
    initialise(model)
    empty = torch.full((1, TEXT["max_position_embeddings"]), TEXT["eos_token_id"], device=device)
    empty[0, 0] = TEXT["eos_token_id"] - 1
    path = folder / "diffusion.safetensors"
    if path.exists():
        # What a checkpoint brought, or an earlier run: weights to train on from, with a schedule of their own.
        model.load_state_dict(load_file(path), strict=False)
    initialise_words(model, vocabulary().to(device))
    file, rate = folder / "diffusion.state", 1e-3
    run = Run("diffusion", model, file, minutes, rate, peers, 300, 0.9995, MuonAndAdamW(model, rate, inside), held_rate)
    if resume:
        run.resume(device)
    # From here on every peer draws for itself.
    own = (seed * peers.count + peers.rank) * 2**20 + run.step
    torch.manual_seed(own)
    schedule = alphas_cumprod(device)
    drawn = max(batch // 12, 1)
    capacity = 2_000_000 if device.type == "cuda" else 100_000
    store = Latents(autoencoder, batches(drawn, workers, own, tokenize=True), device, capacity)
    # So many that the first steps do not rehearse a few.
    while store.written < 40 * batch:
        store.add()
    going = True
    while going:
        store.add()
        latents, tokens, labels = store.draw(batch)
        dropped = torch.rand(batch, device=device) < CAPTION_DROPOUT
        tokens = torch.where(dropped[:, None], empty, tokens)
        going = run.advance(training_loss(model, latents, tokens, labels, schedule), batch)
    if peers.rank == 0:
        trained = run.average.module.state_dict()
        save_whole(path, {name: trained[name] for name in trained if not name.startswith("labels.")})
        print(f"diffusion: {run.step} steps of {batch * peers.count}", flush=True)
    return path
