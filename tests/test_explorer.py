"""The page of ``hf-tokenprune explore`` in a real browser: what is chosen there is what is shown, and saved."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from hf_tokenprune import PruneConfig
from hf_tokenprune.cli import app
from hf_tokenprune.demo.digits import MODEL_DIR
from hf_tokenprune.engine import current_config
from hf_tokenprune.explorer.models import PACKAGED, Models

pytest.importorskip("gradio", reason="pip install hf-tokenprune[app]")
pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install hf-tokenprune[demo]")
playwright = pytest.importorskip("playwright.sync_api")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
DESKTOP, PHONE = {"width": 1300, "height": 1000}, {"width": 390, "height": 844}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium on the path"),
]


@pytest.fixture(scope="module")
def models() -> Models:
    return Models()


@pytest.fixture(scope="module")
def address(models: Models) -> Iterator[str]:
    """Where the page is served."""
    from hf_tokenprune.explorer.page import Page

    models["digits ViT"]
    page = Page(models)
    _, url, _ = page.blocks.launch(prevent_thread_lock=True, quiet=True)
    yield url
    page.blocks.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Visitor:
    """A tab of the browser, with what somebody does there."""

    def __init__(self, browser: Any, address: str, size: dict[str, int] = DESKTOP) -> None:
        self.tab = browser.new_context(viewport=size, accept_downloads=True).new_page()
        self.tab.set_default_timeout(60_000)
        self.requests: list[str] = []
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.goto(address)
        self.tab.locator("#picture1 img").wait_for()

    def choose(self, what: str, value: str) -> None:
        """Of a list; or, in the list of models, one of one's own."""
        box = self.tab.locator(f"#{what} input")
        box.click()
        option = self.tab.get_by_role("option", name=value, exact=True)
        if what == "model" and not option.count():
            box.fill(value)
            box.press("Enter")
        else:
            option.click()

    def write(self, what: str, value: str) -> None:
        """Into a box of text."""
        box = self.tab.locator(f"#{what} textarea, #{what} input").first
        box.fill(value)
        box.press("Enter")

    def slide(self, what: str, value: int) -> None:
        """To a value, written beside the slider."""
        number = self.tab.locator(f"#{what} input[type=number]")
        number.fill(str(value))
        number.press("Enter")

    def expect(self, what: str, text: str) -> None:
        """Wait until a part of the page says this."""
        playwright.expect(self.tab.locator(f"#{what}")).to_contain_text(text, timeout=60_000)

    def expect_not(self, what: str) -> None:
        playwright.expect(self.tab.locator(f"#{what}")).to_be_hidden(timeout=60_000)

    def picture(self, number: int) -> str:
        """Its address, which is another one for every picture."""
        return str(self.tab.locator(f"#picture{number} img").get_attribute("src"))

    def expect_other_picture(self, number: int, before: str) -> None:
        playwright.expect(self.tab.locator(f"#picture{number} img")).not_to_have_attribute("src", before)

    def config(self, number: int, folder: Path) -> PruneConfig:
        """Download it and load it. The button is made anew with every look, so a click may come to nothing."""
        for _ in range(6):
            try:
                with self.tab.expect_download(timeout=10_000) as download:
                    self.tab.locator(f"#download{number}").click()
                download.value.save_as(folder / "prune_config.json")
                break
            except playwright.TimeoutError:
                continue
        return PruneConfig.from_pretrained(folder)


@pytest.fixture
def visitor(browser: Any, address: str) -> Iterator[Visitor]:
    visitor = Visitor(browser, address)
    yield visitor
    visitor.tab.context.close()


def test_it_opens_with_a_model_and_an_image(browser: Any, address: str, tmp_path: Path, monkeypatch: Any) -> None:
    from hf_tokenprune.explorer import page

    looks, look = [], page.look
    monkeypatch.setattr(page, "look", lambda *args: looks.append([c.method for c in args[2]]) or look(*args))
    visitor = Visitor(browser, address)
    visitor.expect("said0", "7")
    visitor.tab.wait_for_timeout(1000)
    assert looks == [["salience_merge"]], "one look, with the method"
    visitor.expect("numbers", "59 of 196")
    assert visitor.config(0, tmp_path) == PruneConfig.for_method("salience_merge")
    assert visitor.requests
    foreign = [url for url in visitor.requests if not url.startswith((address, "data:", "blob:"))]
    assert not foreign, "no other server is asked for anything"


def test_sliders_change_what_is_shown(visitor: Visitor, models: Models, tmp_path: Path) -> None:
    visitor.expect("picture1", "59 of 196")
    behind_the_last = visitor.picture(1)
    visitor.slide("layer", 2)
    visitor.expect("picture1", "block 1: 148 of 196")
    visitor.expect_other_picture(1, behind_the_last)
    visitor.slide("budget", 70)
    model = models["digits ViT"].model
    expected = PruneConfig.for_method("salience_merge").for_budget(model, speedup=1 / 0.7)
    visitor.expect("config0", f'"r": {expected.to_dict()["r"]}')
    visitor.expect("picture1", "block 1")  # the slider stays
    assert visitor.config(0, tmp_path) == expected
    assert current_config(model) is None, "it is pruned for the length of a look"


