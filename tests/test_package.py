import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import mod_star

ROOT = Path(__file__).parent.parent

IMPORT_EVERYTHING = """
import importlib, sys
from pathlib import Path
files = [path for path in Path("mod_star").rglob("*.py") if path.name != "__main__.py"]
for path in files:
    importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
print(len(files), *sorted({name.split(".")[0] for name in sys.modules} & {"tensorflow", "torch", "matplotlib"}))
"""


@pytest.mark.slow
def test_importing_everything_brings_in_neither_tensorflow_nor_torch_and_matplotlib_only_to_draw() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_EVERYTHING], cwd=ROOT, capture_output=True, text=True, check=True
    )
    modules, *heavy = done.stdout.split()
    assert int(modules) >= 10
    assert heavy == []


def test_importing_the_package_alone_imports_nothing_heavy() -> None:
    program = "import sys, mod_star; print(*{'jax', 'numpy', 'flax'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.slow
def test_every_public_name_is_there_and_has_documentation() -> None:
    program = (
        "import mod_star; print(*(n for n in mod_star.__all__ if not (getattr(mod_star, n).__doc__ or '').strip()))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
    assert set(mod_star.__all__) <= set(dir(mod_star))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = mod_star.trian


def test_the_version_is_the_installed_one() -> None:
    assert importlib.metadata.version("mod-star") == mod_star.__version__


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(mod_star.__file__).parent / "py.typed").is_file()


def test_the_lock_holds_every_dependency_and_no_address() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    assert not re.search(r"://|^\s*-|@ ", lock, re.MULTILINE), "an address or a pip option"
    assert not re.search(r"(^|\s)/\w", lock), "a path of the machine that made it"
    locked = set(re.findall(r"^([a-z0-9._-]+)==", lock, re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {re.split(r"[\[<>=!~; ]", name)[0].lower().replace("_", "-") for name in wanted}
    assert names <= locked
    jax = re.findall(r"^jax==(\S+) ; (.+)$", lock, re.MULTILINE)
    assert ("0.10.2", "python_full_version < '3.12'") in jax, "the last JAX for Python 3.11"


@pytest.mark.parametrize("script", ["tpu_setup.sh", ".ci/run"])
def test_scripts_are_executable_and_sound(script: str) -> None:
    assert (ROOT / script).stat().st_mode & 0o111
    subprocess.run(["bash", "-n", script], cwd=ROOT, check=True)


RIDDLES = re.compile(
    r"has no use (with|for)|at the most\b(?! likely| probable)|at the least\b(?! certain)"
    r"|(is|are) no good\b|\bwhat is no\b|none of the (model|user|text)'s\b|of the user's own\b|either so or\b"
    r"|\bbehind (it|them|every|each|the (text|token|batch|thought|number|second|first|last))\b",
    re.IGNORECASE,
)


def test_words_that_readers_stumble_over_stay_away() -> None:
    """See docs/glossary.md and CONTRIBUTING.md: one meaning per word, plain English."""
    generated = {ROOT / "docs/reference" / name for name in ("command_line.md", "configuration.md")}  # of what is read
    pages = [*ROOT.glob("docs/**/*.md"), *ROOT.glob("experiments/*/README.md"), *ROOT.glob("*.md")]
    riddles = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in [*ROOT.glob("mod_star/**/*.py"), *pages]
        if path not in generated
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if RIDDLES.search(line)
    ]
    assert riddles == []


def _messages(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every string in a module that may be printed: all but docstrings and regular expressions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documentation = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.lineno, node.value


def test_messages_write_words_out() -> None:
    """Such as cannot and does not. A pattern that reads a model's text is not a message."""
    contraction = re.compile(r"[a-z]n't\b", re.IGNORECASE)
    paths = sorted(ROOT.glob("mod_star/**/*.py"))
    texts = [(path, *each) for path in paths for each in _messages(path) if "|" not in each[1]]
    assert len(texts) > 1000
    contracted = [
        f"{path.relative_to(ROOT)}:{number}: {text}" for path, number, text in texts if contraction.search(text)
    ]
    assert contracted == []
