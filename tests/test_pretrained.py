"""Prune configs that travel with checkpoints: our load and save, stock load and save, and the opt-in auto mode."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import DryRunFileInfo
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    BertConfig,
    BertModel,
    CLIPModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
    pipeline,
)

import hf_tokenprune
from hf_tokenprune import (
    PruneConfig,
    RandomConfig,
    UniformConfig,
    ZeroTPruneConfig,
    disable_auto,
    enable_auto,
    list_methods,
    prune,
    record,
    unprune,
)
from hf_tokenprune.adapters.vision.vit import ViTAdapter
from hf_tokenprune.config import CONFIG_NAME
from hf_tokenprune.engine import current_config
from hf_tokenprune.errors import ConfigError, PruneStateError, UnsupportedModelError
from hf_tokenprune.methods.layerwise import LayerwiseConfig
from hf_tokenprune.registry import get_adapter, get_method
from hf_tokenprune.sharing.pretrained import choose_config

from .families import first_tensor, images, supported_classes, tiny_model

DEFAULTS = [get_method(name)() for name in list_methods("vision") if issubclass(get_method(name), LayerwiseConfig)]
OURS = [(family, cls) for family, cls in supported_classes() if isinstance(get_adapter(family), ViTAdapter)]
"""Families whose stock ``save_pretrained`` writes the same file again; the contract has all of them."""
ARGUMENT = RandomConfig(layers=(1,), keep_ratios=0.25)
IN_FILE = UniformConfig(layers=(2,), keep_ratios=0.5)
IN_KEY = RandomConfig(layers=(3,), keep_ratios=0.75)


def by_method(config: PruneConfig) -> str:
    return config.method


def vit() -> ViTForImageClassification:
    return tiny_model("vit", ViTForImageClassification)


def run(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return first_tensor(model(images()))


def checkpoint(folder: Path, file: PruneConfig | None = None, key: PruneConfig | None = None) -> Path:
    """A stock checkpoint of a dense model, with a config beside it, in its ``config.json``, both or neither."""
    model = vit()
    if key is not None:
        model.config.prune_config = key.to_dict()
    model.save_pretrained(folder)
    if file is not None:
        file.save_pretrained(folder)
    return folder


def caught(call: Any) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = call()
    return result, [str(warning.message) for warning in found if "disagree" in str(warning.message)]


@pytest.fixture
def auto() -> Iterator[None]:
    enable_auto()
    yield
    disable_auto()


# -- our own save and load -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", DEFAULTS, ids=by_method)
@pytest.mark.parametrize(("family", "cls"), OURS, ids=lambda value: getattr(value, "__name__", value))
def test_save_and_load_give_the_same_model(family: str, cls: type, config: PruneConfig, tmp_path: Path) -> None:
    model = prune(tiny_model(family, cls), config)
    expected = run(model)
    hf_tokenprune.save_pretrained(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", CONFIG_NAME}
    assert PruneConfig.from_pretrained(tmp_path) == config
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [cls.__name__]
    loaded = hf_tokenprune.from_pretrained(tmp_path)
    assert type(loaded) is cls
    assert not loaded.training
    assert current_config(loaded) == config
    assert torch.equal(run(loaded), expected)
    assert run(loaded).shape == expected.shape
    assert loaded.state_dict().keys() == tiny_model(family, cls).state_dict().keys()
    hf_tokenprune.save_pretrained(loaded, tmp_path / "again")
    for name in ("config.json", CONFIG_NAME):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / name).read_text()
    weights, again = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_sharded_files_are_safetensors_too(tmp_path: Path) -> None:
    model = prune(vit(), ARGUMENT)
    hf_tokenprune.save_pretrained(model, tmp_path, max_shard_size="50KB")
    names = {path.name for path in tmp_path.iterdir()}
    shards = {name for name in names if name.endswith(".safetensors")}
    assert len(shards) > 1
    assert names - shards == {"config.json", CONFIG_NAME, "model.safetensors.index.json"}
    assert torch.equal(run(hf_tokenprune.from_pretrained(tmp_path)), run(model))


def test_save_of_a_dense_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PruneStateError, match=r"not pruned; call prune first, or save it with model\.save_pretrained"):
        hf_tokenprune.save_pretrained(vit(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_load_without_any_config_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    with pytest.raises(ConfigError) as error:
        hf_tokenprune.from_pretrained(tmp_path)
    assert f"no prune config for {str(tmp_path)!r}: give prune_config=..., or add a {CONFIG_NAME}" in str(error.value)
    assert "Transformers' own from_pretrained" in str(error.value)


@pytest.mark.parametrize("as_what", ["config", "dict", "folder", "file"])
def test_the_argument_in_every_form(as_what: str, tmp_path: Path) -> None:
    checkpoint(tmp_path / "model")
    file = ARGUMENT.save_pretrained(tmp_path / "config")
    argument = {"config": ARGUMENT, "dict": ARGUMENT.to_dict(), "folder": str(file.parent), "file": file}[as_what]
    model = hf_tokenprune.from_pretrained(tmp_path / "model", argument)
    assert current_config(model) == ARGUMENT
    assert torch.equal(run(model), run(prune(vit(), ARGUMENT)))


SOURCES = {"argument": ARGUMENT, "file": IN_FILE, "key": IN_KEY}
NAMES = {
    "argument": "the argument prune_config",
    "file": f"its {CONFIG_NAME}",
    "key": "the key prune_config of its config.json",
}
PRESENT = [
    ("argument",),
    ("file",),
    ("key",),
    ("argument", "file"),
    ("argument", "key"),
    tuple(SOURCES),
]


@pytest.mark.parametrize("loader", ["ours", "auto class", "concrete class", "pipeline"])
@pytest.mark.parametrize("present", PRESENT, ids="+".join)
@pytest.mark.parametrize("equal", [False, True], ids=["different", "equal"])
def test_precedence_is_argument_file_key(loader: str, present: tuple[str, ...], equal: bool, tmp_path: Path) -> None:
    given = {name: SOURCES[present[0]] if equal else SOURCES[name] for name in present}
    checkpoint(tmp_path, given.get("file"), given.get("key"))
    argument = {"prune_config": given["argument"]} if "argument" in given else {}
    if loader == "ours":
        model, messages = caught(lambda: hf_tokenprune.from_pretrained(tmp_path, **argument))
    else:
        load = {
            "auto class": lambda: AutoModelForImageClassification.from_pretrained(tmp_path, **argument),
            "concrete class": lambda: ViTForImageClassification.from_pretrained(tmp_path, **argument),
            "pipeline": lambda: classifier(tmp_path, model_kwargs=argument).model,
        }[loader]
        enable_auto()
        try:
            model, messages = caught(load)
        finally:
            disable_auto()
    assert current_config(model) == given[present[0]]
    assert model.config.prune_config == given[present[0]].to_dict()
    assert torch.equal(run(model), run(prune(vit(), given[present[0]])))
    assert len(messages) == (0 if equal else len(present) - 1)
    for message, other in zip(messages, present[1:], strict=not equal):
        assert str(tmp_path) in message
        assert f"{NAMES[present[0]]} ({given[present[0]]}) and {NAMES[other]} ({given[other]}) disagree" in message
        assert "using the former" in message


def test_a_broken_file_or_key_is_an_error_even_where_an_argument_is_given(tmp_path: Path) -> None:
    checkpoint(tmp_path / "a", file=IN_FILE)
    (tmp_path / "a" / CONFIG_NAME).write_text('{"method": "random", "sed": 1}')
    with pytest.raises(ConfigError, match=r"prune_config\.json: method 'random' has no field 'sed'"):
        hf_tokenprune.from_pretrained(tmp_path / "a", ARGUMENT)
    checkpoint(tmp_path / "b")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps({**config, "prune_config": {"method": "gone"}}))
    with pytest.raises(ConfigError, match="method='gone': no such method"):
        hf_tokenprune.from_pretrained(tmp_path / "b")


def test_a_config_that_does_not_fit_the_checkpoint(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    with pytest.raises(ConfigError, match=r"block 11 does not exist, this model has 8 blocks"):
        hf_tokenprune.from_pretrained(tmp_path, RandomConfig(layers=(11,), keep_ratios=0.5))


def test_the_class_to_load(tmp_path: Path) -> None:
    checkpoint(tmp_path, file=IN_FILE)
    assert type(hf_tokenprune.from_pretrained(tmp_path)) is ViTForImageClassification
    assert type(hf_tokenprune.from_pretrained(tmp_path, auto_class=AutoModel)) is ViTModel
    assert type(hf_tokenprune.from_pretrained(tmp_path, auto_class=ViTModel)) is ViTModel
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("PreTrainedConfig", "set_seed", "NoSuchClass", "__loader__"):  # nothing but models is loaded
        (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
        assert type(hf_tokenprune.from_pretrained(tmp_path)) is ViTModel


@pytest.mark.parametrize("part", [CLIPVisionModel, CLIPVisionModelWithProjection])
def test_a_part_of_a_checkpoint(part: type, tmp_path: Path) -> None:
    """Its config is a part too, which only loading finds."""
    tiny_model("clip", CLIPModel).save_pretrained(tmp_path)
    assert current_config(hf_tokenprune.from_pretrained(tmp_path, ARGUMENT, part)) == ARGUMENT
    with pytest.raises(ConfigError, match=r"block 11 does not exist"):
        hf_tokenprune.from_pretrained(tmp_path, RandomConfig(layers=(11,), keep_ratios=0.5), part)


@pytest.mark.parametrize(
    "kwargs", [{}, {"device_map": "cpu"}, {"low_cpu_mem_usage": True}, {"dtype": torch.bfloat16}], ids=str
)
def test_arguments_go_to_transformers(kwargs: dict, tmp_path: Path) -> None:
    checkpoint(tmp_path, file=IN_FILE)
    model = hf_tokenprune.from_pretrained(tmp_path, **kwargs)
    expected = prune(ViTForImageClassification.from_pretrained(tmp_path, **kwargs), IN_FILE)
    assert model.dtype == kwargs.get("dtype", torch.float32)
    assert torch.equal(run(model), run(expected))


def test_loading_info_and_a_config_given_as_object_or_path(tmp_path: Path) -> None:
    checkpoint(tmp_path, file=IN_FILE)
    model, info = hf_tokenprune.from_pretrained(tmp_path, output_loading_info=True)
    assert current_config(model) == IN_FILE
    assert not info["missing_keys"]
    for config in (AutoConfig.from_pretrained(tmp_path, num_labels=5), str(tmp_path), tmp_path):
        assert torch.equal(run(hf_tokenprune.from_pretrained(tmp_path, config=config)), run(model))


def test_a_subfolder(tmp_path: Path) -> None:
    checkpoint(tmp_path / "inner", file=IN_FILE)
    ARGUMENT.save_pretrained(tmp_path)  # of another model
    assert current_config(hf_tokenprune.from_pretrained(tmp_path, subfolder="inner")) == IN_FILE


# -- stock Transformers carries it -----------------------------------------------------------------------------------


def test_stock_save_carries_the_key_and_stock_load_stays_dense(tmp_path: Path) -> None:
    config = ZeroTPruneConfig()
    model = vit()
    dense = run(model)
    expected = run(prune(model, config))
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert json.loads((tmp_path / "config.json").read_text())["prune_config"] == config.to_dict()
    assert torch.equal(run(hf_tokenprune.from_pretrained(tmp_path)), expected)
    for cls in (AutoModelForImageClassification, ViTForImageClassification):
        stock = cls.from_pretrained(tmp_path)
        assert current_config(stock) is None
        assert torch.equal(run(stock), dense)
        with pytest.raises(PruneStateError):
            unprune(stock)
        assert torch.equal(run(prune(stock, config)), expected)
        assert torch.equal(run(unprune(stock)), dense)
        assert not hasattr(stock.config, "prune_config")


def test_an_unpruned_model_is_saved_as_a_dense_one(tmp_path: Path) -> None:
    checkpoint(tmp_path / "stock")
    unprune(prune(vit(), ARGUMENT)).save_pretrained(tmp_path / "ours")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "stock" / file).read_bytes()


def test_trainer_saves_it(tmp_path: Path) -> None:
    model = prune(vit(), ARGUMENT)
    expected = run(model)
    arguments = TrainingArguments(tmp_path / "run", report_to=[], use_cpu=True)
    Trainer(model, arguments).save_model(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*.safetensors.index.json"))
    assert torch.equal(run(hf_tokenprune.from_pretrained(tmp_path / "saved")), expected)
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize(
    "setting",
    [
        {"private": True},
        {"tags": ["mine"]},
        {"commit_message": "words"},
        {"create_pr": True},
        {"revision": "v1"},
        {"repo_id": "me/x"},
        {"token": "t"},
    ],
    ids=str,
)
def test_settings_of_a_push_without_one(setting: dict[str, Any], tmp_path: Path) -> None:
    (name,) = setting
    with pytest.raises(ConfigError, match=f"{name}= has no effect without push_to_hub=True"):
        hf_tokenprune.save_pretrained(prune(vit(), IN_FILE), tmp_path / "new", **setting)
    assert not (tmp_path / "new").exists()
    hf_tokenprune.save_pretrained(prune(vit(), IN_FILE), tmp_path / "new", **{name: None})


def test_a_file_is_no_folder_to_save_in(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("mine")
    with pytest.raises(ConfigError, match="model is a file; give a folder"):
        hf_tokenprune.save_pretrained(prune(vit(), IN_FILE), tmp_path / "model")


# -- enable_auto -----------------------------------------------------------------------------------------------------


def classifier(model: Any, **kwargs: Any) -> Any:
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    return pipeline("image-classification", model=str(model), image_processor=processor, device="cpu", **kwargs)


def picture() -> Image.Image:
    return Image.effect_noise((40, 36), 80).convert("RGB")


@pytest.mark.parametrize("source", ["file", "key"])
@pytest.mark.parametrize("cls", [AutoModelForImageClassification, ViTForImageClassification, AutoModel, ViTModel])
def test_stock_classes_follow_what_a_checkpoint_carries(auto: None, cls: type, source: str, tmp_path: Path) -> None:
    checkpoint(tmp_path, **{source: IN_FILE})
    model = cls.from_pretrained(tmp_path)
    assert current_config(model) == IN_FILE
    with record(model) as rec:
        run(model)
    assert rec.tokens[7] == 33


@pytest.mark.parametrize("as_what", ["config", "dict", "folder", "file"])
@pytest.mark.parametrize("cls", [AutoModelForImageClassification, ViTForImageClassification])
@pytest.mark.parametrize("carried", [None, IN_KEY], ids=["dense", "pruned"])
def test_stock_classes_take_prune_config(
    auto: None, cls: type, as_what: str, carried: PruneConfig | None, tmp_path: Path
) -> None:
    checkpoint(tmp_path / "model", key=carried)
    file = ARGUMENT.save_pretrained(tmp_path / "config")
    argument = {"config": ARGUMENT, "dict": ARGUMENT.to_dict(), "folder": str(file.parent), "file": file}[as_what]
    (model, info), messages = caught(
        lambda: cls.from_pretrained(tmp_path / "model", prune_config=argument, output_loading_info=True)
    )
    assert not info["missing_keys"]
    assert current_config(model) == ARGUMENT
    assert model.config.prune_config == ARGUMENT.to_dict()
    assert len(messages) == (carried is not None)
    model.save_pretrained(tmp_path / "again")
    assert current_config(cls.from_pretrained(tmp_path / "again", prune_config=None)) == ARGUMENT


def test_pipelines_prune(auto: None, tmp_path: Path) -> None:
    checkpoint(tmp_path / "carries", file=IN_FILE, key=IN_FILE)
    checkpoint(tmp_path / "dense")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "carries")
    pipes = {
        33: classifier(tmp_path / "carries"),
        17: classifier(tmp_path / "dense", model_kwargs={"prune_config": ARGUMENT}),
    }
    for tokens, pipe in pipes.items():
        with record(pipe.model) as rec:
            answer = pipe(picture())
        assert rec.tokens[7] == tokens
        assert len(answer) == 5
        assert sum(label["score"] for label in answer) == pytest.approx(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the two configs disagree
        pipe = pipeline("image-classification", str(tmp_path / "carries"), model_kwargs={"prune_config": ARGUMENT})
    assert current_config(pipe.model) == ARGUMENT  # with the processor of the folder, which gets model_kwargs too
    assert len(pipe(picture())) == 5
    assert current_config(classifier(tmp_path / "dense").model) is None


def test_dense_checkpoints_load_as_ever(auto: None, tmp_path: Path) -> None:
    checkpoint(tmp_path)
    for cls in (AutoModelForImageClassification, ViTForImageClassification):
        model, info = cls.from_pretrained(tmp_path, output_loading_info=True)
        assert current_config(model) is None
        assert not hasattr(model.config, "prune_config")
        assert torch.equal(run(model), run(vit()))
        assert not info["missing_keys"]
    config, unused = AutoConfig.from_pretrained(tmp_path, return_unused_kwargs=True, num_labels=3, other=1)
    assert (config.num_labels, unused) == (3, {"other": 1})


def test_loading_with_our_function_prunes_once(auto: None, tmp_path: Path) -> None:
    checkpoint(tmp_path, file=IN_FILE, key=IN_FILE)
    for auto_class in (None, AutoModelForImageClassification, ViTForImageClassification):
        model, messages = caught(
            lambda cls=auto_class: hf_tokenprune.from_pretrained(tmp_path, ARGUMENT, auto_class=cls)
        )
        assert len(messages) == 2  # about the file and the key, once each
        assert current_config(model) == ARGUMENT
        assert torch.equal(run(model), run(prune(vit(), ARGUMENT)))


def test_enable_and_disable(tmp_path: Path) -> None:
    checkpoint(tmp_path, file=IN_FILE)
    classes = (PreTrainedModel, AutoConfig, AutoModel, AutoModelForImageClassification, ViTForImageClassification)
    before = [cls.__dict__.get("from_pretrained") for cls in classes]
    functions = [cls.from_pretrained.__func__ for cls in classes]
    disable_auto()  # not enabled: nothing happens
    enable_auto()
    during = [cls.__dict__.get("from_pretrained") for cls in classes]
    enable_auto()
    assert [cls.__dict__.get("from_pretrained") for cls in classes] == during != before
    assert PreTrainedModel.from_pretrained.__doc__ == functions[0].__doc__
    assert current_config(ViTForImageClassification.from_pretrained(tmp_path)) == IN_FILE
    disable_auto()
    for now, then in zip((cls.__dict__.get("from_pretrained") for cls in classes), before, strict=True):
        assert now is then
    for cls, function in zip(classes, functions, strict=True):
        assert cls.from_pretrained.__func__ is function
    assert current_config(ViTForImageClassification.from_pretrained(tmp_path)) is None
    with pytest.raises(TypeError, match="prune_config"):
        ViTForImageClassification.from_pretrained(tmp_path, prune_config=ARGUMENT)
    disable_auto()


def test_a_config_for_all_leaves_models_that_it_is_not_for_as_they_are(tmp_path: Path) -> None:
    """A text encoder, an image encoder beside a vision-language model; one that it is for and does not fit raises."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    BertModel(BertConfig(vocab_size=8, **sizes)).save_pretrained(tmp_path / "bert")
    checkpoint(tmp_path / "vit"), checkpoint(tmp_path / "own", file=IN_FILE)
    try:
        enable_auto("tome")
        for load in (BertModel.from_pretrained, AutoModel.from_pretrained):
            with pytest.warns(
                UserWarning, match=r"this BertModel is not pruned by ToMeConfig.*no adapter for model_type"
            ):
                assert type(load(tmp_path / "bert")) is BertModel
        enable_auto("divprune")
        with pytest.warns(UserWarning, match=r"is not pruned by .* it is one of the vision encoders"):
            assert current_config(ViTForImageClassification.from_pretrained(tmp_path / "vit")) is None
        with pytest.warns(UserWarning, match="is not pruned by"):
            assert current_config(ViTForImageClassification.from_pretrained(tmp_path / "own")) == IN_FILE
        enable_auto(UniformConfig(layers=(40,), keep_ratios=0.5))
        with pytest.raises(ConfigError, match="block 40 does not exist"):
            ViTForImageClassification.from_pretrained(tmp_path / "vit")
        with pytest.raises(UnsupportedModelError, match="no adapter"):  # asked for by name
            BertModel.from_pretrained(tmp_path / "bert", prune_config="tome")
    finally:
        disable_auto()


