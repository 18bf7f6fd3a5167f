"""The notebooks, as committed (without outputs), run from the root in their tiny mode and show what they promise."""

import ast
import base64
import math
import pathlib
import re

import nbclient
import nbformat
import pytest

from opd_jax import metrics

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))


def read(path):
    return nbformat.read(path, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_without_outputs_and_counts(path):
    notebook = read(path)
    nbformat.validate(notebook)
    for cell in code(notebook):
        assert cell.outputs == [] and cell.execution_count is None
    assert f"https://colab.research.google.com/github/opd-jax/opd_jax/blob/main/colab/{path.name}" in notebook.cells[0].source
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert {key for cell in notebook.cells for key in cell.metadata} == set()


def is_guard(node):
    """Whether a statement is `if here is None:`, that is, no checkout was found."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "here is None"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_point_to_files_of_this_checkout_and_nothing_is_installed_beside_it(path):
    notebook = read(path)
    links = re.findall(r"github\.com/opd-jax/opd_jax/blob/main/([\w./]+)", "\n".join(cell.source for cell in notebook.cells))
    assert len(links) > 3
    assert [link for link in links if not (ROOT / link).exists()] == []
    shell = [cell.source for cell in code(notebook) if re.search(r"^\s*[!%]", cell.source, re.MULTILINE)]
    for source in shell:  # shell commands stand under the test that no checkout was found
        tree = ast.parse(re.sub(r"^(\s*)[!%].*", r"\1pass", source, flags=re.MULTILINE))
        guarded = {line for node in tree.body if is_guard(node) for line in range(node.lineno, node.end_lineno + 1)}
        lines = [number for number, line in enumerate(source.splitlines(), start=1) if re.match(r"\s*[!%]", line)]
        assert set(lines) <= guarded


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the first notebook puts what it makes."""
    return tmp_path_factory.mktemp("notebook")


HOSTILE = """
from types import SimpleNamespace

hostile = SimpleNamespace(decode=lambda ids: "<script>alert(1)</script>&")
coloured(prompts, before, SimpleNamespace(params=student.params, config=student.config, tokenizer=hostile), "hostile")
"""


@pytest.fixture(scope="module")
def executed(folder):
    """The first notebook after its cells ran in tiny mode, from the root, and one more cell of a model that writes HTML.

    An exception in a cell is an error here.
    """
    notebook = read(ROOT / "colab" / "01_quickstart.ipynb")
    notebook.cells.append(nbformat.v4.new_code_cell(HOSTILE))
    return execute(notebook, folder)


def execute(notebook, folder):
    """Runs the cells in tiny mode from the root; an exception in a cell is an error here."""
    before = {path: path.stat().st_mtime_ns for path in ROOT.iterdir() if not path.name.startswith(".")}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"OPD_JAX_TINY": "1", "JAX_PLATFORMS": "cpu", "TMPDIR": str(folder)}.items():
            patch.setenv(name, value)
        nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    after = {path: path.stat().st_mtime_ns for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert after == before, "the notebook wrote into the checkout"
    return notebook


def outputs(notebook, kind):
    """What cells displayed of a MIME type, in order; a figure that was updated counts once."""
    return [output.data[kind] for cell in code(notebook) for output in cell.outputs if kind in output.get("data", {})]


def printed(notebook):
    return "".join(o.text for cell in code(notebook) for o in cell.outputs if o.output_type == "stream" and o.name == "stdout")


@pytest.mark.slow
def test_the_lesson_runs_without_errors_and_prints_its_numbers(executed):
    assert not [output for cell in code(executed) for output in cell.outputs if output.output_type == "error"]
    assert all(cell.execution_count for cell in code(executed))
    text = printed(executed)
    assert re.search(r"jax [\d.]+ on cpu:0|jax [\d.]+ on TFRT_CPU_0", text)
    assert re.search(r"teacher: [\d,]+ parameters\nstudent: [\d,]+ parameters", text)
    for name in ("token_full", "token", "to_go"):
        assert re.search(rf"^{name} +cosine +-?[\d.]+ ", text, re.MULTILINE)
    rows = re.findall(r"^(before|on-policy distillation|teacher writes) +([\d.]+ \[.*\])$", text, re.MULTILINE)
    assert [name for name, _ in rows] == ["before", "on-policy distillation", "before", "on-policy distillation", "teacher writes"]
    assert rows[0][1] == rows[2][1] != rows[1][1] == rows[3][1]  # the runs start from one student and move it


@pytest.mark.slow
def test_a_run_that_was_left_in_the_middle_was_saved_there_and_continued(executed, folder):
    """The cell breaks after half of the 4 updates, the third on its way, long before a checkpoint is due; the next goes on from there."""
    assert "records of updates 0 to 4, none missing: True" in printed(executed)
    (workdir,) = folder.glob("opd_jax_*/opd")
    assert [record["step"] for record in metrics.read(workdir / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    assert sorted(entry.name for entry in (workdir / "checkpoints").iterdir()) == ["3", "4"]


@pytest.mark.slow
def test_the_curves_and_the_coloured_samples_are_there(executed):
    pictures = [base64.b64decode(picture) for picture in outputs(executed, "image/png")]
    assert len(pictures) == 3 and all(picture.startswith(b"\x89PNG") and len(picture) > 5000 for picture in pictures)
    assert len(set(pictures)) == 3
    pages = [page for page in outputs(executed, "text/html") if 'class="log-ratio"' in page]
    assert len(pages) == 3
    for page, title in zip(pages, ("before training", "after training", "hostile"), strict=True):
        assert title in page
        found = re.findall(r'title="student ([\d.]+), teacher ([\d.]+), log-ratio ([+-][\d.]+)" style="background: rgba\((\d+)', page)
        assert len(found) >= 6
        for student, teacher, ratio, red in found:
            assert (red == "220") == (float(ratio) < 0) or float(ratio) == 0
            if min(float(student), float(teacher)) > 0.02:
                assert float(ratio) == pytest.approx(math.log(float(teacher) / float(student)), abs=0.06)
    assert "<script" not in pages[2] and pages[2].count("&lt;script&gt;alert(1)&lt;/script&gt;&amp;") >= 6


@pytest.mark.slow
def test_the_notebook_of_estimators_shows_claims_that_hold(tmp_path):
    """Exact tables: what is unbiased to rounding, traps, weights; then tables of samples, and figures."""
    notebook = execute(read(ROOT / "colab" / "02_estimators.ipynb"), tmp_path)
    assert not [output for cell in code(notebook) for output in cell.outputs if output.output_type == "error"]
    text = printed(notebook)
    exact = re.findall(r"^(\w+) +(sequence_reverse_kl|token_reverse_kl) +([\d.e+-]+) +([\d.e+-]+) +([\d.]+)$", text, re.MULTILINE)
    rows = {name: [float(number) for number in numbers] for name, _, *numbers in exact}
    assert set(rows) == {"sequence", "to_go", "rao_blackwell_to_go", "rao_blackwell_to_go_kl_baseline", "local_to_go", "discounted"} | {
        "token",
        "token_full",
    }
    assert all(bias < 1e-6 for name, (bias, _, _) in rows.items() if name != "discounted") and rows["discounted"][0] > 1e-3
    assert rows["token"][1] == pytest.approx(rows["token_full"][1]) and rows["token"][1] > 1e-3
    assert rows["sequence"][2] > rows["to_go"][2] > rows["rao_blackwell_to_go"][2] > rows["token_full"][2]
    assert rows["local_to_go"][2] > rows["rao_blackwell_to_go"][2]  # what the text below the table says of this student
    assert "UserWarning" not in "".join(o.text for cell in code(notebook) for o in cell.outputs if o.output_type == "stream")
    traps = dict(re.findall(r"^(k\d_\w+) +norm ([\d.]+),", text, re.MULTILINE))
    assert float(traps["k1_loss"]) == 0 < float(traps["k2_loss"])
    assert re.search(r"^k2_loss .* 0\.000 from token_reverse_kl", text, re.MULTILINE)
    assert re.search(r"^k3_loss .* 0\.000 from token_forward_kl", text, re.MULTILINE)
    assert re.search(r"^intervals of the variance that hold the exact value: [4-8] of 8$", text, re.MULTILINE)
    errors = re.findall(r"^(temperature|top-p) [\d.]+ +importance=(\w+) +error of the mean ([\d.]+) of", text, re.MULTILINE)
    assert len(errors) == 8
    assert {float(e) == 0 for law, kind, e in errors if law == "temperature" and kind in ("cumulative", "sequence")} == {True}
    assert {float(e) > 0.01 for law, kind, e in errors if law == "top-p" or kind in ("none", "token")} == {True}
    assert "token_kl_baseline" in text and "references: [" in text
    assert len(outputs(notebook, "image/png")) == 2


@pytest.mark.slow
def test_the_notebook_of_meshes_gives_the_numbers_of_one_device(tmp_path):
    """Eight virtual devices: how parameters lie, plans of larger pairs, a run beside that of one device, a model out and in."""
    notebook = execute(read(ROOT / "colab" / "03_mesh_and_models.ipynb"), tmp_path)
    assert not [output for cell in code(notebook) for output in cell.outputs if output.output_type == "error"]
    text = printed(notebook)
    assert "on 8 devices" in text and "'fsdp': 4" in text and "'tensor': 2" in text
    assert re.search(r"^gate +\(64, 192\) +\('embed', 'ffn'\) +-> P\w*\('fsdp', 'tensor'\)$", text, re.MULTILINE)
    assert float(re.search(r"the first device holds ([\d.]+)% of the bytes", text)[1]) < 15
    error, size = re.search(r"largest difference of a logit: (\S+) of (\S+)$", text, re.MULTILINE).groups()
    assert float(error) < 1e-5 < float(size)
    assert re.search(r"^teacher +always +7\.6 GiB  counted$", text, re.MULTILINE)  # 32.76 billion times 2 bytes, on 8 devices
    updates = re.findall(r"^update (\d): reverse KL ([\d.]+) on one device, ([\d.]+) on the mesh$", text, re.MULTILINE)
    assert [step for step, *_ in updates] == ["1", "2"]
    assert all(float(alone) == pytest.approx(float(together), rel=1e-3) for _, alone, together in updates)
    assert len(re.findall(r"^(one|mesh): memory planned (on the|per) device: ", text, re.MULTILINE)) == 2
    assert "the same logits, bit for bit: True" in text and "config.json model.safetensors" in text
    assert len(outputs(notebook, "image/png")) == 1
