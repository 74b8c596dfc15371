"""From the folders of an archive, or from a CSV in it, to classes and splits."""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from mlpipe.data.archives.listing import ImageArchive, why
from mlpipe.data.archives.names import role_of
from mlpipe.errors import UserError

LAYOUTS = (
    "<class>/<image>, or train/<class>/<image> and test/<class>/<image>, "
    "or images and a CSV file with the columns image and label"
)

SPLIT_FOLDERS = {
    "train": "train", "training": "train", "test": "test", "testing": "test",
    "val": "val", "valid": "val", "validation": "val",
    "train_set": "train", "training_set": "train", "test_set": "test", "val_set": "val", "validation_set": "val",
}  # fmt: skip
"""What the names of folders, and the values of a CSV's column `split`, say; in lower case."""
_PREFIXED_SPLIT = re.compile(r"(.+)_(train|test|val)")
_SPLIT_WORD = re.compile(r"(?<![a-z])(train|training|test|testing|val|valid|validation)(?![a-z])")

IMAGE_COLUMNS = (
    *("image", "filename", "file_name", "file", "path", "filepath", "file_path"),
    *("image_path", "image_name", "img", "img_name", "img_path", "image_id", "id"),
)
LABEL_COLUMNS = ("label", "class", "category", "target", "dx")
SPLIT_COLUMNS = ("split", "set", "subset")

LEFT_ASIDE = -1
"""Label of images that are not used."""

Folder = tuple[str, ...]
Row = tuple[str, str | None]
"""An image's label and split, as a CSV has them."""


@dataclass(frozen=True)
class Layout:
    """What the folders say of the images, in the archive's order."""

    classes: tuple[str, ...]
    """Sorted by code point; a label is a position here."""
    labels: NDArray[np.int64]
    """(N,); -1: the image is left aside."""
    is_test: NDArray[np.bool_] | None
    """(N,); `None` where the archive has no test images of its own."""
    is_val: NDArray[np.bool_] | None
    """(N,); `None` where the archive has no validation images of its own."""
    notes: tuple[str, ...]


def resolve_layout(archive: ImageArchive) -> Layout:
    """Tell the layout: split folders or none, class folders or a CSV; folders around all of it may be.

    Class names are sorted by code point, so that labels do not depend on how the archive was packed.

    Raises:
        UserError: another layout, fewer than two classes, or names that differ in case alone.
    """
    if not len(archive):
        found = f"; it has {', '.join(map(repr, archive.others[:3]))}" if archive.others else ""
        raise UserError(f"the archive has no images (.png, .jpg, .webp, .heic, …){found}; give {LAYOUTS}")
    folders = _without_wrappers(archive.folders)
    split_of = _split_folders(folders)
    class_of = [folder[1 if split_of else 0 :] for folder in folders]  # and what lies inside of it
    if len({inside[0] for inside in class_of if inside}) < 2:
        return _by_table(archive, split_of, class_of)
    if not split_of:
        _check_not_splits(folders)
    notes = []
    unlabelled = [i for i, inside in enumerate(class_of) if not inside]
    refused = [folders[i] for i in unlabelled if not split_of or split_of[i] == "train"]
    if refused:
        where = "/".join(refused[0]) or "the top folder"
        raise UserError(f"the archive's images in {where!r} lie in no class folder; the layout must be {LAYOUTS}")
    if unlabelled:
        number = int(np.isin(archive.folder_ids, unlabelled).sum())
        places = ", ".join(f"{folders[i][0]}/" for i in unlabelled)
        notes.append(f"{number:,} images straight in {places} have no label and were left aside")
    if inner := [folder for folder, inside in zip(folders, class_of, strict=True) if len(inside) > 1]:
        notes.append(
            f"{len(inner):,} folders lie inside class folders, such as '{'/'.join(inner[0])}': "
            "the outer folder is the class, the inner ones were not used"
        )
    names = [inside[0] if inside else None for inside in class_of]
    classes, positions = _classes(names)
    labels = np.array([positions[name] for name in names], np.int64)[archive.folder_ids]
    _check_tables_agree(archive, classes, labels)
    splits = np.array(split_of)[archive.folder_ids] if split_of else None
    return _layout(archive, classes, labels, splits, notes)