def test_auto_mode_in_a_subfolder(auto: None, tmp_path: Path) -> None:
    checkpoint(tmp_path / "inner", file=IN_FILE)
    ARGUMENT.save_pretrained(tmp_path)
    for cls in (AutoModelForImageClassification, ViTForImageClassification):
        assert current_config(cls.from_pretrained(tmp_path, subfolder="inner")) == IN_FILE


@pytest.mark.parametrize("cls", [AutoModelForImageClassification, ViTForImageClassification])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not valid JSON"),
        ('{"method": "gone"}', "no such method"),
        ('{"method": "random", "format_version": 9}', "is newer than"),
        ('{"method": "random", "layers": [9], "keep_ratios": 0.5}', "block 9 does not exist"),
    ],
)
def test_a_bad_file_is_an_error_in_auto_mode(auto: None, cls: type, text: str, expected: str, tmp_path: Path) -> None:
    checkpoint(tmp_path)
    (tmp_path / CONFIG_NAME).write_text(text)
    with pytest.raises(ConfigError, match=expected):
        cls.from_pretrained(tmp_path)
    (tmp_path / CONFIG_NAME).unlink()
    assert current_config(cls.from_pretrained(tmp_path)) is None  # and the next load is not affected


def test_a_bad_argument_is_an_error_in_auto_mode(auto: None, tmp_path: Path) -> None:
    checkpoint(tmp_path)
    for bad in ({"method": "gone"}, {}, "./absent", "off", "auto", 3):
        with pytest.raises(ConfigError):
            ViTForImageClassification.from_pretrained(tmp_path, prune_config=bad)
        with pytest.raises(ConfigError):
            AutoModelForImageClassification.from_pretrained(tmp_path, prune_config=bad)


