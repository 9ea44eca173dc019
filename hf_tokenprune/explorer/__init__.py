"""A page in the browser that shows what methods do to an image: ``hf-tokenprune explore``. Needs the extra ``app``."""
