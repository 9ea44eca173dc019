"""Recovery: what is trained, what is kept of it, and how its values travel. References are made with PyTorch alone."""

import copy
import dataclasses
import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    Dinov2Model,
    SiglipVisionModel,
    ViTForImageClassification,
    pipeline,
)

from hf_tokenprune import (
    ConfigError,
    PruneConfig,
    PruneStateError,
    RandomConfig,
    StackConfig,
    UniformConfig,
    UnsupportedModelError,
    disable_auto,
    enable_auto,
    from_pretrained,
    merge_recovery,
    prune,
    pruned,
    recover,
    save_pretrained,
    unprune,
)
from hf_tokenprune.config_files import CONFIG_NAME, MAX_VALUES_BYTES
from hf_tokenprune.engine import current_config
from hf_tokenprune.errors import DataError, TokenPruneError
from hf_tokenprune.evaluation import load_images, load_questions
from hf_tokenprune.recovery.training import split
from hf_tokenprune.weights import RECOVERY_NAME, Recovery

from .clip_checkpoint import tiny_clip
from .decoder_families import tiny_vlm
from .families import images as pixels
from .families import tiny_model
from .test_answers_of_families import PROMPT, NumbersProcessor, asked

pytest.importorskip("accelerate")

ROOT = Path(__file__).resolve().parents[1]
CONFIG = UniformConfig(layers=(0,), keep_ratios=0.25)
QUICK: dict[str, Any] = {"passes": 4, "batch_size": 4, "learning_rate": 1e-3, "progress": False}


def vit() -> Any:
    """One whose classes are told apart, so that there is something to lose by pruning."""
    model = tiny_model("vit", ViTForImageClassification, num_hidden_layers=2)
    with torch.no_grad():
        model.classifier.weight.mul_(20)
    return model


def noise(n: int) -> Any:
    """Images without labels, alike enough that what is learned on some holds for the others."""
    generator = torch.Generator().manual_seed(0)
    one, others = torch.rand(1, 32, 32, 3, generator=generator), torch.rand(n, 32, 32, 3, generator=generator)
    drawn = ((0.8 * one + 0.2 * others) * 255).byte().numpy()
    return load_images([{"image": Image.fromarray(image)} for image in drawn], label_column=None)


def processor(images: list[Image.Image], return_tensors: str = "pt") -> dict[str, Tensor]:
    """A processor that scales."""
    import numpy as np

    arrays = [torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 128 - 1 for image in images]
    return {"pixel_values": torch.stack(arrays)}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(pixel_values=pixels()).logits  # type: ignore[no-any-return]


def given(model: nn.Module) -> PruneConfig:
    """The config with values for norms and biases that no training made."""
    generator = torch.Generator().manual_seed(1)
    values = {name: p + torch.randn(p.shape, generator=generator) / 5 for name, p in norms_and_biases(model).items()}
    return CONFIG.with_recovery(Recovery.of(values))


def norms_and_biases(model: nn.Module) -> dict[str, Tensor]:
    """Of a ViT: its vectors. Patches, positions and layers have more axes."""
    return {name: p.detach() for name, p in model.named_parameters() if p.ndim == 1}


def by_hand(model: nn.Module, config: PruneConfig) -> nn.Module:
    """A copy of a dense model with the values of a config written over its own, pruned without them."""
    assert config.recovery is not None and config.recovery.content is not None
    found = copy.deepcopy(model)
    found.load_state_dict(config.recovery.tensors(), strict=False)
    return prune(found, config.with_recovery(None))


# -- training --------------------------------------------------------------------------------------------------------


def kl_by_hand(dense: Any, model: Any, shown: Any, places: list[int]) -> float:
    inputs = torch.cat([processor([shown[i]["image"]])["pixel_values"] for i in places])
    with torch.no_grad():
        p, q = (m(pixel_values=inputs).logits.double().log_softmax(1) for m in (dense, model))
    return float((p.exp() * (p - q)).sum(1).mean())


