"""Shapley values of blocks of pixels (Shapley 1953; Lundberg and Lee 2017): exact, or over permutations.

The players are the blocks of a grid. A coalition's value is the output of the image on which all other blocks take what
the masker says; of the masker `data`, the mean over background images. The values of the blocks add up to the output of
the image minus that of the image that is all hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rbkit.tools import random
from rbkit.tools.attribution import Explained, Saliency, output_of, values
from rbkit.tools.masking import filler, masked_values
from rbkit.tools.models import Evaluation

SIDE = 8  # blocks per side over permutations, and
EXACT_SIDE = 3  # for exact values, unless told
EXACT_PLAYERS = 12  # at most: 4,096 coalitions
AHEAD = 16  # blocks of images that permutations are gathered for, at least one permutation per image


def grid(spec: Saliency, height: int, width: int, *, default: int) -> Tensor:
    """The player of each pixel, int64 (H, W), from 0 in reading order; blocks differ by at most a pixel a side.

    Raises: ValueError for more blocks than pixels along a side.
    """
    down = min(default, height) if spec.players is None else spec.players
    across = min(default, width) if spec.players is None else spec.players_across or spec.players
    if not (1 <= down <= height and 1 <= across <= width):
        raise ValueError(f"{down} x {across} players: expected at most one per pixel, {height} x {width}")
    y, x = torch.arange(height) * down // height, torch.arange(width) * across // width
    return y[:, None] * across + x


def _explained(phi: Tensor, players: Tensor, channels: int, target: Tensor, change: Tensor) -> Explained:
    """Values (N, P) of the players, each shared evenly by the pixels and channels of its block."""
    size = torch.bincount(players.flatten(), minlength=phi.shape[1]) * channels
    maps = (phi / size).float()[:, players]
    attribution = maps[:, None].repeat(1, channels, 1, 1)
    error = (attribution.flatten(1).double().sum(1) - change).abs()
    return Explained(attribution, target, error, change)


def _weights(players: int, device: torch.device) -> Tensor:
    """Factors of the values of all coalitions (2**P, P): Lundberg and Lee 2017, eq. 4; bit i of a row is player i."""
    coalitions = torch.arange(2**players, device=device)
    inside = (coalitions[:, None] >> torch.arange(players, device=device)) & 1 == 1
    size = inside.sum(1, keepdim=True)
    share = torch.tensor(
        [1 / (players * math.comb(players - 1, others)) for others in range(players)],
        dtype=torch.float64,
        device=device,
    )
    gains, losses = share[(size - 1).clamp_min(0)], share[size.clamp_max(players - 1)]
    return torch.where(inside, gains, -losses)


def _background(background: Tensor | None) -> Tensor:
    if background is None or not len(background):
        raise ValueError("masker data needs background images; try --background FILE")
    return background


def exact_shap(
    evaluation: Evaluation,
    images: Tensor,
    target: Tensor,
    spec: Saliency,
    *,
    background: Tensor | None = None,
    **unused: Tensor | None,
) -> Explained:
    """Shapley values from all coalitions of at most 12 players (Lundberg and Lee 2017, eq. 4).

    Raises: ValueError for more players, or for the masker data without background.
    """
    players = grid(spec, *images.shape[2:], default=EXACT_SIDE).to(images.device)
    count = int(players.max()) + 1
    if count > EXACT_PLAYERS:
        raise ValueError(
            f"{count} players have 2**{count} coalitions, expected at most {EXACT_PLAYERS} players; "
            "try --players 3 or --method permutation-shap"
        )

    def keep(rows: Tensor, numbers: Tensor) -> Tensor:
        return (numbers[:, None, None] >> players) & 1 == 1

    def worth_against(hidden: Tensor) -> Tensor:
        return masked_values(
            evaluation, images, target, spec.output, masks=2**count, keep=keep,
            fill=lambda rows, _: hidden.index_select(0, rows),
        )  # fmt: skip

    if spec.masker == "data":
        shown = _background(background)
        worth = torch.zeros(len(images), 2**count, dtype=torch.float64, device=images.device)
        for one in shown:
            worth += worth_against(one.expand_as(images)) / len(shown)
    else:
        worth = worth_against(filler(spec.masker, evaluation, images))
    weights = _weights(count, images.device)
    phi = torch.stack([(worth * weights[:, player]).sum(1) for player in range(count)], 1)
    return _explained(phi, players, images.shape[1], target, worth[:, -1] - worth[:, 0])


def orders(ids: Tensor, draws: Tensor, players: int, *, seed: int) -> Tensor:
    """A permutation of the players for each id and draw, int64 (M, P), a function of (seed, id, draw)."""
    bits = random.words(ids, 2 * players, seed=seed, purpose="permutation", draw=draws)
    return torch.argsort((bits[:, :players] << 31) | (bits[:, players:] >> 1), dim=1, stable=True)


@dataclass(frozen=True)
class _Game:
    """Images, the player of each of their pixels, and what stands for hidden ones.

    hidden: per image (N, C, H, W), or for the masker data background images (B, C, H, W), of which each draw takes one.
    nothing: what `hidden` is worth to each image, (N, 1) or (N, B); clear: what the images are, (N,).
    """

    evaluation: Evaluation
    images: Tensor
    target: Tensor
    spec: Saliency
    ids: Tensor
    players: Tensor
    hidden: Tensor
    nothing: Tensor
    clear: Tensor

    @property
    def count(self) -> int:
        """The number of players."""
        return int(self.players.max()) + 1

    @property
    def looks(self) -> int:
        """Images that a permutation and its reverse need besides the ends, which all walks of an image share."""
        return 2 * (self.count - 1)

    def walks(self, first: int, draws: int) -> Tensor:
        """What each player adds, mean of a permutation and its reverse, float64 (N, draws, P + 1).

        The last entry is the value of the image all hidden. Coalitions of the reverse are the complements of those of
        the permutation.
        """
        rows = torch.arange(len(self.images), device=self.images.device).repeat_interleave(draws)
        numbers = torch.arange(first, first + draws, device=self.images.device).repeat(len(self.images))
        rank = orders(self.ids[rows], numbers, self.count, seed=self.spec.seed).argsort(1)
        chosen = self._background_of(self.ids[rows], numbers)

        def keep(row: Tensor, number: Tensor) -> Tensor:
            step, walk = number % self.looks, row * draws + number // self.looks
            early = rank[walk] < (step // 2 + 1)[:, None]
            return (early ^ (step % 2 == 1)[:, None])[:, self.players]

        def fill(row: Tensor, number: Tensor) -> Tensor:
            source = row if chosen is None else chosen[row * draws + number // self.looks]
            return self.hidden.index_select(0, source)

        seen = masked_values(
            self.evaluation, self.images, self.target, self.spec.output, masks=draws * self.looks, keep=keep, fill=fill
        ).reshape(len(rows), self.count - 1, 2)
        nothing = self.nothing[rows, torch.zeros_like(rows) if chosen is None else chosen][:, None]
        whole = (self.clear[rows][:, None] - nothing) / 2
        # Half of coalition minus complement: from nothing - all to all - nothing; a step of it is a player's mean gain.
        halves = torch.cat([-whole, (seen[..., 0] - seen[..., 1]) / 2, whole], 1)
        gains = halves.diff(dim=1).gather(1, rank)
        return torch.cat([gains, nothing], 1).reshape(len(self.images), draws, self.count + 1)

    def _background_of(self, ids: Tensor, draws: Tensor) -> Tensor | None:
        if self.spec.masker != "data":
            return None
        return random.integers(ids, len(self.hidden), seed=self.spec.seed, purpose="shapley background", draw=draws)


def _hidden(
    evaluation: Evaluation, images: Tensor, target: Tensor, spec: Saliency, background: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`hidden` and `nothing` of a game."""
    if spec.masker != "data":
        hidden = filler(spec.masker, evaluation, images)
        return hidden, values(evaluation, hidden, target, spec.output)[:, None]
    hidden = _background(background)
    logits = evaluation.logits(hidden)
    nothing = torch.empty(len(images), len(hidden), dtype=torch.float64, device=images.device)
    for row, goal in enumerate(target):
        nothing[row] = output_of(logits, goal.expand(len(hidden)), spec.output).double()
    return hidden, nothing


