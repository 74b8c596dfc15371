"""From folders in an archive to classes and splits."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlpipe.data.archive import ImageArchive
from mlpipe.errors import UserError

LAYOUTS = "train/<class>/<image> and test/<class>/<image>, or <class>/<image> alone"

Folder = tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """What the folders say of the images, in the archive's order."""

    classes: tuple[str, ...]
    """Sorted by code point; a label is a position here."""
    labels: NDArray[np.int64]
    """(N,)"""
    is_test: NDArray[np.bool_] | None
    """(N,); `None` where the archive has no split of its own."""
    notes: tuple[str, ...]


def resolve_layout(archive: ImageArchive) -> Layout:
    """Tell the layout: `train/` and `test/` with class folders, or class folders alone; one folder around all may be.

    Class names are sorted by code point, so that labels do not depend on how the archive was packed.

    Raises:
        UserError: another layout, fewer than two classes, or names that differ in case alone.
    """
    if not len(archive):
        found = f"; it has {', '.join(map(repr, archive.others[:3]))}" if archive.others else ""
        raise UserError(f"the archive has no images (.png, .jpg, .bmp, .gif, .webp, .tif){found}; give {LAYOUTS}")
    folders, empty = _without_wrapper(archive.folders, archive.empty_folders)
    split = _has_split(folders)
    _check_depth(folders, split=split)
    class_of = {folder: folder[-1] for folder in folders}
    classes = sorted(set(class_of.values()) | {folder[-1] for folder in empty if _is_class(folder, split=split)})
    _check_classes(classes)
    positions = {name: position for position, name in enumerate(classes)}
    labels = np.array([positions[class_of[folder]] for folder in folders], np.int64)[archive.folder_ids]
    is_test = None
    if split:
        is_test = np.array([folder[0].lower() == "test" for folder in folders])[archive.folder_ids]
    return Layout(tuple(classes), labels, is_test, _notes(archive))


def _is_class(folder: Folder, *, split: bool) -> bool:
    return len(folder) == 2 and folder[0].lower() in ("train", "test") if split else len(folder) == 1


def _has_split(folders: Sequence[Folder]) -> bool:
    return any(len(folder) and folder[0].lower() in ("train", "test") for folder in folders)


def _without_wrapper(folders: Sequence[Folder], empty: Iterable[Folder]) -> tuple[list[Folder], list[Folder]]:
    """Take off the one folder that people pack by packing a folder."""
    stripped, rest = list(folders), list(empty)
    while stripped:
        tops = {folder[0] if folder else "" for folder in stripped}
        if len(tops) != 1 or next(iter(tops)).lower() in ("", "train", "test") or min(map(len, stripped)) < 2:
            break
        rest = [folder[1:] for folder in rest if folder[:1] == stripped[0][:1] and len(folder) > 1]
        stripped = [folder[1:] for folder in stripped]
    return stripped, rest


def _check_depth(folders: Sequence[Folder], *, split: bool) -> None:
    if not split:
        for folder in folders:
            if len(folder) != 1:
                where = "/".join(folder) or "the top folder"
                raise UserError(
                    f"the archive's images in {where!r} lie in no class folder; the layout must be {LAYOUTS}"
                )
        return
    tops = sorted({folder[0] if folder else "" for folder in folders})
    unknown = [top for top in tops if top.lower() not in ("train", "test")]
    if unknown:
        raise UserError(
            f"the archive has images in {', '.join(repr(top + '/') for top in unknown[:5])} beside train/ and test/; "
            "move them into those two (validation images are taken from train/) or leave them out"
        )
    if len(tops) != 2 or tops[0].lower() == tops[1].lower():
        raise UserError(
            f"the archive has images in {', '.join(top + '/' for top in tops)} only; "
            "give both train/ and test/, or class folders alone, which are then split"
        )
    for folder in folders:
        if len(folder) != 2:
            raise UserError(
                f"the archive's images in '{'/'.join(folder)}/' lie at the wrong depth; they belong in "
                f"{folder[0]}/<class>/"
            )


def _check_classes(classes: Sequence[str]) -> None:
    if len(classes) < 2:
        raise UserError(
            f"the archive has one class, {classes[0]!r}; at least 2 are needed, each in a folder of its own"
        )
    alike: dict[str, list[str]] = defaultdict(list)
    for name in classes:
        alike[unicodedata.normalize("NFC", name.casefold())].append(name)
    for names in alike.values():
        if len(names) > 1:
            raise UserError(
                f"the archive's classes {', '.join(map(repr, names))} differ in upper and lower case only; "
                "merge or rename them"
            )


def _notes(archive: ImageArchive) -> tuple[str, ...]:
    if not archive.num_others:
        return ()
    some = ", ".join(archive.others[:3]) + (", …" if archive.num_others > 3 else "")
    return (f"{archive.num_others:,} files that are not images were left out: {some}",)
