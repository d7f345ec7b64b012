"""The house: which rooms there are, what each is for, and what may import what. CONTRIBUTING.md shows `sketch()`."""

import ast
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from tests.support.launching import ROOT

PACKAGE = ROOT / "ds_higgs"
GROUND = "ground"
# From the bottom up. A room imports from the floors below it, and not from its neighbours on the same floor.
FLOORS: tuple[dict[str, str], ...] = (
    {GROUND: "errors, batch, config/, layout, files, hub, losses, module_calls, run_folder"},
    {"job": "one process among others: ranks, launcher, stopping, failures, exit"},
    {
        "model": "HiggsAudioModel: loading, LoRA, patches; the only importer of boson_multimodal.model",
        "data": "manifest -> prepared data -> batches; codec/, sources/, containers/: one module a kind; shares/",
        "checkpoint": "complete or absent",
    },
    {
        "adapters": "what a run hands out: saving, opening, merging, native form, card",
        "sizing": "memory terms and estimator: arithmetic alone",
        "speech": "speaking prompts, measures, judges",
    },
    {"setup": "the configuration's data section -> rules, data sets, loaders"},
    {"training": "the loop, the step and what they are made of"},
    {"commands": "one module a user command"},
    {"report": "the pages"},
    {"cli": "parses, imports lazily, calls one function"},
)
GROUND_MODULES = {"errors", "batch", "config", "layout", "files", "hub", "losses", "module_calls", "run_folder"}
# The configuration does not leak inwards: builders elsewhere take plain values.
KNOW_THE_CONFIG = {GROUND, "setup", "training", "commands", "report", "cli"}
# Where data and model may meet in one module.
KNOW_DATA_AND_MODEL = {"setup", "training", "commands", "report", "cli"}


def sketch() -> str:
    """The floors from the top down, as CONTRIBUTING.md shows them."""
    lines = []
    for floor in reversed(FLOORS):
        lines += [f"{room:<12}{purpose}" for room, purpose in floor.items()]
    return "\n".join(lines)


def floor_of(room: str) -> int:
    """The room's floor, 0 at the bottom."""
    matching = [number for number, floor in enumerate(FLOORS) if room in floor]
    assert matching, f"ds_higgs/{room}: give it a place in FLOORS"
    return matching[0]


def room_of(module: str) -> str:
    """The room of a module's dotted name."""
    top = module.split(".")[1]
    return GROUND if top in GROUND_MODULES else top


@cache
def modules() -> dict[str, Path]:
    """Every module of the package but its two entrances, by dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: path for name, path in found.items() if name not in ("ds_higgs", "ds_higgs.__main__")}


@cache
def tree_of(module: str) -> ast.Module:
    """The module's syntax tree."""
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


def statements(nodes: Sequence[ast.AST]) -> Iterator[ast.AST]:
    """`nodes` and all below them, without what only a type checker reads."""
    for node in nodes:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from statements(node.orelse)
            continue
        yield node
        yield from statements(list(ast.iter_child_nodes(node)))


def imported_names(nodes: Iterator[ast.AST]) -> set[str]:
    """Dotted names that import statements among `nodes` may load."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@cache
def imports(module: str) -> frozenset[str]:
    """Modules of the package that `module` imports, inside functions too; a package's own names are not the package."""
    names = imported_names(statements([tree_of(module)]))
    known = {name for name in names if name in modules()}
    # `from ds_higgs.job import distributed` loads the module; the package beside it says nothing more.
    packages = {
        name for name in known if modules()[name].name == "__init__.py" and any(n.startswith(name + ".") for n in known)
    }
    return frozenset(known - packages - {module})
