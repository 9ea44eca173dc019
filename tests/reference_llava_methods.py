"""The methods for vision-language models once more, as plain loops over tokens in float64, from the equations.

Everything is of one sample: no batch axis. Attention is a nested list or a tensor indexed [head][query][key].
"""

import math

import torch
from torch import Tensor


def cosine(a: Tensor, b: Tensor) -> float:
    norms = float(a.double().norm()) * float(b.double().norm())
    return float(a.double() @ b.double()) / norms if norms else 0.0


def naive_divprune(features: Tensor, n_keep: int) -> list[int]:
    """Algorithm 1 of DivPrune on (N, D): positions in the order of their choice."""
    tokens = range(len(features))
    distance = [[1 - cosine(features[i], features[j]) for j in tokens] for i in tokens]

    def farthest(pool: list[int], against: list[int]) -> int:
        nearest = [min((distance[i][j] for j in against if j != i), default=0.0) for i in pool]
        return pool[nearest.index(max(nearest))]

    chosen = [farthest(list(tokens), list(tokens))]
    while len(chosen) < n_keep:
        chosen.append(farthest([i for i in tokens if i not in chosen], chosen))
    return chosen


def naive_transition(before: Tensor, after: Tensor, counted: list[bool], absolute: bool) -> list[float]:
    """TTV of one half of a layer for (T, D): ratio of norms times softmax, over the counted tokens, of 1 − cos."""
    change = [cosine(x, y) for x, y in zip(before, after, strict=True)]
    weight = [math.exp(1 - (abs(d) if absolute else d)) if c else 0.0 for d, c in zip(change, counted, strict=True)]
    magnitude = [float(y.double().norm() / x.double().norm()) for x, y in zip(before, after, strict=True)]
    return [m * w / sum(weight) for m, w in zip(magnitude, weight, strict=True)]


def naive_guided(text_attention: Tensor, rows: list[int]) -> list[float]:
    """IGA of (H, R, N): mean over heads and over these rows."""
    heads, _, num_tokens = text_attention.shape
    return [
        sum(float(text_attention[h, r, i]) for h in range(heads) for r in rows) / (heads * len(rows))
        for i in range(num_tokens)
    ]


def naive_transprune(ttv: list[list[float]], guided: list[float], alpha: float, n_keep: int) -> list[int]:
    """Sum over layers, both terms as shares of their sum, alpha : 1 − alpha; ascending positions."""
    accumulated = [sum(layer[i] for layer in ttv) for i in range(len(guided))]
    scores = [
        alpha * t / sum(accumulated) + (1 - alpha) * g / sum(guided) for t, g in zip(accumulated, guided, strict=True)
    ]
    return best(scores, n_keep)


def naive_received(attention: Tensor, queries: range, columns: range) -> list[float]:
    """(H, T, T): attention that each column gets, mean over heads and queries."""
    heads = range(len(attention))
    count = len(heads) * len(queries)
    return [sum(float(attention[h, q, c]) for h in heads for q in queries) / count for c in columns]


def naive_visionzip(
    states: Tensor, scores: list[float], metric: Tensor, num_dominant: int, num_contextual: int
) -> tuple[list[int], list[int], list[Tensor]]:
    """Of (N, D) patches: the dominant ones, the targets, and what each target becomes."""
    dominant = best(scores, num_dominant)
    others = [i for i in range(len(states)) if i not in dominant]
    step = max(1, len(others) // num_contextual)
    targets = [others[place] for place in range(0, len(others), step)][:num_contextual]
    members: dict[int, list[int]] = {target: [] for target in targets}
    for i in others:
        if i not in targets:
            similarity = [cosine(metric[i], metric[target]) for target in targets]
            members[targets[similarity.index(max(similarity))]].append(i)
    merged = []
    for target, group in members.items():
        total = states[target].double()
        for i in group:
            total = total + states[i].double() / len(group)
        merged.append(total)
    return dominant, targets, merged


def best(scores: list[float], n_keep: int) -> list[int]:
    """Ascending positions of the highest scores; the lower position wins a tie."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:n_keep])


def rotary_causal_attention(
    states: Tensor, norm: Tensor, q_proj: Tensor, k_proj: Tensor, heads: int, eps: float = 1e-6, base: float = 1e4
) -> Tensor:
    """(H, L, L) attention of a Llama layer on (L, D): RMS norm, projections, rotary embedding, causal softmax."""
    x = states.double()
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm.double()
    length, width = x.shape
    d = width // heads
    frequency = base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    angle = torch.cat([angle, angle], -1)

    def project(weight: Tensor) -> Tensor:
        y = (x @ weight.double().T).view(length, heads, d).transpose(0, 1)
        turned = torch.cat([-y[..., d // 2 :], y[..., : d // 2]], -1)
        return y * angle.cos() + turned * angle.sin()

    logits = project(q_proj) @ project(k_proj).transpose(1, 2) / math.sqrt(d)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    return logits.masked_fill(future, -math.inf).softmax(-1)