def test_an_argument_for_an_unsupported_family_is_an_error(auto: None, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    BertModel(
        BertConfig(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1)
    ).save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is BertModel
    with pytest.raises(UnsupportedModelError, match="no adapter for model_type='bert'"):
        AutoModel.from_pretrained(tmp_path, prune_config=ARGUMENT)


def test_weights_from_memory_are_pruned_too(auto: None) -> None:
    model = vit()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loaded = ViTForImageClassification.from_pretrained(
        None, config=model.config, state_dict=weights, prune_config=ARGUMENT
    )
    assert torch.equal(run(loaded), run(prune(vit(), ARGUMENT)))


@pytest.mark.parametrize(
    "kwargs", [{"device_map": "cpu"}, {"low_cpu_mem_usage": True}, {"dtype": torch.bfloat16}], ids=str
)
def test_auto_mode_with_other_ways_to_load(auto: None, kwargs: dict, tmp_path: Path) -> None:
    checkpoint(tmp_path, file=IN_FILE)
    expected = run(hf_tokenprune.from_pretrained(tmp_path, **kwargs))
    for cls in (AutoModelForImageClassification, ViTForImageClassification):
        assert torch.equal(run(cls.from_pretrained(tmp_path, **kwargs)), expected)


def test_a_hub_repository(auto: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The file is asked for with the very arguments of the load: how large it is, and then for what is in it."""
    checkpoint(tmp_path / "model")
    file = IN_FILE.save_pretrained(tmp_path / "hub")
    calls = []

    def download(repo_id: str, filename: str, dry_run: bool = False, **kwargs: Any) -> Any:
        calls.append((repo_id, filename, kwargs))
        return DryRunFileInfo("0" * 40, 100, filename, str(file), False, True) if dry_run else str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    hub_kwargs = {"revision": "v1", "token": "t", "cache_dir": "/c", "local_files_only": True, "subfolder": "s"}
    chosen = choose_config("owner/name", None, None, hub_kwargs)
    assert chosen == IN_FILE
    assert calls == 2 * [("owner/name", CONFIG_NAME, hub_kwargs)]
