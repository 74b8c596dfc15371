from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from mlpipe.data.archives.decode import resize_pixels
from mlpipe.data.imageset import content_hash
from mlpipe.data.near_duplicates import cell_sums, group_numbers, near_duplicates, thumbnails


def picture(seed: int, size: int = 64) -> Image.Image:
    """Soft shapes, as photographs have them."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


def pairs_of(images: list[Image.Image]) -> list[list[int]]:
    pixels = np.stack([resize_pixels(np.asarray(image), 32) for image in images])
    hashes = np.array([content_hash(image.tobytes()) for image in images], np.uint64)
    return sorted(near_duplicates(thumbnails(cell_sums(pixels), 32), hashes).tolist())


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(stream).convert("RGB")


def test_compressed_and_scaled_copies_are_found() -> None:
    original = picture(0)
    images = [picture(1), original, picture(2), as_jpeg(original, 60), as_jpeg(original.resize((50, 50)), 80)]
    assert pairs_of(images) == [[1, 3], [1, 4], [3, 4]]


def test_different_pictures_are_not_taken_for_copies() -> None:
    assert pairs_of([picture(seed) for seed in range(400)]) == []


def test_copies_are_found_once_each() -> None:
    assert pairs_of([picture(0), picture(1), picture(0), picture(0)]) == [[0, 2], [0, 3]]


def test_plain_pictures_of_other_brightness_differ() -> None:
    plain = [Image.new("RGB", (32, 32), (value, value, value)) for value in (0, 128, 255)]
    assert pairs_of(plain) == []


def test_noise_and_textures_of_one_brightness_are_different_pictures() -> None:
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(100, 125, (32, 32, 3), np.uint8)) for _ in range(50)]
    assert pairs_of([*noise, noise[3]]) == [[3, 50]]


@pytest.mark.parametrize("size", [8, 13, 512])
def test_thumbnails_are_means_of_cells(size: int) -> None:
    assert (thumbnails(cell_sums(np.full((2, size, size, 3), 255, np.uint8)), size) == 255).all()
    right = np.zeros((1, size, size, 3), np.uint8)
    right[:, :, size // 2 :] = 200
    assert thumbnails(cell_sums(right), size).reshape(8, 8)[:, [0, 7]].tolist() == [[0, 200]] * 8


def test_groups_are_connected_pairs() -> None:
    numbers = group_numbers(np.array([[0, 3], [3, 4]]), 5)
    assert numbers[0] == numbers[3] == numbers[4]
    assert len(set(numbers)) == 3
