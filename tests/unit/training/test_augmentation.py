"""Random changes of training images."""

from __future__ import annotations

import torch

from mlpipe.training.augmentation import augment, mix


def numbered(batch: int, size: int) -> torch.Tensor:
    """Images whose pixels tell their row, column and image."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    image = torch.stack([rows, columns, torch.zeros_like(rows)], dim=-1).to(torch.uint8)
    images = image.repeat(batch, 1, 1, 1)
    images[..., 2] = torch.arange(batch, dtype=torch.uint8)[:, None, None]
    return images


def test_none_changes_nothing() -> None:
    images = numbered(4, 8)
    assert augment(images, "none", 0) is images


def test_flip_mirrors_half_of_the_images_and_in_the_next_epoch_the_other_half() -> None:
    images = numbered(200, 8)
    mirrored = images.flip(2)
    seen = []
    for epoch in range(4):
        changed = augment(images, "flip", epoch)
        is_same = (changed == images).flatten(1).all(dim=1)
        is_mirrored = (changed == mirrored).flatten(1).all(dim=1)
        assert (is_same ^ is_mirrored).all()
        assert 70 < int(is_mirrored.sum()) < 130
        seen.append(is_mirrored)
    assert (seen[0] ^ seen[1]).all()
    assert torch.equal(seen[0], seen[2])


def test_flip_crop_shifts_each_image_by_its_own_offset_within_reach() -> None:
    torch.manual_seed(0)
    images = numbered(300, 32)
    changed = augment(images, "flip_crop", 0)
    assert (changed.shape, changed.dtype) == (images.shape, torch.uint8)
    assert (changed[..., 2] == images[..., 2]).all(), "no image may get another's pixels"
    offsets = changed[:, 16, 0, 0].to(torch.int64) - 16  # no reflection in the middle rows
    assert set(offsets.tolist()) == set(range(-2, 3))
    for image, offset in zip(changed, offsets.tolist(), strict=True):
        expected = [min(abs(row + offset), 62 - abs(row + offset)) for row in range(32)]
        assert image[:, 0, 0].tolist() == expected


def test_the_generator_decides() -> None:
    images = numbered(16, 16)
    torch.manual_seed(1)
    first = augment(images, "flip_crop", 0)
    torch.manual_seed(1)
    assert torch.equal(first, augment(images, "flip_crop", 0))
    assert not torch.equal(first, augment(images, "flip_crop", 0))


def test_trivial_changes_parts_of_a_batch_each_in_its_own_way() -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (64, 16, 16, 3), dtype=torch.uint8)
    changed = augment(images, "trivial", 0)
    assert (changed.shape, changed.dtype) == (images.shape, torch.uint8)
    assert len({float(image.float().mean()) for image in changed}) > 32


def test_color_changes_brightness_and_contrast_of_each_image_a_little() -> None:
    torch.manual_seed(0)
    images = torch.randint(64, 192, (200, 32, 32, 3), dtype=torch.uint8)
    before = images.float().flatten(1)
    after = augment(images, "flip_crop_color", 0).float().flatten(1)
    brightness = after.mean(dim=1) - before.mean(dim=1)
    contrast = after.std(dim=1) / before.std(dim=1)
    assert 5 < brightness.abs().max() < 11
    assert 0.8 < contrast.min() < 0.9
    assert 1.1 < contrast.max() < 1.2
    white = torch.full((50, 8, 8, 3), 255, dtype=torch.uint8)
    assert augment(white, "flip_crop_color", 0).min() > 220, "no pixel may overflow"


def test_mixing_blends_images_and_labels_alike() -> None:
    torch.manual_seed(0)
    labels = torch.tensor([0, 1, 2, 3])
    images = labels.float().view(4, 1, 1, 1).expand(4, 3, 8, 8)  # each filled by its class
    for kind in ("mixup", "cutmix"):
        blended, shares = mix(images, labels, kind, 5)  # type: ignore[arg-type]
        assert shares.shape == (4, 5)
        assert torch.allclose(shares.sum(dim=1), torch.ones(4))
        expected = shares @ torch.arange(5.0)
        assert torch.allclose(blended.mean(dim=(1, 2, 3)), expected, atol=1e-5)
        assert not torch.equal(blended, images)
    same, whole = mix(images, labels, "none", 5)
    assert same is images
    assert whole is labels
