"""Images that show the same: copies, and copies that were compressed or scaled anew.

Two images count as one picture where their files are equal, or where their thumbnails of 8×8 grey values hardly
differ. Thumbnails with little contrast, as of textures and noise, all look alike and say nothing. Which thumbnails may
be so near is found by a k-d tree of their lowest cosine frequencies, as perceptual hashes use them (C. Zauner,
"Implementation and Benchmarking of Perceptual Image Hash Functions", 2010): a distance there is never above that of the
thumbnails.
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

MIN_CONTRAST = 8.0
"""Standard deviation of a thumbnail from which it tells pictures apart, grey levels."""

NEIGHBORS = 8
"""Images that each image is compared with at most: plain pictures are all alike."""

_CHANNELS = np.array([77, 150, 29], np.uint32)  # of 256: ITU-R BT.601, as Pillow's conversion to grey
_COSINES = dct(np.eye(SIDE), axis=0, norm="ortho")
_LOWEST = np.kron(_COSINES, _COSINES)[np.add.outer(range(SIDE), range(SIDE)).ravel() < 4].T  # (64, 10)


def cell_sums(images_u8: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """(n, size, size, 3) images, of 8×8 to 512×512 pixels, to (n, 8, 8, 3): sums of the pixels of each cell."""
    n, size = images_u8.shape[:2]
    rows = images_u8.reshape(n, size, size * 3)
    cell_of = np.arange(size) * SIDE // size
    bands = np.zeros((n, SIDE, size * 3), np.uint16)
    for row, cell in enumerate(cell_of):
        bands[:, cell] += rows[:, row]
    # A product of matrices adds columns ten times as fast as a sum; whole numbers below 2²⁴ are exact in float32.
    columns = np.kron(np.eye(SIDE)[cell_of], np.eye(3)).astype(np.float32)
    cells = bands.reshape(n * SIDE, size * 3).astype(np.float32) @ columns
    return cells.astype(np.uint32).reshape(n, SIDE, SIDE, 3)


def thumbnails(sums: NDArray[np.uint32], size: int) -> NDArray[np.uint8]:
    """(n, 8, 8, 3) sums of cells, of images of that size, to (n, 64) grey values."""
    pixels = np.bincount(np.arange(size) * SIDE // size)
    weights = np.outer(pixels, pixels) * int(_CHANNELS.sum())
    return ((sums @ _CHANNELS + weights // 2) // weights).astype(np.uint8).reshape(-1, SIDE * SIDE)


def near_duplicates(thumbnails_u8: NDArray[np.uint8], hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Pairs (P, 2) of positions of images that show the same, the smaller position first.

    Of several equal files or thumbnails, each is paired with the first one alone; of others, each is compared with
    those that are nearest.

    Args:
        thumbnails_u8: (N, 64)
        hashes: (N,) of the image files' bytes.
    """
    _, first_file, which_file = np.unique(hashes, return_index=True, return_inverse=True)
    later = np.setdiff1d(np.arange(len(hashes)), first_file)
    same_file = np.stack([first_file[which_file.reshape(-1)[later]], later], axis=1)
    # One of each file, where its thumbnail tells pictures apart.
    told_apart = np.sort(first_file[thumbnails_u8[first_file].std(axis=1) >= MIN_CONTRAST])
    if not len(told_apart):
        return same_file.astype(np.int64)
    different, first, which = np.unique(thumbnails_u8[told_apart], axis=0, return_index=True, return_inverse=True)
    later = np.setdiff1d(np.arange(len(told_apart)), first)
    equal = np.stack([first[which.reshape(-1)[later]], later], axis=1)
    values = different.astype(np.float64)
    radius = MAX_DIFFERENCE * SIDE
    frequencies = values @ _LOWEST
    _, nearest = KDTree(frequencies).query(frequencies, k=NEIGHBORS + 1, distance_upper_bound=radius, workers=-1)
    one, other = np.nonzero(nearest < len(values))[0], nearest[nearest < len(values)]
    near = np.unique(np.sort(np.stack([one, other], axis=1)[one != other], axis=1), axis=0)
    near = near[np.linalg.norm(values[near[:, 0]] - values[near[:, 1]], axis=1) <= radius]
    similar = np.concatenate([equal, np.sort(first[near], axis=1)])
    return np.concatenate([same_file, told_apart[similar]]).astype(np.int64)


def group_numbers(pairs: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """(count,) the same number for images that pairs connect."""
    edges = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    return connected_components(edges, directed=False)[1].astype(np.int64)