def _layout(
    archive: ImageArchive,
    classes: tuple[str, ...],
    labels: NDArray[np.int64],
    splits: NDArray[np.str_] | None,
    notes: Sequence[str],
    table: str | None = None,
) -> Layout:
    """Decide what serves as test and validation images.

    Args:
        splits: (N,) `train`, `val` or `test`; `None`: the archive says nothing of splits.
        table: name of the CSV file that the labels come from.
    """
    is_test = is_val = None
    also = []
    if splits is not None:
        there = set(splits[labels != LEFT_ASIDE].tolist())
        if "train" not in there:
            raise UserError(
                f"the archive has labelled images in {', '.join(f'{name}/' for name in sorted(there))} only; "
                "give train/ too, or class folders alone, which are then split"
            )
        if there == {"train"}:
            also.append("there are images to train on alone (train/): a part of them became the test split")
        elif there == {"train", "val"}:
            is_test = splits == "val"
            also.append("there is no test/: the validation images (val/) are the test split")
        else:
            is_test = splits == "test"
            is_val = splits == "val" if "val" in there else None
    others = [name for name in archive.others if name != table]
    if num_others := archive.num_others - (table is not None):
        some = ", ".join(others[:3]) + (", …" if num_others > 3 else "")
        also.append(f"{num_others:,} files that are not images were left out: {some}")
    return Layout(classes, labels, is_test, is_val, (*archive.notes, *notes, *also))


def _without_wrappers(folders: Sequence[Folder]) -> list[Folder]:
    """Take off the folders that people pack by packing a folder, and the second of `train/train/`."""
    stripped = list(folders)
    while True:
        tops = {folder[:1] for folder in stripped}
        top = next(iter(tops))
        if len(tops) > 1 or not top or top[0].lower() in SPLIT_FOLDERS or min(map(len, stripped)) < 2:
            doubled = tops - {folder[:1] for folder in stripped if folder[:1] != folder[1:2]}
            return [folder[1:] if folder[:1] in doubled else folder for folder in stripped]
        stripped = [folder[1:] for folder in stripped]


def _split_folders(folders: Sequence[Folder]) -> list[str]:
    """For each folder `train`, `val` or `test`; empty where the archive has class folders alone.

    Raises:
        UserError: there are other folders with images beside `train/`, or two for one split.
    """
    tops = {folder[0] if folder else "" for folder in folders}
    roles = {top: SPLIT_FOLDERS.get(top.lower()) for top in tops}
    prefixed = [match for top in tops if (match := _PREFIXED_SPLIT.fullmatch(top.lower()))]
    if len(prefixed) == len(tops) and len({match[1] for match in prefixed}) == 1:  # such as seg_train/, seg_test/
        roles = {top: top.lower().rpartition("_")[2] for top in tops}
    if not {"train", "test"} & set(roles.values()):
        return []
    if unknown := sorted(top for top, role in roles.items() if role is None):
        raise UserError(
            f"the archive has images in {', '.join(repr(top + '/') for top in unknown[:5])} beside train/ and test/; "
            "move them into those two or leave them out; a class called train or test must be renamed"
        )
    of_role = defaultdict(list)
    for top in sorted(tops):
        of_role[roles[top]].append(f"{top}/")
    if twice := [names for names in of_role.values() if len(names) > 1]:
        raise UserError(f"the archive has {' and '.join(twice[0])} for one split; merge them")
    return [str(roles[folder[0]]) for folder in folders]


def _check_not_splits(folders: Sequence[Folder]) -> None:
    """
    Raises:
        UserError: two outer folders, one of which is called like a split, hold inner ones of the same names.
    """
    inside: dict[str, set[str]] = defaultdict(set)
    for folder in folders:
        if len(folder) > 1:
            inside[folder[0]].add(folder[1])
    first_with: dict[str, str] = {}
    for top in sorted(inside):
        for other, number in Counter(first_with.setdefault(name, top) for name in inside[top]).items():
            if other != top and number > 1 and any(_SPLIT_WORD.search(each.lower()) for each in (top, other)):
                shared = ", ".join(map(repr, sorted(inside[top] & inside[other])[:3]))
                raise UserError(
                    f"the folders {other + '/'!r} and {top + '/'!r} hold folders of the same names ({shared}): "
                    "if the inner ones are the classes, rename the outer ones train/ and test/, or merge them; "
                    "if the outer ones are, move the images out of the inner ones"
                )


