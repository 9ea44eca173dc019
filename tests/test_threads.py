"""One model in several threads: results are those of one thread, records are of their own forwards, and a model that
runs is not changed. Threads meet in front of every block, so that a step of the one is between two of the other."""

import asyncio
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ViTForImageClassification

from hf_tokenprune import PruneConfig, UniformConfig, prune, pruned, record, unprune
from hf_tokenprune.engine import current_config
from hf_tokenprune.errors import PruneStateError
from hf_tokenprune.registry import get_adapter

from .decoder_families import FAMILIES as DECODERS
from .decoder_families import ONCE, built, sample, tiny_vlm
from .families import first_tensor, images, inputs_for, tiny_model
from .test_contract_decoders import id_of
from .test_contract_families import FAMILIES, MECHANICS, PAIRS, name_of

Call = Callable[[], Any]
SECONDS = 60
"""How long threads wait for each other at most; they never do so long."""


def most_slow(values: Sequence[Any]) -> list[Any]:
    """As parameters, of which the first is quick; the others are for make test-all."""
    return [values[0], *(pytest.param(value, marks=pytest.mark.slow) for value in values[1:])]


def at_once(*calls: Call) -> list[Any]:
    """What ``calls`` return, each in a thread of its own."""
    results: list[Any] = [None] * len(calls)

    def work(number: int) -> None:
        try:
            results[number] = calls[number]()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@contextmanager
