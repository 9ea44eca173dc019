"""What may import what (docs/design.md), read from the syntax trees; and what every module owes its readers."""

import ast
import configparser
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

import hf_tokenprune
from hf_tokenprune.registry import get_method, list_methods

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(hf_tokenprune.__file__).parent
MAX_LINES = 350

CORE = {
    *(
        "errors",
        "threads",
        "atomic",
        "field_types",
        "config_files",
        "config",
        "weights",
        "registry",
        "tokens",
        "reductions",
        "signals",
        "methods",
        "adapters",
        "engine",
    ),
    *("recording", "cost", "presets", "sharing"),
}
"""Parts that everybody imports; the others (evaluation, command line, pictures, ...) may need more installed."""

GROUND = {"errors", "registry", "tokens", "signals"}
MAY_IMPORT = {
    "errors": set(),
    "atomic": set(),
    "threads": {"errors"},
    "registry": {"errors"},
    "field_types": set(),
    "config_files": {"errors"},
    "weights": {"errors", "config_files"},
    "config": {
        "errors",
        "weights",
        "atomic",
        "registry",
        "field_types",
        "config_files",
        "signals",
        "cost",
        "presets",
        "sharing",
    },  # see FACADES
    "tokens": {"errors"},
    "reductions": set(),
    "signals": {"reductions", "tokens"},
    "methods": GROUND | {"config", "methods"},
    "adapters": GROUND | {"adapters"},
    "engine": GROUND | {"config", "threads", "weights"},
    "recording": {"engine", "errors"},
    "cost": {"engine", "config", "errors", "signals", "cost"},
    "presets": {"config", "errors"},
    "sharing": {"atomic", "engine", "config", "config_files", "cost", "errors", "registry", "sharing", "weights"},
}
"""Parts of the package each core part may import, in functions too. ``methods`` and ``adapters`` meet through the
registry, so not even the engine names one."""

ROOMS = {"adapters.vision": {"adapters.decoder"}, "adapters.decoder": {"adapters.vision"}}
"""What encoders and decoders do not share lies apart."""

ON_TOP = {"evaluation": {"methods", "adapters", "engine", "config", "cost", "presets", "sharing"}}
"""What parts on top of the core must not import, but for the files in KNOW_CONFIGS."""
KNOW_CONFIGS = {"evaluation/run.py", "evaluation/compare.py"}

FACADES = {("config", "cost"), ("config", "presets"), ("config", "sharing")}
"""``PruneConfig.for_budget``, ``.preset`` and ``.push_to_hub`` look upwards, inside the method: the only circles."""


class Import(NamedTuple):
    """``module`` as an absolute name; ``eager`` if importing the file imports it."""

    module: str
    eager: bool


def imports(source: str, module: str, is_package: bool = False, types: bool = False) -> set[Import]:
    """All imports in a file, with ``types`` those under ``if TYPE_CHECKING`` too; ``from a import b``: a and a.b."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    found: set[Import] = set()

    def walk(node: ast.AST, eager: bool) -> None:
        if (
            not types
            and isinstance(node, ast.If)
            and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        ):
            for child in node.orelse:
                walk(child, eager)
            return
        if isinstance(node, ast.Import):
            found.update(Import(alias.name, eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found.update({Import(name, eager), *(Import(f"{name}.{alias.name}", eager) for alias in node.names)})
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            walk(child, eager and not inside)

    walk(ast.parse(source), True)
    return found


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """'hf_tokenprune.methods.random' -> 'methods'."""
    return [*module.split("."), ""][1]


FILES = sorted(PACKAGE.rglob("*.py"))
SUBPACKAGES = [f"{PACKAGE.name}.{path.parent.name}" for path in sorted(PACKAGE.glob("*/__init__.py"))]
PUBLIC = [hf_tokenprune, *(part for part in map(importlib.import_module, SUBPACKAGES) if hasattr(part, "__all__"))]
"""The package, and those of its parts that say what their public names are."""
IMPORTS = {path: imports(path.read_text(), module_name(path), path.name == "__init__.py") for path in FILES}
PARTS = {part_of(module_name(path)) for path in FILES} - {""}


def every_file(*parts: str) -> pytest.MarkDecorator:
    """Parametrise over the files of these parts; of the whole package if none is named."""
    files = [path for path in FILES if not parts or part_of(module_name(path)) in parts]
    assert files
    return pytest.mark.parametrize("path", files, ids=lambda path: str(path.relative_to(PACKAGE)))


def parts_imported(path: Path) -> set[str]:
    modules = {found.module for found in IMPORTS[path] if found.module.split(".")[0] == PACKAGE.name}
    return {part_of(module) for module in modules} & PARTS


def test_the_walk_sees_every_kind_of_import() -> None:
    source = """
