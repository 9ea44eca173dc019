"""PEFT: adapters on a pruned model, and pruning of a model that has them. The references are models whose weights have
the adapters' products added by hand, pruned by the same config."""

import copy
import json
import re
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from transformers import AutoModelForImageClassification, PreTrainedModel, ViTForImageClassification, pipeline
from transformers.integrations.peft import MIN_PEFT_VERSION

from hf_tokenprune import (
    ConfigError,
    PruneConfig,
    PruneStateError,
    RandomConfig,
    UniformConfig,
    UnsupportedModelError,
    disable_auto,
    enable_auto,
    from_pretrained,
    prune,
    pruned,
    record,
    save_pretrained,
    unprune,
)
from hf_tokenprune.config_files import CONFIG_NAME, MAX_OTHER_BYTES
from hf_tokenprune.cost import cost
from hf_tokenprune.engine import current_config

from .decoder_families import FAMILIES, ONCE, Case, collate, sample, tiny_vlm
from .families import first_tensor, images, inputs_for, tiny_model
from .test_contract_decoders import id_of
from .test_contract_families import MECHANICS, name_of

peft = pytest.importorskip("peft")
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402

TRANSFORMERS_SAVES = Version(version("peft")) >= Version(MIN_PEFT_VERSION)
"""Whether Transformers takes this version of PEFT for what it does with adapters by itself, beside loading them."""
A, B = UniformConfig(layers=(0,), keep_ratios=0.5), RandomConfig(layers=(0,), keep_ratios=0.5)
OF_HEADS = {"exclude_modules": r".*\.head\.attention\.out_proj"}
"""Of SigLIP's pooling, a parameter of ``nn.MultiheadAttention`` more than a layer: PEFT applies it twice."""


def lora(**fields: Any) -> LoraConfig:
    """All linear layers, with weights that do something at once."""
    return LoraConfig(**{"target_modules": "all-linear", "init_lora_weights": False, **OF_HEADS, **fields})


def with_lora(model: PreTrainedModel, **fields: Any) -> Any:
    torch.manual_seed(3)
    return get_peft_model(model, lora(**fields)).eval()


def vit(config: PruneConfig | None = None, **fields: Any) -> PreTrainedModel:
    model = tiny_model("vit", ViTForImageClassification, num_hidden_layers=2, **fields)
    return model if config is None else prune(model, config)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    vit().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def run(model: Any, inputs: Any = None) -> Tensor:
    with torch.no_grad():
        return first_tensor(model(**({"pixel_values": images()} if inputs is None else inputs)))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def merged_by_hand(adapted: Any, stock: PreTrainedModel) -> PreTrainedModel:
    """``stock`` with the product of the low-rank matrices of each adapter added to the weight that it is beside."""
    added = 0
    with torch.no_grad():
        for name, module in adapted.get_base_model().named_modules():
            for key in getattr(module, "lora_A", ()):
                product = module.lora_B[key].weight @ module.lora_A[key].weight
                stock.get_submodule(name).weight += module.scaling[key] * product
                added += 1
    assert added
    return stock


def check_both_orders(build: Callable[[], PreTrainedModel], config: PruneConfig, inputs: Any) -> None:
    first, last = with_lora(prune(build(), config)), prune(with_lora(build()), config)
    expected = run(prune(merged_by_hand(first, build()), config), inputs)
    dense = run(merged_by_hand(first, build()), inputs)
    assert (expected - run(prune(build(), config), inputs)).abs().max() > 1e-2, "the adapters do something"
    for model in (first, last):
        assert isinstance(model, PeftModel) and current_config(model) == config
        found = run(model, inputs)
        close(found, expected)
        with model.disable_adapter():
            close(run(model, inputs), run(prune(build(), config), inputs))
        assert torch.equal(run(prune(unprune(model), config), inputs), found)
        merged = model.merge_and_unload()
        assert type(merged) is type(build()) and current_config(merged) == config
        close(run(merged, inputs), expected)
        close(run(unprune(merged), inputs), dense)
        assert current_config(merged) is None


