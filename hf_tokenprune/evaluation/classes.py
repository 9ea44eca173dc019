"""Classes that a data set calls by name, as classes of a model: by name where names are, never by a guess."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hf_tokenprune.errors import DataError
from hf_tokenprune.evaluation.images import ImageDataset, numbers_of

_UNNAMED = re.compile(r"LABEL_\d+")
_WNID = re.compile(r"n\d{8}")
_IMAGENET = 1000
_BY_NUMBER = "classes by number"


def names_of(model: Any) -> dict[int, str] | None:
    """What a model calls its classes; None where it has no names (``LABEL_0``, ... are none)."""
    names: Mapping[Any, Any] = getattr(getattr(model, "config", None), "id2label", None) or {}
    if all(_UNNAMED.fullmatch(str(name)) for name in names.values()):
        return None
    return {int(i): str(name) for i, name in names.items()}


def in_classes_of(images: ImageDataset, names: Mapping[int, str] | None) -> tuple[ImageDataset, str | None]:
    """Images with labels that are classes of a model, and how they were found (None: they were numbers already).

    The names of the source are found among those of the model: as they are; or but for case, underscores, hyphens and
    spaces; or as one of several separated by commas ("tench, Tinca tinca"). They may be fewer and in another order.
    A name of several classes is taken by its place if there are as many names as classes and all others are in theirs.
    1000 WordNet ids (n01440764) are ImageNet's classes in their order. Where none of them is known and all are numbers
    (folders 0, 1, 10, 2), they are those of the model's classes.

    Args:
        names: of the model's classes, by number; None if these have none: what is no number counts by its place.

    Raises:
        DataError: a name is that of no class, or of several, or two are that of one.
    """
    if images.classes is None or all(label is None for label in images.labels):
        return images, None
    classes, numbers = images.classes, numbers_of(images.classes)
    if names is None:
        return (images, "classes by their place") if numbers is None else (_relabelled(images, numbers), _BY_NUMBER)
    if len(set(classes)) == len(names) == _IMAGENET and all(map(_WNID.fullmatch, classes)):
        order = {name: i for i, name in enumerate(sorted(classes))}
        return _relabelled(images, [order[name] for name in classes]), "classes by the order of all 1000 WordNet ids"
    indices = [_index(names, way) for way in _WAYS]
    found = [_candidates(name, indices) for name in classes]
    if numbers is not None and not any(found):
        return _relabelled(images, numbers), _BY_NUMBER
    alone = [next(iter(own)) if len(own) == 1 else None for own in found]
    in_place = len(classes) == len(names) and all(own in (None, i) for i, own in enumerate(alone))
    if in_place and 2 * alone.count(None) <= len(classes):
        alone = [i if not own or i in own else None for i, own in enumerate(found)]
    if None in alone:
        raise DataError(_unknown(classes, found, alone, names))
    chosen = [own for own in alone if own is not None]
    if twice := [name for name, own in zip(classes, chosen, strict=True) if chosen.count(own) > 1]:
        raise DataError(
            f"{', '.join(map(repr, twice[:4]))} are one class of the model; join them, or number the labels"
        )
    return _relabelled(images, chosen), "classes by name"


def any_is_known(classes: Sequence[str], names: Mapping[int, str]) -> bool:
    """Whether one of the names of a source is that of a class, or of several."""
    indices = [_index(names, way) for way in _WAYS]
    return any(_candidates(name, indices) for name in classes)


def _relabelled(images: ImageDataset, numbers: Sequence[int]) -> ImageDataset:
    labels = [None if label is None else numbers[label] for label in images.labels]
    return replace(images, labels=labels, classes=None)


def _candidates(name: str, indices: Sequence[Mapping[str, set[int]]]) -> set[int]:
    """Classes called so, by the strictest comparison that finds any."""
    return next((own for index in indices for own in [index.get(name) or index.get(_plain(name))] if own), set())


def _index(names: Mapping[int, str], way: Callable[[str], list[str]]) -> Mapping[str, set[int]]:
    found: dict[str, set[int]] = defaultdict(set)
    for number, name in names.items():
        for each in way(name):
            found[each].add(number)
    return found


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[\s_\-,]+", " ", text).casefold().split())


_WAYS: tuple[Callable[[str], list[str]], ...] = (
    lambda name: [name],
    lambda name: [_plain(name)],
    lambda name: [_plain(part) for part in name.split(",")],
)


def _unknown(
    classes: Sequence[str], found: Sequence[Iterable[int]], alone: Sequence[int | None], names: Mapping[int, str]
) -> str:
    lost = [(name, sorted(own)) for name, own, one in zip(classes, found, alone, strict=True) if one is None]
    told = [f"{name!r} ({f'classes {own}' if own else 'none'})" for name, own in lost[:4]]
    some = ", ".join(repr(names[i]) for i in sorted(names)[:3])
    wnids = f" WordNet ids have an order only if all {_IMAGENET} are there;" if _WNID.fullmatch(lost[0][0]) else ""
    return (
        f"{len(lost)} of {len(classes)} classes of the images are not one class of the model ({some}, ...): "
        f"{', '.join(told)}{', ...' if len(lost) > 4 else ''};{wnids} call them as the model does, give its class "
        "numbers in a labels.csv or an integer column (label_column, --label-column), or evaluate without labels "
        "(label_column=None, --no-labels)"
    )
