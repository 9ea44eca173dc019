"""Zero-shot classification with two-tower models (CLIP, SigLIP): class names in templates take the place of a head.

The image tower may be pruned; texts are embedded once, by the text tower, which pruning leaves alone.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_tokenprune.errors import DataError, TokenPruneError, UnsupportedModelError, shown
from hf_tokenprune.evaluation.classes import any_is_known, in_classes_of
from hf_tokenprune.evaluation.images import ImageDataset
from hf_tokenprune.evaluation.loop import place
from hf_tokenprune.evaluation.optional import require
from hf_tokenprune.evaluation.paired import InterruptedEvaluation, evaluate_paired
from hf_tokenprune.evaluation.report import PairedReport
from hf_tokenprune.evaluation.turns import Variants, eval_mode

TEMPLATES = ("a photo of a {}.",)
_TEXTS = 256  # in one forward pass of the text tower


class ImageTower(nn.Module):
    """The image side of a two-tower model, which it holds and does not copy: pruning the model prunes this.

    Args:
        model: ``CLIPModel``, ``SiglipModel``, ``Siglip2Model`` or another with ``get_image_features``,
            ``get_text_features`` and ``logit_scale``.

    Raises:
        UnsupportedModelError: it lacks one of them.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = _two_towers(model)
        self.hf_device_map = getattr(model, "hf_device_map", None)

    def forward(self, **inputs: Tensor) -> Tensor:
        """Inputs of B images, as the processor names them, to embeddings: ``(B, D)`` float32 of length 1."""
        return _unit(self.model.get_image_features(**inputs))


class SimilarityToClasses(ImageTower):
    """A two-tower model as a classifier: images to their similarity with each class.

    Args:
        model: see `ImageTower`.
        classes: ``(C, D)`` float32 of length 1, see `zero_shot_classifier`.
    """

    def __init__(self, model: nn.Module, classes: Tensor) -> None:
        super().__init__(model)
        self.register_buffer("classes", classes, persistent=False)

    def forward(self, **inputs: Tensor) -> Tensor:
        """``(B, C)`` float32: cosine times the model's ``exp(logit_scale)``."""
        embeddings = super().forward(**inputs)
        scale = self.model.logit_scale.float().exp().to(embeddings.device)
        with torch.autocast(embeddings.device.type, enabled=False):
            return scale * embeddings @ self.classes.to(embeddings.device).T


def embed_texts(model: nn.Module, processor: Callable[..., Any], texts: Sequence[str]) -> Tensor:
    """Embed texts with the text tower of a two-tower model: in eval mode, without gradients, in the model's own dtype.

    Texts longer than the tower's positions are cut. SigLIP was trained on texts padded to all of its positions, so they
    are padded thus, as in the pipelines of Transformers; others are padded to the longest of a batch.

    Args:
        model: see `ImageTower`.
        processor: processor or tokenizer of the model.
        texts: n of them.

    Returns:
        ``(n, D)`` float32 of length 1, on the model's device.

    Raises:
        UnsupportedModelError: the model has no two towers. TokenPruneError: the processor is one for images alone.
    """
    from transformers.image_processing_base import ImageProcessingMixin

    two_towers = _two_towers(model)
    if isinstance(processor, ImageProcessingMixin):
        raise TokenPruneError(
            f"{type(processor).__name__} reads no text; pass AutoProcessor.from_pretrained(the model's path)"
        )
    config = two_towers.config
    batches = []
    with eval_mode(model), torch.no_grad():
        for start in range(0, len(texts), _TEXTS):
            tokens = processor(
                text=list(texts[start : start + _TEXTS]),
                padding="max_length" if "siglip" in config.model_type else True,
                truncation=True,
                max_length=config.text_config.max_position_embeddings,
                return_tensors="pt",
            )
            batches.append(_unit(two_towers.get_text_features(**tokens.to(two_towers.device))))
    return torch.cat(batches)


def zero_shot_classifier(
    model: nn.Module,
    processor: Callable[..., Any],
    class_names: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
) -> Tensor:
    """Embed classes as CLIP does (Radford et al., arXiv 2103.00020, section 3.1.4): a class is the normalised mean of
    the normalised embeddings of its name in every template.

    Args:
        model: see `ImageTower`.
        processor: processor or tokenizer of the model.
        class_names: C different ones, in the order of the labels.
        templates: texts with ``{}`` where the name goes.

    Returns:
        ``(C, D)`` float32 of length 1, on the model's device.

    Raises:
        DataError: no class names, an empty one or one that comes twice; no templates, or one without ``{}``; the model
            cannot tell their texts apart.
        TokenPruneError: what `embed_texts` raises.
    """
    _check_class_names(class_names)
    _check_templates(templates)
    texts = [template.replace("{}", name) for name in class_names for template in templates]
    embeddings = embed_texts(model, processor, texts).unflatten(0, (len(class_names), len(templates)))
    classes = F.normalize(embeddings.mean(dim=1), dim=-1)
    if len(classes) > 1 and torch.allclose(classes, classes[:1], rtol=0.0, atol=1e-6):
        raise DataError(
            f"the texts of all {len(classes)} classes are one to the model, such as {shown(texts[0])}: shorter ones, "
            "or words that it knows, may differ: give others as templates= or class_names="
        )
    return classes