def _moments(game: _Game) -> tuple[Tensor, Tensor]:
    """Mean over the draws and squares of the distances from it, both (N, P + 1).

    Draws are added one by one (Welford 1962), so that it does not matter how many are walked together.
    """
    samples, n = game.spec.samples, len(game.images)
    mean = torch.zeros(n, game.count + 1, dtype=torch.float64, device=game.images.device)
    square = torch.zeros_like(mean)
    together = max(1, AHEAD * game.evaluation.block // max(1, n * game.looks))
    for first in range(0, samples, together):
        for draw, found in enumerate(game.walks(first, min(together, samples - first)).unbind(1), start=first + 1):
            off = found - mean
            mean += off / draw
            square += off * (found - mean)
    return mean, square


def permutation_shap(
    evaluation: Evaluation,
    images: Tensor,
    target: Tensor,
    spec: Saliency,
    *,
    ids: Tensor,
    background: Tensor | None = None,
) -> Explained:
    """Shapley values by permutations (Castro et al. 2009), each walked both ways (Mitchell et al. 2022).

    `samples` draws of a permutation, and for the masker data of a background image, keyed by (seed, id, draw). Values
    add up to the change of the output from what was drawn, exactly. Stores their standard errors over the draws, from
    two draws on, and for data that of their sum. Raises: ValueError for the masker data without background.
    """
    players = grid(spec, *images.shape[2:], default=SIDE).to(images.device)
    clear = values(evaluation, images, target, spec.output)
    hidden, nothing = _hidden(evaluation, images, target, spec, background)
    game = _Game(evaluation, images, target, spec, ids, players, hidden, nothing, clear)
    mean, square = _moments(game)
    found = _explained(mean[:, :-1], players, images.shape[1], target, clear - mean[:, -1])
    if spec.samples > 1:
        error = (square / (spec.samples * (spec.samples - 1))).sqrt()
        found.block_standard_error = error[:, :-1].unflatten(1, (-1, int(players[0, -1]) + 1))
        found.standard_error = error[:, -1] if spec.masker == "data" else None
    return found