def test_two_methods_beside_each_other_and_their_fields(visitor: Visitor, tmp_path: Path) -> None:
    visitor.choose("method0", "uniform")
    visitor.expect("picture1", "uniform")
    visitor.choose("method1", "zero_tprune")
    visitor.expect("picture2", "zero_tprune")
    visitor.tab.locator("#settings0").get_by_role("button").first.click()
    visitor.write("method0-keep_ratios", "0.5")
    visitor.expect("config0", '"keep_ratios": 0.5')
    visitor.expect("python0", "UniformConfig(keep_ratios=0.5)")
    visitor.expect("command0", "-m uniform -s keep_ratios=0.5")
    visitor.choose("method0-where", "mid_block")
    visitor.expect("config0", '"where": "mid_block"')
    assert visitor.config(0, tmp_path).to_dict()["keep_ratios"] == 0.5
    visitor.tab.locator("#settings1").get_by_role("button").first.click()
    visitor.tab.locator("#method1-cls_boost input").click()
    visitor.expect("config1", '"cls_boost": false')


def test_an_image_of_ones_own_and_one_that_is_none(visitor: Visitor, tmp_path: Path) -> None:
    Image.new("RGB", (90, 60), "white").save(tmp_path / "white.png")
    before = visitor.picture(0)
    visitor.tab.locator("#image button[aria-label='Remove Image']").click()
    visitor.expect("error", "upload one")
    visitor.tab.locator("#image input[type=file]").set_input_files(tmp_path / "white.png")
    visitor.expect_other_picture(0, before)
    visitor.expect_not("error")
    (tmp_path / "words.png").write_text("no picture")
    white = visitor.picture(0)
    visitor.tab.locator("#image button[aria-label='Remove Image']").click()
    visitor.tab.locator("#image input[type=file]").set_input_files(tmp_path / "words.png")
    visitor.expect("error", "words.png is no image that can be read")
    assert visitor.picture(0) == white
    visitor.tab.locator("#examples img").nth(1).click()
    visitor.expect_other_picture(0, white)


def test_errors_are_the_librarys_own_and_break_nothing(visitor: Visitor) -> None:
    visitor.slide("budget", 20)
    visitor.expect("error", "out of reach")
    visitor.slide("budget", 60)
    visitor.expect_not("error")
    visitor.tab.locator("#settings0").get_by_role("button").first.click()
    visitor.write("method0-layers", "1,2")
    visitor.expect("error", "expected JSON")
    visitor.write("method0-layers", "[40]")
    visitor.expect("error", "expected blocks 0..5")
    visitor.write("method0-layers", "null")
    visitor.expect_not("error")
    visitor.choose("model", "nowhere/to be found")
    visitor.expect("error", "there is no folder")
    visitor.choose("model", "digits ViT")
    visitor.expect_not("error")
    visitor.choose("model", str(MODEL_DIR))
    visitor.expect("command0", f"viz {MODEL_DIR}")


@pytest.mark.parametrize("name", [name for name in PACKAGED if name != "digits ViT"])
def test_other_packaged_models(visitor: Visitor, name: str) -> None:
    visitor.choose("model", name)
    if PACKAGED[name].question:
        visitor.expect("picture1", "divprune")
        visitor.expect("said0", "row 2 column 2")
        visitor.choose("method1", "transprune")
        visitor.expect("picture2", "transprune, layer 7")
        visitor.write("question", "how many 7s are there ?")
        visitor.expect("command0", "how many 7s are there ?")
    else:
        visitor.write("texts", "the 1, the 2")
        visitor.expect("said1", "the 1")
        visitor.expect("command0", "printf '%s\\n' 'the 1' 'the 2'")


def test_two_visitors_do_not_see_each_others_choices(browser: Any, address: str, tmp_path: Path) -> None:
    one, other = Visitor(browser, address), Visitor(browser, address)
    one.choose("method0", "uniform")
    other.choose("method0", "tome")
    one.slide("budget", 80)
    other.slide("budget", 60)
    one.expect("picture1", "uniform")
    other.expect("picture1", "tome")
    one.expect("command0", "keep_ratios")
    other.expect("command0", "-s r=")
    assert one.config(0, tmp_path / "one").method == "uniform"
    assert other.config(0, tmp_path / "other").method == "tome"


def test_the_space_is_the_same_page(tmp_path: Path) -> None:
    """Started as the Hub starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "GRADIO_SERVER_PORT": str(port), "PYTHONPATH": str(EXAMPLES.parent)}
    running = subprocess.Popen([sys.executable, str(EXAMPLES / "space" / "app.py")], env=env, cwd=tmp_path)
    try:
        assert "hf_tokenprune" in answer_of(running, f"http://127.0.0.1:{port}/")
    finally:
        running.terminate()
        running.wait()


def answer_of(running: subprocess.Popen[bytes], address: str) -> str:
    """As soon as there is one."""
    end = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(address, timeout=10) as answer:
                return str(answer.read().decode())
        except OSError:
            assert running.poll() is None and time.monotonic() < end, "it does not answer"
            time.sleep(0.5)


def test_what_cannot_be_shown_is_said_on_the_command_line() -> None:
    done = CliRunner().invoke(app, ["explore", "nowhere/to/be/found"])
    assert done.exit_code == 1 and "no folder 'nowhere/to/be/found'" in done.stderr


def test_it_fits_a_phone(browser: Any, address: str) -> None:
    visitor = Visitor(browser, address, PHONE)
    assert visitor.tab.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
