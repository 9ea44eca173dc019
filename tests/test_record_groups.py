"""What a record says beside who stays: who stands for whom where tokens merge, and how important each was found."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from transformers import ViTForImageClassification

from hf_tokenprune import PruneConfig, prune, record
from hf_tokenprune.registry import get_adapter
from hf_tokenprune.signals import Merging, Reduction, Stage

from .decoder_families import Case, collate, run, sample, tiny_vlm
from .families import images, tiny_model

GROUPING = ["tome", "pitome", "salience_merge", "evit", "zero_tprune"]
ENCODER_RANKS = {"evit": {"fuse": False}, "ats": {}, "zero_tprune": {"num_similar": 0}}
DECODER_RANKS = ["fastv", "pyramiddrop", "transprune", "cls_attention"]


def watched(monkeypatch: pytest.MonkeyPatch, stages: Iterable[Stage]) -> list[Reduction | Merging]:
    """What the stages say from now on, in order."""
    said: list[Reduction | Merging] = []
    for cls in {type(stage) for stage in stages}:
        stock = cls.reduce
        monkeypatch.setattr(cls, "reduce", lambda self, *a, stock=stock: said.append(stock(self, *a)) or said[-1])
    return said


@pytest.mark.parametrize("method", GROUPING)
def test_owners_are_the_groups_of_the_reductions_one_after_the_other(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("vit", ViTForImageClassification)
    fields = {"exact_last_block": False} if method == "salience_merge" else {}
    config = PruneConfig.for_method(method, **fields)
    prune(model, config)
    blocks = get_adapter("vit").pruned_blocks(model).values()
    said = watched(monkeypatch, [block.token_prune.stage for block in blocks if block.token_prune.stage])
    with record(model) as rec, torch.no_grad():
        model(images(2))
    assert len(said) == len(rec.owners) > 1
    for row in range(2):
        entering = [(position, {position}) for position in range(64)]  # who is there, and whom it stands for
        for (name, owners), reduction in zip(rec.owners.items(), said, strict=True):
            staying = [(entering[i][0], set(entering[i][1])) for i in reduction.keep[row].tolist()]
            if isinstance(reduction, Merging):
                for gone, place in zip(reduction.merged[row].tolist(), reduction.into[row].tolist(), strict=True):
                    staying[place - reduction.num_protected][1].update(entering[gone][1])
            expected = {member: survivor for survivor, members in staying for member in members}
            assert owners[row].tolist() == [expected.get(position, -1) for position in range(64)], name
            assert sorted({owner for owner in owners[row].tolist() if owner >= 0}) == rec.kept[name][row].tolist()
            entering = staying


def check_ranks(kept: list[int], importance: list[float], entering: set[int]) -> set[int]:
    """That those who stay of ``entering`` are the most important ones of them; who stays."""
    stays = set(kept)
    assert {position for position, score in enumerate(importance) if score == score} == entering
    assert min(importance[i] for i in stays) >= max(importance[i] for i in entering - stays)
    return stays


@pytest.mark.parametrize("method", ENCODER_RANKS)
def test_those_who_stay_in_an_encoder_are_the_most_important_ones(method: str) -> None:
    fields: dict[str, Any] = {"layers": (1, 4), "keep_ratios": 0.5, **ENCODER_RANKS[method]}
    model = prune(tiny_model("vit", ViTForImageClassification), PruneConfig.for_method(method, **fields))
    with record(model) as rec, torch.no_grad():
        model(images(2))
    for row in range(2):
        entering = set(range(64))
        for name in ("1", "4"):
            entering = check_ranks(rec.kept[name][row].tolist(), rec.importance[name][row].tolist(), entering)


@pytest.mark.parametrize("method", DECODER_RANKS)
def test_those_who_stay_in_a_decoder_are_the_most_important_ones(method: str) -> None:
    model = tiny_vlm("llava")
    prune(model, Case(method).config(model))
    batch = collate([sample(model, "..I."), sample(model, ".I...")])
    with record(model) as rec:
        run(model, batch)
    assert list(rec.importance) == list(rec.kept) != []
    for row in range(2):
        entering = set(range(rec.importance[next(iter(rec.kept))].shape[1]))
        for name, kept in rec.kept.items():
            entering = check_ranks(kept[row].tolist(), rec.importance[name][row].tolist(), entering)


def test_nothing_is_left_of_a_former_forward_of_another_method() -> None:
    model = tiny_vlm("llava")
    prune(model, Case("divprune").config(model))
    with record(model) as rec:
        run(model, collate([sample(model, ".I")]))
    assert not rec.importance and not rec.owners, "DivPrune ranks no tokens, and a decoder says no groups"


@pytest.mark.parametrize(
    "case", [Case("visionzip"), Case("sparsevlm", choice=("recycle", True)), Case("fastv")], ids=str
)
def test_stages_that_average_tokens_into_others_are_told(case: Case) -> None:
    model = tiny_vlm("llava")
    config = case.config(model)
    prune(model, config)
    with record(model) as rec:
        run(model, collate([sample(model, "..I..")]))
    assert rec.averaging == ({*rec.kept} if case.method != "fastv" else set())
