"""The documentation is right: its code runs and prints what it says, its links lead somewhere, nothing is left out.

What follows ``python`` on the line that opens a fenced block tells what is done with it (GitHub shows all alike):

- nothing: it runs; the blocks of a page run in order, as one program. A ``text`` block that comes next is its output.
- ``hub``: it runs, with a small model in place of the one it would download, and with a file ``photo.jpg``.
- ``family=name``: it runs with a tiny random model of that family and inputs as its processor makes them, in place of
  those it would download; behind the blocks ``families`` of its page, if there are any.
- ``notest``: it is only compiled.
- ``file=path``: it is an excerpt, and these lines stand in that file.

``console`` blocks are ``hf-tokenprune`` commands behind a ``$`` with their output, run from the root of the repository.
"""

import ast
import builtins
import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from types import CodeType
from typing import NamedTuple

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)
from typer.testing import CliRunner

import hf_tokenprune
from hf_tokenprune import list_methods
from hf_tokenprune.cli import app
from hf_tokenprune.demo.digits import MODEL_DIR
from hf_tokenprune.engine import counts, find_adapter, plan
from hf_tokenprune.errors import DOCS
from hf_tokenprune.registry import get_method

from . import support_table
from .clip_checkpoint import save_tiny_clip
from .decoder_families import FAMILIES, sample, tiny_vlm
from .llava_checkpoint import save_photo, save_tiny_llava

ROOT = Path(__file__).resolve().parents[1]
OUR_METHODS = [name for name in list_methods() if get_method(name).__module__.startswith("hf_tokenprune.")]
METHODS_PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8").split("## For vision encoders")[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
VLM_PAGE = ROOT / "docs" / "vision_language_families.md"
CLIP = '"openai/clip-vit-base-patch32"'
VIT, LLAVA = '"facebook/deit-small-patch16-224"', '"llava-hf/llava-1.5-7b-hf"'
OLDER = Version(transformers.__version__) < Version("5.23")
TABLES = [page for page in support_table.PAGES if page.name != "methods.md" or not OLDER]
"""Of older versions that of encoders is another: some families cannot merge tokens there."""
END = "\x1e"  # printed behind every block that runs
REPOSITORY = DOCS.removesuffix("docs")
"""Of the files of this repository on the web. A package page renders README.md, where relative links are dead."""


class Block(NamedTuple):
    """A fenced block: language and what follows it, number of the line that opens it, its lines."""

    language: str
    tag: str
    line: int
    code: list[str]

    @property
    def runs(self) -> bool:
        return self.language == "python" and self.tag in ("", "hub")

    @property
    def family(self) -> str | None:
        """Of the model that it runs with; None where it names none."""
        return self.tag.removeprefix("family=") if self.tag.startswith("family=") else None


def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    inside = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = re.fullmatch(r"```(\w*) ?(.*)", line)
        if fence and not inside:
            found.append(Block(fence[1], fence[2], number, []))
        elif inside and not fence:
            found[-1].code.append(line)
        inside = inside != bool(fence)
    assert not inside, f"{page}: a fenced block is not closed"
    return found


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def pages_with(wanted) -> list:
    return [pytest.param(page, id=name_of(page)) for page in PAGES if any(map(wanted, blocks(page)))]


QUICK = {"README.md", "docs/file_format.md"}
"""What a quick run shows of the pages: each starts a Python of its own, which takes seconds."""


def in_a_process(pages: list) -> list:
    return [pytest.param(*p.values, id=p.id, marks=[pytest.mark.slow] * (p.id not in QUICK)) for p in pages]


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("llava"))