def in_step(threads: int, *models: nn.Module) -> Iterator[None]:
    """Within: so many threads wait for each other in front of every block and layer."""
    barrier = threading.Barrier(threads)

    def wait(module: nn.Module, args: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            barrier.wait(SECONDS)

    handles = [block.register_forward_pre_hook(wait) for model in models for block in blocks(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def blocks(model: nn.Module) -> list[nn.Module]:
    """Blocks of all towers, and layers of the decoder."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return [block for found in lists for block in found if any(True for _ in block.parameters())]


def encode(model: PreTrainedModel, seed: int) -> Tensor:
    with torch.no_grad():
        return first_tensor(model(**inputs_for(model, images(1 + seed))))


def answer(model: PreTrainedModel, seed: int) -> Tensor:
    with torch.no_grad():
        return model(**sample(model, "..I.i.." + "." * seed, seed)).logits


def generate(model: PreTrainedModel, seed: int) -> Tensor:
    return model.generate(**sample(model, "..I.", seed), max_new_tokens=4, min_new_tokens=4, do_sample=False)


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def recorded(model: PreTrainedModel, run: Callable[[], Any]) -> Any:
    with record(model) as rec:
        run()
    return rec


def facts(rec: Any) -> Any:
    own = ({name: kept.tolist() for name, kept in rec.kept.items()}, dict(rec.tokens))
    return own if rec.tower is None else (own, facts(rec.tower))


# -- forwards at once ------------------------------------------------------------------------------------------------


def check(model: PreTrainedModel, run: Callable[[PreTrainedModel, int], Tensor]) -> None:
    """Two threads, of which one records; then both."""
    expected = [run(model, 0), run(model, 1)]
    alone = [facts(recorded(model, lambda seed=seed: run(model, seed))) for seed in (0, 1)]
    assert alone[0] != alone[1], "there is nothing to mix up"
    results: list[Any] = [None, None]

    def work(seed: int) -> None:
        results[seed] = run(model, seed)

    with in_step(2, model):
        (rec, _) = at_once(lambda: recorded(model, lambda: work(0)), lambda: work(1))
        assert same(results, expected) and facts(rec) == alone[0]
        both = at_once(*(lambda seed=seed: recorded(model, lambda: work(seed)) for seed in (0, 1)))
        assert same(results, expected) and [facts(rec) for rec in both] == alone


@pytest.mark.parametrize("pair", most_slow(MECHANICS), ids=name_of)
def test_encoders(pair: Any) -> None:
    (family, cls), config = pair
    check(prune(tiny_model(family, cls), config), encode)


@pytest.mark.parametrize("pair", most_slow(ONCE[::-1]), ids=id_of)
def test_decoders(pair: Any) -> None:
    family, case = pair
    model = tiny_vlm(family)
    check(prune(model, case.config(model)), answer)


@pytest.mark.parametrize("family", most_slow(DECODERS))
def test_generate(family: str) -> None:
    model = tiny_vlm(family)
    prune(model, next(case for name, case in reversed(ONCE) if name == family).config(model))
    expected = [generate(model, 0), generate(model, 1)]
    with in_step(2, model):
        assert same(at_once(lambda: generate(model, 0), lambda: generate(model, 1)), expected)


def test_two_models_of_one_config() -> None:
    family, case = ONCE[0]
    config = case.config(built(family))
    models = [prune(tiny_vlm(family), config) for _ in range(2)]
    expected = [answer(models[0], 0), answer(models[1], 1)]
    with in_step(2, *models):
        assert same(at_once(lambda: answer(models[0], 0), lambda: answer(models[1], 1)), expected)


# -- records ---------------------------------------------------------------------------------------------------------


def vit() -> ViTForImageClassification:
    return prune(tiny_model("vit", ViTForImageClassification), "zero_tprune")


def test_recordings_that_overlap() -> None:
    """The one that began first ends first."""
    model = vit()
    expected = facts(recorded(model, lambda: encode(model, 1)))
    begun, ended = threading.Event(), threading.Event()

    def first() -> None:
        with record(model):
            assert begun.wait(SECONDS)
        ended.set()

    def second() -> Any:
        with record(model) as rec:
            begun.set()
            assert ended.wait(SECONDS)
            encode(model, 1)
        return rec

    _, rec = at_once(first, second)
    assert facts(rec) == expected
    assert not any(state.recorders for state in get_adapter("vit").states(model))


def test_tasks_of_asyncio() -> None:
    """A forward of a task is recorded where it runs, also in a thread that it is sent to; another task's is not."""
    model = vit()
    expected = facts(recorded(model, lambda: encode(model, 1)))

    async def recording() -> Any:
        with record(model) as rec:
            await asyncio.sleep(0)
            await asyncio.to_thread(encode, model, 1)
            await asyncio.sleep(0)
        return rec

    async def other() -> None:
        for _ in range(3):
            encode(model, 0)
            await asyncio.sleep(0)

    async def both() -> Any:
        return await asyncio.gather(recording(), other(), other())

    rec, *_ = asyncio.run(both())
    assert facts(rec) == expected


def test_what_a_thread_started_within_does_is_not_recorded_and_the_summary_says_so() -> None:
    model = vit()
    with record(model) as rec:
        at_once(lambda: encode(model, 0))
    assert rec.summary().startswith("nothing recorded yet: call the model inside the with block, in the same thread")
    with pytest.raises(KeyError, match=r"nothing recorded yet.*copy_context"):
        rec.kept["2"]
    assert rec.tokens.get("2") is None


def test_a_thread_that_streams_is_recorded_in_the_context_of_the_block() -> None:
    """As TextIteratorStreamer is used, and as the message and the documentation say."""
    model = tiny_vlm(ONCE[0][0])
    prune(model, ONCE[0][1].config(model))
    inputs = sample(model, "..I.", 0)
    expected = facts(recorded(model, lambda: generate(model, 0)))
    arrived: queue.Queue[Tensor | None] = queue.Queue()
    streamer = SimpleNamespace(put=arrived.put, end=lambda: arrived.put(None))
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "streamer": streamer}
    with record(model) as rec:
        thread = Thread(target=copy_context().run, args=(model.generate,), kwargs={**inputs, **how}, daemon=True)
        thread.start()
        streamed = list(iter(lambda: arrived.get(timeout=SECONDS), None))
        thread.join(SECONDS)
    assert len(streamed) == 1 + 4 and facts(rec) == expected
    with pytest.raises(KeyError, match="'99': expected one of"):
        rec.kept["99"]


@pytest.mark.slow
def test_compiled_models_are_recorded() -> None:
    model = vit()
    expected = facts(recorded(model, lambda: encode(model, 0)))
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad(), record(model) as rec:
        compiled(images(1))
    assert facts(rec) == expected


# -- changing a model that runs --------------------------------------------------------------------------------------


@contextmanager
def held(model: PreTrainedModel, run: Call) -> Iterator[list[Any]]:
    """Within: another thread stands in the middle of ``run``; behind it the list has its result."""
    inside, go, result = threading.Event(), threading.Event(), []

    def stop(module: nn.Module, args: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert go.wait(SECONDS)

    handle = blocks(model)[-2].register_forward_pre_hook(stop)
    thread = threading.Thread(target=lambda: result.append(run()), daemon=True)
    thread.start()
    assert inside.wait(SECONDS)
    try:
        yield result
    finally:
        go.set()
        thread.join(SECONDS)
        handle.remove()


def check_refused(model: PreTrainedModel, config: PruneConfig, run: Callable[[PreTrainedModel, int], Tensor]) -> None:
    message = f"another thread is running this {type(model).__name__}, in "

    def attempt(change: Call) -> None:
        expected = run(model, 0)
        with held(model, lambda: run(model, 0)) as result:
            for _ in range(2):  # the first try leaves nothing behind
                with pytest.raises(PruneStateError, match=message):
                    change()
        assert torch.equal(result[0], expected)
        assert torch.equal(run(model, 0), expected)

    dense = run(model, 0)
    attempt(lambda: prune(model, config))
    attempt(lambda: pruned(model, config).__enter__())
    assert current_config(model) is None
    prune(model, config)
    attempt(lambda: unprune(model))
    attempt(lambda: pruned(model, config).__enter__())
    assert current_config(model) == config
    assert torch.equal(run(unprune(model), 0), dense)


@pytest.mark.parametrize("family", most_slow(FAMILIES), ids=lambda family: family[1].__name__)
def test_a_running_encoder_is_not_changed(family: Any) -> None:
    config = next(config for pair, config in PAIRS if pair == family)
    check_refused(tiny_model(*family), config, encode)


@pytest.mark.parametrize("family", most_slow(DECODERS))
def test_a_running_decoder_is_not_changed(family: str) -> None:
    model = tiny_vlm(family)
    config = next(case for name, case in reversed(ONCE) if name == family).config(model)
    check_refused(model, config, answer)


def test_between_the_tokens_of_an_answer_nothing_changes_either() -> None:
    model = tiny_vlm(ONCE[0][0])
    config = ONCE[0][1].config(model)
    inside, go = threading.Event(), threading.Event()

    class Stop:
        def put(self, value: Tensor) -> None:
            inside.set()
            assert go.wait(SECONDS)

        def end(self) -> None: ...

    expected = generate(model, 0)
    inputs = sample(model, "..I.", 0)

    def run() -> Tensor:
        return model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, streamer=Stop())

    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(run()), daemon=True)
    thread.start()
    assert inside.wait(SECONDS)
    with pytest.raises(PruneStateError, match="another thread is running this"):
        prune(model, config)
    go.set()
    thread.join(SECONDS)
    assert torch.equal(found[0], expected)


def test_a_block_that_ends_while_another_thread_runs_says_so() -> None:
    model, config = tiny_model("vit", ViTForImageClassification), UniformConfig(layers=(2,), keep_ratios=0.5)
    with pytest.raises(PruneStateError, match="another thread is running this"):  # noqa: SIM117
        with pruned(model, config):
            block = held(model, lambda: encode(model, 0))
            result = block.__enter__()
    assert current_config(model) == config
    block.__exit__(None, None, None)
    assert torch.equal(result[0], encode(model, 0))
    unprune(model)


def test_a_part_that_another_thread_runs_alone() -> None:
    """And another model can be changed meanwhile."""
    model = tiny_model("vit", ViTForImageClassification)
    with held(model, lambda: model.vit(images())), pytest.raises(PruneStateError, match="another thread"):
        prune(model)
    other = tiny_model("vit", ViTForImageClassification)
    with held(model, lambda: encode(model, 0)):
        prune(other)
    assert current_config(other) is not None and current_config(model) is None


def test_a_forward_that_begins_in_the_middle_of_the_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("vit", ViTForImageClassification)
    adapter = get_adapter("vit")
    attach = adapter.attach
    errors: list[BaseException] = []

    def slow(*args: Any, **kwargs: Any) -> None:
        attach(*args, **kwargs)
        for call in (lambda: encode(model, 0), lambda: model.vit(images())):
            with pytest.raises(PruneStateError, match="by another thread at this moment; call it again") as error:
                at_once(call)
            errors.append(error.value)

    monkeypatch.setattr(adapter, "attach", slow)
    prune(model)
    monkeypatch.undo()
    assert len(errors) == 2
    assert torch.equal(encode(model, 0), encode(prune(tiny_model("vit", ViTForImageClassification)), 0))


def test_one_of_several_threads_prunes() -> None:
    model = tiny_model("vit", ViTForImageClassification)
    barrier = threading.Barrier(4)

    def work() -> bool:
        barrier.wait(SECONDS)
        try:
            prune(model, "uniform")
        except PruneStateError as error:
            assert "already pruned" in str(error)
            return False
        return True

    assert sum(at_once(*[work] * 4)) == 1
    assert torch.equal(encode(model, 0), encode(prune(tiny_model("vit", ViTForImageClassification), "uniform"), 0))


@pytest.mark.parametrize("change", ["prune", "unprune"])
def test_a_hook_of_its_own_forward_does_not_change_a_model(change: str) -> None:
    model = tiny_model("vit", ViTForImageClassification)
    if change == "unprune":
        prune(model, "tome")

    def changes(*of_the_hook: Any) -> None:
        prune(model, "tome") if change == "prune" else unprune(model)

    with torch.no_grad():
        expected = model(pixel_values=images()).logits
        hook = model.vit.register_forward_pre_hook(changes)
        with pytest.raises(PruneStateError, match="not in a hook of one"):
            model(pixel_values=images())
        hook.remove()
        assert torch.equal(model(pixel_values=images()).logits, expected)


def test_a_method_of_a_model_may_prune_it() -> None:
    class Own(ViTForImageClassification):
        def made_fast(self) -> None:
            prune(self, "tome")

    model = tiny_model("vit", ViTForImageClassification)
    Own.made_fast(model)
    assert current_config(model) is not None
