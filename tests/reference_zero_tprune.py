"""Zero-TPrune once more, as plain loops over tokens in float64, straight from the published equations."""

import math

import torch

from hf_tokenprune.methods.zero_tprune import ZeroTPruneStage
from hf_tokenprune.signals import Signals


def naive_page_rank(graph: torch.Tensor, rounds: int, cls_boost: bool) -> torch.Tensor:
    """Algorithm 1 on one head: ``graph`` (n, n), row i is what node i votes for. Returns (n,)."""
    n = len(graph)
    scores = [1 / n] * n
    if cls_boost:
        scores[0] *= math.sqrt(n)
    for _ in range(rounds):
        scores = [sum(float(graph[i, j]) * scores[i] for i in range(n)) for j in range(n)]
    return torch.tensor(scores, dtype=torch.float64)


def naive_importance(graphs: torch.Tensor, rounds: int, cls_boost: bool, protected: int, variance_range) -> list[float]:
    """All heads of one image: (H, n, n) -> importance of the prunable nodes."""
    heads = [naive_page_rank(graph, rounds, cls_boost)[protected:].tolist() for graph in graphs]
    if variance_range is not None:
        chosen = []
        for scores in heads:
            mean = sum(scores) / len(scores)
            variance = sum((s / mean - 1) ** 2 for s in scores) / len(scores)
            if variance_range[0] <= variance <= variance_range[1]:
                chosen.append(scores)
        heads = chosen or heads
    return [math.sqrt(sum(scores[i] ** 2 for scores in heads) / len(heads)) for i in range(len(heads[0]))]


def naive_similarity(a: torch.Tensor, b: torch.Tensor, metric: str) -> float:
    if metric == "cosine":
        return float(a @ b / (a.norm() * b.norm()))
    if metric == "dot":
        return float(a @ b)
    order = {"manhattan": 1, "euclidean": 2, "chebyshev": math.inf}.get(metric) or int(metric[-1])
    return -float(torch.linalg.vector_norm(a - b, order))


def naive_kept(signals: Signals, row: int, stage: ZeroTPruneStage) -> list[int]:
    """Positions among the prunable tokens that I' → S → I keeps for one image."""
    config, protected = stage.config, signals.num_protected
    graphs = torch.cat(signals.attention)[row].double()
    boost = config.cls_boost and signals.has_cls
    count = graphs.shape[-1] - protected

    # I': rank
    scores = naive_importance(graphs, 1, boost, protected, config.head_variance_range)
    ranked = sorted(range(count), key=lambda i: -scores[i])

    # S: partition, match, drop
    half = count // 2
    partners = {
        "sequential_unimportant": ranked[:half],
        "sequential_important": ranked[count - half :],
        "alternate": ranked[: 2 * half : 2],
        "none": None,
    }[config.partition]
    features = naive_features(signals, row, config.similarity_feature)
    match: dict[int, float] = {}
    for place, i in enumerate(ranked):
        others = ranked[:place] if partners is None else [] if i in partners else partners
        if others:
            match[i] = max(naive_similarity(features[i], features[j], config.similarity_metric) for j in others)
    num_similar = min(stage.num_similar, count - half)
    dropped = sorted(match, key=lambda i: -match[i])[:num_similar]
    left = [i for i in range(count) if i not in dropped]

    # I: rank what is left by its own graph
    nodes = list(range(protected)) + [i + protected for i in left]
    graphs = graphs[:, nodes][:, :, nodes]
    if config.renormalize:
        graphs = graphs / graphs.sum(-1, keepdim=True)
    scores = naive_importance(graphs, stage.num_iterations, boost, protected, config.head_variance_range)
    n_keep = max(1, math.floor(len(left) * stage.keep_ratio + 1e-9))
    best = sorted(range(len(left)), key=lambda i: -scores[i])[:n_keep]
    return sorted(left[i] for i in best)


def naive_features(signals: Signals, row: int, feature: str) -> torch.Tensor:
    if feature in ("input", "output"):
        states = (signals.inputs if feature == "input" else signals.tokens)[row]
    else:
        heads = {"query": signals.queries, "value": signals.values}.get(feature, signals.keys)[row]
        states = heads.mean(0) if feature == "key_mean" else torch.cat(list(heads), dim=-1)
    return states[signals.num_protected :].double()
