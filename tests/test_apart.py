"""A teacher on devices of its own: the numbers of a run are those of one mesh, and each model lies where it should."""

import jax
import pytest

from opd_jax import apart, config, metrics, parallel, train
from opd_jax.job import setup
from opd_jax.types import UserError

CLOCK = ("time/", "per_second", "memory")


def run_config(cache, **mesh):
    c = config.load_config("configs/quickstart.py:tiny")
    c.cache_dir, c.eval.every, c.log.samples_every = str(cache), 2, 1
    c.learner.microbatches, c.log.diagnostics = 2, True
    c.mesh.update(mesh)
    return c


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"fsdp": 2, "tensor": 2, "teacher": 4}, {"teacher": 3}])
def test_a_run_has_the_numbers_of_one_mesh(cache, tmp_path, mesh):
    shared = list(train.run(run_config(cache), tmp_path / "shared"))
    alone = list(train.run(run_config(cache, **mesh), tmp_path / "apart"))
    for a, b in zip(alone, shared, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if not any(word in name for word in CLOCK):
                assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), (a["step"], name)
    a, b = (metrics.read(tmp_path / name / "samples.jsonl") for name in ("apart", "shared"))
    assert [one["token_ids"] for one in a] == [one["token_ids"] for one in b]
    assert [one["teacher_logp"] for one in a] == [pytest.approx(one["teacher_logp"], abs=1e-3) for one in b]


@pytest.mark.slow
def test_each_model_lies_on_its_own_devices(cache, tmp_path):
    job = setup(
        config.parse(run_config(cache, fsdp=2, tensor=2, teacher=4)),
        tmp_path / "run",
        make_model=train.make_model,
        make_store=train.make_store,
        progress=metrics.Progress(quiet=True),
    )
    devices = jax.devices()
    assert all(leaf.sharding.device_set == set(devices[:4]) for leaf in jax.tree.leaves((job.state.params, job.frozen)))
    assert all(leaf.sharding.device_set == set(devices[4:]) for leaf in jax.tree.leaves(job.teacher.params))
    assert set(job.frozen["teacher"]) == {"unembed_DV", "valid_V"}  # the layers are nowhere else
    assert {shard.data.size * 4 for shard in job.teacher.params["layers"]["0"]["mlp"]["up"].addressable_shards} == {
        job.teacher.params["layers"]["0"]["mlp"]["up"].size
    }


REFUSED = {
    "no teacher": ({"teacher.recipe": ""}, "a teacher of its own \\(teacher.path\\)"),
    "the student itself": ({"teacher.recipe": "", "teacher.path": "student_init"}, "a teacher of its own \\(teacher.path\\)"),
    "teacher writes": ({"rollout.source": "teacher"}, "rollout.source = 'student', 'dataset' or 'mix'"),
    "reads more": ({"context.privileged.reads": "solution"}, "context.privileged.reads = ''"),
    "ranks": ({"preference.weight": 1.0, "preference.judge": "teacher", "rollout.group_size": 2}, "preference.judge = 'reward'"),
    "turns": ({"rollout.max_turns": 2}, "rollout.max_turns = 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_teacher_cannot_do_from_elsewhere_is_refused(case, cache):
    changes, words = REFUSED[case]
    c = run_config(cache, teacher=4)
    c.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=f"mesh.teacher = 4 needs {words}; use that, or mesh.teacher = 0"):
        apart.check(config.parse(c))


def test_a_teacher_leaves_devices_to_the_student():
    with pytest.raises(UserError, match="mesh.teacher = 8 leaves no device to the student: there are 8"):
        parallel.from_settings(config.Mesh(teacher=8))
    with pytest.raises(UserError, match="but there are 5 devices"):
        parallel.from_settings(config.Mesh(data=8, teacher=3))
