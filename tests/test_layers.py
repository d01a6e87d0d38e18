"""Imports point down only: modules -> distributions -> ops -> reference | kernels."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Folders are layers of their own, but for specs, which is the modules'. Of the files directly in
# fastprob/, rng and backend serve every layer above the reference, and interaction stands beside
# the distributions: it takes a value from one, and a composite asks it for each of its parts. All
# others are the modules.
FILES = {
    "rng": "base",
    "streams": "base",
    "lowering": "base",
    "native": "base",
    "native_normal": "base",
    "backend": "base",
    "counter": "base",
    "interaction": "distributions",
}
FOLDERS = {"distributions", "ops", "reference", "kernels"}
MAY_IMPORT = {
    "modules": {"modules", "distributions", "ops", "reference", "base"},
    "distributions": {"distributions", "ops", "reference", "base"},
    "ops": {"ops", "reference", "kernels", "base"},
    "base": {"base", "reference"},
    "reference": {"reference"},
    "kernels": {"kernels"},
}
MAY_IMPORT_TRITON = {"base", "kernels", "ops"}


def layer_of(module: str) -> str | None:
    """Names the layer of a dotted module name; None for what is not fastprob's."""
    parts = module.split(".")
    if parts[0] != "fastprob":
        return None
    child = parts[1] if len(parts) > 1 else ""
    return child if child in FOLDERS else FILES.get(child, "modules")


def module_name(path: Path) -> str:
    """Dotted import name of a source file, `kernels/x.py` being `fastprob.kernels.x`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "kernels":
        parts = ("fastprob", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(tree: ast.AST, package: str) -> Iterator[str]:
    """Yields the dotted name of all that a module imports, in functions too.

    `from a import b` gives `a.b`, since b may be a module. Strings given to `import_module` and
    `__import__` count.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            function = node.func
            called = function.attr if isinstance(function, ast.Attribute) else None
            called = function.id if isinstance(function, ast.Name) else called
            name = node.args[0]
            if called in {"import_module", "__import__"} and isinstance(name, ast.Constant):
                yield str(name.value)


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Lists the imports of a source text that its layer may not make."""
    package = module if is_package else module.rpartition(".")[0]
    layer = layer_of(module)
    found = []
    for name in imported_names(ast.parse(source), package):
        target = layer_of(name)
        root = name.split(".")[0]
        if root == "kernels":
            found.append(f"{module} imports {name}: it is fastprob.kernels")
        elif layer and root == "triton" and layer not in MAY_IMPORT_TRITON:
            found.append(f"{module} ({layer}) imports {name}")
        elif layer and target and target not in MAY_IMPORT[layer]:
            found.append(f"{module} ({layer}) imports {name} ({target})")
    return found


def sources() -> list[Path]:
    """Every Python file of the package, the kernels, the tests and the benchmark."""
    folders = ("fastprob", "kernels", "tests", "bench")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def test_imports_point_down():
    found = []
    for path in sources():
        is_package = path.name == "__init__.py"
        found += violations(path.read_text("utf-8"), module_name(path), is_package=is_package)
    assert found == []


def test_the_walk_reaches_every_layer():
    layers = {layer_of(module_name(path)) for path in sources()}
    assert {"modules", "distributions", "ops", "reference", None} <= layers


def test_kernels_is_no_package_of_its_own():
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fastprob.reference.normal", "import triton"),
        ("fastprob.reference.normal", "def f():\n    from triton import language"),
        ("fastprob.reference.normal", "from fastprob.kernels import normal"),
        ("fastprob.reference.normal", "from fastprob import kernels"),
        ("fastprob.reference.normal", "from ..kernels.normal import sample"),
        ("fastprob.reference.normal", "from .. import ops"),
        ("fastprob.reference.normal", "from fastprob import rng"),
        ("fastprob.reference.normal", "import importlib\nimportlib.import_module('triton')"),
        ("fastprob.kernels.normal", "from fastprob.reference import normal"),
        ("fastprob.kernels.normal", "from fastprob.ops.normal import sample"),
        ("fastprob.ops.normal", "from fastprob.distributions.normal import Normal"),
        ("fastprob.ops.normal", "import fastprob.modules"),
        ("fastprob.ops.normal", "import fastprob"),
        ("fastprob.rng", "from fastprob.ops import normal"),
        ("fastprob.distributions.normal", "from fastprob.kernels import normal"),
        ("fastprob.distributions.normal", "from ..safe import SafeProbabilisticModule"),
        ("fastprob.distributions.normal", "import triton"),
        ("fastprob.distributions.normal", "from fastprob.specs import Bounded"),
        ("fastprob.ops.normal", "from fastprob.interaction import take"),
        ("fastprob.interaction", "from fastprob.keys import with_suffix"),
        ("fastprob.modules", "from .kernels import normal"),
        ("fastprob.modules", "import triton.language as tl"),
        ("fastprob.modules", "import kernels"),
        ("tests.test_normal", "from kernels.normal import sample"),
        ("bench.calls", "def f():\n    __import__('kernels')"),
    ],
)
def test_the_check_finds_a_forbidden_import(module, source):
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fastprob.safe", "from fastprob.modules import ProbabilisticTensorDictModule"),
        ("fastprob.safe", "from .distributions import _base\nfrom .ops import projection"),
        ("fastprob.distributions.composite", "from fastprob.interaction import take"),
        ("fastprob.distributions.normal", "from fastprob import rng\nfrom ..ops import normal"),
        ("fastprob.ops.normal", "def f():\n    from fastprob.kernels import normal"),
        ("fastprob.ops.normal", "from fastprob.reference import normal as kernels"),
        ("fastprob.kernels.normal", "import triton\nfrom fastprob.kernels import _math"),
        ("fastprob.kernels.normal", "from . import _math"),
        ("fastprob.reference.normal", "import torch\nfrom fastprob.reference import philox"),
        ("tests.test_normal", "import triton\nfrom fastprob.kernels import normal"),
    ],
)
def test_the_check_lets_a_right_import_pass(module, source):
    assert violations(source, module) == []


def test_relative_imports_of_a_package_are_resolved():
    source = "from ..kernels import normal"
    assert violations(source, "fastprob.reference", is_package=True)
    assert not violations("from . import normal", "fastprob.reference", is_package=True)
