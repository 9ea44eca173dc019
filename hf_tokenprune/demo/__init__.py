"""A small model with its data inside the package: pruning to try without a download."""
