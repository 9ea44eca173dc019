"""Image-text retrieval with two-tower models (CLIP, SigLIP): recall at K, dense against pruned on the same pairs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_tokenprune.benchmark.medians import Quartiles, cell
from hf_tokenprune.errors import DataError
from hf_tokenprune.evaluation.images import ImageDataset
from hf_tokenprune.evaluation.loop import Rows, place, run_in_turn
from hf_tokenprune.evaluation.optional import require
from hf_tokenprune.evaluation.preprocess import PreprocessedImages
from hf_tokenprune.evaluation.report import paired_difference, speed_notes
from hf_tokenprune.evaluation.scores import as_logits, topk_correct
from hf_tokenprune.evaluation.tables import aligned, filled, markdown, number, plain, with_interval
from hf_tokenprune.evaluation.turns import DENSE, Variants, check_names
from hf_tokenprune.evaluation.zero_shot import ImageTower, embed_texts

DIRECTIONS = ("image to text", "text to image")
_QUERIES = 1024  # compared at once with everything that they may find


@dataclass(frozen=True)
class Recall:
    """Recall at ``k`` of one run.

    Attributes:
        k: how many answers a query may give.
        recall: fraction of the queries with a right answer among them.
        difference: to the dense run on the same queries, in percentage points; negative is a loss. None for that run.
        interval: 95 % interval of the difference, in percentage points; see `scores.paired_interval`.
    """

    k: int
    recall: float
    difference: float | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class RetrievalRow:
    """One run.

    Attributes:
        name: of the run; the first row is ``"dense"``.
        image_to_text: a query is an image; any of its captions is right.
        text_to_image: a query is a caption; its image is right.

    The others are those of `PairedRow`.
    """

    name: str
    image_to_text: tuple[Recall, ...]
    text_to_image: tuple[Recall, ...]
    images_per_second: float | None = None
    macs: float | None = None
    speed_up: float | None = None
    speed_up_quartiles: Quartiles | None = None
    ideal_speed_up: float | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """What a model card says of this run: recalls by name."""
        both = {"image_to_text": self.image_to_text, "text_to_image": self.text_to_image}
        return {f"{name}_recall_at_{each.k}": each.recall for name, recalls in both.items() for each in recalls}


@dataclass(frozen=True)
class RetrievalReport:
    """Rows of a dense and of pruned runs on the same pairs, the dense one first.

    Attributes:
        rows: the runs.
        images: number of images.
        captions: number of captions, of all images together.
    """

    rows: tuple[RetrievalRow, ...]
    images: int
    captions: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: ``images``, ``captions`` and ``rows`` with the fields and units of `RetrievalRow`."""
        return {"images": self.images, "captions": self.captions, "rows": [plain(asdict(row)) for row in self.rows]}

    def summary(self) -> str:
        """The table as plain text, columns aligned, with what it rests on above and below."""
        return f"{self._caption()}\n\n{aligned(*self._table())}\n\n{self._notes()}"

    def to_markdown(self) -> str:
        """The same as Markdown."""
        return f"{self._caption()}\n\n{markdown(*self._table())}\n\n{self._notes()}"

    def _caption(self) -> str:
        return f"{self.images} images with {self.captions} captions, every run on the same ones."

    def _notes(self) -> str:
        return (
            "R@K: queries with a right answer among the K most similar. [ ]: 95 % intervals of the differences in "
            "percentage points, Bonett-Price for paired proportions, queries taken as independent. "
            f"{speed_notes(self.rows, 'images/s: forward passes of the image tower only')}"
        )

    def _table(self) -> tuple[list[str], list[list[str]]]:
        """Two lines a run, one for each direction."""
        lines = [
            (row, direction, recalls)
            for row in self.rows
            for direction, recalls in zip(DIRECTIONS, (row.image_to_text, row.text_to_image), strict=True)
        ]
        columns = {"run": [row.name for row, _, _ in lines], "query": [direction for _, direction, _ in lines]}
        for i, recall in enumerate(self.rows[0].image_to_text):
            own = [recalls[i] for _, _, recalls in lines]
            columns[f"R@{recall.k} %"] = [number(each.recall, ".2f", 100) for each in own]
            columns[f"R@{recall.k} vs dense"] = [with_interval(each.difference, each.interval, "+.2f") for each in own]
        columns["GMACs"] = [number(row.macs, ".3f", 1e-9) for row, _, _ in lines]
        columns["images/s"] = [number(row.images_per_second, ".1f") for row, _, _ in lines]
        columns["speed-up"] = [cell(row.speed_up, row.speed_up_quartiles, ".2f") for row, _, _ in lines]
        columns["ideal"] = [number(row.ideal_speed_up, ".2f") for row, _, _ in lines]
        return filled(columns)


