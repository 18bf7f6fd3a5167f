"""A path becomes a model; a teacher's tokenizer is checked, its padding masked, its content recognised."""

import dataclasses

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest

from opd_jax import config as config_lib
from opd_jax import model_io, pair, parallel, teachers, train
from opd_jax.data import tokenizer
from opd_jax.model_io import LoadedModel
from opd_jax.models import hf, spec, transformer
from opd_jax.types import UserError

pytestmark = pytest.mark.slow


def folder(path, seed=0, **changes):
    params, config = models.tiny_model(seed, **({"vocab_size": 259} | changes))
    hf.save(path, params, config, tokenizer.byte())
    return params, config


def test_a_hugging_face_folder_opens_with_its_tokenizer(tmp_path):
    params, config = folder(tmp_path / "m")
    model = model_io.open_model(str(tmp_path / "m"))
    assert model.tokenizer.fingerprint() == tokenizer.byte().fingerprint()
    assert model.config.num_layers == config.num_layers
    for a, b in zip(jax.tree.leaves(model.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_run_directory_opens_as_its_newest_student_on_any_mesh(tmp_path):
    c = config_lib.default()
    c.task.level, c.rollout.source, c.rollout.batch_size, c.rollout.max_new_tokens = 3, "dataset", 8, 4
    c.signal.divergence, c.steps, c.eval.prompts = "nll", 2, 0
    c.student.init.hidden_size, c.student.init.intermediate_size, c.student.init.num_hidden_layers = 16, 16, 1
    list(train.run(c, tmp_path / "run"))
    one = model_io.open_model(str(tmp_path / "run"))
    eight = model_io.open_model(str(tmp_path / "run"), mesh=parallel.make_mesh(1, 4, 2), dtype=jnp.float32)
    assert spec.content_hash(one.params) == spec.content_hash(eight.params)
    assert len(eight.params["embed"].sharding.device_set) == 8


@pytest.mark.parametrize("make", ["missing", "empty", "file", "run without model"])
def test_paths_that_hold_no_model_are_named(make, tmp_path):
    path = tmp_path / "m"
    if make == "file":
        path.write_text("x")
    elif make != "missing":
        path.mkdir()
    if make == "run without model":
        (path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=str(path)):
        model_io.open_model(str(path))


def test_a_broken_description_of_a_run_is_named(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{")
    with pytest.raises(UserError, match="model/config.json: cannot be read"):
        model_io.open_model(str(tmp_path))


def test_a_teacher_with_another_tokenizer_is_refused(tmp_path):
    folder(tmp_path / "s")
    params, config = models.tiny_model(vocab_size=259)
    hf.save(tmp_path / "t", params, config, tokenizer.byte().stopping_at([5]))
    c = config_lib.default()
    c.student.path, c.teacher.path = str(tmp_path / "s"), str(tmp_path / "s")
    c.rollout.max_new_tokens = 4
    assert pair.open_pair(config_lib.parse(c), None, parallel.make_mesh()).teacher.config.vocab_size == 259
    c.teacher.path = str(tmp_path / "t")
    with pytest.raises(UserError, match="stop ids"):
        pair.open_pair(config_lib.parse(c), None, parallel.make_mesh())


def test_padding_rows_are_masked_and_missing_rows_refused():
    """Qwen2.5 has 151,936 or 152,064 rows for the same 151,665 ids: here 272 for 259."""
    params, config = models.tiny_model(vocab_size=272)
    model = LoadedModel(params, config, tokenizer.byte())
    masked = teachers.mask_padding(model, tokenizer.byte(), field="student.path")
    assert masked.config.valid_vocab_size == 259
    logits, _ = transformer.prefill(params, masked.config, jnp.array([[1, 2]]), jnp.ones((1, 2), bool), cache_length=2)
    assert np.isneginf(logits[0, 259:]).all() and np.isfinite(logits[0, :259]).all()
    small = LoadedModel({}, models.tiny_config(100), tokenizer.byte())
    with pytest.raises(UserError, match="student.path: the model has 100 vocabulary rows, its tokenizer 259 ids"):
        teachers.mask_padding(small, tokenizer.byte(), field="student.path")


def test_the_content_hash_sees_a_bit_and_no_sharding():
    params, config = models.tiny_model()
    digest = spec.content_hash(params)
    spread = jax.device_put(params, spec.shardings(transformer.param_specs(config), parallel.make_mesh(2, 2, 2)))
    assert spec.content_hash(spread) == digest
    changed = params | {"final_norm": params["final_norm"].at[3].add(1e-7 * 2)}
    assert spec.content_hash(changed) != digest
    assert spec.content_hash(params | {"other": params["final_norm"]}) != digest
    assert spec.content_hash(jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)) != digest


def test_padded_teacher_and_student_of_different_sizes_distil(tmp_path):
    """Student 259 rows, teacher 272: no padding id is ever sampled, and the loss is finite."""
    folder(tmp_path / "student")
    folder(tmp_path / "teacher", seed=1, vocab_size=272)
    c = config_lib.default()
    c.student.path, c.teacher.path = str(tmp_path / "student"), str(tmp_path / "teacher")
    c.task.level, c.rollout.batch_size, c.rollout.max_new_tokens, c.steps = 3, 8, 8, 1
    c.eval.prompts, c.eval.samples, c.eval.batch_size = 4, 1, 4
    records = list(train.run(c, tmp_path / "run"))
    assert 0 < records[-1]["train/reverse_kl"] < 20
    padded = dataclasses.replace(models.tiny_config(272), valid_vocab_size=259)
    assert padded.valid_vocab_size < padded.vocab_size
