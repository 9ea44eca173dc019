"""VidCom² and EVS: official programs, equations in loops, and what must hold for any video."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_tokenprune.adapters.decoder._images import ImageTokens
from hf_tokenprune.adapters.decoder._layout import NEWLINE, read_layout
from hf_tokenprune.methods.evs import EvsStage, dissimilarity
from hf_tokenprune.methods.vidcom2 import VidCom2Stage, shares, similarities
from hf_tokenprune.methods.videowise import VideoStage
from hf_tokenprune.signals import Signals

from .golden_vlm import CASES, VALUES, case_names, inputs, needs_golden

METHODS: dict[str, type[VideoStage]] = {"evs": EvsStage, "vidcom2": VidCom2Stage}


def stage_of(method: str, keep_ratio: float) -> VideoStage:
    return METHODS[method](-1, "entrance", keep_ratio)


def kept(method: str, videos: Tensor, keep_ratio: float) -> Tensor:
    """(B, k): what a method keeps of ``videos`` (B, F, P, D)."""
    stage, (frames, per_frame) = stage_of(method, keep_ratio), videos.shape[1:3]
    tokens = videos.flatten(1, 2)
    signals = Signals(tokens, tokens, num_protected=0, has_cls=False, frames=frames)
    return stage.reduce(signals, stage.num_kept_of(frames * per_frame, frames)).keep


def golden(method: str, case: str) -> tuple[Tensor, float]:
    """((1, F, P, D) video, fraction kept) of a case."""
    spec = CASES[method][case]
    video = torch.tensor(inputs(method, case)["x"]).view(1, spec["frames"], -1, spec["d"])
    return video, spec["ratio"] if "ratio" in spec else 1 - spec["q"]


def videos(batch: int, frames: int, per_frame: int, width: int = 12, seed: int = 0) -> Tensor:
    return torch.randn(batch, frames, per_frame, width, generator=torch.Generator().manual_seed(seed))


# -- official programs and equations ---------------------------------------------------------------------------------


@needs_golden
@pytest.mark.parametrize("case", case_names("vidcom2"))
def test_vidcom2_keeps_what_the_equations_and_the_programs_do(case: str) -> None:
    video, ratio = golden("vidcom2", case)
    of_video, of_frame = similarities(video)
    for name, value in (("video", of_video), ("frame", of_frame), ("shares", shares(of_video, ratio))):
        np.testing.assert_allclose(value[0], VALUES[f"vidcom2_{case}_{name}"], atol=1e-5)
    found = kept("vidcom2", video, ratio)[0]
    assert VALUES[f"vidcom2_{case}_exact_firm"] == 1
    assert np.array_equal(found, VALUES[f"vidcom2_{case}_exact"])
    assert np.array_equal(found, VALUES[f"vidcom2_{case}_exact_official"]) or case == "same"  # ties: no stable order


@needs_golden
@pytest.mark.parametrize("case", case_names("evs"))
def test_evs_keeps_what_the_equations_and_the_program_do(case: str) -> None:
    video, ratio = golden("evs", case)
    found, score = kept("evs", video, ratio)[0], dissimilarity(video).flatten()
    expected = torch.tensor(VALUES[f"evs_{case}_dissimilarity"])
    seen = score.isfinite()
    assert torch.equal(~seen, expected == 255)
    torch.testing.assert_close(score[seen], expected[seen], atol=1e-6, rtol=0)
    assert len(found) == len(VALUES[f"evs_{case}_keep"])
    if VALUES[f"evs_{case}_keep_firm"]:
        assert np.array_equal(found, VALUES[f"evs_{case}_keep"])
        assert np.array_equal(found, VALUES[f"evs_{case}_keep_official"])
    else:
        assert set((expected > 0.001).nonzero().flatten().tolist()) <= set(found.tolist())


@needs_golden
@pytest.mark.parametrize("method", METHODS)
def test_counts_are_those_of_the_serving_program(method: str) -> None:
    for per_frame, frames, pruned, count in VALUES[f"{method}_counts_official"].tolist():
        stage = stage_of(method, 1 - round(pruned, 6))  # stored as float32
        assert stage.num_kept_of(int(per_frame * frames), int(frames)) == count


@needs_golden
def test_newlines_between_rows_of_frames_stay() -> None:
    """What two frames of 3 × 3 keep, as places among rows that end with a newline each."""
    newlines = tuple(range(3, 24, 4))
    told = [ImageTokens(24, newlines, parts=2, frames=2)]
    kinds, layout = read_layout(torch.ones(1, 24, dtype=torch.uint8), lambda *_: told, NEWLINE)
    ((group,),) = (list(layout.groups(lambda *_: 5, "image")),)
    assert group.frames == 2 and group.index.shape == (1, 18)
    chosen = group.index[0, [0, 4, 8, 9 + 2, 9 + 3]]
    stays = {*chosen.tolist(), *(kinds[0] == NEWLINE).nonzero().flatten().tolist()}
    assert stays == set(VALUES["vidcom2_newline_official"].tolist())


def cosine(a: list[float], b: list[float]) -> float:
    length = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / length if length else 0.0


def evs_in_loops(video: list[list[list[float]]], count: int) -> list[int]:
    per_frame = len(video[0])
    scores = [math.inf] * per_frame
    for before, frame in pairwise(video):
        scores += [1 - cosine(token, former) for token, former in zip(frame, before, strict=True)]
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


def vidcom2_in_loops(video: list[list[list[float]]], ratio: float, count: int) -> list[int]:
    tokens = [token for frame in video for token in frame]
    width, per_frame = len(tokens[0]), len(video[0])

    def mean(vectors: list[list[float]]) -> list[float]:
        return [sum(values) / len(values) for values in zip(*vectors, strict=True)]

    centre = mean(tokens)
    variances = [sum((token[c] - centre[c]) ** 2 for token in tokens) for c in range(width)]
    channels = sorted(sorted(range(width), key=lambda c: (variances[c], c))[: max(1, width // 2)])

    def unit(token: list[float]) -> list[float]:
        part = [token[c] for c in channels]
        length = math.sqrt(sum(x * x for x in part)) or 1.0
        return [x / length for x in part]

    def near(token: list[float], place: list[float]) -> float:
        distance = sum((x - y) ** 2 for x, y in zip(token, place, strict=True))
        return sum(math.exp(-distance / (2 * bandwidth)) for bandwidth in (0.125, 0.25, 0.5, 1, 2))

    frames = [[unit(token) for token in frame] for frame in video]
    middle = mean([token for frame in frames for token in frame])
    to_video = [[near(token, middle) for token in frame] for frame in frames]
    score = [
        own + near(token, mean(frame))
        for frame, owns in zip(frames, to_video, strict=True)
        for token, own in zip(frame, owns, strict=True)
    ]
    unique = [-sum(owns) / per_frame for owns in to_video]
    powers = [math.exp((value - max(unique)) / 0.01) for value in unique]
    chosen: set[int] = set()
    for f, power in enumerate(powers):
        share = min(1.0, ratio * (1 + power / sum(powers) - 1 / len(powers)))
        own = sorted(range(f * per_frame, (f + 1) * per_frame), key=lambda i: (score[i], i))
        chosen |= set(own[: max(1, round(share * per_frame))])
    ranked = sorted(range(len(score)), key=lambda i: (i not in chosen, score[i], i))
    return sorted(ranked[:count])


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.6, 0.95, 1.0])
@pytest.mark.parametrize(("frames", "per_frame"), [(1, 7), (2, 1), (5, 9), (7, 4), (3, 20)])
def test_naive_loops_keep_the_same(frames: int, per_frame: int, ratio: float) -> None:
    several = videos(3, frames, per_frame, seed=frames + per_frame)
    for row, video in enumerate(several.double().tolist()):
        total = frames * per_frame
        count = min(total, max(frames, int(total * ratio)))
        assert kept("vidcom2", several, ratio)[row].tolist() == vidcom2_in_loops(video, ratio, count)
        count = max(per_frame, int(total * ratio))
        assert kept("evs", several, ratio)[row].tolist() == evs_in_loops(video, count)


# -- any video -------------------------------------------------------------------------------------------------------

each_method = pytest.mark.parametrize("method", METHODS)


@each_method
def test_a_batch_is_its_videos_alone(method: str) -> None:
    several = videos(4, 6, 8)
    together = kept(method, several, 0.3)
    assert torch.equal(together, torch.cat([kept(method, video, 0.3) for video in several.split(1)]))
    assert len({tuple(row) for row in together.tolist()}) == 4


@each_method
def test_one_frame(method: str) -> None:
    """EVS keeps a first frame whole; VidCom² has one share."""
    found = kept(method, videos(2, 1, 20), 0.25)
    assert found.shape == (2, 20 if method == "evs" else 5)


@each_method
@pytest.mark.parametrize("fill", ["frames repeat", "tokens repeat", "zeros", "zeros among others"])
def test_ties_go_to_the_lower_position(method: str, fill: str) -> None:
    """With identical frames EVS keeps the first one and, beside it, what comes first; nothing is chosen twice."""
    some: dict[str, Any] = {
        "frames repeat": videos(2, 1, 6).expand(-1, 5, -1, -1),
        "tokens repeat": videos(2, 1, 1).expand(-1, 5, 6, -1),
        "zeros": torch.zeros(2, 5, 6, 12),
        "zeros among others": videos(2, 5, 6).index_fill(2, torch.tensor([1, 2]), 0.0),
    }
    found = kept(method, some[fill], 0.5)
    assert found.shape == (2, 15) and found.diff(dim=1).min() > 0
    if method == "evs" and "repeat" in fill:
        assert torch.equal(found, torch.arange(15).expand(2, -1))
    if method == "vidcom2" and fill in ("tokens repeat", "zeros"):
        assert torch.equal(found[0] // 6, torch.arange(5).repeat_interleave(3)), "frames have equal shares"
        assert torch.equal(found % 6, torch.arange(3).repeat(5).expand(2, -1))


def test_a_repeated_token_differs_by_nothing() -> None:
    """Exactly, so that rounding does not rank what stands still."""
    video = videos(1, 1, 50, 33).expand(-1, 3, -1, -1).mul(torch.logspace(-3, 3, 50)[None, None, :, None])
    assert dissimilarity(video)[:, 1:].eq(0).all()


def test_evs_always_keeps_the_first_frame_and_what_moves() -> None:
    still = videos(1, 1, 10).repeat(1, 4, 1, 1)
    still[0, 2:, 3] = videos(1, 1, 1, seed=1)[0, 0]  # from frame 2 on the token in place 3 is another
    assert kept("evs", still, 0.3)[0].tolist() == [*range(10), 10, 23], "and of what stands still the first"


def test_vidcom2_gives_most_to_the_frame_that_stands_out() -> None:
    video = videos(1, 1, 30).expand(-1, 5, -1, -1) + 0.1 * videos(1, 5, 30, seed=1)
    video[0, 2] = videos(1, 1, 30, seed=2)[0, 0]
    counts = torch.bincount(kept("vidcom2", video, 0.2)[0] // 30, minlength=5)
    assert counts.argmax() == 2 and counts.min() >= 1


@each_method
def test_order_of_tokens_within_frames_does_not_matter(method: str) -> None:
    video, order = videos(2, 5, 8), torch.randperm(8, generator=torch.Generator().manual_seed(1))
    places = (torch.arange(5)[:, None] * 8 + order).flatten()
    assert torch.equal(places[kept(method, video[:, :, order], 0.4)].sort(1).values, kept(method, video, 0.4))


@each_method
@pytest.mark.parametrize("ratio", [0.01, 0.25, 0.37, 0.99, 1.0])
def test_counts_are_exact(method: str, ratio: float) -> None:
    for frames, per_frame in [(1, 1), (1, 9), (4, 1), (3, 7), (8, 16)]:
        total = frames * per_frame
        least = frames if method == "vidcom2" else per_frame
        found = kept(method, videos(2, frames, per_frame), ratio)
        assert found.shape == (2, min(total, max(least, math.floor(total * ratio))))
        assert ratio < 1 or torch.equal(found, torch.arange(total).expand(2, -1))


@each_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_chooses_what_its_float32_copy_does(method: str, dtype: torch.dtype) -> None:
    half = videos(2, 5, 8).to(dtype)
    assert torch.equal(kept(method, half, 0.3), kept(method, half.float(), 0.3))
