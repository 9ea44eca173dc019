"""The merging methods and their relatives once more, as plain loops over tokens in float64, from the papers' equations.

A result is a dictionary: each token that stays, with the weight of every token that its new state is made of. It is in
the order in which tokens go on.
"""

import math
from collections.abc import Callable

import torch

from hf_tokenprune.signals import Signals

Groups = dict[int, dict[int, float]]


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def mean_keys(signals: Signals, row: int) -> list[torch.Tensor]:
    """Of the prunable tokens: keys averaged over heads (ToMe, section 3)."""
    heads = signals.keys[row].double()
    return [sum(head[token] for head in heads) / len(heads) for token in range(signals.num_protected, heads.shape[1])]


def sizes_of(signals: Signals, row: int) -> list[float]:
    count = signals.tokens.shape[1] - signals.num_protected
    return [1.0] * count if signals.sizes is None else signals.sizes[row, signals.num_protected :].tolist()


def significance(signals: Signals, row: int) -> list[float]:
    """ATS, eq. 3 without its denominator: attention of CLS times the norm of the value, summed over heads."""
    attention, values = signals.cls_attention[row].double(), signals.values[row].double()
    heads, tokens = attention.shape
    return [
        sum(float(attention[h, t]) * math.sqrt(sum(float(x) ** 2 for x in values[h, t])) for h in range(heads))
        for t in range(signals.num_protected, tokens)
    ]


def mean_cosine(signals: Signals, row: int) -> Callable[[int, int], float]:
    """The cosine of the keys of two prunable tokens, head by head, and then the mean."""
    keys = signals.keys[row, :, signals.num_protected :].double()
    return lambda a, b: sum(cosine(head[a], head[b]) for head in keys) / len(keys)


def cosine_of_means(signals: Signals, row: int) -> Callable[[int, int], float]:
    """The cosine of keys that are averaged over heads before."""
    keys = mean_keys(signals, row)
    return lambda a, b: cosine(keys[a], keys[b])


def alternate_edges(signals: Signals, row: int, alike: Callable[[int, int], float]) -> list[tuple[int, int, float]]:
    """ToMe, section 3, steps 1 to 3: tokens go to A and B in turns; each of A draws one edge, to the most similar of B.

    All tokens of the sequence are dealt out, A first; protected ones then neither draw an edge nor are drawn to.
    """
    protected = signals.num_protected
    sequence = range(signals.tokens.shape[1])
    in_a = [place - protected for place in sequence if place % 2 == 0 and place >= protected]
    in_b = [place - protected for place in sequence if place % 2 == 1 and place >= protected]
    edges = []
    for a in in_a:
        best = max(in_b, key=lambda b: alike(a, b))
        edges.append((a, best, alike(a, best)))
    return edges


def averaged(pairs: list[tuple[int, int]], weights: list[float]) -> Groups:
    """Every first of a pair joins the second; a group's state is its weighted mean."""
    groups = {token: [token] for token in range(len(weights)) if token not in {a for a, _ in pairs}}
    for a, b in pairs:
        groups[b].append(a)
    return {
        token: {member: weights[member] / sum(weights[m] for m in members) for member in members}
        for token, members in groups.items()
    }


def in_new_order(groups: Groups, edges: list[tuple[int, int, float]]) -> Groups:
    """Step 5: the sets are concatenated back together, what is left of A in front (appendix D)."""
    in_a = {a for a, _, _ in edges}
    return {token: groups[token] for token in sorted(groups, key=lambda token: (token not in in_a, token))}


def naive_tome(signals: Signals, row: int, r: int) -> Groups:
    """Steps 4 and 5: the r most similar edges stay; connected tokens are averaged by size (section 3)."""
    edges = alternate_edges(signals, row, cosine_of_means(signals, row))
    chosen = sorted(edges, key=lambda edge: -edge[2])[:r]
    return in_new_order(averaged([(a, b) for a, b, _ in chosen], sizes_of(signals, row)), edges)


