"""The imports of the product: they point one way, and what is light stays light."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import jaxrl

ROOT = Path(jaxrl.__file__).parents[1]
PACKAGES = ("jaxrl", "evals")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}


def imported(module: str) -> Iterator[str]:
    """The product's modules that a module imports, anywhere in it; not for type checking alone."""
    tree = ast.parse(FILES[module].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            found = name if name in FILES else name.rpartition(".")[0]
            if found in FILES:
                yield found


GRAPH = {module: set(imported(module)) - {module} for module in FILES}


def room(module: str) -> str:
    """A folder or a file of jaxrl/, or evals/ as a whole."""
    first, *rest = module.split(".")
    return ".".join([first, *rest[:1]]) if first == "jaxrl" else first


def test_no_module_imports_itself_by_way_of_others() -> None:
    tuple(TopologicalSorter(GRAPH).static_order())  # raises CycleError


def test_no_room_imports_itself_by_way_of_others() -> None:
    rooms: dict[str, set[str]] = {}
    for module, others in GRAPH.items():
        rooms.setdefault(room(module), set()).update(map(room, others))
    tuple(TopologicalSorter({name: others - {name} for name, others in rooms.items()}).static_order())


def test_the_trainer_knows_no_evaluation() -> None:
    for module, others in GRAPH.items():
        if room(module) != "evals":
            assert not {other for other in others if room(other) == "evals"}, module


def test_the_loop_is_short_and_knows_no_tracker_transport_or_verifier() -> None:
    assert len(FILES["jaxrl.loop"].read_text().splitlines()) < 200
    rooms = {"jaxrl.rewards", "jaxrl.telemetry", "jaxrl.sampling.transports"}
    assert not {other for other in GRAPH["jaxrl.loop"] if any(map(other.startswith, rooms))}


def test_the_readme_counts_the_lines_of_a_step() -> None:
    readme = (ROOT / "README.md").read_text()
    claim = re.search(r"lines to read for one step \| ([\d,]+) in (\d+) files", readme)
    named = re.search(r"non-blank ones of, under `jaxrl/`: (.*?)\.\n", readme, re.DOTALL)
    assert claim and named
    files = []
    for part in re.split(r";\s+", named[1]):
        folder, _, names = part.rpartition(": ")
        files += [ROOT / "jaxrl" / folder.strip("`") / f"{name}.py" for name in re.findall(r"`(\w+)`", names)]
    lines = sum(bool(line.strip()) for file in files for line in file.read_text().splitlines())
    assert len(files) == int(claim[2])
    assert abs(lines - int(claim[1].replace(",", ""))) < 0.03 * lines


def names_its_encoding(call: ast.Call) -> bool:
    """Whether a call opens no text, or says in which encoding."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if name in ("open", "fdopen"):
        library = isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) in ("os", "gzip")
        modes = [*call.args, *given.values()]
        binary = any(
            "b" in str(m.value) for m in modes if isinstance(m, ast.Constant) and len(str(m.value)) < 4
        )
        text = not binary and not (library and name == "open")
    else:
        asked = given.get("text") or given.get("universal_newlines")
        text = name in ("read_text", "write_text") or (
            isinstance(asked, ast.Constant) and asked.value is True
        )
    return not text or "encoding" in given


def test_all_text_is_utf8_whatever_the_locale() -> None:
    folders = ("jaxrl", "evals", "launch", "benchmarks", "recipes")
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and not names_its_encoding(node)
    ]
    assert not found, found


def test_a_user_without_a_home_is_no_traceback() -> None:
    """Path.expanduser and Path.home raise there; os.path.expanduser does not."""
    found = [
        f"{module}:{node.lineno}"
        for module, path in FILES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if node.func.attr in ("expanduser", "home") and ast.unparse(node.func.value) != "os.path"
    ]
    assert not found, found


OURS = {"jaxrl.errors.InputError", "jaxrl.errors.RunError", "jaxrl.errors.file_error"}
BROAD = {"ValueError", "RuntimeError", "Exception", "BaseException"}  # which ours are


@functools.cache
def known(module: str) -> dict[str, str]:
    """What a module defines or imports by name, and where that is defined."""
    names = {"self": module}
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.setdefault(node.name, f"{module}.{node.name}")
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def calls(module: str, tree: ast.AST) -> set[str]:
    """What is called in a tree by a name that is the module's or imported from another one of the product."""
    names, found = known(module), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            first, _, rest = ast.unparse(node.func).partition(".")
            if first in names and "." not in rest:
                found.add(f"{names[first]}.{rest}".strip("."))
    return found


def test_no_broad_except_takes_an_error_of_ours_for_another_one() -> None:
    """Around a call that can raise InputError or RunError, these are raised again first."""
    trees = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in FILES.items()}
    called: dict[str, set[str]] = {}
    for module, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                called.setdefault(f"{module}.{node.name}", set()).update(calls(module, node))
    raising, more = set(OURS), True
    while more:
        more = {function for function, others in called.items() if others & raising} - raising
        raising |= more
    found = []
    for module, tree in trees.items():
        for node in ast.walk(tree):
            handled: set[str] = set()
            for handler in node.handlers if isinstance(node, ast.Try) else ():
                kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
                names = {ast.unparse(kind) if kind else "BaseException" for kind in kinds}
                again = any(isinstance(last, ast.Raise) and not last.exc for last in handler.body)
                inside = {name for part in node.body for name in calls(module, part)} & raising
                if names & BROAD and not again and not handled & {"InputError", "RunError"} and inside:
                    found.append(f"{module}:{handler.lineno} around {', '.join(sorted(inside))}")
                handled |= names
    assert not found, found
