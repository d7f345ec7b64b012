"""The shape of the package, as tests/support/house.py draws it: who imports whom, how large things get."""

import ast

import pytest

from tests.support import house
from tests.support.launching import ROOT

MAX_FILE, MAX_CLASS, MAX_FUNCTION = 350, 250, 60
MAX_LOOSE_MODULES = 10


def test_contributing_shows_the_house():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert f"```\n{house.sketch()}\n```" in page, f"expected in CONTRIBUTING.md:\n\n{house.sketch()}"


def test_few_modules_lie_beside_the_rooms():
    loose = [path.stem for path in house.PACKAGE.glob("*.py") if path.stem != "__init__"]
    assert len(loose) <= MAX_LOOSE_MODULES, loose


def test_imports_run_downwards():
    wrong = []
    for module in house.modules():
        for imported in house.imports(module):
            room, other = house.room_of(module), house.room_of(imported)
            if room != other and house.floor_of(other) >= house.floor_of(room):
                wrong.append(f"{module} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_there_is_no_import_cycle():
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, "import cycle: " + " -> ".join([*way[way.index(module) :], module])
        if module in done:
            return
        for imported in sorted(house.imports(module)):
            visit(imported, (*way, module))
        done.add(module)

    for module in house.modules():
        visit(module, ())


def test_the_configuration_does_not_leak_inwards():
    knowing = {
        module
        for module in house.modules()
        if house.room_of(module) not in house.KNOW_THE_CONFIG
        and any(name.split(".")[1] == "config" for name in house.imports(module))
    }
    assert not knowing


def test_data_and_model_meet_in_the_setup():
    meeting = []
    for module in house.modules():
        rooms = {house.room_of(imported) for imported in house.imports(module)}
        if {"data", "model"} <= rooms | {house.room_of(module)} and house.room_of(
            module
        ) not in house.KNOW_DATA_AND_MODEL:
            meeting.append(module)
    assert not meeting


def test_only_the_model_room_imports_bosons_model():
    offenders = {
        module
        for module in house.modules()
        if house.room_of(module) != "model"
        and any(
            name.startswith("boson_multimodal.model") for name in house.imported_names(ast.walk(house.tree_of(module)))
        )
    }
    assert not offenders


def test_deepspeeds_private_parts_are_touched_in_one_file():
    touched = {
        f"{module}:{node.lineno}: {ast.unparse(node)}"
        for module in house.modules()
        if module != "ds_higgs.checkpoint.deepspeed_parts"
        for node in ast.walk(house.tree_of(module))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and ast.unparse(node.value).split(".")[-1] in ("engine", "optimizer")
        and ast.unparse(node.value) != "self"
    }
    assert not touched


def test_no_pickle_is_loaded_that_could_run_code():
    calls = {
        f"{module}:{node.lineno}": {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        for module in house.modules()
        for node in ast.walk(house.tree_of(module))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads")
    }
    assert calls
    assert not [where for where, keywords in calls.items() if keywords.get("weights_only") != "True"]


def test_no_name_means_two_things():
    """Public classes, and functions that other rooms import, are called by a name of their own."""
    owners: dict[str, set[str]] = {}
    for module in house.modules():
        for node in house.tree_of(module).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                owners.setdefault(node.name, set()).add(module)
    for module, name in _used_across_rooms():
        owners.setdefault(name, set()).add(module)
    shared = {name: sorted(found) for name, found in owners.items() if len(found) > 1}
    assert not shared


def test_what_other_rooms_use_is_explained():
    unexplained = []
    for module, name in sorted(_used_across_rooms()):
        for node in house.tree_of(module).body:
            named = isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name
            if named and not ast.get_docstring(node):
                unexplained.append(f"{module}.{name}")
    assert not unexplained


def _used_across_rooms() -> set[tuple[str, str]]:
    """(module, name) of every function and class that a module of another room imports."""
    found = set()
    for module in house.modules():
        for node in ast.walk(house.tree_of(module)):
            if not isinstance(node, ast.ImportFrom) or node.module not in house.modules():
                continue
            if house.room_of(node.module) == house.room_of(module):
                continue
            defined = {
                one.name for one in house.tree_of(node.module).body if isinstance(one, ast.FunctionDef | ast.ClassDef)
            }
            found |= {(node.module, alias.name) for alias in node.names if alias.name in defined}
    return found


@pytest.mark.parametrize("module", house.modules())
def test_what_is_printed_is_an_answer_or_names_its_stream(module):
    """`print_answer`, a log line, or `print(..., file=...)`: a bare print would not reach who asked."""
    calls = (node for node in ast.walk(house.tree_of(module)) if isinstance(node, ast.Call))
    bare = [call.lineno for call in calls if ast.unparse(call.func) == "print" and "file=" not in ast.unparse(call)]
    assert not bare


@pytest.mark.parametrize("module", house.modules())
def test_files_classes_and_functions_stay_small(module):
    tree = house.tree_of(module)
    assert house.modules()[module].read_text(encoding="utf-8").count("\n") <= MAX_FILE
    assert ast.get_docstring(tree), "a file's first line says what it is for"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < MAX_FUNCTION, node.name
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno - node.lineno < MAX_CLASS, node.name
