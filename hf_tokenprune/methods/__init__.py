"""One file a paper: its config class and its algorithm, as functions of tensors."""
