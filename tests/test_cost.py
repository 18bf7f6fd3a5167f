"""Parameters and FLOPs by hand, and against what the compiler counts."""

import jax
import jax.numpy as jnp
import models
import pytest

from opd_jax import cost
from opd_jax.models import spec, transformer

D, F, V, E, LAYERS = 16, 24, 17, 8, 2  # models.tiny_config: 4 heads of 4, 2 of keys and values
ATTENTION = D * D + 2 * D * 8 + D * D + D  # q, k and v, o, norm


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_count_the_output_projection_and_not_the_lookup(tied):
    config = models.tiny_config(tie_word_embeddings=tied)
    expected = LAYERS * (ATTENTION + 3 * D * F + D) + D + D * V
    assert cost.active_parameters(config) == expected
    assert spec.count(transformer.param_specs(config)) == expected + (0 if tied else V * D)
    assert cost.parameters(config, None) == expected
    assert cost.parameters(object(), {"a": jnp.ones((2, 3)), "b": jnp.ones(4)}) == 10


def test_a_token_meets_some_experts_only():
    experts = {"num_experts": E, "num_experts_per_tok": 2, "moe_intermediate_size": F, "norm_topk_prob": True}
    config = models.tiny_config(model_type="qwen3_moe", head_dim=4, **experts)
    layer = ATTENTION + 2 * 4 + D + D * E + 2 * 3 * D * F  # norms of q and k; router; 2 experts of 8
    assert cost.active_parameters(config) == LAYERS * layer + D + D * V


def test_an_update_may_learn_from_other_tokens_than_were_written():
    """rollout.aggregate: sampled and scored is what was written, 6 N are spent on what was drawn from all so far."""
    work = cost.account("dagger", 7, 7, 11, scorers=(11,)).work(prompt=10, teacher_prompt=30, completion=50, learnt=90)
    assert work == (2 * 7 * 60 + 2 * 11 * 80 + 2 * 11 * 80 + 6 * 7 * 90, 50, 50)
    assert cost.account("cache", 7, 7, 11).work(prompt=10, teacher_prompt=30, completion=50) == (6 * 7 * 60, 0, 0)


def test_forward_and_training_are_what_the_compiler_counts():
    """At lengths where attention scores are little: 2 N and 6 N per token, within the few percent that norms and scores take."""
    config = models.tiny_config(hidden_size=256, intermediate_size=512, vocab_size=512, num_hidden_layers=1)
    params, tokens_BL = spec.abstract(transformer.param_specs(config), jnp.float32), jax.ShapeDtypeStruct((4, 16), jnp.int32)
    forward = lambda params, tokens_BL: transformer.apply(params, config, tokens_BL).sum()
    counted = [jax.jit(f).lower(params, tokens_BL).cost_analysis()["flops"] for f in (forward, jax.value_and_grad(forward))]
    N = cost.active_parameters(config)
    teacher = cost.account("dataset", 0, 0, N, scorers=(N,)).work(prompt=0, teacher_prompt=24, completion=40)
    student = cost.account("dataset", N, N, None).work(prompt=24, teacher_prompt=0, completion=40)
    assert teacher.flops == 2 * N * 64 and student.flops == 6 * N * 64
    assert 1 <= counted[0] / teacher.flops < 1.05 and 1 <= counted[1] / student.flops < 1.05


def test_the_work_of_an_update_by_hand():
    tokens = {"prompt": 10, "teacher_prompt": 30, "completion": 50}
    student = cost.account("student", 7, 7, 11, scorers=(11,)).work(**tokens)
    assert student == (2 * 7 * 60 + 2 * 11 * 80 + 6 * 7 * 60, 50, 50)
    teacher = cost.account("teacher", 7, 7, 11, scorers=(11,)).work(**tokens)
    assert teacher == (2 * 11 * 80 + 2 * 11 * 80 + 6 * 7 * 60, 50, 50)
    assert cost.account("dataset", 7, 7, 11).work(**tokens) == (6 * 7 * 60, 0, 0)
    adapter = cost.account("student", 7 + 2, 2, None).work(**tokens)  # the base has no gradients of weights
    assert adapter.flops == 2 * 9 * 60 + (4 * 7 + 6 * 2) * 60
    assert cost.Account(7, 7, (11, 13), (17,), 7).work(**tokens) == (2 * 7 * 60 + 2 * 24 * 80 + 2 * 17 * 60 + 6 * 7 * 60, 50, 150)


def test_totals_go_on_from_what_is_remembered_or_from_the_completions():
    account = cost.account("student", 7, 7, 11, scorers=(11,))
    info = {"tokens_total": 50, "seconds": 1.0, "flops": 3, "generated_tokens": 4, "scored_tokens": 5}
    assert cost.totals(info, account) == (3, 4, 5)
    assert cost.totals({"tokens_total": 50, "seconds": 1.0}, account) == (2 * 7 * 50 + 2 * 11 * 50 + 6 * 7 * 50, 50, 50)
    assert cost.totals({"tokens_total": 0}, account) == (0, 0, 0)
