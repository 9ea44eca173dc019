"""``PruneConfig``: what it takes, what it refuses and with which words, and the file and Hub formats."""

import dataclasses
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import huggingface_hub
import pytest
from huggingface_hub import DryRunFileInfo
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from hf_tokenprune import PruneConfig, RandomConfig, UniformConfig, ZeroTPruneConfig, list_methods
from hf_tokenprune.config import CONFIG_NAME, FORMAT_VERSION, as_config
from hf_tokenprune.config_files import MAX_FILE_BYTES
from hf_tokenprune.errors import ConfigError
from hf_tokenprune.field_types import MAX_VALUES
from hf_tokenprune.methods.layerwise import LayerwiseConfig
from hf_tokenprune.registry import get_method

METHODS = list_methods()
FIELDS = [(method, field.name) for method in METHODS for field in dataclasses.fields(get_method(method))]
LAYERWISE = [method for method in METHODS if issubclass(get_method(method), LayerwiseConfig)]

# Values that are none of the defaults, by method, to see that every field travels. A new method works without one.
EXAMPLES = {
    "random": RandomConfig(layers=(0, 3), keep_ratios=(0.5, 1.0), where="mid_block", positions="original", seed=7),
    "uniform": UniformConfig(layers=(2,), keep_ratios=0.25, where="mid_block", positions="original"),
    "zero_tprune": ZeroTPruneConfig(
        layers=(1, 4),
        keep_ratios=(0.9, 0.5),
        where="mid_block",
        num_similar=(3, 0.1),
        num_iterations=(2, 1),
        cls_boost=False,
        head_variance_range=(0.0, 2.0),
        partition="alternate",
        similarity_feature="value",
        similarity_metric="minkowski3",
        renormalize=False,
    ),
}
CONFIGS = [get_method(method)() for method in METHODS] + list(EXAMPLES.values())


def config_id(config: PruneConfig) -> str:
    return f"{config.method}-{'default' if config == type(config)() else 'example'}"


def hint(method: str, field: str) -> Any:
    return get_type_hints(get_method(method))[field]


def leaves(annotation: Any) -> set[Any]:
    """The types an annotation is made of: float | tuple[int, ...] | None -> {float, int, NoneType}."""
    if get_origin(annotation) in (Union, types.UnionType, tuple):
        return set().union(*(leaves(arg) for arg in get_args(annotation) if arg is not Ellipsis))
    return {annotation}


def message_of(make: Any) -> str:
    with pytest.raises(ConfigError) as error:
        make()
    return str(error.value)


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / CONFIG_NAME
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# -- round trips -----------------------------------------------------------------------------------------------------


def test_the_examples_differ_from_the_defaults_in_every_field() -> None:
    for method, config in EXAMPLES.items():
        default = get_method(method)()
        same = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) == getattr(default, f.name)]
        assert set(same) <= {"exact_last_block", "restore"}, (method, same)  # which exclude each other


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_round_trips(config: PruneConfig, tmp_path: Path) -> None:
    data = config.to_dict()
    assert data["method"] == config.method
    assert data["format_version"] == FORMAT_VERSION
    assert set(data) == {"method", "format_version", *(f.name for f in dataclasses.fields(config))}
    through_json = json.loads(json.dumps(data, allow_nan=False))
    assert through_json == data  # nothing but JSON values
    file = config.save_pretrained(tmp_path / "made" / "for me")
    assert file == tmp_path / "made" / "for me" / CONFIG_NAME
    for back in (
        PruneConfig.from_dict(data),
        type(config).from_dict(through_json),
        PruneConfig.for_method(config.method, **{k: v for k, v in data.items() if k not in ("method",)}),
        PruneConfig.from_pretrained(file.parent),
        PruneConfig.from_pretrained(str(file)),
        type(config).from_pretrained(file.parent),
        as_config(data),
        as_config(file.parent),
        dataclasses.replace(config),
    ):
        assert back == config
        assert repr(back) == repr(config)  # equal numbers of other types would show: 1 == 1.0 == True
        assert hash(back) == hash(config)
    assert as_config(config) is config


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_the_file_is_sorted_indented_json(config: PruneConfig, tmp_path: Path) -> None:
    text = config.save_pretrained(tmp_path).read_text(encoding="utf-8")
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
    assert text == config.save_pretrained(tmp_path).read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == [CONFIG_NAME]


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_a_config_is_immutable(config: PruneConfig) -> None:
    before = config.to_dict()
    for field in dataclasses.fields(config):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, getattr(config, field.name))
        assert not isinstance(getattr(config, field.name), (list, dict, set))
    data = config.to_dict()
    for value in data.values():
        if isinstance(value, list):
            value.clear()
    assert config.to_dict() == before


