"""environment.json: what a run ran on, session by session; a note on which nothing depends."""

import getpass
import json
import os
import pathlib
import platform

import jax
import pytest

from opd_jax import machine, parallel


@pytest.fixture
def mesh():
    return parallel.make_mesh(2, 2, 2)


def test_facts_are_versions_devices_and_host_without_names_of_users(mesh):
    facts = machine.facts(mesh)
    assert facts["libraries"]["jax"] == jax.__version__
    assert (facts["platform"], facts["devices"], facts["processes"]) == ("cpu", 8, 1)
    assert facts["python"] == platform.python_version() and facts["cpu_count"] >= 1 and facts["cpu"]
    text = json.dumps(facts)
    for private in (platform.node(), str(pathlib.Path.home()), os.getcwd(), str(pathlib.Path(machine.__file__).parent)):
        assert len(private) < 3 or private not in text
    assert len(getpass.getuser()) < 5 or getpass.getuser() not in text


def test_sessions_are_appended_and_those_whose_work_was_cut_back_are_dropped(tmp_path, mesh):
    for step in (0, 0, 4, 9, 6):
        machine.begin_session(tmp_path, step, mesh)
    assert [session["from_step"] for session in machine.read(tmp_path)] == [0, 4, 6]
    machine.end_session(tmp_path, 8, mesh)
    first, _, last = machine.read(tmp_path)
    assert last["to_step"] == 8 and "to_step" not in first
    assert 10 * 2**20 < last["peak_host_bytes"] < 2**41  # in bytes, whatever unit the system has
    assert [path.name for path in tmp_path.iterdir()] == ["environment.json"]


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"sessions": 3}', '{"sessions": [{"devices": 1}]}', '{"sessions": ["x"]}'])
def test_a_missing_or_damaged_file_is_no_hindrance(text, tmp_path, mesh):
    if text is not None:
        (tmp_path / "environment.json").write_text(text)
    assert machine.read(tmp_path) == []
    machine.end_session(tmp_path, 3, mesh)
    machine.begin_session(tmp_path, 3, mesh)
    assert [session["from_step"] for session in machine.read(tmp_path)] == [3]


def test_a_file_that_cannot_be_written_is_a_warning(tmp_path, mesh, caplog):
    (tmp_path / "environment.tmp").mkdir()
    machine.begin_session(tmp_path, 0, mesh)
    assert "environment.json: cannot be written" in caplog.text
