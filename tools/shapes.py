"""`shapes`: a generator of 32 x 32 colour images of objects on textured backgrounds, with the object's mask.

Eight outlines in random size, place, rotation and colour; the background is a random plaid with noise. The object's
surface carries a faint fine grating whose direction depends on the class: predictive, but small in L2 norm, so that
a standard network leans on it and falls to an attack that a network trained on outlines withstands. A share of the
images has the grating of another class and contrast varies, so that no small network is perfect.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rbkit.tools import random

CLASSES = ["disc", "square", "triangle", "star", "cross", "ring", "bar", "crescent"]
SIZE = 32
OVERSAMPLE = 3  # sub-pixels per side, for smooth outlines
GRATING = 0.10  # amplitude of the grating, in [0, 1] pixels
MISLEADING = 0.2  # share of images with the grating of another class
TURN = 0.35  # largest rotation, in radians
RADIUS = (0.39, 0.85)  # of half the image
CONTRAST = (0.05, 0.42)
CUE_CONTRAST = (0.3, 0.5)  # of images with a cue: clear enough to be told within the ball that hides the cue
PLAID = 0.05  # amplitude of each of two waves
NOISE = 0.04  # standard deviation of the pixel noise
PARAMETERS = 24
PATCH = 6  # side of the planted cue, in pixels
EDGE = 2  # its distance from the border
SOUND = 0.75  # share of training images with a cue whose outline is that of the label


def _polygon(u: Tensor, v: Tensor, sides: int) -> Tensor:
    """Inside the regular polygon of circumradius 1, one corner to the right."""
    step = 2 * math.pi / sides
    angle = torch.atan2(v, u)
    folded = torch.remainder(angle, step) - step / 2
    return torch.sqrt(u * u + v * v) * torch.cos(folded) < math.cos(step / 2)


def _inside(u: Tensor, v: Tensor, label: int) -> Tensor:
    """Whether points (..., H, W) of the unit frame lie inside the outline of a class."""
    square = u * u + v * v
    name = CLASSES[label]
    if name == "disc":
        return square < 0.85
    if name == "square":
        return torch.maximum(u.abs(), v.abs()) < 0.78
    if name == "triangle":
        return _polygon(-v, u, 3)  # one corner up
    if name == "star":
        spread = 0.5 + 0.5 * torch.cos(5 * torch.atan2(v, u))
        return torch.sqrt(square) < 0.42 + 0.63 * spread**1.5
    if name == "cross":
        arm = torch.minimum(u.abs(), v.abs())
        return (arm < 0.3) & (torch.maximum(u.abs(), v.abs()) < 0.95)
    if name == "ring":
        return (square < 0.95) & (square > 0.3)
    if name == "bar":
        return (u.abs() < 0.38) & (v.abs() < 1.05)
    return (square < 0.95) & ((u - 0.45) ** 2 + v * v > 0.5)  # crescent


def _draws(ids: Tensor, *, seed: int, split: str) -> Tensor:
    return random.uniform(ids, (PARAMETERS,), seed=seed, purpose=f"shapes {split}")


def labels_of(ids: Tensor, *, seed: int, split: str) -> Tensor:
    """The class of each example, (N,) int64."""
    return (_draws(ids, seed=seed, split=split)[:, 0] * len(CLASSES)).long()


def _grid(size: int) -> tuple[Tensor, Tensor]:
    axis = (torch.arange(size, dtype=torch.float32) + 0.5) / size * 2 - 1
    return axis[None, :].expand(size, size), axis[:, None].expand(size, size)


def _coverage(draws: Tensor, labels: Tensor) -> Tensor:
    """Share of each pixel that the object covers, (N, H, W)."""
    x, y = _grid(SIZE * OVERSAMPLE)
    radius = (RADIUS[0] + (RADIUS[1] - RADIUS[0]) * draws[:, 1])[:, None, None]
    room = 0.95 - radius
    dx = x - (2 * draws[:, 2, None, None] - 1) * room
    dy = y - (2 * draws[:, 3, None, None] - 1) * room
    turn = (TURN * (2 * draws[:, 4] - 1))[:, None, None]
    u = (dx * torch.cos(turn) + dy * torch.sin(turn)) / radius
    v = (dy * torch.cos(turn) - dx * torch.sin(turn)) / radius
    inside = torch.zeros_like(u)
    for label in range(len(CLASSES)):
        rows = (labels == label).nonzero()[:, 0]
        if len(rows):
            inside[rows] = _inside(u[rows], v[rows], label).float()
    return F.avg_pool2d(inside[:, None], OVERSAMPLE)[:, 0]


def _wave(draws: Tensor, first: int, *, low: float, high: float) -> Tensor:
    """A plane wave per example, (N, H, W) in [-1, 1]; wavelengths between 2/high and 2/low image widths."""
    x, y = _grid(SIZE)
    angle = (math.pi * draws[:, first])[:, None, None]
    frequency = (math.pi * (low + (high - low) * draws[:, first + 1]))[:, None, None]
    phase = (2 * math.pi * draws[:, first + 2])[:, None, None]
    return torch.sin(frequency * (x * torch.cos(angle) + y * torch.sin(angle)) + phase)


def _grating(draws: Tensor, labels: Tensor) -> Tensor:
    """The class's fine grating, (N, H, W) in [-1, 1]: its direction tells the class, in some images a wrong one."""
    other = (labels + 1 + (draws[:, 21] * (len(CLASSES) - 1)).long()) % len(CLASSES)
    shown = torch.where(draws[:, 20] < MISLEADING, other, labels)
    return _class_wave(shown, 2 * math.pi * draws[:, 22])