def test_from_dict_leaves_its_argument_alone() -> None:
    data = EXAMPLES["zero_tprune"].to_dict()
    copy = json.loads(json.dumps(data))
    PruneConfig.from_dict(data)
    assert data == copy


@pytest.mark.parametrize("method", LAYERWISE)
def test_lists_become_tuples_and_integers_floats(method: str) -> None:
    config = PruneConfig.for_method(method, layers=[0, 2], keep_ratios=[1, 0.5])
    assert config.layers == (0, 2)
    assert type(config.layers) is tuple
    assert type(config.keep_ratios) is tuple
    assert [type(ratio) for ratio in config.keep_ratios] == [float, float]
    assert config.keep_ratios == (1.0, 0.5)
    one = PruneConfig.for_method(method, keep_ratios=1)
    assert type(one.keep_ratios) is float


def test_an_integer_stays_one_where_integer_and_fraction_mean_different_things() -> None:
    assert type(ZeroTPruneConfig(num_similar=1).num_similar) is int
    assert type(ZeroTPruneConfig(num_similar=0.5).num_similar) is float
    mixed = ZeroTPruneConfig(layers=(0, 1), keep_ratios=0.5, num_similar=[1, 0.5])
    assert [type(r) for r in mixed.num_similar] == [int, float]


def test_missing_fields_take_the_defaults_and_the_version_may_be_missing() -> None:
    assert PruneConfig.from_dict({"method": "random", "seed": 3}) == RandomConfig(seed=3)
    assert RandomConfig.from_dict({"seed": 3}) == RandomConfig(seed=3)


def test_configs_of_two_methods_are_not_equal() -> None:
    assert RandomConfig() != UniformConfig()


# -- bad values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "field"), FIELDS)
@pytest.mark.parametrize("value", [{"a": 1}, {1, 2}, [{}], ["?"], [[[]]], b"x", object], ids=repr)
def test_a_wrong_type_names_field_value_and_what_is_allowed(method: str, field: str, value: Any) -> None:
    message = message_of(lambda: PruneConfig.for_method(method, **{field: value}))
    assert message.startswith(f"{field}={value!r} in {get_method(method).__name__}: expected ")
    words = {int: "an integer", float: "a finite number", bool: "true or false", str: "a string", type(None): "None"}
    words[PruneConfig] = "a prune config"
    for leaf in leaves(hint(method, field)):
        literals = get_args(leaf)  # of a Literal
        for word in map(repr, literals) if literals else [words[leaf]]:
            assert word in message.split(": expected ")[1]


@pytest.mark.parametrize(("method", "field"), [f for f in FIELDS if bool not in leaves(hint(*f))])
@pytest.mark.parametrize("value", [True, [True, True]], ids=repr)
def test_a_bool_is_no_number(method: str, field: str, value: Any) -> None:
    message = message_of(lambda: PruneConfig.for_method(method, **{field: value}))
    assert message.startswith(f"{field}={value!r} in ")


@pytest.mark.parametrize(("method", "field"), [f for f in FIELDS if bool in leaves(hint(*f))])
@pytest.mark.parametrize("value", [0, 1, "true"], ids=repr)
def test_a_number_is_no_bool(method: str, field: str, value: Any) -> None:
    message = message_of(lambda: PruneConfig.for_method(method, **{field: value}))
    assert message.startswith(f"{field}={value!r} in ")
    assert "expected true or false" in message