def evaluate_retrieval(
    model: nn.Module,
    pairs: Sequence[tuple[Any, str | Sequence[str]]],
    processor: Callable[..., Any],
    variants: Variants,
    ks: Sequence[int] = (1, 5, 10),
    macs: Mapping[str, float] | None = None,
    batch_size: int = 32,
    accelerator: Any = None,
    progress: bool = True,
) -> RetrievalReport:
    """Find captions for images and images for captions, with a two-tower model as it is, then within each variant.

    All captions are what an image chooses from, all images what a caption chooses from, by cosine; of equally similar
    ones the earlier wins. Captions are embedded once, by the text tower, which pruning leaves alone. The intervals take
    queries as independent. Several captions of one image are not quite, which makes those of "text to image" a little
    too narrow.

    Args:
        model: see `ImageTower`.
        pairs: an image (a path, a PIL image, an ``(H, W, 3)`` uint8 array or encoded bytes) and caption or captions.
        processor: processor of the model, for images and texts: ``AutoProcessor.from_pretrained``.
        variants: name -> function that makes a context manager, in which ``model`` is changed: for example
            ``{"ToMe r=8": lambda: pruned(model, config)}``.
        ks: how many answers a query may give, ascending.

    The other arguments are those of `evaluate_paired`.

    Raises:
        DataError: no pairs, one that is none or whose image cannot be decoded, an image without captions, ``ks`` that
            do not ascend from 1 or more.
        TokenPruneError: what `embed_texts` and `evaluate_paired` raise.
    """
    macs = macs or {}
    check_names(variants, macs)
    if not ks or list(ks) != sorted(set(ks)) or ks[0] < 1:
        raise DataError(f"ks={ks!r}: expected ascending numbers of answers, at least 1, such as (1, 5, 10)")
    images, captions = _split(pairs)
    accelerator = accelerator or require("accelerate").Accelerator()
    place(model, accelerator)
    texts = embed_texts(model, processor, [text for own in captions for text in own]).cpu()
    image_numbers = torch.arange(len(images))
    image_of_text = image_numbers.repeat_interleave(torch.tensor([len(own) for own in captions]))

    embeddings = {name: Rows(len(images)) for name in (DENSE, *variants)}

    def keep(said: dict[str, Tensor], _: Tensor) -> None:
        for name, part in said.items():
            embeddings[name].add(as_logits(part, f"embeddings of {name!r}"))

    def hits(run: Tensor) -> tuple[Tensor, Tensor]:
        return (
            _hits(run, image_numbers, texts, image_of_text, ks),
            _hits(texts, image_of_text, run, image_numbers, ks),
        )

    prepared = PreprocessedImages(images, processor)
    turns, counts = run_in_turn(ImageTower(model), prepared, variants, keep, batch_size, accelerator, progress)
    before, speeds, rows = hits(embeddings[DENSE].all), turns.speeds(counts), []
    for name, speed in speeds.items():
        if name == DENSE:
            to_text, to_image = (_recalls(ks, found) for found in before)
        else:
            after = hits(embeddings[name].all)
            to_text, to_image = (_recalls(ks, *found) for found in zip(after, before, strict=True))
        rows.append(
            RetrievalRow(
                name=name,
                image_to_text=to_text,
                text_to_image=to_image,
                images_per_second=speed.per_second,
                macs=macs.get(name),
                speed_up=speed.speed_up,
                speed_up_quartiles=speed.speed_up_quartiles,
                ideal_speed_up=macs[DENSE] / macs[name] if name != DENSE and {DENSE, name} <= set(macs) else None,
            )
        )
    return RetrievalReport(tuple(rows), images=len(images), captions=len(texts))


def _split(pairs: Sequence[tuple[Any, str | Sequence[str]]]) -> tuple[ImageDataset, list[list[str]]]:
    """Images without labels, and the captions of each."""
    sources, captions = [], []
    for i, pair in enumerate(pairs):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise DataError(f"pair {i} is of type {type(pair).__name__}; expected (image, caption or several captions)")
        image, own = pair
        own = [own] if isinstance(own, str) else list(own)
        if not own or not all(isinstance(caption, str) and caption.strip() for caption in own):
            raise DataError(f"pair {i} has the captions {own!r}; expected a text, or a sequence of at least one")
        sources.append(image)
        captions.append(own)
    if not sources:
        raise DataError("there are no pairs; give at least one image with a caption")
    return ImageDataset(
        sources, [f"the image of pair {i}" for i in range(len(sources))], [None] * len(sources)
    ), captions


def _hits(queries: Tensor, query_images: Tensor, answers: Tensor, answer_images: Tensor, ks: Sequence[int]) -> Tensor:
    """Whether a right answer is among the k most similar.

    Args:
        queries: ``(q, D)``.
        query_images: ``(q,)`` int64, the image that a query is or belongs to.
        answers: ``(a, D)``.
        answer_images: ``(a,)`` int64, the same for them; right are those of the query's image.
        ks: K numbers.

    Returns:
        ``(K, q)`` bool.
    """
    parts = []
    for rows, own in zip(queries.split(_QUERIES), query_images.split(_QUERIES), strict=True):
        similarity = rows @ answers.T
        wrong = own[:, None] != answer_images
        best = similarity.masked_fill(wrong, -torch.inf).argmax(dim=1)  # none of the right ones comes before it
        parts.append(torch.stack([topk_correct(similarity, best, k) for k in ks]))
    return torch.cat(parts, dim=1)


def _recalls(ks: Sequence[int], hits: Tensor, dense_hits: Tensor | None = None) -> tuple[Recall, ...]:
    recalls = hits.double().mean(dim=1).tolist()
    if dense_hits is None:
        return tuple(map(Recall, ks, recalls))
    differences = [paired_difference(before, after) for before, after in zip(dense_hits, hits, strict=True)]
    return tuple(Recall(k, recall, *both) for k, recall, both in zip(ks, recalls, differences, strict=True))