def _check_tables_agree(archive: ImageArchive, classes: Sequence[str], labels: NDArray[np.int64]) -> None:
    """
    Raises:
        UserError: a CSV gives most of the images other classes than their folders do.
    """
    for table in archive.tables:
        try:
            known = _by_image(table, _rows(table, archive.read_table(table)[0]) or [])
        except UserError:
            continue  # the folders do without it
        if not known:
            continue
        keys = _row_keys(archive, known)
        times = Counter(keys)
        pairs = Counter(
            (label, known[key][0])
            for label, key in zip(labels.tolist(), keys, strict=True)
            if label != LEFT_ASIDE and key and times[key] == 1 and known[key][0]
        )
        given = {name for _, name in pairs}
        is_about_them = 2 * pairs.total() > (labels != LEFT_ASIDE).sum()
        only_other_names = len(pairs) == len(given) == len({label for label, _ in pairs})
        if is_about_them and not given <= set(classes) and not only_other_names:
            raise UserError(
                f"{table} and the folders give the images different classes, such as {sorted(given)[0]!r} and "
                f"{classes[0]!r}; remove {table}, or put the images into one folder"
            )


def _classes(names: Sequence[str | None]) -> tuple[tuple[str, ...], dict[str | None, int]]:
    """Classes in order, and the label of each name.

    Raises:
        UserError: fewer than two, or names that differ in case alone.
    """
    classes = sorted({name for name in names if name is not None})
    if len(classes) < 2:
        raise UserError(
            f"the archive has one class, {classes[0]!r}; at least 2 are needed, each in a folder of its own"
            if classes
            else f"the archive's images have no labels; the layout must be {LAYOUTS}"
        )
    alike: dict[str, list[str]] = defaultdict(list)
    for name in classes:
        alike[unicodedata.normalize("NFC", name.casefold())].append(name)
    for same in alike.values():
        if len(same) > 1:
            raise UserError(
                f"the archive's classes {', '.join(map(repr, same))} differ in upper and lower case only; "
                "merge or rename them"
            )
    positions: dict[str | None, int] = {name: position for position, name in enumerate(classes)}
    return tuple(classes), positions | {None: LEFT_ASIDE}


def _by_table(archive: ImageArchive, split_of: Sequence[str], class_of: Sequence[Folder]) -> Layout:
    """Labels from the CSV in the archive.

    Raises:
        UserError: there is none with the columns, or more than one.
    """
    tables, notes_of = {}, {}
    for name in archive.tables:
        text, notes_of[name] = archive.read_table(name)
        if (rows := _rows(name, text)) is not None:
            tables[name] = rows
    if not tables:
        raise UserError(_why_no_classes(archive, class_of))
    if len(tables) > 1:
        raise UserError(f"the archive has several CSV files with labels: {', '.join(sorted(tables))}; leave one")
    name, rows = next(iter(tables.items()))
    return _labelled(archive, name, _by_image(name, rows), split_of, notes_of[name])


def _why_no_classes(archive: ImageArchive, class_of: Sequence[Folder]) -> str:
    """In an archive without a table of labels."""
    hint = "".join(f"; {note}" for note in archive.notes)
    if archive.tables_beside:
        hint += f"; {archive.tables_beside[0]} lies beside the archive that has the images: pack it into that one"
    if not all(class_of):
        outside = archive.folders[class_of.index(())]
        return (
            f"the archive's images in {'/'.join(outside) or 'the top folder'!r} lie in no class folder; "
            f"the layout must be {LAYOUTS}{hint}"
        )
    deeper = sorted({inside[1] for inside in class_of if len(inside) > 1})
    loose = [position for position, inside in enumerate(class_of) if len(inside) == 1]
    if len(deeper) > 1 and loose:
        image = archive.name(int(np.argmax(archive.folder_ids == loose[0])))
        return (
            f"the archive's image {image!r} lies beside the folders {deeper[0] + '/'!r} and {deeper[1] + '/'!r}; "
            "if those are the classes, remove it or move it into one of them"
        )
    return (
        f"the archive has one class, {class_of[0][0]!r}; at least 2 are needed, each in a folder of its own, "
        f"or a CSV file with the columns image and label{hint}"
    )