NOT_FINITE = [float("nan"), float("inf"), -float("inf"), [float("nan")], 10**400]


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [
        pytest.param(*field, value, id=f"{'-'.join(field)}-{value!s:.20}")
        for field in FIELDS
        for value in NOT_FINITE
        if float in leaves(hint(*field)) and type(value) not in leaves(hint(*field)) - {float}  # 10**400 is an integer
    ],
)
def test_numbers_are_finite(method: str, field: str, value: Any) -> None:
    message = message_of(lambda: PruneConfig.for_method(method, **{field: value}))
    assert message.startswith(f"{field}={value!r:.200} in ")
    assert "a finite number" in message


@pytest.mark.parametrize(("method", "field"), [f for f in FIELDS if tuple in map(get_origin, get_args(hint(*f)))])
def test_lists_are_bounded(method: str, field: str) -> None:
    message = message_of(lambda: PruneConfig.for_method(method, **{field: [1] * (MAX_VALUES + 1)}))
    assert message.startswith(f"{field}=[1, 1,")
    assert len(message) < 500


@pytest.mark.parametrize("method", LAYERWISE)
@pytest.mark.parametrize(
    ("fields", "field", "allowed"),
    [
        ({"layers": (3, 1), "keep_ratios": 0.5}, "layers", "ascending block numbers >= 0"),
        ({"layers": (1, 1), "keep_ratios": 0.5}, "layers", "ascending block numbers >= 0"),
        ({"layers": (-1, 1), "keep_ratios": 0.5}, "layers", "ascending block numbers >= 0"),
        ({"layers": (), "keep_ratios": 0.5}, "layers", "ascending block numbers >= 0"),
        ({"layers": (1.5,), "keep_ratios": 0.5}, "layers", "an integer"),
        ({"layers": 1, "keep_ratios": 0.5}, "layers", "a list of"),
        ({"layers": (1, 2)}, "keep_ratios", "one ratio a layer where layers is given"),
        ({"layers": (1, 2), "keep_ratios": (0.5,)}, "keep_ratios", "2 values, one for each of layers=(1, 2)"),
        ({"layers": (1,), "keep_ratios": (0.5, 0.5)}, "keep_ratios", "1 values, one for each of layers=(1,)"),
        ({"layers": (1,), "keep_ratios": ()}, "keep_ratios", "1 values"),
        ({"keep_ratios": 0}, "keep_ratios", "0 < ratio <= 1, the fraction kept"),
        ({"keep_ratios": -0.5}, "keep_ratios", "0 < ratio <= 1, the fraction kept"),
        ({"keep_ratios": 1.0000001}, "keep_ratios", "0 < ratio <= 1, the fraction kept"),
        ({"layers": (0, 1), "keep_ratios": (0.5, 0.0)}, "keep_ratios", "0 < ratio <= 1, the fraction kept"),
        ({"layers": (0, 1), "keep_ratios": (0.5, 70)}, "keep_ratios", "0 < ratio <= 1, the fraction kept"),
        ({"where": "before_block"}, "where", "'after_block' or 'mid_block'"),
        ({"where": None}, "where", "'after_block' or 'mid_block'"),
    ],
)
def test_layers_and_ratios_out_of_range(method: str, fields: dict, field: str, allowed: str) -> None:
    message = message_of(lambda: PruneConfig.for_method(method, **fields))
    value = fields.get(field)
    if value and field == "keep_ratios":  # already floats when ranges are checked
        value = tuple(map(float, value)) if isinstance(value, tuple) else float(value)
    assert message.startswith(f"{field}={value!r}" if value else f"{field}=")
    assert get_method(method).__name__ in message
    assert allowed in message