def similarity_to_classes(
    model: nn.Module, processor: Callable[..., Any], class_names: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """A two-tower model as a function from inputs of B images to (B, C) logits; see `zero_shot_classifier`."""
    classifier = SimilarityToClasses(model, zero_shot_classifier(model, processor, class_names, templates))
    return lambda inputs: classifier(**inputs)


def evaluate_zero_shot(
    model: nn.Module,
    images: ImageDataset,
    processor: Callable[..., Any],
    class_names: Sequence[str] | None,
    variants: Variants,
    templates: Sequence[str] = TEMPLATES,
    macs: Mapping[str, float] | None = None,
    batch_size: int = 32,
    accelerator: Any = None,
    progress: bool = True,
    processors: Mapping[str, Callable[..., Any]] | None = None,
) -> PairedReport:
    """Zero-shot classification with a two-tower model as it is, then within each variant, on the same images.

    Logits are cosines times the model's ``exp(logit_scale)``, and the KL is that of their softmax over the classes. For
    SigLIP, which is trained with a sigmoid, too: its ``logit_bias`` changes neither their order nor their softmax.
    ``images_per_second`` are those of the image tower; texts are embedded before, once.

    Args:
        model: see `ImageTower`.
        images: what `load_images` returns.
        processor: processor of the model, for images and texts: ``AutoProcessor.from_pretrained``.
        class_names: what to call the class of every label in a text; ``images.classes`` are the names of class folders.
        variants: name -> function that makes a context manager, in which ``model`` is changed: for example
            ``{"ToMe r=8": lambda: pruned(model, config)}``.
        templates: see `zero_shot_classifier`.

    The other arguments are those of `evaluate_paired`.

    Raises:
        DataError: class names or templates cannot be used, see `zero_shot_classifier`; labels do not fit them.
        TokenPruneError: what `embed_texts` and `evaluate_paired` raise.
    """
    if class_names is None:
        raise DataError(
            "class_names is None: the images do not say what their classes are called; give a name for every label, in "
            "their order, or put the images into a folder per class"
        )
    images, mapping = in_classes_of_texts(images, class_names)
    accelerator = accelerator or require("accelerate").Accelerator()
    place(model, accelerator)
    try:
        report = evaluate_paired(
            SimilarityToClasses(model, zero_shot_classifier(model, processor, class_names, templates)),
            images,
            processor,
            variants,
            macs=macs,
            batch_size=batch_size,
            accelerator=accelerator,
            progress=progress,
            processors=processors,
        )
    except InterruptedEvaluation as interrupt:
        interrupt.report = replace(interrupt.report, classes=mapping)
        raise
    return replace(report, classes=mapping)


def in_classes_of_texts(images: ImageDataset, class_names: Sequence[str]) -> tuple[ImageDataset, str | None]:
    """Labels by name; by number or place where the images call no class as the texts do (WordNet ids, say)."""
    names = dict(enumerate(class_names))
    known = images.classes is not None and any_is_known(images.classes, names)
    return in_classes_of(images, names if known else None)


def _two_towers(model: nn.Module) -> Any:
    parts = ("get_image_features", "get_text_features", "logit_scale")
    if lacking := [name for name in parts if not hasattr(model, name)]:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no {', '.join(lacking)}; load a model with an image and a text tower, with "
            "AutoModelForZeroShotImageClassification"
        )
    return model


def _unit(output: Any) -> Tensor:
    """Features in float32, of length 1. Transformers 5 returns them as the ``pooler_output`` of an output object."""
    features = output if isinstance(output, Tensor) else output.pooler_output
    return F.normalize(features.float(), dim=-1)


def _check_class_names(class_names: Sequence[str]) -> None:
    if isinstance(class_names, str) or len(class_names) == 0:
        raise DataError(f"class_names={class_names!r}: expected a sequence with a name for every class")
    if empty := [i for i, name in enumerate(class_names) if not isinstance(name, str) or not name.strip()]:
        raise DataError(f"class_names[{empty[0]}]={class_names[empty[0]]!r} is no text; name the class")
    if twice := [name for name, times in Counter(class_names).items() if times > 1]:
        raise DataError(
            f"class_names: {twice[0]!r} comes twice, so its classes cannot be told apart; describe each as only it is"
        )


def _check_templates(templates: Sequence[str]) -> None:
    if isinstance(templates, str) or len(templates) == 0:
        raise DataError(f"templates={templates!r}: expected a sequence of at least one text such as {TEMPLATES[0]!r}")
    for template in templates:
        if not isinstance(template, str) or "{}" not in template:
            raise DataError(f"template {template!r} has no {{}}; put it where the class name goes: {TEMPLATES[0]!r}")
