"""Methods that choose by coverage and diversity once more, as plain loops over tokens in float64, from the equations.

Everything is of one sample: no batch axis. A tie goes to the lower position.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .reference_llava_methods import cosine

Matrix = list[list[float]]


def cosine_matrix(features: Tensor, others: Tensor | None = None) -> Matrix:
    return [[cosine(x, y) for y in (features if others is None else others)] for x in features]


def greedy(num_tokens: int, n_keep: int, score: Callable[[int, list[int]], float]) -> list[int]:
    """``n_keep`` tokens, each the one of the highest ``score(token, chosen before)``."""
    chosen: list[int] = []
    while len(chosen) < n_keep:
        pool = [token for token in range(num_tokens) if token not in chosen]
        chosen.append(max(pool, key=lambda token: score(token, chosen)))
    return chosen


def brought_to_one(values: Sequence[float]) -> list[float]:
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 1.0 for value in values]


# -- Cen-Prune -------------------------------------------------------------------------------------------------------


def naive_consistency(features: Tensor) -> list[float]:
    """g: minus the mean cosine with the other tokens."""
    similar = cosine_matrix(features)
    tokens = range(len(features))
    return [-sum(similar[i][j] for j in tokens if j != i) / max(len(tokens) - 1, 1) for i in tokens]


def naive_centred(features: Tensor) -> Tensor:
    return features.double() - features.double().mean(0)


def naive_standardized(features: Tensor) -> Tensor:
    """Every dimension divided by its deviation over the tokens, not centred."""
    return features.double() / features.double().std(0, correction=0)


def naive_z_weight(consistency: list[float]) -> list[float]:
    values = torch.tensor(consistency, dtype=torch.float64)
    return torch.sigmoid((values - values.mean()) / values.std(correction=0)).tolist()


def naive_max_min(features: Tensor, n_keep: int, weight: list[float]) -> list[int]:
    """First the token whose nearest neighbour is farthest, then by weight times the distance to the nearest chosen."""
    similar = cosine_matrix(features)

    def score(token: int, chosen: list[int]) -> float:
        if not chosen:
            return min(1 - similar[token][j] for j in range(len(features)) if j != token)
        return weight[token] * min(1 - similar[token][j] for j in chosen)

    return greedy(len(features), n_keep, score)


# -- SCOPE and MMTok ---------------------------------------------------------------------------------------------------


def covered(cover: Matrix, chosen: Sequence[int]) -> float:
    """How much of all rows the chosen tokens cover; ``cover[token][row]``."""
    return sum(max([0.0, *(cover[token][row] for token in chosen)]) for row in range(len(cover[0])))


def naive_coverage(cover: Matrix, n_keep: int, saliency: Sequence[float] | None = None) -> list[int]:
    def score(token: int, chosen: list[int]) -> float:
        gain = covered(cover, [*chosen, token]) - covered(cover, chosen)
        return gain if saliency is None else gain * saliency[token]

    return greedy(len(cover), n_keep, score)


def softmax(values: list[float], temperature: float) -> list[float]:
    weights = [math.exp((value - max(values)) / temperature) for value in values]
    return [weight / sum(weights) for weight in weights]


def naive_mmtok_rows(
    visual: Tensor, tower: Tensor, text: Tensor, tau_text: float = 0.02, tau_image: float = 0.2, alpha: float = 0.5
) -> Matrix:
    """``cover[token][row]``: rows of text, then of the image."""
    rows = [[p / len(text) for p in softmax(row, tau_text)] for row in cosine_matrix(text, visual)]
    rows += [[alpha * p / len(tower) for p in softmax(row, tau_image)] for row in cosine_matrix(tower)]
    return [[row[token] for row in rows] for token in range(len(visual))]


# -- CDPruner --------------------------------------------------------------------------------------------------------


def naive_relevance(features: Tensor, text: Tensor) -> list[float]:
    return [-sum(row) / len(row) if row else 0.0 for row in cosine_matrix(features, text)]


def naive_dpp(features: Tensor, n_keep: int, weight: list[float]) -> list[int]:
    """Each step by the determinant of the kernel of all that is then chosen, worked out anew."""
    w = torch.tensor(weight, dtype=torch.float64)
    kernel = w[:, None] * torch.tensor(cosine_matrix(features), dtype=torch.float64) * w

    def score(token: int, chosen: list[int]) -> float:
        index = torch.tensor([*chosen, token])
        return float(torch.linalg.det(kernel[index][:, index]))

    return greedy(len(features), n_keep, score)