def contrast(signals: Signals, row: int) -> list[float]:
    """Softmax of minus the scaled product of key and mean key, times the norm of the value; summed; times the size."""
    protected = signals.num_protected
    keys, values = (part[row, :, protected:].double() for part in (signals.keys, signals.values))
    heads, count, width = keys.shape
    salience = [0.0] * count
    for h in range(heads):
        mean = sum(keys[h, t] for t in range(count)) / count
        powers = [math.exp(-float(keys[h, t] @ mean) / math.sqrt(width)) for t in range(count)]
        for t in range(count):
            salience[t] += powers[t] / sum(powers) * math.sqrt(sum(float(x) ** 2 for x in values[h, t]))
    return [s * size for s, size in zip(salience, sizes_of(signals, row), strict=True)]


def naive_salience_merge(
    signals: Signals, row: int, r: int, similarity: str = "per_head", salience_of: str = "cls"
) -> Groups:
    """The r edges of least s_a · (1 − cos) stay; connected tokens are averaged by s."""
    salience = {"cls": significance, "contrast": contrast}[salience_of](signals, row)
    edges = alternate_edges(
        signals, row, {"per_head": mean_cosine, "mean_key": cosine_of_means}[similarity](signals, row)
    )
    chosen = sorted(edges, key=lambda edge: salience[edge[0]] * (1 - edge[2]))[:r]
    return in_new_order(averaged([(a, b) for a, b, _ in chosen], salience), edges)


def naive_pitome(signals: Signals, row: int, k: int, margin: float) -> Groups:
    """The 2k tokens of greatest energy (eq. 4) are dealt out to A and B in that order; A joins B (Algorithm 1)."""
    keys = mean_keys(signals, row)
    count = len(keys)

    def alike(x: float) -> float:
        return x if x >= margin else math.exp(x - margin) - 1

    energy = [sum(alike(cosine(keys[i], keys[j])) for j in range(count) if j != i) / count for i in range(count)]
    mergeable = sorted(range(count), key=lambda i: -energy[i])[: 2 * k]
    in_a, in_b = mergeable[0::2], mergeable[1::2]
    return averaged([(a, max(in_b, key=lambda b: cosine(keys[a], keys[b]))) for a in in_a], sizes_of(signals, row))


def naive_evit(signals: Signals, row: int, keep_ratio: float, fuse: bool) -> Groups:
    """The k = ceil(κN) tokens that CLS attends to most (mean over heads); the others become Σ a_i x_i."""
    heads = signals.cls_attention[row].double()
    attention = [
        sum(float(head[t]) for head in heads) / len(heads) for t in range(signals.num_protected, heads.shape[1])
    ]
    k = math.ceil(keep_ratio * len(attention) - 1e-9)
    ranked = sorted(range(len(attention)), key=lambda i: -attention[i])
    groups: Groups = {i: {i: 1.0} for i in ranked[:k]}
    others = sorted(ranked[k:])
    if fuse and len(others) > 1:
        groups[others[0]] = {i: attention[i] for i in others}
    elif fuse and others:  # one token in place of one: nothing to gain, all stay
        groups[others[0]] = {others[0]: 1.0}
    return dict(sorted(groups.items()))


def naive_ats(signals: Signals, row: int, k: int, sampling: str) -> list[int]:
    """Positions that stay: the k most significant, or those that quantiles of the cumulative significance hit."""
    scores = significance(signals, row)
    ranked = sorted(range(len(scores)), key=lambda i: -scores[i])
    if sampling == "top_k":
        return sorted(ranked[:k])
    hit = set()
    for sample in range(1, k + 1):
        quantile = (2 * sample - 1) / (2 * k)
        cumulative = 0.0
        for token, score in enumerate(scores):
            cumulative += score / sum(scores)
            if cumulative >= quantile:
                hit.add(token)
                break
    for token in ranked:
        if len(hit) < k:
            hit.add(token)
    return sorted(hit)
