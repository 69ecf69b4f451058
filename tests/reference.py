"""Slow float64 re-implementations, written from the papers' equations alone, with loops where the code has tensors.

Nothing of rbkit is imported here: a mistake would have to be made twice to pass.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Gradient = Callable[[Array], Array]


def philox4x32(counter: Sequence[int], key: Sequence[int], rounds: int = 10) -> tuple[int, ...]:
    """Salmon et al. 2011, section 3.3: one counter, in Python integers."""
    c, k = list(counter), list(key)
    for turn in range(rounds):
        if turn:
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
    return tuple(c)


def linear_optimum(weight: Array, margin: float, eps: float, norm: str) -> float:
    """The largest margin w.x that a perturbation of size eps can reach: margin + eps times the dual norm of w."""
    dual = np.sqrt((weight**2).sum()) if norm == "l2" else np.abs(weight).sum()
    return float(margin + eps * dual)


def sign_or_unit(gradient: Array, norm: str) -> Array:
    """Steepest ascent direction (Madry et al. 2018): g / |g|_2, or sign(g)."""
    if norm == "linf":
        return np.sign(gradient)
    size = math.sqrt(float((gradient**2).sum()))
    return gradient / size if size else gradient


def onto_ball(delta: Array, eps: float, norm: str) -> Array:
    """Euclidean projection onto the ball."""
    if norm == "linf":
        return np.clip(delta, -eps, eps)
    size = math.sqrt(float((delta**2).sum()))
    return delta * (eps / size) if size > eps else delta


def pgd(image: Array, gradient: Gradient, *, norm: str, eps: float, step: float, steps: int) -> list[Array]:
    """The iterates of Madry et al. 2018, equation 2.1 (x_0 first), of one image."""
    iterates = [image.copy()]
    for _ in range(steps):
        moved = iterates[-1] + step * sign_or_unit(gradient(iterates[-1]), norm)
        iterates.append(np.clip(image + onto_ball(moved - image, eps, norm), 0, 1))
    return iterates


def integrated_gradients(image: Array, base: Array, gradient: Gradient, steps: int) -> Array:
    """Sundararajan et al. 2017, equation 1, by the trapezoid rule with `steps` intervals."""
    total = np.zeros_like(image)
    for i in range(steps + 1):
        weight = (0.5 if i in (0, steps) else 1.0) / steps
        total += weight * gradient(base + i / steps * (image - base))
    return total * (image - base)


def crop_flip(image: Array, *, top: int, left: int, mirrored: bool, pad: int) -> Array:
    """The window at (top, left) of the zero-padded image (C, H, W), pixel by pixel, then mirrored."""
    channels, height, width = image.shape
    out = np.zeros_like(image)
    for c in range(channels):
        for y in range(height):
            for x in range(width):
                row, column = y + top - pad, (width - 1 - x if mirrored else x) + left - pad
                if 0 <= row < height and 0 <= column < width:
                    out[c, y, x] = image[c, row, column]
    return out


def gini(values: Sequence[float]) -> float:
    """Hurley and Rickard 2009: half the mean absolute difference over the mean."""
    n, mean = len(values), sum(map(abs, values)) / len(values)
    return sum(abs(abs(a) - abs(b)) for a in values for b in values) / (2 * n * n * mean)


def entropy(values: Sequence[float]) -> float:
    """Bhatt et al. 2020, equation 4: of the shares of absolute relevance, in nats."""
    total = sum(map(abs, values))
    return -sum(abs(v) / total * math.log(abs(v) / total) for v in values if v)


def ssim(first: Array, second: Array, *, size: int) -> float:
    """Wang et al. 2004, section III.B, of images (C, H, W) in [0, 1]: window by window, mean of windows and channels."""
    half = (size - 1) / 2
    window = np.array(
        [[math.exp(-((y - half) ** 2 + (x - half) ** 2) / (2 * 1.5**2)) for x in range(size)] for y in range(size)]
    )
    window /= window.sum()
    found = []
    for a, b in zip(first, second, strict=True):
        for y in range(a.shape[0] - size + 1):
            for x in range(a.shape[1] - size + 1):
                p, q = a[y : y + size, x : x + size], b[y : y + size, x : x + size]
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                cov = (window * (p - mp) * (q - mq)).sum()
                above = (2 * mp * mq + 1e-4) * (2 * cov + 9e-4)
                found.append(above / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    return float(np.mean(found))


def wilson(successes: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson 1927: the shares p at distance z standard errors from the one observed."""
    p = successes / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return middle - half, middle + half


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value: twice the tail of Binomial(n, 1/2), at most 1."""
    n, k = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def log_softmax(logits: Array) -> Array:
    """Of one row, by log-sum-exp."""
    top = logits.max()
    return logits - top - math.log(np.exp(logits - top).sum())


def trades(clean: Array, moved: Array, labels: Sequence[int], beta: float) -> float:
    """Zhang et al. 2019, equation 5: mean of CE(f(x), y) + beta KL(f(x) || f(x')), from logits (N, K)."""
    total = 0.0
    for row, other, label in zip(clean, moved, labels, strict=True):
        p, q = log_softmax(row), log_softmax(other)
        total += -p[label] + beta * float((np.exp(p) * (p - q)).sum())
    return total / len(clean)


def area(curve: Sequence[float]) -> float:
    """Mean height by the trapezoid rule on an even grid."""
    return sum((a + b) / 2 for a, b in itertools.pairwise(curve)) / (len(curve) - 1)


def relevance_rank(values: Sequence[float], inside: Sequence[bool]) -> float:
    """Arras et al. 2022, equation 4, averaged over ways of breaking ties: each tied location is taken equally often."""
    k = sum(inside)
    bar = sorted(values, reverse=True)[k - 1]
    above = [i for i, v in enumerate(values) if v > bar]
    tied = [i for i, v in enumerate(values) if v == bar]
    hits = sum(inside[i] for i in above) + (k - len(above)) * sum(inside[i] for i in tied) / len(tied)
    return hits / k