def _rows(table: str, text: str) -> list[tuple[str, Row]] | None:
    """Of each row what it calls its image, and what it says of it; `None`: the CSV has no such columns.

    Raises:
        UserError: it breaks off, or has a quote that nothing closes.
    """
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=_delimiter(text))
    try:
        columns = {(field or "").strip().lower(): field for field in rows.fieldnames or ()}
        image, label, split = (_column(columns, names) for names in (IMAGE_COLUMNS, LABEL_COLUMNS, SPLIT_COLUMNS))
        if image is None or label is None:
            return None
        read = list(rows)
        if image == columns.get("id"):  # often the number of the row
            others = [name for name in columns.values() if name not in (image, label, split)]
            named = (name for name in others if all(role_of(_key(row[name] or "")) == "image" for row in read))
            image = next(named, image)
        return [(_key(row[image] or ""), ((row[label] or "").strip(), row[split] if split else None)) for row in read]
    except csv.Error as error:
        raise UserError(f"{table} cannot be read at line {rows.line_num} ({why(error)}); close its quotes") from error


def _by_image(table: str, rows: Sequence[tuple[str, Row]]) -> dict[str, Row]:
    """
    Raises:
        UserError: two rows say different things of one image.
    """
    known: dict[str, Row] = {}
    for image, row in rows:
        if known.setdefault(image, row) != row and image:
            one, other = (", ".join(filter(None, each)) or "nothing" for each in (known[image], row))
            raise UserError(f"{table} has several rows for {image!r}, with {one!r} and {other!r}; leave one")
    return known


def _row_keys(archive: ImageArchive, known: Mapping[str, Row]) -> list[str | None]:
    """(N,) the row of each image; `None`: it has none."""
    names = (archive.name(index) for index in range(len(archive)))
    return [next((key for key in _keys(name) if key in known), None) for name in names]


def _labelled(
    archive: ImageArchive, table: str, known: Mapping[str, Row], split_of: Sequence[str], notes: Sequence[str]
) -> Layout:
    keys = _row_keys(archive, known)
    if known and not any(keys):
        raise UserError(
            f"{table} names none of the archive's images: its first row has {next(iter(known))!r}, and the first image "
            f"is {archive.name(0)!r}; write the images' paths or names in it"
        )
    found = [known[key] if key and known[key][0] else None for key in keys]
    first_of: dict[str, int] = {}
    for index, (key, row) in enumerate(zip(keys, found, strict=True)):
        if row and first_of.setdefault(str(key), index) != index:
            raise UserError(
                f"{table}: the row {key!r} fits {archive.name(first_of[str(key)])} and {archive.name(index)}; "
                "write their paths in the CSV, or leave one folder out"
            )
    without_row = [index for index, row in enumerate(found) if row is None]
    without_image = [key for key in known if key not in first_of]
    all_notes = [f"classes come from {table}", *notes]
    for number, what, some in (
        (len(without_row), "images have no row in it and were left aside", map(archive.name, without_row[:3])),
        (len(without_image), "of its rows have no image", without_image[:3]),
    ):
        if number:
            all_notes.append(f"{number:,} {what}: {', '.join(some)}{', …' * (number > 3)}")
    classes, positions = _classes([row[0] if row else None for row in found])
    labels = np.array([positions[row[0] if row else None] for row in found], np.int64)
    splits = np.array(split_of)[archive.folder_ids] if split_of else None
    if any(row and row[1] for row in found):
        splits = np.array([_split_value(row[1], table) if row else "train" for row in found])
    return _layout(archive, classes, labels, splits, all_notes, table)


def _split_value(value: str | None, table: str) -> str:
    role = SPLIT_FOLDERS.get((value or "").strip().lower())
    if role is None:
        raise UserError(f"{table}: split {value!r} is not allowed; give train, val or test in each row")
    return role


def _keys(name: str) -> list[str]:
    """What a row may call an image: its path, ever shorter, with and without the end of its name."""
    path = PurePosixPath(name.replace("\\", "/"))
    tails = ["/".join(path.parts[i:]) for i in range(len(path.parts))]
    return [_key(tail) for tail in tails] + [_key(str(PurePosixPath(tail).with_suffix(""))) for tail in tails]


def _key(image: str) -> str:
    return unicodedata.normalize("NFC", image.strip().replace("\\", "/").removeprefix("./"))


def _delimiter(text: str) -> str:
    header = text.partition("\n")[0]
    return max(",;\t", key=header.count)


def _column(columns: Mapping[str, str], names: Sequence[str]) -> str | None:
    return next((columns[name] for name in names if name in columns), None)
