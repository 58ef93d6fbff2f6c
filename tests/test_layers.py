"""The house holds: packages import downwards only, modules form no circle, and only `run` and the command line know a run's configuration."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import ai4land

PACKAGE = Path(ai4land.__file__).parent

LAYERS = (
    {"errors", "digests"},
    {"years", "grid", "places", "yamlfile"},
    {"legend", "crosswalk", "sources", "workers", "synthetic"},
    {"rasters", "model", "cube"},
    {"scenario", "constrain", "store", "publish", "serve"},
    {"train", "reconstruct", "evaluate"},
    {"run"},
    {"cli"},
)
"""From the foundations to the roof. A package imports only from layers below its own; modules at the top of ``ai4land/`` may also import from their own layer."""

HEIGHT = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(("ai4land", *(p for p in parts if p != "__init__")))] = path
    return found


def imports_of(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name in known}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            if (node.module or "").split(".")[0] == "ai4land":
                found |= {
                    f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in known else str(node.module) for a in node.names
                }
    return found


MODULES = modules()
IMPORTS = {name: imports_of(path, MODULES) for name, path in MODULES.items()}


def room_of(module: str) -> str:
    return module.split(".")[1]


def test_every_room_has_a_layer_and_every_layer_its_rooms():
    assert {room_of(m) for m in MODULES if m != "ai4land"} == set(HEIGHT)


def test_the_top_has_at_most_ten_modules():
    top = [p.name for p in PACKAGE.glob("*.py")]
    assert len(top) <= 10, top


def test_packages_import_downwards_only():
    upward = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        if module != "ai4land"
        for other in others
        if other != "ai4land"
        and room_of(other) != room_of(module)
        and (HEIGHT[room_of(other)], "." in other.removeprefix("ai4land.")) >= (HEIGHT[room_of(module)], True)
    ]
    assert not upward, "\n".join(upward)


def test_modules_form_no_circle():
    remaining = {m: {o for o in others if o != m} for m, others in IMPORTS.items() if m != "ai4land"}
    while free := [m for m, others in remaining.items() if not others & remaining.keys()]:
        for m in free:
            del remaining[m]
    assert not remaining, f"these modules import each other in a circle: {sorted(remaining)}"


def test_only_run_and_the_command_line_know_the_configuration():
    knows = [
        f"{module}: {name}"
        for module, path in MODULES.items()
        if module != "ai4land" and room_of(module) not in ("run", "cli")
        for name in ("RunConfig", "ai4land.run")
        if name in path.read_text(encoding="utf-8")
    ]
    assert not knows, knows


@pytest.mark.parametrize("init", sorted(p for p in PACKAGE.glob("*/__init__.py")), ids=lambda p: p.parent.name)
def test_a_package_begins_with_a_signpost(init):
    body = ast.parse(init.read_text(encoding="utf-8")).body
    assert len(body) == 1 and isinstance(body[0], ast.Expr), (
        f"{init} holds more than its docstring; imports there would load the whole package"
    )
    text = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or ""
    room = init.parent.name
    assert "May import" in text and "Start with" in text, f"{init} does not say what {room} may import and where to start reading"
    named = set(text.split("Start with")[1].split(":mod:`")[1:])
    assert all(n.split("`")[0] in MODULES for n in named), f"{init} names a module that does not exist"


def test_every_package_has_its_signpost():
    assert not [p.name for p in PACKAGE.iterdir() if p.is_dir() and list(p.glob("*.py")) and not (p / "__init__.py").is_file()]