@pytest.mark.parametrize("page", in_a_process(pages_with(lambda block: block.runs)))
def test_code_runs_and_prints_what_the_page_says(page: Path, tmp_path: Path, tiny_llava: Path) -> None:
    """In a process of its own: a page may register methods. Lines keep their numbers, so tracebacks fit the page."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install hf-tokenprune[demo]")
    pytest.importorskip("accelerate")
    program: list[str] = []
    for block in blocks(page):
        if block.runs:
            program += [""] * (block.line - len(program)) + block.code + [f"print(end={END!r})"]
    script = tmp_path / f"{page.stem}.py"
    code = "\n".join(program)
    for name, folder in ((VIT, MODEL_DIR), (LLAVA, tiny_llava), (CLIP, save_tiny_clip(tmp_path / "clip"))):
        code = code.replace(name, repr(str(folder)))
    script.write_text(code, encoding="utf-8")
    save_photo(tmp_path / "photo.jpg")
    done = python(script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    printed = iter(done.stdout.split(END))
    all_blocks = blocks(page)
    for block, following in zip(all_blocks, [*all_blocks[1:], None], strict=True):
        if block.runs:
            output = [line.rstrip() for line in next(printed).splitlines()]
            if following is not None and following.language == "text":
                assert output == following.code, f"output of the block in line {block.line}"


class Checkpoint:
    """In the place of the auto classes: a tiny model of a family, and of its processor what a chat needs."""

    def __init__(self, family: str) -> None:
        self.model = tiny_vlm(family)

    def load_model(self, name: str, **kwargs: object) -> PreTrainedModel:
        return self.model

    def load_processor(self, name: str, **kwargs: object) -> "Checkpoint":
        return self

    def apply_chat_template(self, messages: list[dict], **kwargs: object) -> BatchFeature:
        parts = {"text": "...", "image": "I", "video": "V"}
        return BatchFeature(sample(self.model, "".join(parts[part["type"]] for m in messages for part in m["content"])))

    def decode(self, tokens: torch.Tensor, skip_special_tokens: bool) -> str:
        return " ".join(map(str, tokens.tolist()))


def code_of(page: Path, block: Block) -> CodeType:
    return compile("\n".join(block.code), f"{page}:{block.line}", "exec")


FAMILY_BLOCKS = [(page, block) for page in PAGES for block in blocks(page) if block.family is not None]


@pytest.mark.parametrize(
    ("page", "block"), [pytest.param(page, block, id=f"{page.stem}:{block.line}") for page, block in FAMILY_BLOCKS]
)
def test_code_of_a_family_runs_on_its_model(page: Path, block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    assert block.family is not None
    checkpoint = Checkpoint(block.family)
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", checkpoint.load_model)
    monkeypatch.setattr(AutoProcessor, "from_pretrained", checkpoint.load_processor)
    namespace: dict[str, object] = {}
    for shared in blocks(page):
        if shared.tag == "families":
            exec(code_of(page, shared), namespace)
    exec(code_of(page, block), namespace)
    assert find_adapter(checkpoint.model).states(checkpoint.model), "the model is pruned"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_vision_language_models_has_its_six_lines(family: str) -> None:
    found = [block for block in blocks(VLM_PAGE) if block.family == family]
    assert found, f"{name_of(VLM_PAGE)} has no block with the tag family={family}"
    for block in found:
        lines = [line for line in block.code if line and not line.startswith(("from ", "import "))]
        assert len(lines) <= 6, f"line {block.line}: {len(lines)} lines"


class Names(NamedTuple):
    """Of a block: names that it imports, those that it makes otherwise, and those that it reads."""

    imported: set[str]
    made: set[str]
    read: set[str]


def names_of(block: Block) -> Names:
    tree = ast.parse("\n".join(block.code))
    walk = list(ast.walk(tree))
    imported = {
        (alias.asname or alias.name).split(".")[0]
        for node in walk
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    loose = [node for node in walk if isinstance(node, ast.Name)]
    made = {node.id for node in loose if not isinstance(node.ctx, ast.Load)}
    made |= {node.name for node in walk if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    made |= {node.arg for node in walk if isinstance(node, ast.arg)}
    read = {node.id for node in loose if isinstance(node.ctx, ast.Load)}
    return Names(imported, made, read - imported - set(dir(builtins)))


@pytest.mark.parametrize("page", pages_with(lambda block: block.runs))
def test_a_block_that_can_be_read_alone_imports_what_it_uses(page: Path) -> None:
    """Blocks run as one program, where an import further up does. A reader copies one that goes on with nothing."""
    imported: set[str] = set()
    made: set[str] = set()
    for block in blocks(page):
        if block.runs:
            names = names_of(block)
            borrowed = (names.read - names.made) & imported
            goes_on = (names.read & made) - names.made
            assert goes_on or not borrowed, f"{name_of(page)}:{block.line} uses {sorted(borrowed)} without an import"
            imported |= names.imported
            made |= names.made


def test_a_missing_import_is_seen() -> None:
    alone = Block("python", "", 1, ["x = torch.ones(2)", "print([y for y in x])"])
    assert names_of(alone) == (set(), {"x", "y"}, {"torch", "x", "y"})


@pytest.mark.parametrize("page", [pytest.param(page, id=name_of(page)) for page in PAGES])
def test_a_page_that_speaks_of_pipelines_runs_one(page: Path) -> None:
    """A comment that says what would work is no proof: README's checkpoint had no processor."""
    code = "\n".join(line for block in blocks(page) if block.runs for line in block.code)
    assert "pipeline(model=path)" not in code or "pipeline(" in re.sub(r"#.*", "", code)