@pytest.mark.parametrize(
    ("make", "field", "allowed"),
    [
        (lambda: ZeroTPruneConfig(num_similar=-1), "num_similar=-1", "a count >= 0"),
        (lambda: ZeroTPruneConfig(num_similar=-0.1), "num_similar=-0.1", "0 <= fraction < 1"),
        (lambda: ZeroTPruneConfig(num_similar=1.0), "num_similar=1.0", "0 <= fraction < 1"),
        (lambda: ZeroTPruneConfig(num_similar=(1, -2)), "num_similar=(1, -2)", "a count >= 0"),
        (
            lambda: ZeroTPruneConfig(layers=(1,), keep_ratios=0.5, num_similar=(1, 2)),
            "num_similar=(1, 2)",
            "1 values, one for each pruned layer",
        ),
        (lambda: ZeroTPruneConfig(num_iterations=0), "num_iterations=0", "1 to 1000 rounds"),
        (lambda: ZeroTPruneConfig(num_iterations=1001), "num_iterations=1001", "1 to 1000 rounds"),
        (lambda: ZeroTPruneConfig(num_iterations=(1, 0)), "num_iterations=(1, 0)", "1 to 1000 rounds"),
        (lambda: ZeroTPruneConfig(num_iterations=1.5), "num_iterations=1.5", "an integer"),
        (
            lambda: ZeroTPruneConfig(layers=(1, 2), keep_ratios=0.5, num_iterations=(1,)),
            "num_iterations=(1,)",
            "2 values, one for each pruned layer",
        ),
        (lambda: ZeroTPruneConfig(head_variance_range=(0.7, 0.01)), "head_variance_range=(0.7, 0.01)", "low < high"),
        (lambda: ZeroTPruneConfig(head_variance_range=(0.1, 0.1)), "head_variance_range=(0.1, 0.1)", "low < high"),
        (lambda: ZeroTPruneConfig(head_variance_range=(-1, 1)), "head_variance_range=(-1.0, 1.0)", "0 <= low"),
        (lambda: ZeroTPruneConfig(head_variance_range=(0.1,)), "head_variance_range=(0.1,)", "a list of 2"),
        (lambda: ZeroTPruneConfig(head_variance_range=(0.1, 1, 2)), "head_variance_range=(0.1, 1, 2)", "a list of 2"),
        (lambda: ZeroTPruneConfig(partition="half"), "partition='half'", "'sequential_important' or 'alternate'"),
        (lambda: RandomConfig(seed=-1), "seed=-1", "0 <= seed < 2**31"),
        (lambda: RandomConfig(seed=2**31), "seed=2147483648", "0 <= seed < 2**31"),
        (lambda: RandomConfig(seed=1.0), "seed=1.0", "an integer"),
    ],
)
def test_fields_of_one_method_out_of_range(make: Any, field: str, allowed: str) -> None:
    message = message_of(make)
    assert message.startswith(f"{field} in ")
    assert allowed in message


