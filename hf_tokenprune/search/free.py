"""Fields of a config that a search chooses beside the counts, such as where in a block tokens leave."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from ..config import PruneConfig
from ..errors import ConfigError, UnsupportedModelError
from ..signals import Shape
from .space import Space


@dataclass(frozen=True)
class Free:
    """The fields, and the spaces of schedules that they lead to.

    Attributes:
        names: in the order of choosing.
        shape: of the model.
        check: raises ConfigError or UnsupportedModelError for a config that does not fit the model.
        space_of: the schedules of a config.
    """

    names: tuple[str, ...]
    shape: Shape
    check: Callable[[PruneConfig], None]
    space_of: Callable[[PruneConfig], Space]

    def others(self, space: Space, name: str) -> list[Space]:
        """The spaces that other values of one field lead to, where they fit the model."""
        return [self.space_of(config) for config in alternatives(space.config, name, self.shape, self.check)]

    def first_within(self, space: Space, by_rule: bool) -> Space:
        """The space if a schedule of it is within the budget, else the first that the fields lead to where one is.

        Args:
            by_rule: the schedule shall be that of the method's rule.

        Raises:
            ConfigError: there is none.
        """
        errors = []
        for each in self._all(space):
            try:
                each.check_reach(by_rule)
            except ConfigError as error:
                errors.append(error)
            else:
                return each
        raise errors[0]

    def _all(self, space: Space) -> Iterator[Space]:
        """A space, and those that any values of all fields lead to; one by one, since timing one takes a while."""
        spaces = [space]
        yield space
        for name in self.names:
            for each in tuple(spaces):
                for other in self.others(each, name):
                    spaces.append(other)
                    yield other


def alternatives(
    config: PruneConfig, name: str, shape: Shape, check: Callable[[PruneConfig], None]
) -> list[PruneConfig]:
    """The config with other values of one field, where they pass ``check``."""
    found = []
    for other in config.choices(name, shape):
        try:
            check(other)
        except (ConfigError, UnsupportedModelError):
            continue
        if other != config:
            found.append(other)
    return found


def free_names(
    config: PruneConfig,
    asked: Sequence[str] | None,
    fixed: Collection[str],
    shape: Shape,
    check: Callable[[PruneConfig], None],
) -> tuple[str, ...]:
    """The fields that a search chooses: ``asked``, or those of ``search_fields`` at their defaults and not ``fixed``.

    Raises:
        ConfigError: a field that was asked for has no other value on this model, or ``fixed`` has no effect.
    """
    if asked is None:
        default = {field.name: field.default for field in dataclasses.fields(config)}
        names = [name for name in config.search_fields if getattr(config, name) == default[name] and name not in fixed]
        return tuple(name for name in names if alternatives(config, name, shape, check))
    if fixed:
        raise ConfigError(f"fixed={tuple(fixed)} has no effect beside free={tuple(asked)}; leave it out")
    for name in asked:
        if not alternatives(config, name, shape, check):
            raise ConfigError(f"free: {name}={getattr(config, name)!r} is all that works on this model; leave it out")
    return tuple(asked)