def test_a_recovered_model_is_nearer_to_its_dense_self_on_images_it_was_not_trained_on() -> None:
    model, shown = vit(), noise(24)
    dense, untrained = copy.deepcopy(model), prune(copy.deepcopy(model), CONFIG)
    prune(model, CONFIG)
    report = recover(model, shown, processor, **QUICK, held_out=0.25)
    _, judges = split(shown.names, 0.25)
    assert report.images_held_out == len(judges) == 6 and report.images == 18
    assert report.before == pytest.approx(kl_by_hand(dense, untrained, shown, judges), rel=1e-4)
    assert report.after == pytest.approx(kl_by_hand(dense, model, shown, judges), rel=1e-4)
    assert report.best >= 1 and report.after < report.before
    assert report.parameters == sum(value.numel() for value in norms_and_biases(dense).values())


def test_only_norms_and_biases_are_changed_and_unprune_gives_them_back_bit_for_bit() -> None:
    model = vit()
    before, names = state_of(model), set(norms_and_biases(model))
    recover(prune(model, CONFIG), noise(12), processor, **QUICK)
    after = state_of(model)
    assert after.keys() == before.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == names
    assert all(p.requires_grad and p.grad is None for p in model.parameters()) and not model.training
    assert same(state_of(unprune(model)), before)
    assert not [name for name, _ in model.named_buffers()]


def test_never_worse_than_it_was() -> None:
    model = prune(vit(), CONFIG)
    before = state_of(model)
    report = recover(model, noise(12), processor, **{**QUICK, "learning_rate": 10.0})
    assert report.best == 0 and report.after == report.before
    assert all(later >= report.before for later in report.held_out[1:])
    assert same(state_of(model), before)
    config = current_config(model)
    assert config is not None and config.recovery is None


def test_it_ends_after_three_passes_that_were_no_better() -> None:
    report = recover(prune(vit(), CONFIG), noise(12), processor, **{**QUICK, "passes": 9, "learning_rate": 10.0})
    assert len(report.held_out) == 4


def test_the_same_arguments_give_the_same_values_and_another_seed_others() -> None:
    def values(seed: int) -> str:
        model = prune(vit(), CONFIG)
        recover(model, noise(12), processor, **QUICK, seed=seed)
        return recovery(model).sha256

    assert values(3) == values(3) != values(4)


def recovery(model: nn.Module) -> Recovery:
    config = current_config(model)
    assert config is not None and config.recovery is not None
    return config.recovery


def test_a_recovered_model_is_recovered_further_towards_the_same_dense_one() -> None:
    model, shown = vit(), noise(16)
    before, dense = state_of(model), copy.deepcopy(model)
    first = recover(prune(model, CONFIG), shown, processor, **{**QUICK, "passes": 1})
    second = recover(model, shown, processor, **QUICK)
    assert second.before == pytest.approx(first.after, rel=1e-4)
    _, judges = split(shown.names, 0.1)
    assert second.after == pytest.approx(kl_by_hand(dense, model, shown, judges), rel=1e-4)
    assert same(state_of(unprune(model)), before)