@pytest.mark.parametrize(
    "setting",
    [
        {"partition": "alternate"},
        {"similarity_feature": "value"},
        {"similarity_metric": "dot"},
        {"renormalize": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("num_similar", [0, 0.0])
def test_a_setting_without_effect_is_refused(setting: dict, num_similar: float) -> None:
    (field,) = setting
    message = message_of(lambda: ZeroTPruneConfig(num_similar=num_similar, **setting))
    assert message.startswith(f"{field}=")
    assert "no effect with num_similar=0" in message
    assert ZeroTPruneConfig(num_similar=1, **setting).to_dict()[field] == setting[field]


@pytest.mark.parametrize(("method", "field"), FIELDS)
def test_an_unknown_field_is_refused_with_a_suggestion(method: str, field: str) -> None:
    typo = field + "s" if not field.endswith("s") else field[:-1]
    message = message_of(lambda: PruneConfig.for_method(method, **{typo: 1}))
    assert f"method {method!r} has no field {typo!r}" in message
    assert f"did you mean {field!r}?" in message
    for known in dataclasses.fields(get_method(method)):
        assert known.name in message


def test_a_field_unlike_any_other_gets_no_suggestion() -> None:
    message = message_of(lambda: PruneConfig.for_method("random", xyzzy=1))
    assert "no field 'xyzzy'" in message
    assert "did you mean" not in message


@pytest.mark.parametrize("name", ["randm", "os", "../x", "hf_tokenprune.methods.random", "", "Random", "_layerwise"])
def test_an_unknown_method_lists_the_known_ones(name: str) -> None:
    message = message_of(lambda: PruneConfig.from_dict({"method": name}))
    assert f"method={name!r}" in message
    assert ", ".join(METHODS) in message


@pytest.mark.parametrize("name", [None, 3, ["random"], {"name": "random"}, True], ids=repr)
def test_a_method_is_a_name(name: Any) -> None:
    assert message_of(lambda: PruneConfig.from_dict({"method": name})).startswith(f"method={name!r}: expected the name")


def test_without_a_method() -> None:
    assert "method=None: expected the name of a method" in message_of(lambda: PruneConfig.from_dict({}))


def test_the_base_class_is_not_a_config() -> None:
    assert "use a method's config or PruneConfig.for_method" in message_of(PruneConfig)


def test_a_method_config_reads_no_other_method(tmp_path: Path) -> None:
    UniformConfig().save_pretrained(tmp_path)
    for make in (
        lambda: RandomConfig.from_dict({"method": "uniform"}),
        lambda: RandomConfig.from_pretrained(tmp_path),
    ):
        message = message_of(make)
        assert "method='uniform' is not what RandomConfig reads ('random')" in message


@pytest.mark.parametrize("data", [None, [], "random", 3, [["method", "random"]]], ids=repr)
def test_only_an_object_is_a_config(data: Any) -> None:
    message = message_of(lambda: PruneConfig.from_dict(data))
    assert "a prune config is an object with a 'method'" in message
    assert f"got {type(data).__name__}: {data!r}" in message


@pytest.mark.parametrize("version", [0, -1, True, 1.0, "1", None, [1]], ids=repr)
def test_bad_format_version(version: Any) -> None:
    message = message_of(lambda: PruneConfig.for_method("random", format_version=version))
    assert message == f"format_version={version!r}: expected the integer {FORMAT_VERSION}"


def test_a_newer_format_version_says_what_to_do() -> None:
    message = message_of(lambda: PruneConfig.for_method("random", format_version=FORMAT_VERSION + 1, new_field=3))
    assert f"format_version={FORMAT_VERSION + 1} is newer than {FORMAT_VERSION}" in message
    assert "pip install -U hf-tokenprune" in message


@pytest.mark.parametrize("method", LAYERWISE)
def test_ratios_without_layers_have_to_fit_the_default_layers(method: str) -> None:
    from hf_tokenprune.signals import ModelShape

    shape = ModelShape(12, 64, 128, 4, 16, (32, 32), (4, 4), 3, 1, True, 0)
    config = PruneConfig.for_method(method, keep_ratios=(0.5,) * 9)
    count = len(type(config).default_blocks)
    message = message_of(lambda: config.stages_for(shape))
    assert message.startswith(f"keep_ratios={(0.5,) * 9} in ")
    assert f"{count} values, one for each default layer" in message


# -- bad files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"method": "random", "seed": 1', "not valid JSON"),
        ("", "not valid JSON"),
        ('{"method": "random", "seed": }', "not valid JSON"),
        ("{'method': 'random'}", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        ('{"method": "random", "seed": ' + "9" * 5000 + "}", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"method": "random", "layers": ' + "[" * 50_000 + "]" * 50_000 + "}", "not valid JSON"),
        ('{"method": "random", "layers": ' + "[" * 50 + "]" * 50 + "}", "layers=[[[["),
        ('{"method": "random", "keep_ratios": NaN}', "NaN is not a JSON number"),
        ('{"method": "random", "keep_ratios": Infinity}', "Infinity is not a JSON number"),
        ('{"method": "random", "keep_ratios": [0.5, -Infinity]}', "-Infinity is not a JSON number"),
        ('{"method": "random", "keep_ratios": 1e999}', "keep_ratios=inf"),
        ('{"method": "random", "keep_ratios": 1' + "0" * 400 + "}", "keep_ratios=1000"),
        ('{"method": "random", "seed": 1, "seed": 2}', "field 'seed' stands twice"),
        ('{"method": "random", "method": "uniform"}', "field 'method' stands twice"),
        ("[]", "a prune config is an object"),
        ("null", "a prune config is an object"),
        ('"random"', "a prune config is an object"),
        ('{"method": "random", "sed": 1}', "did you mean 'seed'?"),
        ('{"method": "os"}', "method='os': no such method"),
        ('{"method": "random", "format_version": 99}', "is newer than"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_file_is_named_in_the_error(text: str | bytes, expected: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    for source in (path, tmp_path):
        message = message_of(lambda source=source: PruneConfig.from_pretrained(source))
        assert message.startswith(f"{path}: ")
        assert expected in message
        assert len(message) < 1000 + len(str(path))


def test_a_file_has_a_size_limit(tmp_path: Path) -> None:
    text = RandomConfig().save_pretrained(tmp_path).read_text()
    path = write(tmp_path, text + " " * (MAX_FILE_BYTES - len(text)))
    assert PruneConfig.from_pretrained(path) == RandomConfig()
    write(tmp_path, text + " " * (MAX_FILE_BYTES - len(text) + 1))
    message = message_of(lambda: PruneConfig.from_pretrained(path))
    assert message == f"{path}: {MAX_FILE_BYTES + 1} bytes; a prune config has at most {MAX_FILE_BYTES}"


def test_missing_files(tmp_path: Path) -> None:
    message = message_of(lambda: PruneConfig.from_pretrained(tmp_path))
    assert message == f"no {CONFIG_NAME} in {str(tmp_path)!r}"
    RandomConfig().save_pretrained(tmp_path / "sub")
    assert PruneConfig.from_pretrained(tmp_path, subfolder="sub") == RandomConfig()
    assert "no prune_config.json" in message_of(lambda: PruneConfig.from_pretrained(tmp_path, subfolder=None))
    for absent in (tmp_path / "absent" / CONFIG_NAME, "./absent", "x" * 300):
        message = message_of(lambda absent=absent: PruneConfig.from_pretrained(absent))
        assert f"{str(absent)!r} is neither a local path nor a Hub repository" in message


def test_reading_a_config_imports_and_runs_nothing_it_names(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    code = """
import json, sys
from hf_tokenprune import PruneConfig, list_methods
from hf_tokenprune.errors import ConfigError
list_methods()
before = set(sys.modules)
for name in json.loads(sys.argv[1]):
    try:
        PruneConfig.from_dict({"method": name})
    except ConfigError as error:
        assert "no such method" in str(error), error
    else:
        raise AssertionError(name)
for field in ("auto_map", "__class__", "__init__", "stages", "method.__globals__"):
    try:
        PruneConfig.from_dict({"method": "random", field: "evil.Config"})
    except ConfigError as error:
        assert "has no field" in str(error), error
    else:
        raise AssertionError(field)
assert set(sys.modules) == before, set(sys.modules) - before
print("nothing imported")
"""
    names = ["evil", "evil.Config", "os", "antigravity", "../x", "/etc/passwd", "methods.random", "random\0", "this"]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(names)],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{root}:{tmp_path}", "PATH": "", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "nothing imported\n"), done.stderr


# -- the Hub ---------------------------------------------------------------------------------------------------------


def test_from_pretrained_of_a_hub_repository(monkeypatch, tmp_path: Path) -> None:
    file = RandomConfig(seed=5).save_pretrained(tmp_path)
    calls = []

    def download(repo_id: str, filename: str, dry_run: bool = False, **kwargs: Any) -> Any:
        if dry_run:
            return DryRunFileInfo("0" * 40, 100, filename, str(file), False, True)
        calls.append((repo_id, filename, kwargs))
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    got = PruneConfig.from_pretrained("owner/name", revision="v1", token="t", subfolder="sub")
    assert got == RandomConfig(seed=5)
    assert calls == [("owner/name", CONFIG_NAME, {"subfolder": "sub", "revision": "v1", "token": "t"})]
    PruneConfig.from_pretrained("owner/name")
    assert calls[1] == ("owner/name", CONFIG_NAME, {"subfolder": None})


@pytest.mark.parametrize("error", [EntryNotFoundError, LocalEntryNotFoundError])
def test_a_hub_repository_without_the_file(error: type[Exception], monkeypatch) -> None:
    def download(*args: Any, **kwargs: Any) -> str:
        raise error("404")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    message = message_of(lambda: PruneConfig.from_pretrained("owner/name"))
    assert "no prune_config.json in 'owner/name'" in message
    assert "no such folder is here" in message


def test_offline_a_repository_that_is_not_cached(tmp_path: Path) -> None:
    message = message_of(lambda: PruneConfig.from_pretrained("owner/name", cache_dir=tmp_path))
    assert "no prune_config.json in 'owner/name'" in message
    assert "the Hub or (offline) its cache has no such file" in message
