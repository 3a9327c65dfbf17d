"""The rooms import each other in one direction, without cycles, and stay small; checked by parsing every file."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "pallas_kernels": set(),
    "models": {"pallas_kernels"},
    "decoding": {"models", "pallas_kernels"},
    "finetune": {"models", "decoding", "pallas_kernels"},
    "experiments": {"models", "decoding", "finetune", "pallas_kernels"},
}
REFERENCES = {"torch", "transformers", "peft", "sentencepiece"}  # what others' models are compared with
REFERENCE_FILES = ("tests/parity/*", "tests/golden/make_*.py")
LAZY_REFERENCE_FILES = ("experiments/bench_decoding.py", "experiments/bench_train.py")  # time others beside us
MOST_LINES = 400


def sources(root: Path) -> dict[str, Path]:
    """{dotted name: file} of everything in the rooms and the tests; a package goes by its folder's name."""
    files = [path for room in (*MAY_IMPORT, "tests") for path in sorted((root / room).rglob("*.py"))]
    parts = {path: path.relative_to(root).with_suffix("").parts for path in files}
    return {".".join(p[:-1] if p[-1] == "__init__" else p): path for path, p in parts.items()}


def imports(name: str, path: Path) -> Iterator[tuple[str, bool]]:
    """Yields (module, whether the import runs when the file is imported) for each import, wherever it stands."""

    def walk(node: ast.AST, at_import: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{module}.{alias.name}", at_import) for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            at_import = False
        for child in ast.iter_child_nodes(node):
            yield from walk(
                child, at_import and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            )

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), True)


def room_violations(root: Path) -> list[str]:
    """Imports of a room that the importing room may not know."""
    found = []
    for name, path in sources(root).items():
        room = name.split(".")[0]
        for target, _ in imports(name, path):
            other = target.split(".")[0]
            if room != "tests" and other != room and other in {*MAY_IMPORT, "tests"} - MAY_IMPORT[room]:
                found.append(
                    f"{name} imports {target}: {room} may import {sorted(MAY_IMPORT[room]) or 'nothing of ours'}"
                )
    return found


def reference_violations(root: Path) -> list[str]:
    """Imports of the libraries that we are compared with, outside the files that compare."""
    found = []
    for name, path in sources(root).items():
        relative = path.relative_to(root)
        if any(relative.match(pattern) for pattern in REFERENCE_FILES):
            continue
        lazy = any(relative.match(pattern) for pattern in LAZY_REFERENCE_FILES)
        for target, at_import in imports(name, path):
            if target.split(".")[0] in REFERENCES and (at_import or not lazy):
                found.append(f"{name} imports {target}, which only {', '.join(REFERENCE_FILES)} may")
    return found


def cycles(root: Path) -> list[str]:
    """Chains of imports, run when a file is imported, that come back to where they started."""
    modules = sources(root)

    def resolve(target: str) -> str | None:
        return target if target in modules else target.rpartition(".")[0] if "." in target else None

    graph = {
        name: {resolve(target) for target, at_import in imports(name, path) if at_import} & set(modules)
        for name, path in modules.items()
    }
    found, done = [], set()

    def visit(name: str, chain: tuple[str, ...]) -> None:
        if name in chain:
            found.append(" -> ".join([*chain[chain.index(name) :], name]))
        elif name not in done:
            for target in sorted(graph[name]):
                visit(target, (*chain, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    return found


def long_files(root: Path) -> list[str]:
    """Files with more lines than one reads in a sitting."""
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources(root).values()}
    long = {path.relative_to(root): n for path, n in lengths.items() if n > MOST_LINES}
    return [f"{path} has {n} lines; split it (at most {MOST_LINES})" for path, n in long.items()]


RULES = [room_violations, reference_violations, cycles, long_files]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_project_keeps_the_rule(rule):
    broken = rule(ROOT)
    assert not broken, "\n" + "\n".join(broken)


def test_the_checker_sees_the_project():
    """An empty list of files would keep every rule."""
    modules = sources(ROOT)
    assert {"models", "models.attention", "decoding.decode", "experiments", "tests.conftest"} <= set(modules)
    seen = {target for target, _ in imports("models.attention", modules["models.attention"])}
    assert {"typing.Any", "flax.linen", "models.cache.LayerCache", "models.config.AttentionConfig"} <= seen


GOOD = {
    "models/__init__.py": "",
    "models/a.py": "import jax\nfrom models.b import x\n",
    "models/b.py": "x = 1\ndef late():\n    from models.a import y\n",
    "decoding/c.py": "import models.a\nfrom models import b\nfrom pallas_kernels import op\n",
    "experiments/d.py": "from decoding.c import z\nimport finetune\n",
    "experiments/bench_decoding.py": "def main():\n    import torch\n",
    "tests/parity/test_a.py": "import torch\n",
    "tests/golden/make_a.py": "from transformers import AutoModel\n",
    "tests/models/test_a.py": "from experiments import d\n",
}
BAD = [
    (room_violations, "pallas_kernels/k.py", "import models", "pallas_kernels.k imports models"),
    (room_violations, "pallas_kernels/k.py", "import finetune.x as y", "pallas_kernels.k imports finetune.x"),
    (room_violations, "models/k.py", "from decoding.c import z", "models.k imports decoding.c.z"),
    (room_violations, "models/k.py", "def f():\n    import experiments.d", "models.k imports experiments.d"),
    (room_violations, "models/sub/__init__.py", "import decoding", "models.sub imports decoding"),
    (room_violations, "decoding/k.py", "from finetune import x", "decoding.k imports finetune.x"),
    (room_violations, "finetune/k.py", "import experiments", "finetune.k imports experiments"),
    (room_violations, "experiments/k.py", "from tests import support", "experiments.k imports tests.support"),
    (reference_violations, "models/k.py", "import torch.nn", "models.k imports torch.nn"),
    (reference_violations, "models/k.py", "def f():\n    import sentencepiece", "models.k imports sentencepiece"),
    (reference_violations, "tests/models/k.py", "from peft import x", "tests.models.k imports peft.x"),
    (reference_violations, "tests/golden/k.py", "import transformers", "tests.golden.k imports transformers"),
    (reference_violations, "experiments/bench_decoding.py", "import torch", "experiments.bench_decoding imports torch"),
    (
        cycles,
        "models/b.py",
        "try:\n    from models.a import y\nexcept ImportError:\n    pass",
        "models.a -> models.b -> models.a",
    ),
    (cycles, "models/b.py", "from . import a", "models.a -> models.b -> models.a"),
    (cycles, "models/__init__.py", "from models.c import x", "models -> models.c -> models"),
    (long_files, "models/k.py", "x = 1\n" * 401, "models/k.py has 401 lines"),
]


def plant(root, files):
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def test_a_good_tree_passes(tmp_path):
    root = plant(tmp_path, GOOD)
    assert [rule(root) for rule in RULES] == [[]] * len(RULES)


@pytest.mark.parametrize(("rule", "path", "text", "message"), BAD)
def test_planted_violations_are_flagged(rule, path, text, message, tmp_path):
    root = plant(tmp_path, GOOD | {"models/c.py": "import models\n", path: text})
    found = rule(root)
    assert len(found) == 1 and message in found[0]
