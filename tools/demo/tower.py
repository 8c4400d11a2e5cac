"""Stage one: the vision tower learns what lies under each patch, from dense labels.

Linear heads read the features LLaVA will use (`hidden_states[-2]`): digit, colour, ink and place per
patch; digits and colours present from CLS, so that CLS attention looks at digits. The heads are thrown away.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from secateur.tools.demo.architecture import GRID, PIXEL_MEAN, PIXEL_STD
from secateur.tools.demo.corpus import Corpus
from secateur.tools.demo.language import COLOURS, DIGITS


def normalise_pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B, 112, 112, 3] to what the processor hands the model, float32 [B, 3, 112, 112]."""
    mean, std = torch.tensor(PIXEL_MEAN), torch.tensor(PIXEL_STD)
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def encode_patches(tower: Any, pixels: torch.Tensor) -> torch.Tensor:
    """`hidden_states[-2]` of a CLIP tower, CLS first, float [B, 197, D], without running the last layer."""
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    for layer in tower.encoder.layers[:-1]:
        hidden = layer(hidden, None)
    return hidden


def seed_local_attention(tower: Any, sharpness: float = 2.5) -> None:
    """Starts the tower's heads looking at neighbouring patches (the idea of ConViT, arXiv:2103.10697).

    Positions enter as sines and cosines of row and column; a head whose query projection is the key
    projection turned by an offset then attends around that offset. All of it goes on learning.
    """
    frequencies = torch.arange(1, 9) * math.pi / GRID
    weights = torch.exp(-((frequencies * 0.7) ** 2) / 2)
    weights = weights / weights.sum()
    place = torch.arange(GRID * GRID)
    angles = torch.cat([axis[:, None] * frequencies for axis in (place // GRID, place % GRID)], 1)  # [196, 16]
    waves = torch.stack([angles.sin(), angles.cos()], 2).reshape(-1, 32)
    offsets = (
        ((-1, 0), (1, 0), (0, -1), (0, 1)),
        ((-1, -1), (-1, 1), (1, -1), (1, 1)),
        ((-1.5, 0), (1.5, 0), (0, -1.5), (0, 1.5)),
        ((-1, -1), (-1, 1), (1, -1), (1, 1)),
    )
    with torch.no_grad():
        embeddings = tower.embeddings
        embeddings.patch_embedding.weight.normal_(std=0.06)
        embeddings.patch_embedding.weight[:32] = 0
        embeddings.position_embedding.weight.normal_(std=0.02)
        embeddings.position_embedding.weight[1:, :32] = 0.5 * waves
        for layer, shifts in zip(tower.encoder.layers, offsets, strict=False):
            attention = layer.self_attn
            scale = (sharpness * weights.repeat(2) * math.sqrt(32)).sqrt()  # per row/column frequency
            for head, (down, right) in enumerate(shifts):
                rows = slice(32 * head, 32 * head + 32)
                turn = torch.cat([frequencies * down, frequencies * right])
                rotation = torch.zeros(32, 32)
                for j in range(16):
                    cosine, sine = turn[j].cos(), turn[j].sin()
                    rotation[2 * j : 2 * j + 2, 2 * j : 2 * j + 2] = scale[j] * torch.tensor(
                        [[cosine, sine], [-sine, cosine]]
                    )
                attention.k_proj.weight[rows, :32] = torch.diag(scale.repeat_interleave(2))
                attention.q_proj.weight[rows, :32] = rotation
            attention.v_proj.weight.normal_(std=0.07)
            attention.out_proj.weight.normal_(std=0.05)


def bend_pixels(pixels: torch.Tensor, generator: torch.Generator, strength: float = 1.6) -> torch.Tensor:
    """Elastic distortion (Simard et al. 2003) of [B, 3, H, W] by about `strength` pixels, so that the tower learns
    shapes and not the few hundred handwritten originals. Too little to move a digit off its patches."""
    count, _, height, width = pixels.shape
    field = torch.randn(count, 2, 8, 8, generator=generator) * strength
    field = F.interpolate(field, (height, width), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    grid = torch.stack([x, y], -1) + field * (2 / width)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="reflection", align_corners=True)


class PatchHeads(nn.Module):
    """Linear read-outs of the patch features and of CLS, used in training only."""

    def __init__(self, width: int):
        super().__init__()
        self.patch = nn.Linear(width, len(DIGITS) + len(COLOURS) + 3)  # digit, colour, ink, row, column
        self.whole = nn.Linear(width, len(DIGITS) + len(COLOURS) + 6)  # digits, colours, number of digits


def split_patch_logits(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[..., 19] to digit [..., 10], colour [..., 6], ink [...], place [..., 2]."""
    digit, colour, ink, place = logits.split([len(DIGITS), len(COLOURS), 1, 2], -1)
    return digit, colour, ink.squeeze(-1), place


def measure_tower_loss(
    tower: Any, heads: PatchHeads, corpus: Corpus, rows: Any, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, dict[str, float]]:
    """Loss and read-out accuracies on the scenes `rows` of a corpus, distorted where a generator is given."""
    pixels = normalise_pixels(torch.from_numpy(corpus.images[rows]))
    if generator is not None:
        pixels = bend_pixels(pixels, generator)
    features = encode_patches(tower, pixels)
    digit, colour, ink, place = split_patch_logits(heads.patch(features[:, 1:]))
    digits, colours = (torch.from_numpy(labels[rows]).long() for labels in (corpus.digit, corpus.colour))
    under = digits >= 0
    grid = torch.arange(GRID * GRID)
    target_place = torch.stack([grid // GRID, grid % GRID], -1) / (GRID / 2) - 1
    losses = {
        "digit": F.cross_entropy(digit[under], digits[under]),
        "colour": F.cross_entropy(colour[under], colours[under]),
        "ink": F.binary_cross_entropy_with_logits(ink, under.float()),
        "place": F.mse_loss(place, target_place.expand_as(place)),
    }
    whole = heads.whole(features[:, 0])
    owners = torch.from_numpy(corpus.owner[rows]).long()
    present = torch.zeros(len(owners), len(DIGITS) + len(COLOURS))
    present.scatter_add_(1, digits.clamp(min=0), under.float())
    present.scatter_add_(1, colours.clamp(min=0) + len(DIGITS), under.float())
    losses["present"] = F.binary_cross_entropy_with_logits(whole[:, :16], (present > 0).float())
    losses["number"] = F.cross_entropy(whole[:, 16:], owners.max(1).values)
    loss = losses["digit"] + losses["colour"] + losses["ink"] + losses["place"]
    loss = loss + 0.5 * losses["present"] + 0.1 * losses["number"]
    with torch.no_grad():
        figures = {name: round(float(value), 4) for name, value in losses.items()}
        figures["patch_digit"] = float((digit.argmax(-1) == digits)[under].float().mean())
        figures["patch_colour"] = float((colour.argmax(-1) == colours)[under].float().mean())
        figures["patch_ink"] = float(((ink > 0) == under).float().mean())
        votes = torch.zeros(len(owners), 6, len(DIGITS))
        weighed = digit.log_softmax(-1) * under[..., None]
        votes.scatter_add_(1, owners.clamp(min=0)[..., None].expand(-1, -1, len(DIGITS)), weighed)
        truth = torch.full((len(owners), 6), -1).scatter_reduce(1, owners.clamp(min=0), digits, "amax")
        known = truth >= 0
        figures["object_digit"] = float((votes.argmax(-1) == truth)[known].float().mean())
    return loss, figures
