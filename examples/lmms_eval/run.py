"""lmms-eval with any checkpoint that has an adapter, pruned by any config: its own command line, with one more model.

    python examples/lmms_eval/run.py --model hf_tokenprune --tasks pope --batch_size 4 \\
        --model_args pretrained=llava-hf/llava-1.5-7b-hf,prune_config=divprune,keep_ratio=0.22

Arguments of the model are those of `TokenPruned` below. Needs ``pip install lmms-eval``; README.md beside this file has
the commands for the benchmarks of the papers.
"""

import sys

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from hf_tokenprune import PruneConfig, from_pretrained, list_methods, record
from hf_tokenprune.evaluation import interpolated_positions, resized

try:
    from accelerate import Accelerator
    from lmms_eval.api.model import lmms
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.models.registry_v2 import ModelManifest
except ImportError as error:
    sys.exit(f"{error}: pip install lmms-eval, 0.7 or later (see README.md in this folder)")


class TokenPruned(lmms):
    """A vision-language model, pruned, resized or dense. Batched, on every process of ``accelerate launch``.

    Args:
        pretrained: folder, or owner/name on the Hub.
        prune_config: a method, preset, prune_config.json or repository that holds one; None: dense.
        resize: share of the usual image tokens that the processor is to make, by fewer pixels.
        batch_size, device, dtype, attn_implementation: as usual.
        fields: of the config, where ``prune_config`` is a method, such as ``keep_ratio=0.22``.
    """

    is_simple = False  # takes messages for a chat template

    def __init__(
        self,
        pretrained: str,
        prune_config: str | None = None,
        resize: float | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        **fields: object,
    ) -> None:
        super().__init__()
        fields.pop("max_batch_size", None)  # which lmms-eval always gives
        if prune_config in list_methods("decoder"):
            prune_config = PruneConfig.for_method(prune_config, **fields)
        elif fields:
            raise ValueError(f"{', '.join(fields)}: fields of a config go with the name of a method as prune_config")
        load = {"dtype": dtype, **({"attn_implementation": attn_implementation} if attn_implementation else {})}
        self.accelerator = Accelerator(cpu=device == "cpu")
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device if self._world_size > 1 or device is None else torch.device(device)
        stock = AutoModelForImageTextToText.from_pretrained
        model = stock(pretrained, **load) if prune_config is None else from_pretrained(pretrained, prune_config, **load)
        self.model = model.to(self.device).eval()
        self.processor = AutoProcessor.from_pretrained(pretrained)
        if resize is not None:
            self.processor = resized(self.processor, resize)
            self.positions = interpolated_positions(self.model)
            self.positions.__enter__()  # for as long as the model lives
        self.batch_size, self.pruned, self.told = int(batch_size), prune_config is not None, False

    def generate_until(self, requests: list) -> list[str]:
        """Answers in the order of the requests; those of one task with the same settings share batches."""
        answers: dict[int, str] = {}
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            _, _, settings, _, task, split = request.args
            alike.setdefault(repr((task, split, settings)), []).append(number)
        with tqdm(total=len(requests), disable=self.rank != 0, desc="answer") as bar:
            for numbers in alike.values():
                for start in range(0, len(numbers), self.batch_size):
                    batch = numbers[start : start + self.batch_size]
                    answers.update(zip(batch, self.answer([requests[number].args for number in batch]), strict=True))
                    bar.update(len(batch))
        return [answers[number] for number in range(len(requests))]

    @torch.inference_mode()
    def answer(self, requests: list[tuple]) -> list[str]:
        """One batch."""
        settings = requests[0][2]
        chats = [messages(self.task_dict[task][split][doc]) for _, messages, _, doc, task, split in requests]
        images = [image for chat in chats for image in images_of(chat)]
        texts = [self.processor.apply_chat_template(for_template(chat), add_generation_prompt=True) for chat in chats]
        nested = [images_of(chat) for chat in chats] if images else None
        inputs = self.processor(images=nested, text=texts, padding=True, padding_side="left", return_tensors="pt")
        inputs = inputs.to(self.device, self.model.dtype)
        sampled = bool(settings.get("do_sample", (settings.get("temperature") or 0) > 0))
        known = {"max_new_tokens": settings.get("max_new_tokens", 1024), "num_beams": settings.get("num_beams", 1)}
        if sampled:
            known |= {name: settings[name] for name in ("temperature", "top_p") if settings.get(name) is not None}
        if self.pruned and images and not self.told:
            with record(self.model) as rec:
                tokens = self.model.generate(**inputs, do_sample=sampled, **known)
            self.tell(inputs["input_ids"], rec)
        else:
            tokens = self.model.generate(**inputs, do_sample=sampled, **known)
        texts = self.processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [cut(text, settings.get("until")) for text in texts]

    def tell(self, ids: torch.Tensor, rec: object) -> None:
        """What is left of the image tokens of the first prompt: so that nobody measures a model that is not pruned."""
        self.told = True
        usual = int((ids[0] == self.model.config.image_token_id).sum())
        left = {place: int((kept[0] >= 0).sum()) for place, kept in rec.kept.items()}
        print(f"image tokens of the first prompt: {usual} -> {left}", file=sys.stderr)

    def loglikelihood(self, requests: list) -> list:
        raise NotImplementedError("tasks that compare likelihoods are not supported; take those that generate answers")

    def generate_until_multi_round(self, requests: list) -> list:
        raise NotImplementedError("tasks of several rounds are not supported; take those with one question")


def images_of(chat: list[dict]) -> list[Image.Image]:
    """Images of a chat, in their order; nothing else that one can look at or listen to."""
    parts = [part for message in chat for part in message["content"] if part["type"] != "text"]
    if other := {part["type"] for part in parts} - {"image"}:
        raise NotImplementedError(f"tasks with {', '.join(sorted(other))} are not supported; take those with images")
    images = [Image.open(part["url"]) if isinstance(part["url"], str) else part["url"] for part in parts]
    return [image.convert("RGB") for image in images]


def for_template(chat: list[dict]) -> list[dict]:
    """The chat as templates of Transformers take it: places of the images, without these."""
    content = [[part if part["type"] == "text" else {"type": "image"} for part in turn["content"]] for turn in chat]
    return [{"role": turn["role"], "content": parts} for turn, parts in zip(chat, content, strict=True)]


def cut(text: str, until: str | list[str] | None) -> str:
    """Up to the first of the texts that end an answer; not an empty line, which tasks get that name none."""
    for end in {until} if isinstance(until, str) else set(until or ()):
        text = text.split(end)[0] if end.strip() else text
    return text.strip()


MODEL_REGISTRY_V2.register_manifest(
    ModelManifest(model_id="hf_tokenprune", chat_class_path=f"{__name__}.TokenPruned"), overwrite=True
)

if __name__ == "__main__":
    from lmms_eval.__main__ import cli_evaluate

    cli_evaluate()
