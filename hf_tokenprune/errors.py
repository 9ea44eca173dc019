"""The errors this package raises. Every message names the value, what is allowed and the next step."""


class TokenPruneError(ValueError):
    """Base of all errors raised on purpose by ``hf_tokenprune``."""


class ConfigError(TokenPruneError):
    """A prune config, or the file it comes from, cannot be used."""


class UnsupportedModelError(TokenPruneError):
    """A model, a head or a forward argument cannot work with pruned tokens."""


class PruneStateError(TokenPruneError):
    """The model is already pruned, or not pruned when it should be."""


class DataError(TokenPruneError):
    """An image, a label file or a folder for evaluation cannot be read."""
