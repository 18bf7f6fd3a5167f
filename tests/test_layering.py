"""The house of the README: a module imports only modules above it, numerics import jax alone, vendors are imported where they are used."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "opd_jax"

# From top to bottom; the modules of one line may not import each other unless they are one package.
FLOORS = """types
files
processes
config cli glossary
numerics
parallel
models
cost
environments
data
rewards
sampler
refill score
turns
rollout
checkpoint
store
model_io
writing
teachers
routing apart
pair
difficulty
objective
observed labels
claim learner replay
batches
metrics
trackers
scores diagnostics
wording injected
evaluate
context_gap
machine
samples
recipes workdir
assembly
outlines
aot memory_plan
job
recorder
score_cache
train
analysis
sweeps
method_table
bench""".splitlines()
FLOOR = {name: level for level, line in enumerate(FLOORS) for name in line.split()}

# Vendor -> the modules that may import it.
VENDORS = {
    "orbax": {"checkpoint"},
    "grain": {"data"},
    "tensorflow_datasets": {"data"},
    "math_verify": {"data"},
    "sympy": {"data"},
    "rouge_score": {"data"},
    "sacrebleu": {"data"},
    "pyarrow": {"data"},
    "transformers": {"data", "models", "bench"},
    "matplotlib": {"analysis"},
    "ml_collections": {"config"},
    "optax": {"learner", "analysis", "bench"},
    "tensorboardX": {"trackers"},
    "wandb": {"trackers"},
    "torch": {"bench"},
    "trl": {"bench"},
}


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(path: pathlib.Path) -> set[str]:
    """Absolute names of everything that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_point_upwards(path):
    room = name_of(path).split(".")[0]
    if room == "__init__":
        assert not imports(path)
        return
    for name in imports(path):
        if name.startswith("opd_jax."):
            target = name.split(".")[1]
            same_package = target == room and (PACKAGE / room).is_dir()
            assert same_package or FLOOR[target] < FLOOR[room], f"{room} (floor {FLOOR[room]}) imports {target} (floor {FLOOR[target]})"


@pytest.mark.parametrize("path", sorted((PACKAGE / "numerics").glob("*.py")), ids=name_of)
def test_numerics_import_jax_alone(path):
    for name in imports(path):
        top = name.split(".")[0]
        assert top == "jax" or top in sys.stdlib_module_names or name.startswith("opd_jax.numerics"), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_vendors_are_imported_where_they_are_used(path):
    room = name_of(path).split(".")[0]
    for name in imports(path):
        allowed = VENDORS.get(name.split(".")[0])
        assert allowed is None or room in allowed, f"{room} imports {name}"


def test_matplotlib_is_imported_by_plots_alone():
    importers = {name_of(path) for path in modules() if any(n.split(".")[0] == "matplotlib" for n in imports(path))}
    assert importers <= {"analysis.plots", "analysis.plots_bench", "analysis.plots_study", "analysis.plots_toy"}


def test_import_is_light():
    """`import opd_jax` and its pure modules bring in none of the heavy vendors."""
    code = "import sys, opd_jax.train; print(' '.join(sorted(m for m in sys.modules if '.' not in m)))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "matplotlib", "tensorflow", "tensorflow_datasets", "transformers", "tensorboardX", "wandb"} & set(loaded)


def test_files_and_functions_stay_readable():
    for path in modules():
        text = path.read_text()
        assert text.count("\n") <= 450, f"{path}: {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno <= 60, f"{path}:{node.lineno} {node.name} is too long"


def test_the_readme_names_every_module():
    readme = (ROOT / "README.md").read_text()
    rooms = [path for path in modules() if path.name != "__init__.py" and "tasks" not in path.parts]
    assert [path.name for path in rooms if path.name not in readme] == []
    assert [path.name for path in (ROOT / "experiments").glob("[a-z]*.py") if path.stem not in readme] == []


def test_nothing_unfinished():
    pattern = re.compile(r"\bTODO\b|\bFIXME\b|\bXXX\b|raise " + "NotImplementedError")
    for path in [*modules(), *(ROOT / "experiments").glob("*.py"), *(ROOT / "configs").rglob("*.py")]:
        assert not pattern.search(path.read_text()), path
