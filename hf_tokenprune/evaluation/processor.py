"""The image processor of a checkpoint."""

import os
from typing import Any

from hf_tokenprune.errors import DataError


def load_processor(path_or_repo: str | os.PathLike[str]) -> Any:
    """``AutoImageProcessor.from_pretrained``, also where Transformers 5.17 asks for torchvision without needing it.

    Raises:
        DataError: the checkpoint has no image processor.
        ImportError: it has one that really needs torchvision.
    """
    import transformers
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        try:
            return transformers.AutoImageProcessor.from_pretrained(path_or_repo)
        except ImportError:
            settings = ImageProcessingMixin.get_image_processor_dict(path_or_repo)[0]
            name = settings.get("image_processor_type") or settings.get("feature_extractor_type") or ""
            name = name.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast")
            with_pillow = getattr(transformers, f"{name}Pil", None)
            if with_pillow is None:
                raise
            return with_pillow.from_pretrained(path_or_repo)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{str(path_or_repo)!r} has no image processor ({error}); add a preprocessor_config.json"
        ) from error