@pytest.mark.slow
@pytest.mark.parametrize("pair", MECHANICS, ids=name_of)
def test_encoders(pair: Any) -> None:
    family, config = pair
    check_both_orders(lambda: tiny_model(*family), config, inputs_for(tiny_model(*family), images()))


@pytest.mark.slow
@pytest.mark.parametrize("pair", ONCE, ids=id_of)
def test_decoders(pair: tuple[str, Case]) -> None:
    """Methods that read keys, queries and attention read them with the adapters."""
    family, case = pair
    model = tiny_vlm(family)
    check_both_orders(
        lambda: tiny_vlm(family), case.config(model), collate([sample(model, "..I.."), sample(model, ".I..I...", 1)])
    )


def test_one_encoder() -> None:
    check_both_orders(vit, A, {"pixel_values": images()})


def test_one_decoder() -> None:
    """That reads what its queries and keys say of text and images."""
    model = tiny_vlm("llava")
    check_both_orders(lambda: tiny_vlm("llava"), Case("sparsevlm").config(model), sample(model, "..I.."))


@pytest.mark.slow
@pytest.mark.parametrize("pair", ONCE, ids=id_of)
def test_training_reaches_the_same_adapters(pair: tuple[str, Case]) -> None:
    family, case = pair
    model = with_lora(tiny_vlm(family)).train()
    inputs = collate([sample(model.get_base_model(), "..I.."), sample(model.get_base_model(), ".I..I...", 1)])

    def learning() -> set[str]:
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert all(gradient.isfinite().all() for gradient in found.values())
        return {name for name, gradient in found.items() if gradient.abs().max() > 0}

    dense = learning()
    assert dense
    prune(model, case.config(model.get_base_model()))
    assert learning() == dense


@pytest.mark.slow
def test_generating() -> None:
    model = tiny_vlm("llava")
    inputs = collate([sample(model, "..I.."), sample(model, ".I..I...", 1)])
    adapted = prune(with_lora(model), "divprune")
    stock = prune(merged_by_hand(adapted, tiny_vlm("llava")), "divprune")
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(adapted.generate(**inputs, **options), stock.generate(**inputs, **options))


