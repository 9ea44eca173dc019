"""One file a model family: where its blocks are, which tokens are protected, how tokens are removed."""
