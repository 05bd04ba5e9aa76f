"""The house rules that an import can break: imports point down, and torch.distributed is named in one place."""

import ast
import graphlib
import re
import subprocess
import sys

import inbatch
from tests.helpers import REPOSITORY

# A package imports only packages of the lines below its own, and none of its own line.
LAYERS = (
    {"__main__"},
    {"cli"},
    {"integrations", "testing", "train"},
    {"retrieval"},
    {"encoder", "data"},
    {"grad_cache", "inbatch_neg_utils", "losses"},
    {"collectives"},
    {"ids", "other_names"},
)
COLLECTIVES = {f"collectives.{name}" for name in ("agreement", "gather", "process_group", "ring", "watch")}
# What is no collective operation: types, sharding, and whether there are other processes.
ALLOWED_DISTRIBUTED = {"ProcessGroup", "checkpoint", "device_mesh", "fsdp", "tensor"}
ALLOWED_DISTRIBUTED |= {"get_world_size", "is_initialized"}


def _module(path) -> str:
    parts = path.relative_to(REPOSITORY / "inbatch").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {_module(path): ast.parse(path.read_text()) for path in (REPOSITORY / "inbatch").rglob("*.py")}


def _imports(tree):
    """Full dotted names of what a module imports at run time, wherever in the file."""
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in set(ast.walk(tree)) - typing_only:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _ours(name: str) -> str | None:
    """The module of ours that an imported name is, or lies in."""
    parts = name.split(".")
    if parts[0] != "inbatch":
        return None
    return next(known for n in range(len(parts), 0, -1) if (known := ".".join(parts[1:n])) in SOURCES)


def test_imports_point_down_and_never_in_circles():
    graph = {name: {ours for i in _imports(tree) if (ours := _ours(i)) is not None} for name, tree in SOURCES.items()}
    layer = {package: number for number, packages in enumerate(LAYERS) for package in packages}
    pairs = {(a.split(".")[0], b.split(".")[0]) for a, below in graph.items() for b in below if a and b}
    assert not [(a, b) for a, b in pairs if a != b and layer[a] >= layer[b]]
    graphlib.TopologicalSorter({a: below - {a} for a, below in graph.items()}).prepare()


def test_only_collectives_names_the_operations_of_torch_distributed():
    found = []
    for name, tree in SOURCES.items():
        attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        for imported in {*_imports(tree), *attributes}:
            parts = imported.split(".")
            if parts[:2] == ["torch", "distributed"] and (len(parts) == 2 or parts[2] not in ALLOWED_DISTRIBUTED):
                found.append((name, imported))
    assert {name for name, _ in found} <= COLLECTIVES, found


def _loaded_after(code: str) -> set[str]:
    code = f"import sys; {code}; print(*{{name.split('.')[0] for name in sys.modules}})"
    return set(subprocess.check_output([sys.executable, "-c", code], text=True, cwd=REPOSITORY).split())


def test_importing_the_package_is_free_and_the_loss_needs_only_torch():
    assert not _loaded_after("import inbatch") & {"torch", "numpy"}
    assert not _loaded_after("from inbatch import all_gather, info_nce") & {
        "transformers",
        "datasets",
        "triton",
        "pyarrow",
    }


def test_every_public_name_resolves():
    imports = [node for node in ast.walk(SOURCES[""]) if isinstance(node, ast.ImportFrom)]
    seen_by_type_checkers = {node.names[0].asname: node.module for node in imports if node.module != "typing"}
    assert seen_by_type_checkers == inbatch._PUBLIC
    for name in inbatch.__all__:
        assert getattr(inbatch, name).__module__.startswith("inbatch")


def functions(tree: ast.AST, prefix: str = "") -> set[str]:
    """The names of a module's functions and classes, those within others as a.b."""
    names = set()
    for node in ast.iter_child_nodes(tree):
        named = isinstance(node, (ast.FunctionDef, ast.ClassDef))
        names |= ({prefix + node.name} if named else set()) | functions(
            node, f"{prefix}{node.name}." if named else prefix
        )
    return names


def test_the_walk_through_the_code_stops_at_functions_that_exist_and_at_none_twice():
    text = (REPOSITORY / "docs" / "design.md").read_text(encoding="utf-8")
    stops = re.findall(r"^\d+\. `([\w/]+\.py):([\w.]+)`", text, re.MULTILINE)
    assert len(stops) > 50
    assert len(set(stops)) == len(stops)
    for file, name in stops:
        assert name in functions(ast.parse((REPOSITORY / "inbatch" / file).read_text())), (file, name)


def test_the_maps_name_every_file():
    package = [path for path in (REPOSITORY / "inbatch").rglob("*.py") if path.name != "__init__.py"]
    kernels = [path for path in package if path.parent.name == "triton"]
    losses = [path for path in package if path.parent.name == "losses"]
    for page, files in (
        ("docs/design.md", [path for path in package if path not in kernels]),
        ("inbatch/losses/README.md", [*losses, *kernels]),
    ):
        text = (REPOSITORY / page).read_text(encoding="utf-8")
        assert [path.name for path in files if path.name not in text] == [], page
