"""Multiply-adds (MACs) and cache of a vision-language model that answers a prompt with one image, from its sizes alone.

Counted are matrix products only: the vision tower (all its tokens, unless its blocks are pruned) and the projector (all
its tokens: what is chosen in the tower leaves behind it), the decoder layers, and the language modelling head for each
token that is generated. A decoder layer with n tokens before K keys, H query and h key heads of width d, model width D
and MLP width M costs
``n·(2·D·H·d + 2·D·h·d + 3·D·M) + 2·n·K·H·d``. The prompt has n = K: its causal attention counts as a full square, like
PyTorch's counter and the papers do. Of a layer with experts the router counts, and the experts that one token is sent
to. A recurrent layer counts its projections, and three products of each token with its state (what it holds for a key
is read, then corrected, and read for the query), however a kernel arranges them; the state is no part of the cache.
Choosing the tokens is not counted; ``hf-tokenprune bench`` measures it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..engine import counts
from ..signals import DecoderShape, Stage
from .vision import BlockCost, model_cost

TEXT_TOKENS = 64
NEW_TOKENS = 32
COUNTED = (
    "vision tower + projector + layers + head, matrix products only, causal attention as a full square; choosing the "
    "tokens is not counted"
)


@dataclass(frozen=True)
class GenerationCost:
    """MACs of one sample: a prompt with one image, and the tokens generated behind it.

    Attributes:
        vision_tower: of all crops of the image.
        projector: of all their features.
        layers: prefill of every decoder layer, with its tokens (text included).
        head: logits of one token; prefill needs those of the last one only.
        decode_steps: forwards behind the prefill, one for each new token but the first.
        decode_macs: of all of these together.
        kv_bytes: keys and values that the cache holds at the end; recurrent layers have none.
    """

    vision_tower: int
    projector: int
    layers: tuple[BlockCost, ...]
    head: int
    decode_steps: int
    decode_macs: int
    kv_bytes: int

    @property
    def macs(self) -> int:
        """Prefill: all that happens before the first new token."""
        return self.vision_tower + self.projector + sum(layer.macs for layer in self.layers) + self.head

    @property
    def decode_macs_per_token(self) -> float:
        """Mean over the decode steps."""
        return self.decode_macs / self.decode_steps


@dataclass(frozen=True)
class GenerationCostReport:
    """Dense beside pruned, for one sample: ``text_tokens`` tokens and one image in, ``new_tokens`` out.

    Attributes:
        image_tokens: of the image, in front of the first layer of the dense model.
        image_size: (height, width) in pixels that it has; None: one that is cut into two rows and columns of crops.
    """

    dense: GenerationCost
    pruned: GenerationCost
    text_tokens: int
    new_tokens: int
    image_tokens: int
    image_size: tuple[int, int] | None

    @property
    def image(self) -> str:
        """The image, in words."""
        size = "" if self.image_size is None else " of {}x{} pixels".format(*self.image_size)
        return f"one image{size} ({self.image_tokens} tokens)"

    @property
    def prompt(self) -> str:
        """What is counted, in words."""
        return f"{self.image} and {self.text_tokens} text tokens in, {self.new_tokens} new tokens out"

    @property
    def ratio(self) -> float:
        """Fraction of the dense prefill MACs that is left."""
        return self.pruned.macs / self.dense.macs

    @property
    def ideal_speedup(self) -> float:
        """Of the prefill, vision tower and head included, if time followed work: dense MACs over pruned MACs."""
        return self.dense.macs / self.pruned.macs

    @property
    def decode_ratio(self) -> float:
        """Fraction of the dense decode MACs that is left."""
        return self.pruned.decode_macs / self.dense.decode_macs

    @property
    def kv_ratio(self) -> float:
        """Fraction of the dense cache that is left."""
        return self.pruned.kv_bytes / self.dense.kv_bytes

    def to_dict(self) -> dict[str, Any]:
        """JSON values: MACs and bytes of both models, their ratios, and the tokens that enter each decoder layer."""
        return {
            "dense_macs": self.dense.macs,
            "pruned_macs": self.pruned.macs,
            "ratio": self.ratio,
            "ideal_speedup": self.ideal_speedup,
            "dense_tower_macs": self.dense.vision_tower,
            "pruned_tower_macs": self.pruned.vision_tower,
            "dense_decode_macs_per_token": self.dense.decode_macs_per_token,
            "pruned_decode_macs_per_token": self.pruned.decode_macs_per_token,
            "decode_ratio": self.decode_ratio,
            "dense_kv_bytes": self.dense.kv_bytes,
            "pruned_kv_bytes": self.pruned.kv_bytes,
            "kv_ratio": self.kv_ratio,
            "text_tokens": self.text_tokens,
            "new_tokens": self.new_tokens,
            "image_tokens": self.image_tokens,
            "image_size": self.image_size and list(self.image_size),
            "tokens_in": [layer.tokens_in for layer in self.pruned.layers],
            "tokens_out": self.pruned.layers[-1].tokens_out,
            "counted": COUNTED,
        }

    def summary(self) -> str:
        """A table with a row for each part of the prefill, and the totals of prefill, decode and cache."""
        rows = [f"{'part':<14}{'tokens in':>10}{'out':>6}{'dense GMACs':>13}{'pruned GMACs':>14}"]

        def row(name: str, tokens: tuple[Any, Any], dense: int, pruned: int) -> None:
            rows.append(f"{name:<14}{tokens[0]:>10}{tokens[1]:>6}{dense / 1e9:>13.4f}{pruned / 1e9:>14.4f}")

        row("vision tower", ("", ""), self.dense.vision_tower, self.pruned.vision_tower)
        row("projector", ("", ""), self.dense.projector, self.pruned.projector)
        for i, (dense, pruned) in enumerate(zip(self.dense.layers, self.pruned.layers, strict=True)):
            row(f"layer {i}", (pruned.tokens_in, pruned.tokens_out), dense.macs, pruned.macs)
        row("head", ("", ""), self.dense.head, self.pruned.head)
        rows.append(f"{'total':<14}{'unit':>16}{'dense':>13}{'pruned':>14}{'ratio':>7}")
        for name, unit, whole, left in (
            ("prefill", "GMACs", self.dense.macs / 1e9, self.pruned.macs / 1e9),
            (
                "decode",
                "MMACs a token",
                self.dense.decode_macs_per_token / 1e6,
                self.pruned.decode_macs_per_token / 1e6,
            ),
            ("KV cache", "MiB", self.dense.kv_bytes / 2**20, self.pruned.kv_bytes / 2**20),
        ):
            rows.append(f"{name:<14}{unit:>16}{whole:>13.4f}{left:>14.4f}{left / whole:>7.3f}")
        rows.append(f"ideal speed-up of the prefill {self.ideal_speedup:.2f}x ({COUNTED})")
        rows.append(self.prompt)
        behind = [layer.tokens_out - self.text_tokens for layer in self.pruned.layers]
        entering = self.pruned.layers[0].tokens_in - self.text_tokens
        rows.append("image tokens " + " -> ".join(map(str, dict.fromkeys([self.image_tokens, entering, *behind]))))
        return "\n".join(rows)


def generation_cost(
    shape: DecoderShape,
    stages: tuple[Stage, ...] = (),
    *,
    tower: tuple[Stage, ...] = (),
    text_tokens: int = TEXT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    element_size: int = 2,
) -> GenerationCost:
    """MACs and cache of one sample through a model of this shape.

    Tokens that a method keeps in the vision tower all count, also those of filling that is cut off behind it where an
    image does not fit its crops.

    Args:
        stages: pruning points; none for the dense model.
        tower: those in the blocks of the vision tower, whose output has its full length again.
        text_tokens: tokens of the prompt that are not of its one image.
        new_tokens: tokens to generate, at least 2.
        element_size: bytes of one number in the cache.
    """
    inner, key_inner = shape.num_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    # Crops lose their filling and get newline tokens behind the projector; elsewhere its features are the image tokens.
    features = shape.tower_images * shape.tower.num_patches if shape.newline_tokens else shape.image_tokens
    kept = {stage.layer: n_keep for stage, _, n_keep in counts(stages, shape)}

    layers = []
    entering = kept.get(-1, shape.image_tokens)
    for layer in range(shape.depth):
        left = kept.get(layer, entering)
        tokens = entering + text_tokens
        layers.append(BlockCost(tokens, left + text_tokens, layer_macs(shape, layer, tokens)))
        entering = left

    head, steps = shape.width * shape.vocab_size, new_tokens - 1
    attends = [layer for i, layer in enumerate(layers) if i not in shape.recurrent]
    held = sum(layer.tokens_in for layer in attends)  # a layer's cache has what entered it
    keys = steps * held + len(attends) * steps * (steps + 1) // 2  # that all decode steps see, their own token included
    per_token = sum(token_macs(shape, layer) for layer in range(shape.depth))
    return GenerationCost(
        vision_tower=shape.tower_images * model_cost(shape.tower, tower).macs,
        projector=features * shape.projector_macs,
        layers=tuple(layers),
        head=head,
        decode_steps=steps,
        decode_macs=steps * (per_token + head) + 2 * keys * inner,
        kv_bytes=2 * key_inner * (held + len(attends) * steps) * element_size,
    )


def token_macs(shape: DecoderShape, layer: int) -> int:
    """Of one token in a decoder layer, without its products with other tokens."""
    if shape.token_macs:
        return shape.token_macs[layer]
    inner, key_inner = shape.num_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    return 2 * shape.width * (inner + key_inner) + 3 * shape.width * shape.mlp_width


def layer_macs(shape: DecoderShape, layer: int, num_tokens: int) -> int:
    """Of a decoder layer in the prefill of so many tokens."""
    pairs = 0 if layer in shape.recurrent else num_tokens**2
    return num_tokens * token_macs(shape, layer) + 2 * pairs * shape.num_heads * shape.head_dim