import os, a.b as c
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from .hidden import X
else:
    import runtime
try:
    import tried
except ImportError:
    pass
class C:
    from .. import up
    def f(self):
        from ..other.deep import name
        return lambda: __import__
"""
    found = imports(source, "pkg.sub.mod")
    assert {i.module for i in found if not i.eager} == {"pkg.other.deep", "pkg.other.deep.name"}
    assert {i.module for i in found if i.eager} == {
        *("os", "a.b", "typing", "typing.TYPE_CHECKING", "runtime", "tried", "pkg", "pkg.up"),
    }
    assert Import("pkg.sub.x", True) in imports("from . import x", "pkg.sub", is_package=True)


def test_every_part_is_known() -> None:
    assert set(MAY_IMPORT) == CORE <= PARTS
    assert {path.stem for path in PACKAGE.glob("*.py")} <= CORE | {"__init__"}, "a loose file wants a room"


@every_file(*MAY_IMPORT)
def test_the_direction_of_imports(path: Path) -> None:
    assert parts_imported(path) <= MAY_IMPORT[part_of(module_name(path))]


@every_file(*ON_TOP)
def test_parts_that_take_any_model_know_no_method(path: Path) -> None:
    if str(path.relative_to(PACKAGE)) not in KNOW_CONFIGS:
        assert not parts_imported(path) & ON_TOP[part_of(module_name(path))]


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_that_lie_apart(room: str) -> None:
    within = [path for path in FILES if f"{module_name(path)}.".startswith(f"{PACKAGE.name}.{room}.")]
    assert within
    for path in within:
        for other in ROOMS[room]:
            assert not [found for found in IMPORTS[path] if found.module.startswith(f"{PACKAGE.name}.{other}")]


def test_no_circles() -> None:
    """Modules that import each other, for types or in functions too; the package's own ``__init__`` files aside."""
    names = {module_name(path): path for path in FILES if path.name != "__init__.py"}
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        everything = imports(path.read_text(), name, types=True)
        graph[name] = {found.module for found in everything if found.module in names and found.module != name}
    rooms = {name: set(found) for name, found in graph.items()}
    while free := [name for name, found in rooms.items() if not found]:
        rooms = {name: found - set(free) for name, found in rooms.items() if name not in free}
    assert not rooms, f"in or above a circle: {sorted(rooms)}"
    parts = {part: set().union(*(parts_imported(p) for p in FILES if part_of(module_name(p)) == part)) for part in CORE}
    above = {part: {other for other in found - {part} if (part, other) not in FACADES} for part, found in parts.items()}
    while free := [part for part, found in above.items() if not found]:
        above = {part: found - set(free) for part, found in above.items() if part not in free}
    assert not above, f"in or above a circle: {sorted(above)}"


@every_file(*PARTS - {"adapters"}, "")
def test_modelling_code_is_imported_by_adapters_only(path: Path) -> None:
    assert not {found.module for found in IMPORTS[path] if found.module.startswith("transformers.models")}


@every_file("methods")
def test_a_method_knows_torch_and_the_standard_library_only(path: Path) -> None:
    outside = {found.module.split(".")[0] for found in IMPORTS[path]} - set(sys.stdlib_module_names)
    assert outside <= {"torch", PACKAGE.name}


@every_file("methods")
def test_a_method_may_share_a_base_with_others_but_imports_no_other_method(path: Path) -> None:
    modules = {found.module for found in IMPORTS[path] if part_of(found.module) == "methods"}
    siblings = {other.stem for other in PACKAGE.glob("methods/*.py")} & {name.split(".")[-1] for name in modules}
    assert not siblings & {get_method(name).__module__.split(".")[-1] for name in list_methods()}


