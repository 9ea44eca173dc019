"""``python -m hf_tokenprune.cli``, which launchers of several processes need."""

from . import app

if __name__ == "__main__":
    app()
