"""DART, SparseVLM, HiPrune and VisPruner once more, as plain loops over tokens in float64, from the equations.

Everything is of one sample: no batch axis. Positions that leave are taken out of lists, so nothing is chosen twice.
"""

import math

from torch import Tensor

from .reference_llava_methods import best, cosine


def ranked(scores: list[float]) -> list[int]:
    """Positions from the highest score to the lowest; the lower position wins a tie."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def naive_dart(
    tokens: Tensor, norms: list[float], text: Tensor, text_norms: list[float], n_keep: int, pivots: tuple[int, int]
) -> list[int]:
    """(N, D) image tokens and (R, D) rows of text, with the L1 norms of their keys: positions in their order."""
    kept = ranked(norms)[: min(pivots[0], n_keep)]
    of_all = [(norms[i], tokens[i]) for i in kept] + [(text_norms[r], text[r]) for r in ranked(text_norms)[: pivots[1]]]
    turns = [of_all[p][1] for p in ranked([norm for norm, _ in of_all])]
    pool = [i for i in range(len(tokens)) if i not in kept]
    for turn in range(n_keep - len(kept)):
        pivot = turns[turn % len(turns)]
        likeness = [cosine(tokens[i], pivot) for i in pool]
        kept.append(pool.pop(likeness.index(min(likeness))))
    return kept


def naive_relevance(images: Tensor, text: Tensor) -> list[float]:
    """(N, D) and (R, D) embeddings: the mean over images of the softmax over the text of inner products."""
    shares = [0.0] * len(text)
    for image in images.double():
        weights = [math.exp(float(image @ word)) for word in text.double()]
        shares = [share + weight / sum(weights) / len(images) for share, weight in zip(shares, weights, strict=True)]
    return shares


def naive_raters(relevance: list[float]) -> list[int]:
    """Those above the mean; all of them where none is."""
    mean = sum(relevance) / max(len(relevance), 1)
    return [r for r, value in enumerate(relevance) if value > mean] or list(range(len(relevance)))


def naive_rated(attention: Tensor, rows: list[int], num_heads: int) -> list[float]:
    """(H, R, N): mean over these rows and over the heads in which they attend to the image most."""
    heads = best([sum(float(x) for r in rows for x in attention[h, r]) for h in range(len(attention))], num_heads)
    columns = range(attention.shape[2])
    return [sum(float(attention[h, r, i]) for h in heads for r in rows) / (len(heads) * len(rows)) for i in columns]


def naive_clusters(states: Tensor, num_clusters: int) -> dict[int, list[int]]:
    """DPC-kNN over (m, D): the members of each centre, centres in the order of their choice."""
    tokens = range(len(states))
    x = states.double()
    distance = [[float((x[i] - x[j]).norm()) / math.sqrt(x.shape[1]) for j in tokens] for i in tokens]
    density = []
    for row in distance:
        nearest = sorted(row)[:5]
        density.append(math.exp(-sum(d * d for d in nearest) / len(nearest)))
    farthest = max(map(max, distance))
    apart = [min([distance[i][j] for j in tokens if density[j] > density[i]] or [farthest]) for i in tokens]
    centres = ranked([density[i] * apart[i] for i in tokens])[:num_clusters]
    members: dict[int, list[int]] = {centre: [centre] for centre in centres}
    for i in tokens:
        if i not in centres:
            near = [distance[i][centre] for centre in centres]
            members[centres[near.index(min(near))]].append(i)
    return members


def naive_hiprune(objects: list[float], deep: list[float], n_keep: int, alpha: float, columns: int) -> list[int]:
    """Anchors, then their neighbours, then the rest, the last two by the deep block: ascending positions."""
    last = len(objects) - 1
    kept = ranked(objects)[: round(n_keep * alpha / 5)]
    around = {min(max(anchor + step, 0), last) for anchor in kept for step in (-1, 1, -columns, columns)}
    by_depth = ranked(deep)
    for group in ([i for i in by_depth if i in around], by_depth):
        kept += [i for i in group if i not in kept]
    return sorted(kept[:n_keep])


def naive_vispruner(features: Tensor, attention: list[float], n_keep: int, important: float) -> list[int]:
    """By attention, then rounds in which those of the even places that are most like one of the odd places leave."""
    order = ranked(attention)
    count = math.floor(n_keep * important + 1e-9)
    kept, rest = order[:count], order[count:]
    while count < n_keep < count + len(rest):
        even, odd = rest[::2], rest[1::2]
        nearest = [max(cosine(features[i], features[j]) for j in odd) for i in even]
        places = ranked(nearest)[min(8, count + len(rest) - n_keep) :]
        rest = [even[place] for place in places] + odd
    return sorted((kept + rest)[:n_keep])
