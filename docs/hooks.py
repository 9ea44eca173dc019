"""What MkDocs does to pages that are written to be read on GitHub too."""

import re
from typing import Any

REPOSITORY = "https://github.com/hf-tokenprune/hf_tokenprune/blob/main"
FENCE = re.compile(r"^(```\w+) .+$", flags=re.MULTILINE)
"""The first line of a block of code; what follows the language is for tests/test_docs.py."""
OUTSIDE = re.compile(r"\]\((?:\.\./)+((?:CHANGELOG|LICENSE|README|examples|hf_tokenprune|tests)\b[^)]*)\)")
"""A link to a file of the repository that is no page."""


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """The page as MkDocs takes it."""
    return OUTSIDE.sub(rf"]({REPOSITORY}/\1)", FENCE.sub(r"\1", markdown))
