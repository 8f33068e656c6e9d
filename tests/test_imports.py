"""The order of the house, read from the source: imports point down, and `import dqbart` is light."""

import ast
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dqbart

ROOT = Path(__file__).parents[1]
# From top to bottom; parts on one line never import each other.
LEVELS = [
    {"__main__"},
    {"cli"},
    {"demo", "dense", "doctor", "extraction"},
    {"pipeline"},
    {"run", "tasks"},
    {"distill", "evaluation"},
    {"engines"},
    {"teacher"},
    {"student", "data", "packed"},
    {"quant"},
    {"fitting"},
    {"recipe"},
    {"methods", "notation", "architectures"},
    {"dqbart_kernels"},
]
DEPTH = {part: level for level, parts in enumerate(LEVELS) for part in parts}
SOURCES = [p for folder in ("dqbart", "kernels") for p in sorted((ROOT / folder).rglob("*.py"))]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported, at the top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the full name"
            # `from dqbart import recipe` imports dqbart.recipe
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def part_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "dqbart_kernels" if parts[0] == "kernels" else parts[1]


def wrong_imports(path: Path) -> Iterator[str]:
    part = part_of(path)
    for line, name in imports(path):
        first, *rest = name.split(".")
        where = f"{path.relative_to(ROOT)}:{line} imports {name}"
        if first in ("benchmarks", "tests", "tiny_models") or first.startswith("test_"):
            yield where
        if first == "kernels":
            yield f"{where}: the package is called dqbart_kernels"
        target = "dqbart_kernels" if first == "dqbart_kernels" else rest[0] if first == "dqbart" and rest else None
        if target in (None, part, "__version__"):
            continue
        if target not in DEPTH:
            yield f"{where}: {target} is not in LEVELS"
        elif part != "__init__" and DEPTH[target] <= DEPTH.get(part, -1):
            yield f"{where}: that is not below {part}"


def test_every_part_has_its_level() -> None:
    assert {part_of(p) for p in SOURCES} - {"__init__"} <= set(DEPTH)
    assert len(SOURCES) > 20


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    assert list(wrong_imports(path)) == []


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("dqbart/quant/x.py", "from dqbart.distill import losses"),
        ("dqbart/student/x.py", "def f():\n    from dqbart import packed"),
        ("dqbart/recipe.py", "import dqbart.quant.layers as q"),
        ("dqbart/data/x.py", "import benchmarks.authors"),
        ("dqbart/data/x.py", "import dqbart.nowhere"),
        ("kernels/dqbart_kernels/x.py", "from dqbart.recipe import Bits"),
        ("dqbart/quant/x.py", "from kernels.dqbart_kernels import integer_matmul"),
    ],
)
def test_the_check_can_fail(place: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    file = tmp_path / place
    file.parent.mkdir(parents=True)
    file.write_text(line)
    assert len(list(wrong_imports(file))) == 1


def test_nothing_importable_is_called_kernels() -> None:
    """transformers takes a package of that name for its own optional dependency, and crashes on its version."""
    found = [
        p for p in (*ROOT.rglob("kernels.py"), *ROOT.rglob("kernels/__init__.py")) if "site-packages" not in p.parts
    ]
    assert not found
    if "kernels" not in {d.name for d in importlib.metadata.distributions()}:
        from transformers.utils import is_kernels_available

        assert not is_kernels_available()


def in_a_fresh_process(code: str) -> list[str]:
    run = subprocess.run(
        [sys.executable, "-c", f"import sys, json\n{code}"], cwd=ROOT, capture_output=True, text=True,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": ""}, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


HEAVY = (
    "print(json.dumps([m for m in ('torch', 'transformers', 'datasets', 'accelerate', 'triton') if m in sys.modules]))"
)


def test_importing_dqbart_is_light() -> None:
    assert in_a_fresh_process(f"import dqbart\n{HEAVY}") == []
    code = "import dqbart\nassert str(dqbart.Recipe(bits='8-8-8').bits) == str(dqbart.Bits('8-8-8')) == '8-8-8'\n"
    assert in_a_fresh_process(code + HEAVY) == []


def test_importing_layers_needs_no_transformers() -> None:
    assert in_a_fresh_process(f"import dqbart.quant.layers, dqbart.distill.objective\n{HEAVY}") in (
        ["torch"],
        ["torch", "triton"],
    )


def test_public_names() -> None:
    for name, home in (("Bits", "notation"), ("Layers", "notation"), ("Recipe", "recipe")):
        assert getattr(dqbart, name).__module__ == f"dqbart.{home}"
    assert callable(dqbart.compress) and callable(dqbart.load)
    assert {"Bits", "Layers", "Recipe", "compress", "load"} <= set(dir(dqbart))
    with pytest.raises(AttributeError, match="module 'dqbart' has no attribute 'Recipee': it has "):
        dqbart.Recipee  # type: ignore[attr-defined]  # noqa: B018
