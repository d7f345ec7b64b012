"""The shape of the package: imports run downwards, files and functions stay small, only model/ knows boson's model."""

import ast
from pathlib import Path

import pytest

from tests.support.launching import ROOT

PACKAGE = ROOT / "ds_higgs"
# From the bottom up: a module may import those of its own line and of the lines before it.
LAYERS = [
    {"errors", "batch", "config", "layout", "files", "hub", "losses", "module_calls", "run_folder"},
    {"job"},
    {"model", "data", "checkpoint"},
    {"adapters", "sizing", "speech"},
    {"setup"},
    {"training"},
    {"commands", "report"},
    {"cli"},
    {"__main__"},
]


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def all_imports(nodes) -> set[str]:
    """Names that import statements among `nodes` may load."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that `path` imports, inside functions too."""
    return all_imports(ast.walk(ast.parse(path.read_text()))) & set(known)


def imports_at_load(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that are imported when `path` is."""
    return all_imports(ast.parse(path.read_text()).body) & set(known)


def top(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def layer_of(name: str) -> int:
    matching = [index for index, layer in enumerate(LAYERS) if name in layer]
    assert matching, f"ds_higgs/{name}: give it a place in LAYERS"
    return matching[0]


def test_imports_run_downwards():
    known = modules()
    upwards = [
        f"{module} imports {imported}"
        for module, path in known.items()
        if top(module)
        for imported in imports(path, known)
        if top(imported) and layer_of(top(imported)) > layer_of(top(module))
    ]
    assert not upwards, "\n".join(upwards)


def test_there_is_no_import_cycle():
    known = modules()
    graph = {module: imports_at_load(path, known) - {module, "ds_higgs"} for module, path in known.items()}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, "import cycle: " + " -> ".join([*way[way.index(module) :], module])
        if module in done:
            return
        for imported in sorted(graph[module]):
            if not module.startswith(imported + "."):  # a package's own modules load after its __init__
                visit(imported, (*way, module))
        done.add(module)

    for module in graph:
        visit(module, ())


def test_nothing_imports_the_command_line():
    known = modules()
    importers = {
        module
        for module, path in known.items()
        for imported in imports(path, known)
        if top(imported) == "cli" and top(module) != "cli"
    }
    assert importers == {"ds_higgs.__main__"}


def test_only_the_model_package_imports_bosons_model():
    offenders = [
        module
        for module, path in modules().items()
        if top(module) != "model"
        for name in all_imports(ast.walk(ast.parse(path.read_text())))
        if name.startswith("boson_multimodal.model")
    ]
    assert not offenders


def test_no_pickle_is_loaded_that_could_run_code():
    calls = {
        f"{path.relative_to(ROOT)}:{node.lineno}": {
            keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords
        }
        for path in modules().values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads")
    }
    assert calls
    assert not [where for where, keywords in calls.items() if keywords.get("weights_only") != "True"]


@pytest.mark.parametrize("module", modules())
def test_files_and_functions_stay_small(module):
    source = modules()[module].read_text()
    tree = ast.parse(source)
    assert source.count("\n") <= 400
    assert ast.get_docstring(tree), "a file's first line says what it is for"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 80, node.name
