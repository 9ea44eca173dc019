"""``PruneConfig``: what to prune, as typed, frozen, versioned data that travels as ``prune_config.json``.

A config is data. Reading one executes nothing and imports nothing it names; whatever is unknown, of the wrong type or
out of range is an error, never a default, because a dropped field changes accuracy silently.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from .atomic import write_bytes, write_text
from .config_files import CONFIG_NAME, MODEL_CONFIG_NAME, find_config_file, is_path, read_json
from .errors import ConfigError, did_you_mean, shown
from .field_types import convert, describe, few_values, field_types
from .registry import get_method, list_methods
from .weights import RECOVERY, Recoverable, Recovery

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

    from .signals import Stage

FORMAT_VERSION = 1
ALSO_IN = "also_in"
"""``"also_in": "config.json"`` stands in a file that was saved with a pruned model, whose config.json says the same."""

Where = Literal["after_block", "mid_block", "queries"]
C = TypeVar("C", bound="PruneConfig")


@dataclass(frozen=True)
class PruneConfig(Recoverable):
    """Base of all method configs: one frozen dataclass a method, validated when it is made.

    Raises:
        ConfigError: a field has the wrong type or is out of range; the message names it, its value and what is allowed.
    """

    method: ClassVar[str] = ""
    prunes: ClassVar[frozenset[str]] = frozenset({"vision"})
    """What the method works on: "vision" encoders, the "decoder" of vision-language models, or both."""
    one_stage: ClassVar[bool] = False
    """Whether tokens leave at a single place, so that a budget decides how many."""
    search_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that a search chooses beside the counts where they have their defaults, in the order of choosing."""

    def __post_init__(self) -> None:
        if not self.method:
            raise ConfigError("PruneConfig is a base; use a method's config or PruneConfig.for_method(name, ...)")
        for name, hint in field_types(type(self)).items():
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, convert(value, hint))
            except TypeError:
                self.check(False, name, describe(hint))
        self.validate()

    def validate(self) -> None:
        """Check ranges and how fields fit together. Types are already right."""

    def stages_for(self, shape: Any) -> tuple[Stage, ...]:
        """The pruning points this config means for a model of this shape, in the order of their layers.

        ``shape`` is of a kind that ``prunes`` names: a ``ModelShape``, or a ``DecoderShape``.
        """
        raise NotImplementedError

    @property
    def tower_part(self) -> PruneConfig | None:
        """Of a config for vision-language models: what prunes the blocks of the vision tower, if anything does."""
        return None

    def scaled(self: C, strength: float) -> C:
        """The same schedule with every removal multiplied by ``strength`` (0 removes nothing, 1 is this config)."""
        raise NotImplementedError(f"{self.method} has no schedule that could be scaled")

    def by_rule(self: C, strength: float, shape: Any) -> C:
        """Like ``scaled``, but where no layers are given they are those that are best for this strength."""
        return self.scaled(strength)

    def with_counts(self: C, shape: Any, counts: Mapping[int, int]) -> C:
        """The same method with ``counts[place]`` prunable tokens of one image left at each place, and all at others.

        Args:
            counts: at least one place of ``search_places`` with its count, in the order of the places.
        """
        raise NotImplementedError(f"{self.method} has no schedule that could be searched")

    def choices(self: C, name: str, shape: Any) -> tuple[C, ...]:
        """This config with each value of the field ``name`` that a search may choose on a model of this shape.

        Raises:
            ConfigError: there is no such field, or it has no short list of values.
        """
        few = {field: values for field, hint in field_types(type(self)).items() if (values := few_values(hint))}
        if name not in few:
            raise ConfigError(
                f"{name!r} is no field with a few values to choose from; {self.method} has {', '.join(few)}"
            )
        found = []
        for value in few[name]:
            with suppress(ConfigError):  # it does not go with the other fields
                found.append(dataclasses.replace(self, **{name: value}))
        return tuple(found)

    def search_places(self, shape: Any) -> tuple[int, ...]:
        """Where a search may let tokens leave, ascending: layers, and ``ENTRANCE`` and ``VISION_TOWER`` of a decoder.

        Nothing is saved behind the last layer.
        """
        return tuple(range(shape.depth - 1))

    def prunable(self, shape: Any) -> int:
        """Tokens of one image that this config may let leave."""
        return int(shape.num_prunable)

    def fewest(self, num_tokens: int) -> int:
        """Of so many prunable tokens that enter a layer, how many one stage leaves at least."""
        return 1

    def for_budget(
        self: C,
        model: Any,
        *,
        macs: float | None = None,
        speedup: float | None = None,
        keep: float | None = None,
        text_tokens: int | None = None,
        image_size: tuple[int, int] | None = None,
    ) -> C:
        """This method within a budget, at once and from sizes alone, by the rule known to be best for it.

        Merging is put into the later blocks, the later the less is merged; dropping is spread as by default. A config
        that names its ``layers`` keeps them. What a search on images finds is better: ``hf_tokenprune.search``.

        Args:
            model: with an adapter; not changed.
            macs: multiply-adds of one image (of a vision-language model: of the prefill), at most.
            speedup: dense MACs over pruned ones, at least. What time follows is measured by ``hf-tokenprune bench``.
            keep: fraction of the prunable tokens that the last stage leaves, at most.
            text_tokens: vision-language models: tokens of the prompt besides those of its image; None: 64.
            image_size: (height, width) in pixels, as for ``hf_tokenprune.cost``.

        Raises:
            ConfigError: not exactly one budget, one out of range or out of reach, or a method without a schedule.
        """
        from .cost import config_within

        budget: dict[str, Any] = {"macs": macs, "speedup": speedup, "keep": keep}
        return config_within(model, self, **budget, text_tokens=text_tokens, image_size=image_size)

    @staticmethod
    def preset(name: str) -> PruneConfig:
        """A searched config of the package: ``PruneConfig.preset("salience_merge/deit-tiny@0.85g")``.

        ``hf_tokenprune.list_presets()`` has all names, with where each comes from.
        """
        from .presets import get_preset

        return get_preset(name).config

    def check(self, condition: bool, field: str, allowed: str) -> None:
        """Raise ``ConfigError`` about ``field`` unless ``condition`` holds."""
        if not condition:
            raise ConfigError(f"{field}={_shown(getattr(self, field))} in {type(self).__name__}: expected {allowed}")

    # -- dictionaries and files ----------------------------------------------------------------------------------

    @staticmethod
    def for_method(name: str, **fields: Any) -> PruneConfig:
        """The config of the method called ``name``: ``PruneConfig.for_method("random", keep_ratios=0.7)``."""
        return PruneConfig.from_dict({"method": name, **fields})

    def to_dict(self) -> dict[str, Any]:
        """JSON values only: ``{"method": ..., "format_version": 1, <fields>}``."""
        fields = {f.name: _to_json(getattr(self, f.name)) for f in dataclasses.fields(self)}
        recovery = {} if self.recovery is None else {RECOVERY: self.recovery.to_dict()}
        return {"method": self.method, "format_version": FORMAT_VERSION, **fields, **recovery}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PruneConfig:
        """Inverse of ``to_dict``. Missing fields take the method's defaults, unknown ones raise.

        A ``recovery`` is known by its name and hash alone; ``from_pretrained`` reads its file too.
        """
        if not isinstance(data, dict):
            raise ConfigError(f"a prune config is an object with a 'method', got {type(data).__name__}: {shown(data)}")
        fields = dict(data)
        if (place := fields.pop(ALSO_IN, MODEL_CONFIG_NAME)) != MODEL_CONFIG_NAME:  # about the file, not the config
            raise ConfigError(f"{ALSO_IN}={shown(place)}: expected {MODEL_CONFIG_NAME!r}, or leave it out")
        recovery = Recovery.from_dict(fields.pop(RECOVERY)) if RECOVERY in fields else None
        version = fields.pop("format_version", FORMAT_VERSION)
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise ConfigError(f"format_version={shown(version)}: expected the integer {FORMAT_VERSION}")
        if version > FORMAT_VERSION:
            raise ConfigError(
                f"format_version={shown(version)} is newer than {FORMAT_VERSION}, the newest this version reads; "
                "pip install -U hf-tokenprune"
            )
        name = fields.pop("method", cls.method or None)
        if not isinstance(name, str):
            raise ConfigError(f"method={shown(name)}: expected the name of a method, such as 'zero_tprune'")
        config_class = get_method(name)
        if not issubclass(config_class, cls):
            raise ConfigError(
                f"method={shown(name)} is not what {cls.__name__} reads ({cls.method!r}); use PruneConfig"
            )
        known = [f.name for f in dataclasses.fields(config_class)]
        for field in fields:
            if field not in known:
                hint = did_you_mean(field, known)
                raise ConfigError(f"method {name!r} has no field {shown(field)} (has: {', '.join(known)}){hint}")
        config = config_class(**fields)
        return config if recovery is None else config.with_recovery(recovery)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *, also_in_model: bool = False) -> Path:
        """Write ``prune_config.json`` (sorted, indented) into a folder, made if need be; returns its path.

        Recovered values are written beside it.

        Args:
            also_in_model: say in the file that the ``config.json`` there, of a pruned model, has the same config. Where
                it no longer has, another model was saved over this one, and loading says so.
        """
        path = Path(save_directory) / CONFIG_NAME
        if self.recovery is not None:
            write_bytes(path.with_name(self.recovery.file), self.recovery.at_hand())
        write_text(path, self._to_json_text(**({ALSO_IN: MODEL_CONFIG_NAME} if also_in_model else {})))
        return path

    def push_to_hub(self, repo_id: str, *, tags: Sequence[str] = (), **kwargs: Any) -> CommitInfo:
        """Upload ``prune_config.json`` and a model card to a Hub repository, in one commit, which is returned.

        Args:
            repo_id: ``owner/name``, created if need be. A card that is there keeps its text.
            tags: of the card, besides our own.
            kwargs: ``token``, ``private``, ``commit_message``, ``commit_description``, ``create_pr`` and ``revision``
                (a branch, made if need be).
        """
        from .sharing import push_config

        files = {CONFIG_NAME: self._to_json_text().encode()}
        if self.recovery is not None:
            files[self.recovery.file] = self.recovery.at_hand()
        return push_config(self, repo_id, files, tags=tags, **kwargs)

    @classmethod
    def from_pretrained(cls, path_or_repo: str | os.PathLike[str], **hub_kwargs: Any) -> PruneConfig:
        """Read ``prune_config.json`` from a file, a folder or a Hub repository.

        Args:
            path_or_repo: local file, local folder, or ``owner/name`` on the Hub.
            hub_kwargs: what ``huggingface_hub.hf_hub_download`` takes: ``revision``, ``token``, ``subfolder``, ...

        Raises:
            ConfigError: there is no such file, or it is not a valid config.
        """
        name = os.fspath(path_or_repo)
        if re.fullmatch(r"[\w.-]{1,96}", name) and not os.path.exists(name):  # not on the Hub, which has owner/name
            hint = did_you_mean(name, list_methods())
            if name in list_methods():
                hint = f"; {name!r} is a method: PruneConfig.for_method({name!r})"
            raise ConfigError(f"no {CONFIG_NAME} in {name!r}: not here, and a Hub repository is owner/name{hint}")
        path = find_config_file(path_or_repo, **hub_kwargs)
        if path is None:
            unknown = "; no such folder is here, and the Hub or (offline) its cache has no such file"
            hint = "" if os.path.isdir(path_or_repo) else unknown
            raise ConfigError(f"no {CONFIG_NAME} in {name!r}{hint}")
        return cls.read(path).completed(path_or_repo, **hub_kwargs)

    @classmethod
    def read(cls, path: Path) -> PruneConfig:
        """What a ``prune_config.json`` says, with a ``recovery`` by its name and hash alone.

        Raises:
            ConfigError: it is not a valid config.
        """
        try:
            return cls.from_dict(read_json(path))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def _to_json_text(self, **about: str) -> str:
        return json.dumps({**self.to_dict(), **about}, indent=2, sort_keys=True) + "\n"