@every_file(*CORE, "")
def test_the_core_needs_nothing_that_is_not_always_installed(path: Path) -> None:
    eager = {found.module.split(".")[0] for found in IMPORTS[path] if found.eager} - set(sys.stdlib_module_names)
    assert eager <= {"torch", "transformers", "huggingface_hub", "safetensors", PACKAGE.name}


def test_every_import_that_is_needed_is_declared() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options"]["install_requires"].split()
    required = {line.split(">=")[0] for line in lines if ">=" in line}
    assert {"torch", "transformers", "huggingface_hub"} <= required


@every_file()
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES, "split it"


@every_file()
def test_every_file_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


@every_file()
def test_docstrings_are_markdown(path: Path) -> None:
    """The reference is made of them: double backticks, and none of Sphinx's roles."""
    assert not re.findall(r":\w+:`", path.read_text())


@pytest.mark.parametrize(("module", "name"), [(module, name) for module in PUBLIC for name in module.__all__])
def test_public_names_are_documented(module: ModuleType, name: str) -> None:
    thing = getattr(module, name)
    doc = inspect.getdoc(thing) if callable(thing) else None
    assert doc
    assert not doc.startswith(f"{name}("), "that is what dataclass writes where there is none"
    if inspect.isclass(thing):
        own = [member.__name__ for member in vars(thing).values() if inspect.isfunction(member)]  # or lambdas
        assert not [key for key in own if key[0] not in "_<" and not inspect.getdoc(getattr(thing, key))]


def test_the_reference_has_every_public_name_once() -> None:
    """A public name is in the ``__all__`` of the package or of a part; the reference may show others too."""
    text = "".join(page.read_text(encoding="utf-8") for page in ROOT.glob("docs/reference/*.md"))
    shown = re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE)
    assert len(shown) == len(set(shown))
    top = set(hf_tokenprune.__all__)
    names = {f"{module.__name__}.{name}" for module in PUBLIC[1:] for name in module.__all__ if name not in top}
    assert names | {f"{PACKAGE.name}.{name}" for name in top} <= set(shown)


def test_public_names_are_the_same_to_type_checkers_and_when_run() -> None:
    """``__all__``, the imports that type checkers read, and the table from which names are imported at first use."""
    assert hf_tokenprune.__all__ == sorted(set(hf_tokenprune.__all__))
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    checked = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom) and node.level == 1
        checked |= {alias.name: f"{PACKAGE.name}.{node.module}" for alias in node.names if alias.asname is None}
    assert set(checked) == set(hf_tokenprune.__all__) <= set(dir(hf_tokenprune))
    for name, module in checked.items():
        assert getattr(hf_tokenprune, name) is getattr(importlib.import_module(module), name)


def in_a_new_process(code: str) -> str:
    """What ``code`` prints there, where nothing is imported yet."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_names_are_imported_at_first_use_and_unknown_ones_are_an_error() -> None:
    code = f"""
import sys, hf_tokenprune as package
assert set(package.__all__) <= set(dir(package))
assert not [name for name in sys.modules if name.partition(".")[0] in ("torch", "transformers")]
assert not [name for name in sys.modules if name.startswith("{PACKAGE.name}.")]
package.ToMeConfig
assert "torch" in sys.modules and "transformers" not in sys.modules
package.methods.tome, package.errors.ConfigError
try:
    package.prun
except AttributeError as error:
    print(error)
"""
    assert in_a_new_process(code) == f"module '{PACKAGE.name}' has no attribute 'prun'\n"


def test_types_are_shipped() -> None:
    assert (PACKAGE / "py.typed").is_file()
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert "py.typed" in setup["options.package_data"]["hf_tokenprune"].split()


def test_using_the_package_imports_nothing_optional() -> None:
    heavy = ["evaluate", "datasets", "accelerate", "matplotlib", "sklearn", "scipy", "PIL", "typer"]
    light = CORE | {"recovery"}  # of which a function is a name of the package; what it needs it imports when it runs
    heavy += [f"hf_tokenprune.{part}" for part in sorted(PARTS - light)]
    code = f"import sys; from hf_tokenprune import *; print([name for name in {heavy} if name in sys.modules])"
    assert in_a_new_process(code) == "[]\n"
