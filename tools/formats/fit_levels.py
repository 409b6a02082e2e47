"""Fit the 16 levels of `accurate` to groups of 16 Gaussian values: Lloyd's algorithm with a free scale a group.

python -m tools.formats.fit_levels [--groups 40000] [--rounds 20] [--seed 0]

In turns, each group takes its best scale for the levels, of either sign, and each level becomes the value that is
best for the weights assigned to it. Only ratios matter: the largest magnitude is set to 127, and in the end all are
rounded. The optimum is flat, and every round gains less than the one before.
"""

import argparse

import numpy as np
from numpy.typing import NDArray

from quant.packed import GAUSS_16

Floats = NDArray[np.float32]

GROUP = 16
LARGEST = 127
# Where a group's largest value may stand. The fit must not depend on which few of them the encoder tries.
ANCHORS = [sign * size for size in range(84, 169, 6) for sign in (-1, 1)]
# To begin with: levels closer together in the middle, as for Gaussian values, and longer on the negative side. The
# sign that a scale has makes room for that: a group's largest value may always lie there.
FIRST_LEVELS = [LARGEST * (np.sinh(1.5 * u) / np.sinh(1.5)) for u in np.linspace(-1, 0.95, 16)]


def fit(groups: Floats, rounds: int) -> tuple[int, ...]:
    """Levels for values [groups, 16]."""
    levels = np.array(FIRST_LEVELS, np.float32)
    for _ in range(rounds):
        codes, scales = assign(groups, levels)
        weights = np.broadcast_to(scales[:, None], groups.shape)
        products = np.bincount(codes.ravel(), (groups * weights).ravel(), len(levels))
        means = products / np.bincount(codes.ravel(), (weights * weights).ravel(), len(levels))
        levels = (means * (LARGEST / np.abs(means).max())).astype(np.float32)
    return tuple(int(level) for level in np.rint(levels))


def assign(groups: Floats, levels: Floats) -> tuple[NDArray[np.int64], Floats]:
    """The code of each value [groups, 16] and the scale of each group [groups] with the least squared error."""
    midpoints = (levels[1:] + levels[:-1]) / 2
    peak = np.take_along_axis(groups, np.abs(groups).argmax(axis=1, keepdims=True), axis=1)
    scales, most = np.zeros(len(groups), np.float32), np.full(len(groups), -1, np.float32)
    for anchor in ANCHORS:
        scale, gain = _best_scale(groups, levels[np.searchsorted(midpoints, groups * (np.float32(anchor) / peak))])
        scales, most = np.where(gain > most, scale, scales), np.maximum(gain, most)
    codes = np.searchsorted(midpoints, groups / scales[:, None])
    return codes, _best_scale(groups, levels[codes])[0]


def _best_scale(groups: Floats, levels: Floats) -> tuple[Floats, Floats]:
    """[groups]: the scale that brings levels [groups, 16] nearest to the values; what Σ x² loses by it."""
    products, squares = (levels * groups).sum(axis=1), (levels * levels).sum(axis=1)
    return products / squares, products * products / squares


def relative_error(groups: Floats, levels: tuple[int, ...]) -> float:
    """Root of the mean squared error, over that of the values. The scales are not rounded."""
    table = np.array(levels, np.float32)
    codes, scales = assign(groups, table)
    return float(np.sqrt(np.mean((groups - table[codes] * scales[:, None]) ** 2) / np.mean(groups**2)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=40_000, help="Gaussian groups to fit to")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    groups, fresh = (rng.standard_normal((options.groups, GROUP), dtype=np.float32) for _ in range(2))
    for name, levels in (("fitted", fit(groups, options.rounds)), ("accurate", GAUSS_16)):
        print(f"{name}: relative error {relative_error(fresh, levels):.5f} with {', '.join(map(str, levels))}")


if __name__ == "__main__":
    main()