def as_config(value: PruneConfig | dict[str, Any] | str | os.PathLike[str], **hub_kwargs: Any) -> PruneConfig:
    """A config, a dictionary, or what a string stands for, as a ``PruneConfig``.

    A string is the name of a method (with its defaults), else that of a preset, else a path or ``owner/name`` on the
    Hub that holds a ``prune_config.json``. So a name wins over a folder called like it; ``./tome`` is the folder.

    Args:
        hub_kwargs: for the Hub, see ``PruneConfig.from_pretrained``.
    """
    if isinstance(value, PruneConfig):
        return value
    if isinstance(value, type) and issubclass(value, PruneConfig):
        raise ConfigError(f"{value.__name__} is a class of configs; give one of it: {value.__name__}()")
    if isinstance(value, str):
        if value in list_methods():
            return PruneConfig.for_method(value)
        if "@" in value:  # in every preset's name, in no repository's
            try:
                return PruneConfig.preset(value)
            except ConfigError:
                if not (os.path.exists(value) or is_path(value)):
                    raise
    if isinstance(value, (str, os.PathLike)):
        return PruneConfig.from_pretrained(value, **hub_kwargs)
    return PruneConfig.from_dict(value)


def _shown(value: Any) -> str:
    """A field in messages, which have no room for the fields of configs in it: these by the names of their methods."""
    if isinstance(value, PruneConfig):
        return value.method
    if isinstance(value, tuple) and any(isinstance(part, PruneConfig) for part in value):
        return f"({', '.join(map(_shown, value))})"
    return shown(value)


def _to_json(value: Any) -> Any:
    if isinstance(value, PruneConfig):  # inside another one, whose format_version holds for both
        return {key: item for key, item in value.to_dict().items() if key != "format_version"}
    return [_to_json(item) for item in value] if isinstance(value, tuple) else value
