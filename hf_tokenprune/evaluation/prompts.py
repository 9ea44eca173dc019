"""What a vision-language model is given with a question, and how many tokens that is."""

from collections.abc import Callable
from typing import Any

from hf_tokenprune.errors import TokenPruneError
from hf_tokenprune.evaluation.questions import QuestionDataset


def mean_text_tokens(model: Any, questions: QuestionDataset, processor: Any, prompt: str | None = None) -> int:
    """Mean number of tokens of the prompts besides those of the image, rounded; for ``cost(..., text_tokens=...)``.

    Text that the processor puts between the tokens of an image is counted as it is in the first prompt.
    """
    prompt_of, image = prompts(processor, prompt), model.config.image_token_id

    def of_text(ids: list[int]) -> int:
        return sum(token != image for token in ids)

    counts = [of_text(row) for row in processor.tokenizer([*map(prompt_of, questions.questions)]).input_ids]
    first = processor(images=[questions[0]["image"]], text=[prompt_of(questions[0]["question"])])
    return round(sum(counts) / len(counts)) + of_text(first["input_ids"][0]) - counts[0]


def prompts(processor: Any, prompt: str | None) -> Callable[[str], str]:
    """The function from a question to what the model is given; see `collect_answers`.

    Raises:
        TokenPruneError: a processor without a chat template and no ``prompt``, or one without ``{}``.
    """
    if prompt is not None:
        if "{}" not in prompt:
            raise TokenPruneError(f"prompt {prompt!r} has no {{}}; put it where the question goes")
        return lambda question: prompt.replace("{}", question)
    if getattr(processor, "chat_template", None) is None:
        raise TokenPruneError(
            f"{type(processor).__name__} has no chat template; give prompt, such as 'USER: <image>\\n{{}} ASSISTANT:'"
        )

    def ask(question: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        turn = [{"role": "user", "content": content}]
        return str(processor.apply_chat_template(turn, add_generation_prompt=True))

    return ask