def test_an_interrupted_run_goes_on_and_ends_with_the_same_values(tmp_path: Path) -> None:
    whole = prune(vit(), CONFIG)
    report = recover(whole, noise(12), processor, **QUICK)
    model, before = prune(vit(), CONFIG), state_of(vit())
    taken = 0

    def stop(images: Any, **kwargs: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken > 1 + 12 + 11 + 1 + 11 + 1 + 5:  # the first one, dense, judged, a pass, judged: within the second pass
            raise KeyboardInterrupt
        return processor(images)

    file = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        recover(model, noise(12), stop, **QUICK, checkpoint=file)
    assert file.exists() and same(state_of(model), before)
    assert current_config(model) == CONFIG
    with pytest.raises(ConfigError, match=r"learning_rate=0\.001, this one has 0\.5"):
        recover(model, noise(12), processor, **{**QUICK, "learning_rate": 0.5}, checkpoint=file)
    again = recover(model, noise(12), processor, **QUICK, checkpoint=file)
    assert again.held_out == report.held_out and recovery(model) == recovery(whole)
    file.write_bytes(b"something else")
    with pytest.raises(ConfigError, match="no state of such a recovery"):
        recover(model, noise(12), processor, **QUICK, checkpoint=file)


def test_bfloat16_is_trained_in_float32() -> None:
    model = prune(vit().bfloat16(), CONFIG)
    recover(model, noise(8), processor, **QUICK)
    assert {value.dtype for value in recovery(model).tensors().values()} == {torch.float32}
    with pytest.raises(UnsupportedModelError, match="float16 has no room"):
        recover(prune(vit().half(), CONFIG), noise(8), processor, **QUICK)


def test_a_clip_is_compared_by_its_similarities_or_embeddings_and_its_texts_stay() -> None:
    model, of_clip = tiny_clip()
    before = state_of(model)
    for names in (["cat", "dog", "bird"], None):
        report = recover(prune(model, CONFIG), noise(24), of_clip, **QUICK, class_names=names, held_out=0.3)
        assert report.measure == ("kl" if names else "features") and report.after < report.before
        assert not [name for name in recovery(model).tensors() if "text" in name]
        assert same(state_of(unprune(model)), before)


def test_a_run_does_not_go_on_with_other_texts(tmp_path: Path) -> None:
    model, of_clip = tiny_clip()
    prune(model, CONFIG)
    recover(model, noise(8), of_clip, **QUICK, class_names=["cat", "dog"], checkpoint=tmp_path / "state")
    with pytest.raises(ConfigError, match=r"class_names=\['cat', 'dog'\], this one has \['cat', 'owl'\]"):
        recover(model, noise(8), of_clip, **QUICK, class_names=["cat", "owl"], checkpoint=tmp_path / "state")


def test_the_classes_of_a_clip_are_read_in_templates() -> None:
    model, of_clip = tiny_clip()
    dense, names, templates = copy.deepcopy(model), ["cat", "dog", "bird"], ["{}", "the {}"]
    shown = noise(24)
    report = recover(prune(model, CONFIG), shown, of_clip, **QUICK, class_names=names, templates=templates)
    _, judges = split(shown.names, 0.1)
    pixels = torch.cat([of_clip(images=[shown[i]["image"]], return_tensors="pt")["pixel_values"] for i in judges])
    with torch.no_grad():
        texts = torch.stack(
            [
                torch.stack([F.normalize(embedded(dense, of_clip, t.replace("{}", n)), dim=-1) for t in templates])
                for n in names
            ]
        )
        texts = F.normalize(texts.mean(1), dim=-1)
        wanted, found = (
            F.normalize(m.get_image_features(pixel_values=pixels).pooler_output, dim=-1) @ texts.T * m.logit_scale.exp()
            for m in (dense, model)
        )
    with pytest.raises(DataError, match=r"templates=\(\): expected"):
        recover(model, shown, of_clip, **QUICK, class_names=names, templates=())
    kl = F.kl_div(found.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="batchmean")
    assert report.after == pytest.approx(float(kl), rel=1e-3)


def embedded(model: Any, of_clip: Any, text: str) -> torch.Tensor:
    features: torch.Tensor = model.get_text_features(**of_clip(text=[text], return_tensors="pt")).pooler_output[0]
    return features


@pytest.mark.parametrize(("family", "cls"), [("dinov2", Dinov2Model), ("siglip_vision_model", SiglipVisionModel)])
def test_an_encoder_without_a_head_is_compared_by_its_features(family: str, cls: Any) -> None:
    model = tiny_model(family, cls, num_hidden_layers=2)
    dense, shown = copy.deepcopy(model), noise(12)
    report = recover(prune(model, CONFIG), shown, processor, **QUICK)
    assert report.measure == "features" and report.after < report.before
    _, judges = split(shown.names, 0.1)
    inputs = torch.cat([processor([shown[i]["image"]])["pixel_values"] for i in judges])
    with torch.no_grad():
        wanted, found = (m(pixel_values=inputs).pooler_output for m in (dense, model))
    distance = ((found - wanted).square().sum(1) / wanted.square().sum(1)).mean()
    assert report.after == pytest.approx(float(distance), rel=1e-3)


def test_a_vision_language_model_learns_the_tokens_of_its_dense_answers() -> None:
    model = tiny_vlm("llava")
    before = state_of(model)
    config = PruneConfig.for_method("divprune", keep_ratio=0.3)
    of_numbers = NumbersProcessor(model)
    rows = [{"image": Image.new("RGB", (9, 4)), "question": "4 5", "answer": "-"}] * 6
    questions = load_questions(rows)
    report = recover(prune(model, config), questions, of_numbers, prompt=PROMPT, new_tokens=3, **QUICK)
    assert report.measure == "kl" and report.after < report.before
    assert any("language_model" in name for name in recovery(model).tensors())
    assert same(state_of(unprune(model)), before)


def test_adapters_of_peft_are_trained_in_place_of_norms(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = vit()
    base.save_pretrained(tmp_path / "base")
    base = ViTForImageClassification.from_pretrained(tmp_path / "base")
    before = state_of(base)
    model = peft.get_peft_model(prune(base, CONFIG), peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    report = recover(model, noise(12), processor, **QUICK)
    assert report.after < report.before
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    assert changed and all("lora_" in name for name in changed)
    config = current_config(model)
    assert config == CONFIG and config.recovery is None
    save_pretrained(model, tmp_path / "adapter")
    assert torch.equal(logits(from_pretrained(tmp_path / "adapter")), logits(model))
    with model.disable_adapter():
        assert torch.equal(logits(unprune(model)), logits(vit()))
    assert before


def test_what_recover_refuses() -> None:
    model = vit()
    with pytest.raises(PruneStateError, match="not pruned"):
        recover(model, noise(4), processor)
    prune(model, CONFIG)
    before = state_of(model)
    refusals: list[tuple[type[TokenPruneError], str, Callable[[], Any]]] = [
        (DataError, "1 image: one to learn from", lambda: recover(model, noise(1), processor, progress=False)),
        (TokenPruneError, "processor is missing", lambda: recover(model, noise(4), progress=False)),
        (ConfigError, "class_names have no effect", lambda: recover(model, noise(4), processor, class_names=["a"])),
        (TokenPruneError, "answers no questions", lambda: recover(model, asked(), processor)),
        (ConfigError, "templates= has no effect", lambda: recover(model, noise(4), processor, templates=["{}"])),
        (ConfigError, "prompt has no effect", lambda: recover(model, noise(4), processor, prompt="{}")),
    ]
    for name, value in (("passes", 0), ("learning_rate", 0.0), ("batch_size", 0), ("held_out", 1.0), ("seed", -1)):
        refusals.append((ConfigError, f"{name}={value}", lambda k=name, v=value: recover(model, noise(4), **{k: v})))
    for error, words, call in refusals:
        with pytest.raises(error, match=words):
            call()
        assert same(state_of(model), before)
        assert current_config(model) == CONFIG
    with pytest.raises(TokenPruneError, match="is asked questions"):
        recover(prune(tiny_vlm("llava"), "divprune"), noise(4), processor)


def test_images_of_one_name_are_held_out_together() -> None:
    names = [f"image {i // 3}" for i in range(30)]
    learn, judge = split(names, 0.2)
    assert sorted(learn + judge) == list(range(30)) and len(judge) == 6
    assert not {names[i] for i in learn} & {names[i] for i in judge}


# -- values in a model -----------------------------------------------------------------------------------------------


def test_values_are_put_in_and_taken_out_bit_for_bit() -> None:
    model = vit()
    before, config, dense = state_of(model), given(model), copy.deepcopy(model)
    wanted = logits(by_hand(dense, config))
    assert not torch.equal(wanted, logits(prune(copy.deepcopy(dense), CONFIG)))
    assert torch.equal(logits(prune(model, config)), wanted)
    for same_model in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(same_model), wanted)
        assert same(state_of(unprune(same_model)), before)
    with pruned(model, RandomConfig(layers=(0,), keep_ratios=0.5)):
        assert torch.equal(model.classifier.bias, dense.classifier.bias)
    assert torch.equal(logits(model), wanted)
    assert same(state_of(unprune(model)), before)
    with pruned(model, config):
        assert torch.equal(logits(model), wanted)
    assert same(state_of(model), before)


def test_only_what_was_trained_is_there_twice() -> None:
    model = vit()
    config = given(model)
    prune(model, config)
    assert sum(b.numel() for _, b in model.named_buffers()) == sum(v.numel() for v in norms_and_biases(model).values())


def test_values_follow_the_model_into_a_dtype() -> None:
    model = vit()
    wanted = {name: value.bfloat16() for name, value in state_of(model).items()}
    config = given(model)
    model = prune(model, config).bfloat16()
    assert same(state_of(unprune(model)), wanted)
    prune(model, config)
    assert config.recovery is not None and recovery(model) == config.recovery
    values = config.recovery.tensors()
    assert torch.equal(model.classifier.bias, values["classifier.bias"].bfloat16())
    assert same(state_of(unprune(model)), wanted)


def test_tied_parameters_are_kept_once() -> None:
    model = vit()
    model.vit.layers[1].layernorm_before = model.vit.layers[0].layernorm_before
    before = state_of(model)
    values = {name: torch.full_like(p, 2.0) for name, p in model.named_parameters() if "layernorm_before" in name}
    both = {**values, **{name.replace("layers.0", "layers.1"): value.clone() for name, value in values.items()}}
    for each in (values, both):
        config = CONFIG.with_recovery(Recovery.of(each))
        prune(model, config)
        assert bool((model.vit.layers[1].layernorm_before.weight == 2).all())
        assert same(state_of(unprune(model)), before)


def test_values_that_were_trained_on_are_the_ones_that_are_saved(tmp_path: Path) -> None:
    model = vit()
    before, config = state_of(model), given(model)
    prune(model, config)
    with torch.no_grad():
        model.classifier.bias.add_(1)
    assert recovery(model) != config.recovery
    wanted = logits(model)
    with pruned(model, "tome"):
        pass
    assert torch.equal(logits(model), wanted)
    save_pretrained(model, tmp_path)
    assert torch.equal(logits(from_pretrained(tmp_path)), wanted)
    assert same(state_of(unprune(model)), before)


def test_merge_makes_a_plain_checkpoint(tmp_path: Path) -> None:
    model = vit()
    prune(model, given(model))
    wanted, values = logits(model), state_of(model)
    assert merge_recovery(model) is model
    config = current_config(model)
    assert config == CONFIG and config.recovery is None
    save_pretrained(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors", CONFIG_NAME]
    assert torch.equal(logits(from_pretrained(tmp_path)), wanted)
    assert same(state_of(unprune(model)), values)
    with pytest.raises(PruneStateError, match="no recovered values"):
        merge_recovery(model)


def test_under_adapters_of_peft_values_go_into_the_base_layers() -> None:
    peft = pytest.importorskip("peft")
    model = vit()
    config, before = given(model), state_of(model)
    wanted = logits(by_hand(model, config))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    assert torch.equal(logits(prune(wrapped, config)), wanted)
    merged = wrapped.merge_and_unload()
    assert torch.equal(logits(merged), wanted)
    assert same(state_of(unprune(merged)), before)


def test_a_config_that_is_made_from_another_has_no_values() -> None:
    config = given(vit())
    assert dataclasses.replace(config, layers=(1,)).recovery is None
    assert config == CONFIG and hash(config) == hash(CONFIG) and "recovery" not in CONFIG.to_dict()
    with pytest.raises(ConfigError, match="none with recovered values"):
        parts = (PruneConfig.for_method("divprune"), PruneConfig.for_method("fastv"))
        StackConfig((parts[0].with_recovery(config.recovery), parts[1]))


# -- the file --------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A recovered checkpoint."""
    model = vit()
    save_pretrained(prune(model, given(model)), tmp_path / "model")
    return tmp_path / "model"


def test_a_checkpoint_has_its_own_weights_and_a_file_of_values(saved: Path) -> None:
    model = vit()
    config = given(model)
    assert config.recovery is not None
    assert same(load_file(saved / RECOVERY_NAME), config.recovery.tensors())
    said = json.loads((saved / CONFIG_NAME).read_text())["recovery"]
    assert said == {"file": RECOVERY_NAME, "sha256": hashlib.sha256((saved / RECOVERY_NAME).read_bytes()).hexdigest()}
    assert json.loads((saved / "config.json").read_text())["prune_config"]["recovery"] == said
    wanted = logits(by_hand(model, config))
    assert torch.equal(logits(from_pretrained(saved)), wanted)
    assert torch.equal(logits(prune(vit(), saved)), wanted)
    assert torch.equal(logits(prune(vit(), saved / CONFIG_NAME)), wanted)
    stock = ViTForImageClassification.from_pretrained(saved)
    assert same(state_of(stock), state_of(model))
    with pytest.raises(ConfigError, match=r"read without that file: give the folder"):
        prune(stock)
    assert same(state_of(stock), state_of(model))
    enable_auto()
    try:
        assert torch.equal(logits(AutoModelForImageClassification.from_pretrained(saved)), wanted)
        assert torch.equal(logits(ViTForImageClassification.from_pretrained(saved, dtype=torch.float32)), wanted)
    finally:
        disable_auto()


def test_pipelines_load_the_values(saved: Path) -> None:
    from transformers import ViTImageProcessorPil

    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(saved)
    enable_auto()
    try:
        pipe: Any = pipeline("image-classification", model=str(saved))
    finally:
        disable_auto()
    assert torch.equal(logits(pipe.model), logits(by_hand(vit(), given(vit()))))


def test_a_config_alone_carries_them(tmp_path: Path) -> None:
    given(vit()).save_pretrained(tmp_path / "config")
    vit().save_pretrained(tmp_path / "model")
    model = from_pretrained(tmp_path / "model", tmp_path / "config")
    assert torch.equal(logits(model), logits(by_hand(vit(), given(vit()))))


def test_values_of_another_model_are_refused_before_weights_are_read(saved: Path, tmp_path: Path) -> None:
    model = tiny_model("vit", ViTForImageClassification, num_hidden_layers=2, hidden_size=16)
    model.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"fits vision encoders.*, not .*has shape \(32,\).*it was made for another"):
        from_pretrained(tmp_path / "other", saved)


def test_an_argument_without_the_values_of_the_checkpoint_makes_a_warning(saved: Path) -> None:
    with pytest.warns(UserWarning, match="recovered.safetensors.*disagree"):
        model = from_pretrained(saved, CONFIG)
    assert torch.equal(logits(model), logits(prune(vit(), CONFIG)))


def test_stock_saving_writes_the_values_into_the_weights(saved: Path, tmp_path: Path) -> None:
    model = from_pretrained(saved)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "stock")
    assert torch.equal(logits(from_pretrained(tmp_path / "stock")), wanted)
    model.save_pretrained(saved)  # over the other, whose file of values would come on top of these
    with pytest.raises(ConfigError, match="is probably left from a model"):
        from_pretrained(saved)


def test_saving_without_values_removes_the_file_of_those_before(saved: Path) -> None:
    save_pretrained(prune(vit(), CONFIG), saved)
    assert not (saved / RECOVERY_NAME).exists()
    assert torch.equal(logits(from_pretrained(saved)), logits(prune(vit(), CONFIG)))


def test_shards_and_a_state_dict_of_the_caller(tmp_path: Path) -> None:
    model = prune(vit(), given(vit()))
    save_pretrained(model, tmp_path, state_dict=model.state_dict(), max_shard_size="20KB")
    assert torch.equal(logits(from_pretrained(tmp_path)), logits(model))
    assert same(state_of(ViTForImageClassification.from_pretrained(tmp_path)), state_of(vit()))


def broken(folder: Path, content: bytes) -> None:
    """Another file, of which the config has the hash."""
    (folder / RECOVERY_NAME).write_bytes(content)
    for name in (CONFIG_NAME, "config.json"):
        said = json.loads((folder / name).read_text())
        about = said if name == CONFIG_NAME else said["prune_config"]
        about["recovery"]["sha256"] = hashlib.sha256(content).hexdigest()
        (folder / name).write_text(json.dumps(said))


NAN = {"classifier.bias": torch.tensor([0.0, float("nan"), 0, 0, 0])}
BAD_FILES = {
    "no safetensors": (b"\x80\x04pickle", "cannot be read"),
    "unknown name": (save({"classifier.bia": torch.zeros(5)}), "has 'classifier.bia'.*did you mean 'classifier.bias'"),
    "other shape": (save({"classifier.bias": torch.zeros(6)}), r"has shape \(6,\).*\(5,\)"),
    "not finite": (save(NAN), "expected finite floating point numbers"),
    "integers": (save({"classifier.bias": torch.zeros(5, dtype=torch.int64)}), "expected finite floating point"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_file_that_does_not_fit_is_refused_and_the_model_as_it_was(saved: Path, what: str) -> None:
    content, words = BAD_FILES[what]
    broken(saved, content)
    model = vit()
    before = state_of(model)
    with pytest.raises(ConfigError, match=words):
        prune(model, saved)
    with pytest.raises(ConfigError, match=words):
        from_pretrained(saved)
    assert same(state_of(model), before)
    assert current_config(model) is None


def test_another_file_than_the_config_names_is_refused_and_nothing_is_loaded(saved: Path) -> None:
    save_file({"classifier.bias": torch.zeros(5)}, saved / RECOVERY_NAME)
    model = vit()
    before = state_of(model)
    for load in (
        lambda: prune(model, saved),
        lambda: from_pretrained(saved),
        lambda: PruneConfig.from_pretrained(saved),
    ):
        with pytest.raises(ConfigError, match=r"its SHA-256 is [0-9a-f]{64}, expected [0-9a-f]{64}\. Nothing was"):
            load()
    assert same(state_of(model), before)
    (saved / RECOVERY_NAME).unlink()
    with pytest.raises(ConfigError, match=r"names 'recovered\.safetensors', and no such file"):
        from_pretrained(saved)


def test_a_file_that_is_too_large_is_not_read(saved: Path) -> None:
    with (saved / RECOVERY_NAME).open("r+b") as file:
        file.truncate(MAX_VALUES_BYTES + 1)
    with pytest.raises(ConfigError, match=f"{MAX_VALUES_BYTES + 1} bytes; a file {RECOVERY_NAME} has at most"):
        from_pretrained(saved)


@pytest.mark.parametrize(
    "said",
    [
        None,
        "recovered.safetensors",
        {"file": "recovered.safetensors"},
        {"file": "recovered.safetensors", "sha256": "0" * 64, "more": 1},
        {"file": "../recovered.safetensors", "sha256": "0" * 64},
        {"file": "/etc/passwd", "sha256": "0" * 64},
        {"file": "a/b.safetensors", "sha256": "0" * 64},
        {"file": "recovered.bin", "sha256": "0" * 64},
        {"file": ".safetensors", "sha256": "0" * 64},
        {"file": "recovered.safetensors\n", "sha256": "0" * 64},
        {"file": 3, "sha256": "0" * 64},
        {"file": "recovered.safetensors", "sha256": "0" * 63},
        {"file": "recovered.safetensors", "sha256": "G" * 64},
    ],
)
def test_what_a_config_may_not_say_of_the_file(said: Any) -> None:
    with pytest.raises(ConfigError, match="recovery"):
        PruneConfig.from_dict({"method": "uniform", "recovery": said})


def test_a_link_out_of_the_folder_is_held_against_the_hash(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (saved / RECOVERY_NAME).unlink()
    (saved / RECOVERY_NAME).symlink_to(tmp_path / "secret")
    with pytest.raises(ConfigError) as error:
        from_pretrained(saved)
    assert "is not the file" in str(error.value) and "secret" not in str(error.value)


def test_parameters_on_other_devices_or_in_pieces_are_refused() -> None:
    from accelerate import cpu_offload

    model = vit()
    config = given(model)
    cpu_offload(model)
    with pytest.raises(UnsupportedModelError, match="is offloaded"):
        prune(model, config)
    assert current_config(model) is None


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(10):
        noise(10)[i]["image"].save(folder / f"{i}.png")
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    from transformers import ViTImageProcessorPil

    vit().save_pretrained(tmp_path / "checkpoint")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def options(checkpoint: Path, photos: Path, out: Path) -> list[str]:
    fields = ["-s", "layers=[0]", "-s", "keep_ratios=0.25"]
    numbers = ["--passes", "4", "--batch-size", "4", "--learning-rate", "0.001", "--held-out", "0.2"]
    return ["recover", str(checkpoint), str(photos), "-m", "uniform", *fields, *numbers, "--out", str(out), "--json"]


def test_the_command_writes_a_config_that_others_take(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from hf_tokenprune.cli import app

    run, out = CliRunner(), tmp_path / "out"
    done = run.invoke(app, options(checkpoint, photos, out))
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["after"] < report["before"]
    assert sorted(path.name for path in out.iterdir()) == [CONFIG_NAME, RECOVERY_NAME, "recovery.json"]
    model = from_pretrained(checkpoint, out)
    assert current_config(model) == CONFIG
    done = run.invoke(app, ["apply", str(checkpoint), str(tmp_path / "applied"), "-c", str(out)])
    assert done.exit_code == 0, done.output
    assert torch.equal(logits(from_pretrained(tmp_path / "applied")), logits(model))
    done = run.invoke(app, ["eval", str(checkpoint), str(photos), "-c", str(out), "--no-labels", "--json"])
    assert done.exit_code == 0, done.output
    done = run.invoke(app, ["eval", str(checkpoint), str(photos), "-c", str(out), "--no-labels", "-g", "0.0001"])
    assert done.exit_code == 1 and "recovered values were trained for it" in done.stderr
    done = run.invoke(app, [*options(checkpoint, photos, out), "--question", "what"])
    assert done.exit_code == 1 and "--question has no effect" in done.stderr


@pytest.mark.slow
def test_two_processes_learn_what_one_does_with_batches_of_twice_the_size(
    checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    from .two_processes import LAUNCH

    def printed(out: str, size: str, *launch: str) -> Any:
        command = options(checkpoint, photos, tmp_path / out)
        command[command.index("--batch-size") + 1] = size
        done = subprocess.run(
            [sys.executable, *launch, "-m", "hf_tokenprune.cli", *command],
            capture_output=True,
            text=True,
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout[done.stdout.index("{") :])

    alone, together = printed("alone", "4"), printed("together", "2", *LAUNCH)
    assert together["held_out"] == pytest.approx(alone["held_out"], rel=1e-3)
    one, two = (load_file(tmp_path / out / RECOVERY_NAME) for out in ("alone", "together"))
    assert all(torch.allclose(one[name], two[name], rtol=1e-3, atol=1e-5) for name in one)
