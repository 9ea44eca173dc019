"""The page: its controls, and what happens when one of them moves. Needs gradio."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
from PIL import Image

from ..config import CONFIG_NAME, PruneConfig
from ..errors import TokenPruneError
from ..evaluation.turns import DENSE
from ..pictures.page import places_of, steps_at
from ..pictures.sheets import kl_of, verdict, work
from ..pictures.tokens import draw_tokens
from .fields import Control, controls
from .looks import Choice, Look, call_of, command_for, look
from .models import PACKAGED, Loaded, Models

READABLE = (TokenPruneError, ImportError, OSError, ValueError)
"""Errors that somebody who looks can act on."""
NONE, AS_SET = "none", 100
ARMS = 2  # methods beside each other
WIDTH = 448  # pixels of a picture
COLUMNS = ["", "image tokens", "multiply-adds", "time, ms", "to dense"]
INTRO = """# Which tokens stay, and does the answer?
[hf_tokenprune](https://github.com/hf-tokenprune/hf_tokenprune) on your image, layer by layer."""
LEGEND = "As photographed: kept. One colour within edges: merged into one token. Striped: removed."
Changes = dict[Any, Any]
"""New values by component; the others stay as they are."""


class Page:
    """Controls on the left, what they lead to on the right. What a visitor chose is in states of the visitor's own.

    Args:
        models: loaded when they are chosen.
        first: the one that is chosen at the start.
    """

    def __init__(self, models: Models, first: str = next(iter(PACKAGED))) -> None:
        self.models = models
        self.files = TemporaryDirectory(prefix="hf_tokenprune_")  # configs to download
        with gr.Blocks(title="hf_tokenprune", analytics_enabled=False, delete_cache=(3600, 3600)) as self.blocks:
            gr.Markdown(INTRO)
            # The last Look and what it was asked, the model that the controls are for, the layer somebody went to.
            self.seen, self.asked, self.of, self.stop = (gr.State() for _ in range(4))
            with gr.Row():
                with gr.Column(scale=1, min_width=320):
                    self._controls(first)
                with gr.Column(scale=2, min_width=320):
                    self._results()
            self._connect()

    def _controls(self, first: str) -> None:
        self.model = gr.Dropdown(
            list(dict.fromkeys([first, *PACKAGED])), value=first, allow_custom_value=True, label="Model",
            info="A packaged one, a folder, or owner/name on the Hub.", elem_id="model",
        )  # fmt: skip
        self.image = gr.Image(label="Image", sources=["upload", "clipboard"], height=240, elem_id="image")
        # A file, not what gradio reads of it: where it is no image, the page says so.
        self.image.preprocess = lambda payload: None if payload is None else payload.path  # type: ignore[method-assign]
        self.examples = gr.Gallery(
            label="Examples", columns=4, height=110, allow_preview=False, interactive=False, elem_id="examples"
        )
        self.question = gr.Textbox(label="Question", elem_id="question")
        self.texts = gr.Textbox(label="Texts to choose from, between commas", elem_id="texts")
        self.budget = gr.Slider(
            20, AS_SET, AS_SET, step=5, label="Budget, % of the dense multiply-adds", elem_id="budget",
            info="100: what the settings of a method come to. Below, they are scaled to fit.",
        )  # fmt: skip
        self.methods, self.fields = [], []
        for i, label in enumerate(("Method", "Beside it")):
            self.methods.append(
                gr.Dropdown(
                    [NONE], value=NONE, allow_custom_value=True, filterable=False, label=label, elem_id=f"method{i}"
                )
            )
            self.fields.append(gr.State({}))
            gr.render(inputs=[self.model, self.methods[i]])(self._settings_of(i))

    def _results(self) -> None:
        self.error = gr.Markdown(visible=False, elem_id="error")
        self.layer = gr.Slider(
            0, 1, 1, step=1, label="Layer", info="0: in front of all; the pictures say which it is.", elem_id="layer"
        )
        runs = range(1 + ARMS)
        with gr.Row():
            self.pictures = [
                gr.Image(label=" ", interactive=False, buttons=["download", "fullscreen"], elem_id=f"picture{i}")
                for i in runs
            ]
        gr.Markdown(LEGEND)
        with gr.Row():
            self.said = [gr.Label(num_top_classes=5, label=" ", elem_id=f"said{i}") for i in runs]
        self.numbers = gr.Dataframe(headers=COLUMNS, interactive=False, elem_id="numbers")
        self.taken = []
        for i in range(ARMS):
            with gr.Accordion(" ", visible=not i) as whole:
                code = gr.Code(label=CONFIG_NAME, language="json", interactive=False, elem_id=f"config{i}")
                download = gr.DownloadButton(f"Download {CONFIG_NAME}", elem_id=f"download{i}")
                python = gr.Code(
                    label="In Python",
                    language="python",
                    lines=1,
                    wrap_lines=True,
                    interactive=False,
                    elem_id=f"python{i}",
                )
                command = gr.Code(
                    label="In a shell",
                    language="shell",
                    lines=1,
                    wrap_lines=True,
                    interactive=False,
                    elem_id=f"command{i}",
                )
            self.taken.append((whole, code, download, python, command))

    def _connect(self) -> None:
        of_model = [
            self.of,
            self.stop,
            self.error,
            self.examples,
            self.question,
            self.texts,
            *self.methods,
            *self.fields,
        ]
        visitors = [self.asked, self.stop, self.model, self.image, self.question, self.texts, self.budget]
        parts = [part for parts in self.taken for part in parts]
        shown = [self.error, self.seen, self.asked, self.layer, *self.pictures, *self.said, self.numbers, *parts]
        self.update: dict[str, Any] = {
            "fn": self.looked, "inputs": [*visitors, *self.methods, *self.fields], "outputs": shown,
            "show_progress": "minimal",
            "trigger_mode": "always_last", "concurrency_id": "models", "concurrency_limit": 1,
        }  # fmt: skip
        gr.on([self.blocks.load, self.model.input], self.chose, [self.model, self.of], of_model)
        # The image after all else: its change may be seen before what is set together with it.
        self.of.change(self.first_image, self.of, self.image).then(**self.update)
        self.examples.select(self.chose_example, self.examples, self.image)
        typed = [moment for box in (self.question, self.texts) for moment in (box.submit, box.blur)]
        gr.on([self.image.change, *typed, self.budget.change], **self.update)
        moved: dict[str, Any] = {"fn": self.at_layer, "inputs": [self.seen, self.layer], "outputs": self.pictures}
        self.layer.change(**moved, show_progress="hidden", trigger_mode="always_last")
        self.layer.input(lambda stop: stop, self.layer, self.stop, show_progress="hidden")
        for method, fields in zip(self.methods, self.fields, strict=True):
            method.input(dict, None, fields).then(**self.update)

    def _settings_of(self, number: int) -> Callable[[str, str], None]:
        """What draws the fields of the method that is chosen."""

        def settings(model: str, method: str) -> None:
            try:
                config = self.models[model].start(method)
            except READABLE:  # none is chosen, or none that there is
                return
            with gr.Accordion(f"Settings of {method}", open=False, elem_id=f"settings{number}"):
                for control in controls(config):
                    field, moments = component(control, f"method{number}-{control.name}")

                    def put(fields: dict[str, Any], given: Any, name: str = control.name) -> dict[str, Any]:
                        return {**fields, name: given}

                    state = self.fields[number]
                    gr.on(moments, put, [state, field], state).then(**self.update)

        return settings

    def chose(self, name: str, former: str | None) -> Changes:
        """What belongs to a model: images, questions and the methods that it takes."""
        if name == former:  # leaving the list counts as a choice too
            return {}
        try:
            loaded = self.models[name]
        except READABLE as error:
            return {self.of: name, self.error: told(str(error))}
        packaged = PACKAGED.get(name)
        images = list(packaged.images()) if packaged else []
        asked, texts = (packaged.question, packaged.class_names) if packaged else ("What is in this image?", ())
        return {
            self.of: name,
            self.stop: None,
            self.error: gr.update(visible=False),
            self.examples: gr.update(value=images, visible=bool(images)),
            self.question: gr.update(value=asked, visible=loaded.kind == "decoder"),
            self.texts: gr.update(value=", ".join(texts), visible=loaded.reads_names),
            self.methods[0]: gr.update(choices=loaded.methods, value=loaded.default.method),
            **{other: gr.update(choices=[NONE, *loaded.methods], value=NONE) for other in self.methods[1:]},
            **{fields: {} for fields in self.fields},
        }

    def first_image(self, name: str) -> Any:
        """Of the examples that come with a model; without any, the image stays."""
        images = PACKAGED[name].images() if name in PACKAGED else ()
        return next(iter(images), gr.skip())

    def chose_example(self, images: Sequence[tuple[Image.Image, str | None]], event: gr.SelectData) -> Any:
        """The one that was clicked."""
        return images[event.index][0]

    def looked(
        self,
        asked: tuple[Any, ...] | None,
        stop: int | None,
        name: str,
        image: str | None,
        question: str,
        texts: str,
        budget: float,
        *chosen: Any,
    ) -> Changes:
        """All that is shown; or an error beside what was shown before. Nothing, if it is shown already."""
        asks = (name, image, question, texts, budget, *chosen)
        if asks == asked:
            return {}
        if image is None:
            return self._failed("Choose an image, or upload one.")
        methods, fields = chosen[:ARMS], chosen[ARMS:]
        choices = [
            Choice(method, fields, budget / AS_SET)
            for method, fields in zip(methods, fields, strict=True)
            if method != NONE
        ]
        class_names = [text.strip() for text in texts.split(",") if text.strip()]
        try:
            loaded = self.models[name]
            found = look(loaded, opened(image), choices, question, class_names)
        except READABLE as error:
            return self._failed(str(error))
        last = len(places_of(found.trace)) - 1
        stop = last if stop is None else min(stop, last)
        return {
            self.error: gr.update(visible=False),
            self.seen: found,
            self.asked: asks,
            self.layer: gr.update(maximum=last, value=stop),
            **dict(zip(self.pictures, self.at_layer(found, stop), strict=True)),
            **self._said(found),
            self.numbers: rows(found),
            **self._taken(found, loaded, PACKAGED[name].folder if name in PACKAGED else name, class_names),
        }

    def _failed(self, message: str) -> Changes:
        return {self.error: told(message), self.asked: None}

    def at_layer(self, found: Look | None, stop: int) -> list[Any]:
        """The pictures of all runs, where the slider stands."""
        if found is None:
            return [gr.skip()] * (1 + ARMS)
        place = places_of(found.trace)[stop]
        pictures = []
        for run in found.trace.runs:
            step = steps_at(found.trace, run)[stop]
            label = run.name if run.name == DENSE else f"{run.name}, {place}: {step.num_kept} of {len(step.owner)}"
            pictures.append(gr.update(value=draw_tokens(step, WIDTH), label=label, visible=True))
        return [*pictures, *[gr.update(visible=False)] * (1 + ARMS - len(pictures))]

    def _said(self, found: Look) -> Changes:
        """The likeliest classes, or the answer, of each run."""
        said: Changes = {label: gr.update(visible=False) for label in self.said}
        for label, run in zip(self.said, found.trace.runs, strict=False):
            classes: Any = {name.split(",")[0]: share for name, share in run.classes} or run.answer
            mark = "" if run.name == DENSE else verdict(found.trace, run)[0][:1]
            said[label] = gr.update(value=classes, label=f"{run.name} {mark}", visible=classes is not None)
        return said

    def _taken(self, found: Look, loaded: Loaded, path: str, class_names: list[str]) -> Changes:
        """The config of each run, as it is used elsewhere."""
        taken: Changes = {parts[0]: gr.update(visible=False) for parts in self.taken}
        pruned = [run for run in found.trace.runs if run.config is not None]
        names = class_names if loaded.reads_names else []
        for (whole, code, download, python, command), run in zip(self.taken, pruned, strict=False):
            assert run.config is not None
            taken |= {
                whole: gr.update(label=f"Take it along: {run.name}", visible=True),
                code: json.dumps(run.config.to_dict(), indent=2),
                download: self._file(run.config),
                python: call_of(loaded.model, path, run.config),
                command: command_for(path, run.config, found.trace.question, names),
            }
        return taken

    def _file(self, config: PruneConfig) -> str:
        """The config as a file, one of each config."""
        folder = Path(self.files.name) / f"{hash(config):x}"
        config.save_pretrained(folder)
        return str(folder / CONFIG_NAME)


def component(control: Control, elem_id: str) -> tuple[Any, list[Any]]:
    """What a field is set with, and the moments at which somebody has set it."""
    how: dict[str, Any] = {
        "label": control.name, "info": control.help, "value": control.value, "elem_id": elem_id, "interactive": True,
    }  # fmt: skip
    if control.kind == "tick":
        field: Any = gr.Checkbox(**how)
        return field, [field.input]
    if control.kind == "list":
        field = gr.Dropdown(list(control.values), **how)
        return field, [field.input]
    field = gr.Textbox(**how)
    return field, [field.submit, field.blur]


def opened(path: str) -> Image.Image:
    """The image in a file.

    Raises:
        TokenPruneError: it holds none.
    """
    try:
        image = Image.open(path)
        image.load()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise TokenPruneError(f"{Path(path).name} is no image that can be read; choose another file") from error
    return image


def told(error: str) -> Changes:
    """An error as the page shows it."""
    return gr.update(value=f"⚠️ {error}", visible=True)


def rows(found: Look) -> list[list[str]]:
    """A row of ``COLUMNS`` a run."""
    trace, dense = found.trace, found.milliseconds[DENSE]
    table = []
    for run in trace.runs:
        left = run.steps[-1].num_kept if run.steps else trace.num_tokens
        own = found.milliseconds[run.name]
        ratio = "" if run.name == DENSE else f" ({dense / own:.2f}x)"
        table.append([run.name, f"{left} of {trace.num_tokens}", work(trace, run), f"{own:.1f}{ratio}", kl_of(run)])
    return table
