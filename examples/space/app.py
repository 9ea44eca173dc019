"""The page of `hf-tokenprune explore` as a Space of the Hugging Face Hub. Here: python examples/space/app.py"""

from hf_tokenprune.explorer.models import Models
from hf_tokenprune.explorer.page import Page

Page(Models()).blocks.launch()
