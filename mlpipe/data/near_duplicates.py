"""Images that show the same: copies, and copies that were compressed or scaled anew.

Two images count as one picture where their thumbnails of 8×8 grey values hardly differ. Which thumbnails may be so near
is found by a k-d tree of their lowest cosine frequencies, as perceptual hashes use them (C. Zauner, "Implementation and
Benchmarking of Perceptual Image Hash Functions", 2010): a distance there is never above that of the thumbnails.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.fft import dct
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import KDTree

SIDE = 8
"""Height and width of a thumbnail."""
MAX_DIFFERENCE = 2.0
"""Root mean square of the difference of two thumbnails up to which they show the same, of 255 grey levels."""

_CHANNELS = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as Pillow's conversion to grey
_COSINES = dct(np.eye(SIDE), axis=0, norm="ortho")
_LOWEST = np.kron(_COSINES, _COSINES)[np.add.outer(range(SIDE), range(SIDE)).ravel() < 4].T  # (64, 10)


def thumbnails(images_u8: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(n, size, size, 3) images, of at least 8×8 pixels, to (n, 64) grey values."""
    n, size = images_u8.shape[:2]
    edges = np.arange(SIDE) * size // SIDE
    pixels = np.diff(edges, append=size)
    rows = np.add.reduceat(images_u8.reshape(n, size, size * 3), edges, axis=1, dtype=np.uint32)
    grey = rows.reshape(n, SIDE, size, 3) @ _CHANNELS
    cells = np.add.reduceat(grey, edges, axis=2) / np.outer(pixels, pixels)
    return np.rint(cells).astype(np.uint8).reshape(n, SIDE * SIDE)


def near_duplicates(thumbnails_u8: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Pairs (P, 2) of positions of images that show the same, the smaller position first.

    Of several equal thumbnails (N, 64), each is paired with the first one alone.
    """
    different, first, which = np.unique(thumbnails_u8, axis=0, return_index=True, return_inverse=True)
    which = which.reshape(-1)
    later = np.setdiff1d(np.arange(len(which)), first)
    equal = np.stack([first[which[later]], later], axis=1)
    values = different.astype(np.float64)
    radius = MAX_DIFFERENCE * SIDE
    near = KDTree(values @ _LOWEST).query_pairs(radius, output_type="ndarray")
    near = near[np.linalg.norm(values[near[:, 0]] - values[near[:, 1]], axis=1) <= radius]
    return np.concatenate([equal, np.sort(first[near], axis=1)]).astype(np.int64)


def group_numbers(pairs: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """(count,) the same number for images that pairs connect."""
    edges = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    return connected_components(edges, directed=False)[1].astype(np.int64)