@pytest.mark.parametrize("method", [name for name in OUR_METHODS if "vision" in get_method(name).prunes])
def test_the_blocks_in_the_table_of_methods_count_as_layers_does(method: str) -> None:
    row = next(row for row in METHODS_PAGE.splitlines() if row.startswith(f"| [`{method}`]"))
    said = re.search(r"blocks? (\d+(?:, \d+)*)(?: to (\d+))?", row)
    with torch.device("meta"):
        model = ViTForImageClassification(ViTConfig())
    shape = find_adapter(model).shape(model)
    stages = plan(get_method(method)(), shape)
    layers = [stage.layer for stage in stages]
    if said:
        first = [int(number) for number in said[1].split(", ")]
        assert layers == (list(range(first[0], int(said[2]) + 1)) if said[2] else first)
    else:
        assert layers in ([], list(range(shape.depth))), "not where they are, so in every block"
    if arrow := re.search(r"196 → (\d+)", row):
        assert int(arrow[1]) == [left for _, _, left in counts(stages, shape)][-1]


def python(*args: object, cwd: Path, path: Path = ROOT) -> subprocess.CompletedProcess:
    """Run Python on one thread, without a network, with this repository and ``path`` to import from."""
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(path)]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_the_method_of_the_guide_keeps_the_contract(tmp_path: Path) -> None:
    guide = blocks(ROOT / "docs" / "add_a_method.md")[0]
    name = "received_attention"
    (tmp_path / f"{name}.py").write_text("\n".join(guide.code), encoding="utf-8")
    arguments = ("-m", "pytest", "-p", name, "-p", "no:cacheprovider", "-k", f"ReceivedAttention or {name}")
    done = python(*arguments, "tests/test_contract_methods.py", cwd=ROOT, path=tmp_path)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"\d{2,} passed", done.stdout), "the method was found"


@pytest.mark.parametrize("page", pages_with(lambda block: block.tag == "notest" or block.tag.startswith("file=")))
def test_code_that_does_not_run_is_still_code(page: Path) -> None:
    for block in blocks(page):
        code = "\n".join(block.code)
        if block.tag == "notest":
            compile(code, f"{page}:{block.line}", "exec")
        elif block.tag.startswith("file="):
            source = (ROOT / block.tag.removeprefix("file=")).read_text(encoding="utf-8")
            assert code.strip() in source, f"line {block.line}: no longer in {block.tag}"


@pytest.mark.parametrize("page", pages_with(lambda block: block.language == "console"))
def test_commands_print_what_the_page_says(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for block in blocks(page):
        if block.language == "console":
            command = block.code[0].removeprefix("$ hf-tokenprune ").split()
            result = CliRunner().invoke(app, command)
            assert result.exit_code == 0, result.output
            assert result.stdout.splitlines() == block.code[1:], f"output of the command in line {block.line + 1}"


@pytest.mark.parametrize("page", [pytest.param(page, id=name_of(page)) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        ours = target.startswith(REPOSITORY)
        if target.startswith(("http://", "https://", "mailto:")) and not ours:
            continue
        path, _, anchor = target.removeprefix(REPOSITORY).partition("#")
        there = ((ROOT if ours else page.parent) / path).resolve() if path else page
        assert page.name != "README.md" or ours or not path, f"{target} is dead where a package page renders README.md"
        assert there.exists(), f"{name_of(page)} links to {target}"
        if anchor:
            assert anchor in anchors(there), f"{name_of(page)} links to {target}; anchors there: {anchors(there)}"


def anchors(page: Path) -> list[str]:
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_the_site_leads_to_every_page_and_a_list_to_every_example() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in ROOT.glob("docs/**/*.md"):
        path = page.relative_to(ROOT / "docs").as_posix()
        assert re.search(rf" {path}$", nav, re.MULTILINE), f"the nav of mkdocs.yml lacks {path}"
    examples = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    for example in ROOT.glob("examples/*.py"):
        assert f"]({example.name})" in examples, f"examples/README.md does not link to {example.name}"


@pytest.mark.parametrize("method", OUR_METHODS)
def test_every_method_has_a_page_with_its_fields_and_a_row(method: str) -> None:
    index = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert f"| [`{method}`](methods/{method}.md) |" in index, "docs/methods.md lists every method"
    text = (ROOT / "docs" / "methods" / f"{method}.md").read_text(encoding="utf-8")
    for field in dataclasses.fields(get_method(method)):
        assert f"`{field.name}`" in text, f"{field.name} is not described"


@pytest.mark.parametrize("page", [pytest.param(page, id=name_of(page)) for page in TABLES])
def test_the_support_tables_are_those_of_the_registries(page: Path) -> None:
    _, on_page, _ = support_table.parts(page)
    assert on_page == support_table.PAGES[page](), "write them anew: python -m tests.support_table"


def test_every_public_name_is_documented() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    missing = [name for name in hf_tokenprune.__all__ if not re.search(rf"\b{name}\b", text)]
    assert not missing


def test_no_page_holds_what_is_only_true_here() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        found = re.search(r"(?<![\w.:/])/(?:home|tmp|work|root|Users|mnt)/\S*", text)
        assert not found, f"{name_of(page)} holds the path {found[0]}"