def test_what_takes_a_model_takes_one_with_adapters() -> None:
    model, stock = with_lora(vit(), modules_to_save=["classifier"]), vit()
    assert prune(model) is model and current_config(model) == current_config(prune(stock))
    with pytest.raises(PruneStateError, match="already pruned"):
        prune(model)
    with record(model) as rec:
        run(model)
    with record(stock) as expected:
        run(stock)
    assert dict(rec.tokens) == dict(expected.tokens)
    with pruned(model, A):
        assert current_config(model) == A and model.config.prune_config == A.to_dict()
    assert current_config(model) == current_config(stock)
    assert unprune(model) is model and current_config(model) is None
    with pytest.raises(PruneStateError, match="not pruned"):
        unprune(model)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_cost_nothing_merged(family: str) -> None:
    model = tiny_vlm(family)
    expected = cost(model, "divprune")
    adapted = with_lora(model, modules_to_save=["multi_modal_projector"])
    assert cost(adapted, "divprune") == expected
    assert PruneConfig.for_method("divprune").for_budget(adapted, keep=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("pair", MECHANICS, ids=name_of)
def test_adapters_of_encoders_cost_nothing_merged(pair: Any) -> None:
    family, config = pair
    model = tiny_model(*family)
    expected = cost(model, config)
    assert cost(with_lora(model, modules_to_save=["classifier"]), config) == expected


@pytest.mark.parametrize("first", [True, False])
def test_adapters_without_the_wrapper(first: bool) -> None:
    """PEFT's ``inject_adapter_in_model`` returns a stock model, and so does Transformers' ``add_adapter``, which calls
    it."""
    model = vit(A if first else None)
    torch.manual_seed(3)
    peft.inject_adapter_in_model(lora(), model)
    if not first:
        prune(model, A)
    assert torch.equal(run(model.eval()), run(with_lora(vit(A))))
    close(run(unprune(model)), run(merged_by_hand(with_lora(vit()), vit())))


@pytest.mark.slow
def test_several_adapters() -> None:
    model = prune(with_lora(vit()), A)
    alone = run(model)
    model.add_adapter("other", lora(r=4))
    model.set_adapter("other")
    other = run(model)
    assert (other - alone).abs().max() > 1e-2
    mixed = {"pixel_values": images(), "adapter_names": ["default", "other"]}
    with torch.no_grad():
        found = model(**mixed).logits
    close(found, torch.stack([alone[0], other[1]]))
    model.set_adapter("default")
    assert torch.equal(run(model), alone)


def own_hooks(model: Any) -> list[Any]:
    return [
        hook
        for module in model.modules()
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        if type(hook).__module__.startswith("hf_tokenprune")
    ]


@pytest.mark.parametrize("name", ["visionzip", "divprune"])
@pytest.mark.parametrize("part", ["multi_modal_projector", "vision_tower"])
@pytest.mark.parametrize("first", [True, False])
def test_modules_to_save(name: str, part: str, first: bool) -> None:
    """PEFT copies such a module with its hooks, and puts the copy in its place when it merges."""
    config, inputs = Case(name).config(tiny_vlm("llava")), sample(tiny_vlm("llava"), "..I..")
    fields: Any = {"target_modules": ["up_proj"], "modules_to_save": [part]}
    if (name, part) == ("visionzip", "vision_tower"):
        with pytest.raises(UnsupportedModelError, match=r"copy of 'model\.vision_tower', .* out of modules_to_save"):
            unprune(wrapped(config, first, **fields))
        return
    model = wrapped(config, first, **fields)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "modules_to_save" in key:
                parameter.mul_(1.1)
    stock = merged_by_hand(model, tiny_vlm("llava"))
    with torch.no_grad():
        for parameter in stock.model.get_submodule(part).parameters():
            parameter.mul_(1.1)
    dense = run(stock, inputs)
    close(run(model, inputs), run(prune(stock, config), inputs))
    assert own_hooks(model) and not own_hooks(unprune(model))
    close(run(model, inputs), dense)
    merged = prune(model, config).merge_and_unload().train()
    merged.requires_grad_(True)
    merged(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in merged.parameters())
    close(run(unprune(merged.eval()), inputs), dense)


def wrapped(config: PruneConfig, first: bool, **fields: Any) -> Any:
    """A LLaVA that was pruned ``first`` and then given adapters, or the other way round."""
    model = tiny_vlm("llava")
    return with_lora(prune(model, config), **fields) if first else prune(with_lora(model, **fields), config)


@pytest.mark.parametrize("first", [True, False])
def test_copies_of_blocks_are_refused(first: bool) -> None:
    fields: Any = {"target_modules": ["fc1", "fc2"], "modules_to_save": ["layers.1"]}
    with pytest.raises(UnsupportedModelError, match=r"copy of 'vit\.layers\.1', .* leave it out of modules_to_save"):
        unprune(with_lora(vit(A), **fields)) if first else prune(with_lora(vit(), **fields), A)


def test_prompts_that_are_learned() -> None:
    """They come as embeddings in front of the prompt's."""
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model, inputs = prune(get_peft_model(tiny_vlm("llava"), settings), "divprune"), sample(tiny_vlm("llava"), "..I..")
    with record(model) as rec, torch.no_grad():
        model(**inputs)
    assert rec.tokens[0] < inputs["input_ids"].shape[1]


# -- wrappers of another kind ------------------------------------------------------------------------------------------


WRAPPED: dict[str, Callable[[PreTrainedModel], Any]] = {
    "twice": lambda model: with_lora(with_lora(model)),
    "mixed": lambda model: get_peft_model(model, lora(), mixed=True).eval(),
}
"""``get_peft_model`` called twice, as by a cell of a notebook that is run again; and the one for several kinds."""


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_other_wrappers(wrap: Callable[[PreTrainedModel], Any], tmp_path: Path) -> None:
    """Pruning finds the model in them; PEFT saves nothing of them that could be loaded again."""
    torch.manual_seed(3)
    model = wrap(vit())
    torch.manual_seed(3)
    first = wrap(vit(A))
    dense = run(model)
    assert prune(model, A) is model and current_config(model) == current_config(first) == A
    assert torch.equal(run(model), run(first)) and not torch.equal(run(model), dense)
    with pytest.raises(UnsupportedModelError, match=r"PEFT saves no PeftMixedModel|this PeftModel is around another"):
        save_pretrained(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert torch.equal(run(unprune(model)), dense)


def test_adapters_inside_a_stock_model_are_not_saved_as_its_weights(tmp_path: Path) -> None:
    """Under names that loading does not know, so that it would make the weights under them anew."""
    model = vit(A)
    peft.inject_adapter_in_model(lora(), model)
    for inner in (model, with_lora(vit(A)).get_base_model()):
        with pytest.raises(UnsupportedModelError, match=r"an adapter in 'vit\.layers\.0\..*\(merge_and_unload\)"):
            save_pretrained(inner, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# -- saving and loading ------------------------------------------------------------------------------------------------


def saved(base: Path, config: PruneConfig | None = A, **fields: Any) -> tuple[Any, Path]:
    """A model with an adapter in a folder, saved by stock code if it is dense."""
    model, folder = with_lora(AutoModelForImageClassification.from_pretrained(base), **fields), base.parent / "adapter"
    save_pretrained(prune(model, config), folder) if config else model.save_pretrained(folder)
    return model, folder


def test_an_adapter_is_saved_and_loaded_with_the_config_beside_it(base: Path) -> None:
    model, folder = saved(base, modules_to_save=["classifier"])
    names = sorted(path.name for path in folder.iterdir() if path.suffix != ".md")
    assert names == ["adapter_config.json", "adapter_model.safetensors", CONFIG_NAME]
    assert "also_in" not in (folder / CONFIG_NAME).read_text(), "there is no config.json"
    loaded = from_pretrained(folder)
    assert isinstance(loaded, PeftModel) and type(loaded.get_base_model()) is ViTForImageClassification
    assert current_config(loaded) == A and not loaded.training
    assert torch.equal(run(loaded), run(model))
    by_hand = prune(PeftModel.from_pretrained(AutoModelForImageClassification.from_pretrained(base), folder), folder)
    assert torch.equal(run(by_hand), run(model))
    with pytest.warns(UserWarning, match="disagree; using the former"):
        assert current_config(from_pretrained(folder, B)) == B
    trainable = from_pretrained(folder, is_trainable=True, adapter_name="mine", dtype=torch.bfloat16)
    assert trainable.active_adapters == ["mine"] and trainable.dtype == torch.bfloat16
    assert {name for name, p in trainable.named_parameters() if p.requires_grad and "mine" in name}
    loaded, info = from_pretrained(folder, output_loading_info=True)
    assert isinstance(loaded, PeftModel) and not info["missing_keys"]


@pytest.mark.slow
def test_the_class_is_that_of_the_model_it_was_trained_on(base: Path) -> None:
    """Not of the architecture that the model's checkpoint names: a backbone has no head."""
    vit().vit.save_pretrained(base)
    torch.manual_seed(0)
    head = AutoModelForImageClassification.from_pretrained(base, num_labels=3)
    folder = base.parent / "adapter"
    model = prune(with_lora(head, modules_to_save=["classifier"]), A)
    save_pretrained(model, folder)
    assert torch.equal(run(from_pretrained(folder, num_labels=3)), run(model))


@pytest.mark.slow
def test_which_config_counts(base: Path) -> None:
    """The adapter's own, else that of the model under it."""
    prune(vit(), B).save_pretrained(base)
    _, folder = saved(base)
    assert current_config(from_pretrained(folder)) == A
    (folder / CONFIG_NAME).unlink()
    assert current_config(from_pretrained(folder)) == B
    vit().save_pretrained(base)
    with pytest.raises(ConfigError, match=r"beside the adapter .* PEFT alone writes none.* Give prune_config=\.\.\."):
        from_pretrained(folder)
    assert current_config(from_pretrained(folder, A)) == A


def test_an_adapter_of_no_known_model(base: Path) -> None:
    folder = base.parent / "adapter"
    save_pretrained(with_lora(vit(A)), folder)
    with pytest.raises(ConfigError, match=r"base_model_name_or_path=None in .* expected the model"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object, got [1]"),
        ('{"a": "\xff"}', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        (" " * (MAX_OTHER_BYTES + 1), f"has at most {MAX_OTHER_BYTES}"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path=3: expected a string"),
        ({"auto_mapping": "x"}, "auto_mapping='x': expected an object"),
        ({"revision": {}}, "revision={}: expected a string"),
        ({"base_model_name_or_path": "no/such-model"}, "'no/such-model' in the adapter_config.json of"),
        ({"base_model_name_or_path": "/no/such"}, "'/no/such' in the adapter_config.json of"),
        ({"peft_type": "NONE"}, "PEFT cannot put the adapter"),
        ({"r": "many"}, "PEFT cannot put the adapter"),
        ({"target_modules": ["nothing"]}, "PEFT cannot put the adapter"),
    ],
    ids=lambda value: str(value)[:40].strip(),
)
def test_an_adapter_config_that_is_broken(text: Any, words: str, base: Path) -> None:
    folder = base.parent / "adapter"
    saved_as = {"peft_type": "LORA", "target_modules": ["q_proj"], "base_model_name_or_path": str(base)}
    A.save_pretrained(folder)
    text = text if isinstance(text, str) else json.dumps({**saved_as, **text})
    (folder / "adapter_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=re.escape(words)) as error:
        from_pretrained(folder)
    assert str(folder) in str(error.value)


def test_adapters_in_folders_are_named(base: Path) -> None:
    model = get_peft_model(AutoModelForImageClassification.from_pretrained(base), lora(), adapter_name="mine")
    save_pretrained(prune(model, A), base.parent / "named")
    with pytest.raises(ConfigError, match=r"adapters in its folders mine; from_pretrained\('.*', subfolder='mine'\)"):
        from_pretrained(base.parent / "named")
    assert current_config(from_pretrained(base.parent / "named", subfolder="mine")) == A


@pytest.mark.slow
def test_every_adapter_has_its_file(base: Path) -> None:
    model, _ = saved(base)
    model.add_adapter("other", lora())
    save_pretrained(model, base.parent / "several")
    files = {str(path.relative_to(base.parent)) for path in base.parent.glob(f"several/**/{CONFIG_NAME}")}
    assert files == {f"several/{CONFIG_NAME}", f"several/other/{CONFIG_NAME}"}
    save_pretrained(model, base.parent / "one", selected_adapters=["other"])
    assert [path.parent.name for path in base.parent.glob(f"one/**/{CONFIG_NAME}")] == ["other"]
    model.set_adapter("other")
    assert torch.equal(run(from_pretrained(base.parent / "one" / "other")), run(model))
    assert torch.equal(run(from_pretrained(base.parent / "one", subfolder="other")), run(model))


def test_saving_a_dense_model_or_pushing_adapters_is_refused(base: Path) -> None:
    with pytest.raises(PruneStateError, match="not pruned"):
        save_pretrained(with_lora(vit()), base.parent / "adapter")
    with pytest.raises(UnsupportedModelError, match=r"call model\.push_to_hub"):
        save_pretrained(with_lora(vit(A)), base.parent / "adapter", push_to_hub=True)
    assert not (base.parent / "adapter").exists()


@pytest.mark.slow
def test_a_merged_model_is_saved_whole(base: Path) -> None:
    model, _ = saved(base)
    merged = model.merge_and_unload()
    save_pretrained(merged, base.parent / "merged")
    assert torch.equal(run(from_pretrained(base.parent / "merged")), run(merged))


# -- stock loading and saving ------------------------------------------------------------------------------------------


@pytest.fixture
def auto() -> Iterator[None]:
    enable_auto()
    yield
    disable_auto()


def said(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in found if "pruned" in str(warning.message)]


LOADERS: dict[str, Callable[[Any, Path], Any]] = {
    "peft": lambda model, folder: PeftModel.from_pretrained(model, folder),
    "another": lambda model, folder: with_lora(model).load_adapter(folder, "another"),
    "transformers": lambda model, folder: model.load_adapter(str(folder)),
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=list(LOADERS))
@pytest.mark.parametrize(("trained", "now"), [(A, None), (A, B), (A, A), (None, None), (None, A)], ids=str)
def test_another_pruning_than_the_adapter_was_trained_under_is_said(
    trained: PruneConfig | None, now: PruneConfig | None, load: Any, base: Path, auto: None
) -> None:
    _, folder = saved(base, trained)
    messages = said(lambda: load(vit(now), folder))
    if trained is None or trained == now:  # pruning what was trained dense is what pruning without training is
        assert messages == []
    else:
        (message,) = messages
        assert f"was pruned by {A}; this one is {f'pruned by {now}' if now else 'dense'}" in message
        assert f"prune(model, {str(folder)!r})" in message


@pytest.mark.slow
def test_stock_loading_of_an_adapter_prunes(base: Path, auto: None) -> None:
    """With Transformers alone: its auto classes, its model classes and its pipelines take the folder of an adapter."""
    model, folder = saved(base)
    for loaded in (
        AutoModelForImageClassification.from_pretrained(folder),
        ViTForImageClassification.from_pretrained(folder),
        pipeline("image-classification", model=str(folder), image_processor=_processor(base)).model,
    ):
        assert current_config(loaded) == A
        assert torch.equal(run(loaded), run(model))
    prune(vit(), B).save_pretrained(base)
    assert current_config(AutoModelForImageClassification.from_pretrained(folder)) == A
    assert current_config(ViTForImageClassification.from_pretrained(folder)) == A
    (folder / CONFIG_NAME).unlink()
    assert current_config(AutoModelForImageClassification.from_pretrained(folder)) == B
    assert current_config(ViTForImageClassification.from_pretrained(folder)) == B


def _processor(folder: Path) -> Any:
    from transformers import ViTImageProcessorPil

    return ViTImageProcessorPil(size={"height": 32, "width": 32})


def test_stock_saving_of_adapters_writes_the_config(base: Path, auto: None) -> None:
    _, folder = saved(base)
    native = AutoModelForImageClassification.from_pretrained(folder)
    models = {"wrapped": with_lora(vit(A)), "native": native, "whole": vit(A), "dense": with_lora(vit())}
    if not TRANSFORMERS_SAVES:
        del models["native"]
    for name, model in models.items():
        model.save_pretrained(base.parent / name)
    files = {path.parent.name for path in base.parent.glob(f"*/{CONFIG_NAME}")}
    assert files == {"adapter", *models} - {"whole", "dense"}
    for name in models.keys() & {"native"}:
        assert torch.equal(run(from_pretrained(base.parent / name)), run(native))


def test_afterwards_classes_are_stock_again(base: Path) -> None:
    classes = (PeftModel, PreTrainedModel)
    before = [(dict(vars(cls)), cls.load_adapter, cls.save_pretrained) for cls in classes]
    enable_auto(), disable_auto()
    assert before == [(dict(vars(cls)), cls.load_adapter, cls.save_pretrained) for cls in classes]


def test_a_copy(base: Path) -> None:
    model = with_lora(vit(A))
    twin = copy.deepcopy(model)
    unprune(twin)
    assert current_config(model) == A and current_config(twin) is None
    close(run(twin), run(merged_by_hand(model, vit())))


def test_a_merged_model_is_not_saved_beside_the_adapter_it_has(tmp_path: Path) -> None:
    """Loading would put the adapter on top once more."""
    model = with_lora(vit(UniformConfig()))
    save_pretrained(model, tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"holds an adapter of PEFT .* give another folder"):
        save_pretrained(model.merge_and_unload(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
