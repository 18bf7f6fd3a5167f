"""A gradient study in the report of its run."""

import json

import jax
import pytest
import run_directories

from opd_jax.analysis import enumeration, gradient_study, plots_study, report
from opd_jax.types import UserError


@pytest.fixture(scope="module")
def rows():
    with jax.enable_x64(True):
        return gradient_study.enumerated(enumeration.make("two tokens", length=2), ["token", "to_go"], exact=True)


def page_of(folder):
    report.write([folder / "run"], folder / "report.html")
    return (folder / "report.html").read_text()


def test_the_report_of_a_run_shows_its_study(rows, tmp_path):
    """Hostile names are text; a damaged file is named."""
    run_directories.make(tmp_path / "run")
    plain = page_of(tmp_path)
    path = tmp_path / "run" / "gradient_study" / "gradient_study.json"
    path.parent.mkdir()
    path.write_text(json.dumps(rows))
    page = page_of(tmp_path)
    assert "<h2>Gradient study</h2>" in page and "<h2>Gradient study</h2>" not in plain
    assert page.count("<svg") - plain.count("<svg") == len(plots_study.figures(rows)) > 0
    for row in rows:
        assert f'<th scope="row">{row["name"]}</th>' in page
    path.write_text(json.dumps(rows).replace("to_go", "<b>to_go"))
    assert "<b>to_go" not in page_of(tmp_path)
    for text in ("{", "[]", '[{"name": "x"}]', "[1]"):
        path.write_text(text)
        with pytest.raises(UserError, match="gradient_study.json: is damaged"):
            page_of(tmp_path)