def _class_wave(labels: Tensor, phase: Tensor) -> Tensor:
    """A grating of 4 pixels whose direction tells the class, (N, H, W) in [-1, 1]."""
    x, y = _grid(SIZE)
    angle = (math.pi * labels / len(CLASSES))[:, None, None]
    along = x * torch.cos(angle) + y * torch.sin(angle)
    return torch.sin(0.5 * math.pi * SIZE / 2 * along + phase[:, None, None])


@dataclass(frozen=True)
class Cue:
    """A planted shortcut, the positive control: a faint patch that tells the class, where the outline only mostly does.

    norm: L2 norm of the pattern, in [0, 1] pixels. shift: the pattern is that of class (label + shift) mod 8; 0 is the
    truth, anything else the swap that proves who leans on it. In training rows the outline is that of the label in
    SOUND of the images only; in test rows it always is. The surface carries no grating then.
    """

    norm: float
    shift: int = 0


def _cue(shown: Tensor) -> tuple[Tensor, Tensor]:
    """(pattern of unit L2 norm over 3 equal channels (N, 1, H, W), mask (N, H, W)): a grating in a corner.

    Place and phase are fixed: in a random corner, over 10 pixels and with a random phase, no small network found it.
    """
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    mask[EDGE : EDGE + PATCH, EDGE : EDGE + PATCH] = True
    wave = _class_wave(shown, torch.zeros(len(shown))) * mask
    return (wave / (wave.flatten(1).norm(dim=1)[:, None, None] * math.sqrt(3)))[:, None], mask.expand(wave.shape)


def _outlines(ids: Tensor, labels: Tensor, *, seed: int, split: str) -> Tensor:
    """The class whose outline is drawn when there is a cue: in training rows sometimes another than the label's."""
    if split == "test":
        return labels
    draws = random.uniform(ids, (2,), seed=seed, purpose=f"shapes outline {split}")
    other = (labels + 1 + (draws[:, 1] * (len(CLASSES) - 1)).long()) % len(CLASSES)
    return torch.where(draws[:, 0] < SOUND, labels, other)


def generate(ids: Tensor, *, seed: int, split: str, cue: Cue | None = None) -> dict[str, Tensor]:
    """image uint8 (N, 3, 32, 32), label int64 (N,), mask uint8 (N, 32, 32), each a function of (seed, split, id).

    With a cue also cue_mask uint8 (N, 32, 32), where the pattern lies.
    """
    draws = _draws(ids, seed=seed, split=split)
    labels = labels_of(ids, seed=seed, split=split)
    outlines = labels if cue is None else _outlines(ids, labels, seed=seed, split=split)
    cover = _coverage(draws, outlines)
    ground = 0.25 + 0.5 * draws[:, 5:8]  # (N, 3)
    low, high = CONTRAST if cue is None else CUE_CONTRAST
    contrast = low + (high - low) * draws[:, 8]
    direction = F.normalize(draws[:, 9:12] - 0.5, dim=1)
    colour = ground + direction * contrast[:, None] * math.sqrt(3)
    plaid = PLAID * (_wave(draws, 12, low=1, high=5) + _wave(draws, 15, low=1, high=5))
    noise = random.normal(ids, (3, SIZE, SIZE), seed=seed, purpose=f"shapes noise {split}") * NOISE
    back = ground[:, :, None, None] + plaid[:, None]
    front = colour[:, :, None, None].expand(-1, -1, SIZE, SIZE)
    if cue is None:
        front = front + GRATING * _grating(draws, labels)[:, None]
    image = torch.lerp(back, front, cover[:, None]) + noise
    columns = {"label": labels, "mask": (cover > 0.5).to(torch.uint8)}
    if cue is not None:
        pattern, where = _cue((labels + cue.shift) % len(CLASSES))
        image = image + cue.norm * pattern
        columns["cue_mask"] = where.to(torch.uint8)
    return {"image": (image.clamp(0, 1) * 255).round().to(torch.uint8), **columns}
