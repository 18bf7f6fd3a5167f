"""Chat templates, separate for student and teacher; the check that both mean the same by every id; what a run does with them."""

import json
import os

import jax
import models
import numpy as np
import pytest
import transformers

from opd_jax import config as config_lib
from opd_jax import metrics, model_io, pair, score, train
from opd_jax.data import contexts, pipeline, tasks
from opd_jax.data import tokenizer as lib
from opd_jax.model_io import LoadedModel
from opd_jax.models import hf
from opd_jax.types import Prompts, Rollout, UserError

QUESTION = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[answer] {% endif %}"
THINKING = QUESTION + "{% if enable_thinking is defined and not enable_thinking %}<no>{% else %}<yes>{% endif %}"
SAME = "{% for m in messages %}{{ m.content }}{% endfor %}"


def reader(template="none", *, tokenizer=None, field="context.student", **settings):
    return contexts.make_reader(config_lib.Reader(template=template, **settings), tokenizer or lib.byte(), field)


@pytest.fixture
def file(tmp_path):
    def write(text, name="t.jinja"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def text_of(ids):
    return bytes(ids).decode()


def test_the_plain_prompt_is_the_tokenizers(tmp_path):
    assert reader().encode_prompt("ab") == lib.byte().encode_prompt("ab")


def test_a_template_gets_system_message_prompt_and_the_beginning_of_the_answer(file):
    one = reader(file(QUESTION), system="Be brief.")
    assert text_of(one.encode_prompt("1+1?")) == "[system] Be brief.\n[user] 1+1?\n[answer] "
    assert text_of(reader(file(QUESTION)).encode_prompt("1+1?")) == "[user] 1+1?\n[answer] "


@pytest.mark.parametrize("thinking, ending", [("", "<yes>"), ("on", "<yes>"), ("off", "<no>")])
def test_the_thinking_switch_reaches_the_template(thinking, ending, file):
    assert text_of(reader(file(THINKING), thinking=thinking).encode_prompt("a")).endswith(ending)


@pytest.mark.parametrize(
    "template, settings, message",
    [
        (None, {"thinking": "on"}, r"context.student.thinking = 'on': .* has no switch enable_thinking"),
        ("{{ messages[-1].content }}", {"system": "Hello"}, r"context.student.system = 'Hello': the chat template leaves it out"),
        ("hello", {}, r"context.student.template = .*: the prompt is not in what it renders"),
        ("{% if %}", {}, r"context.student.template = .*: the chat template cannot be rendered \(.*\); correct it"),
        ("{{ raise_exception('no') }}", {"system": "a"}, r"cannot be rendered \(no\)"),
    ],
)
def test_templates_that_ignore_or_fail_are_refused(template, settings, message, file):
    with pytest.raises(UserError, match=message):
        reader(file(template or QUESTION), **settings)


def test_a_template_cannot_reach_python(file):
    """transformers renders in Jinja's sandbox: attributes of Python objects are out of reach."""
    with pytest.raises(UserError, match="cannot be rendered .*unsafe"):
        reader(file("{{ messages.__class__.__base__.__subclasses__() }}"), system="a")


def test_templates_that_are_missing_are_named(tmp_path):
    with pytest.raises(UserError, match="context.student.template = 'chat': the model's tokenizer has no chat template"):
        reader("chat")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "latin").write_bytes(b"\xe9")
    for path, why in (("none", "No such file"), (".", "Is a directory"), ("pipe", "a pipe or a device"), ("latin", "not UTF-8")):
        with pytest.raises(
            UserError, match=f"context.student.template = .*: cannot be read .*{why}.*; give 'none', 'chat' or a UTF-8 file"
        ):
            reader(str(tmp_path / path))


def test_a_template_has_no_clock(file):
    assert reader(file("{{ strftime_now('%d %b %Y') }} {{ messages[-1].content }}")).render("a") == "26 Jul 2024 a"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"student.system": "a"}, "context.student.system = 'a' needs a chat template, but context.student.template = 'none'"),
        ({"teacher.thinking": "on"}, "context.teacher.thinking = 'on' needs a chat template, but context.teacher.template = 'student'"),
        ({"student.template": "chat", "student.thinking": "yes"}, "context.student.thinking = 'yes' is not known"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(changes, message):
    c = config_lib.default()
    c.context.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        config_lib.parse(c)


def test_truncation_would_cut_a_templates_head(tmp_path):
    c = config_lib.default()
    c.context.student.template, c.rollout.overlong = "chat", "truncate"
    with pytest.raises(UserError, match="rollout.overlong = 'truncate' must be 'refuse', because truncation would cut off the head"):
        config_lib.parse(c)


# ---- student and teacher


def words(folder, vocabulary, **settings):
    from test_tokenizer import words as make

    return lib.load(str(make(folder, vocabulary, **settings)))


BASE = ("<s>", "</s>", "<pad>", "a", "b", "c")


def test_an_id_that_is_another_token_to_the_teacher_is_refused(tmp_path):
    """Same width, same ids for the probes: only the last token has another name."""
    student, teacher = words(tmp_path / "s", (*BASE, "<box>")), words(tmp_path / "t", (*BASE, "<think>"))
    with pytest.raises(UserError, match=r"the student's token '<box>' \(id 6\) is '<think>' to the teacher's tokenizer"):
        lib.check_compatible(student, teacher)
    with pytest.raises(UserError, match=r"the student's token '<box>' \(id 6\) is unknown to the teacher's tokenizer"):
        lib.check_compatible(student, words(tmp_path / "short", BASE))


def special(folder, *, normalized):
    """The byte tokenizer with one more token, which one folder strips blanks around and the other does not."""
    lib.byte().save(folder)
    path = folder / "tokenizer.json"
    fields = json.loads(path.read_text())
    fields["added_tokens"].append(
        {"id": 259, "content": "<tool>", "single_word": False, "lstrip": normalized, "rstrip": False, "normalized": False, "special": True}
    )
    path.write_text(json.dumps(fields))
    return lib.load(str(folder))


def test_special_tokens_are_probed_within_text(tmp_path):
    """Same vocabulary, but one tokenizer swallows the blank before the token: only a text with a blank there tells."""
    student, teacher = special(tmp_path / "s", normalized=False), special(tmp_path / "t", normalized=True)
    assert student.vocabulary() == teacher.vocabulary() and student.encode("a<tool>") == teacher.encode("a<tool>")
    assert student.encode("a <tool>") != teacher.encode("a <tool>")
    with pytest.raises(UserError, match="its tokenizer splits .* differently"):
        lib.check_compatible(student, teacher)


def test_rendered_templates_are_compared_too(tmp_path, file):
    student, teacher = lib.byte(), special(tmp_path / "t", normalized=False)
    readers = contexts.make_readers(config_lib.Context(), student, teacher)  # the teacher knows one more token, which prompts do not use
    assert readers[1] is None
    spelled = config_lib.Context(student=config_lib.Reader(template=file("<to" + "ol>{{ messages[-1].content }}")))
    with pytest.raises(UserError, match="its tokenizer splits '<tool>.*differently from token 0"):
        contexts.make_readers(spelled, student, teacher)


def stops(*ids):
    return lib.byte().stopping_at(ids)


def test_stop_ids_must_be_the_same_or_shared(tmp_path):
    lib.check_compatible(stops(257, 5), stops(5, 257))
    for student, teacher in (((257,), (5, 257)), ((257, 5), (257,)), ((), (257,))):
        with pytest.raises(UserError, match=r"its stop ids \[.*\] are not the student's \[.*\].*set rollout.stop=union"):
            lib.check_compatible(stops(*student), stops(*teacher))


# ---- in a run


def model_folder(path, seed, eos=(257,), **changes):
    params, config = models.tiny_model(seed, **({"vocab_size": 259, "max_position_embeddings": 96} | changes))
    hf.save(path, params, config, stops(*eos))
    return str(path)


def run_config(tmp_path, **changes):
    c = config_lib.default()
    c.student.path, c.teacher.path = model_folder(tmp_path / "s", 0), model_folder(tmp_path / "t", 1)
    c.task.level, c.rollout.batch_size, c.rollout.max_new_tokens, c.steps = 3, 8, 6, 1
    c.eval.prompts, c.eval.batch_size, c.eval.samples, c.log.samples_every = 4, 8, 2, 0
    c.update_from_flattened_dict(changes)
    return c


def records_of(config, workdir):
    list(train.run(config, workdir))
    timed = ("time/", "per_second", "memory")
    return [{k: v for k, v in r.items() if not any(word in k for word in timed)} for r in metrics.read(workdir / "metrics.jsonl")]


@pytest.mark.slow
def test_templates_that_leave_the_prompt_as_it_is_change_nothing(tmp_path, file):
    plain = records_of(run_config(tmp_path), tmp_path / "plain")
    same = {"context.student.template": file(SAME), "context.teacher.template": file(SAME)}
    assert records_of(run_config(tmp_path, **same), tmp_path / "same") == plain
    other = records_of(run_config(tmp_path, **same | {"context.teacher.template": file(QUESTION, "q")}), tmp_path / "other")
    assert other[1]["rollout/length"] == plain[1]["rollout/length"] and other[1]["train/reverse_kl"] != plain[1]["train/reverse_kl"]
    assert other[0]["eval/accuracy"] == plain[0]["eval/accuracy"] and other[0]["eval/reverse_kl"] != plain[0]["eval/reverse_kl"]


@pytest.mark.slow
@pytest.mark.parametrize("source", ["student", "teacher"])
def test_the_teacher_scores_and_samples_after_its_own_prompt(source, tmp_path, file):
    """The log-ratio of the record, computed again from public functions on two separately encoded prompts."""
    template = file(QUESTION)
    c = run_config(tmp_path, **{"context.teacher.template": template, "rollout.source": source, "log.samples_every": 1, "log.samples": 8})
    record = records_of(c, tmp_path / "run")[1]
    student, teacher = model_io.open_model(c.student.path), model_io.open_model(c.teacher.path)
    lines = metrics.read(tmp_path / "run" / "samples.jsonl")
    texts = [line["prompt"] for line in lines]
    own, _ = pipeline.encode_prompts(texts, lib.byte(), ids=range(8), max_prompt_length=64, overlong="refuse")
    theirs, _ = pipeline.encode_prompts(texts, reader(template), ids=range(8), max_prompt_length=64, overlong="refuse")
    rollout = rollout_of([line["token_ids"] for line in lines], 6)
    ratio = total(score.logprobs(teacher.params, teacher.config, theirs, rollout)) - total(
        score.logprobs(student.params, student.config, own, rollout)
    )
    if source == "student":
        np.testing.assert_allclose(record["train/log_ratio_mean"], ratio / total(rollout.mask_BT), rtol=2e-4)
    else:  # what the teacher samples after its own prompt is likelier under that prompt than under the student's
        plain = total(score.logprobs(teacher.params, teacher.config, own, rollout))
        assert total(score.logprobs(teacher.params, teacher.config, theirs, rollout)) > plain + 5


def rollout_of(rows, length):
    mask_BT = np.arange(length)[None, :] < np.array([len(row) for row in rows])[:, None]
    tokens_BT = np.zeros(mask_BT.shape, np.int32)
    tokens_BT[mask_BT] = np.concatenate(rows)
    zeros_BT = np.zeros(mask_BT.shape, np.float32)
    return Rollout(tokens_BT, mask_BT, zeros_BT, zeros_BT, np.arange(len(rows), dtype=np.uint32), np.ones(len(rows), bool))


def total(x) -> float:
    return float(np.asarray(x, np.float64).sum())


@pytest.mark.slow
def test_a_prompt_beyond_the_teachers_context_is_refused_before_anything_is_written(tmp_path, file):
    c = run_config(tmp_path, **{"context.teacher.template": file("x" * 100 + SAME)})
    with pytest.raises(UserError, match="a prompt has 104 tokens, at most 90 fit"):
        list(train.run(c, tmp_path / "run"))
    assert not (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_template_that_changed_is_refused_on_resume(tmp_path, file):
    c = run_config(tmp_path, **{"context.student.template": file(QUESTION), "eval.prompts": 0})
    list(train.run(c, tmp_path / "run"))
    c.steps, before = 2, (tmp_path / "run" / "metrics.jsonl").read_bytes()
    file(SAME)
    with pytest.raises(UserError, match="context.student.template = .* is not what this run began with; restore it"):
        list(train.run(c, tmp_path / "run"))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_union_stops_where_either_model_would(tmp_path):
    c = run_config(tmp_path)
    c.teacher.path = model_folder(tmp_path / "other", 1, eos=tuple(range(97, 200)))
    with pytest.raises(UserError, match="set rollout.stop=union"):
        list(train.run(c, tmp_path / "same"))
    c.rollout.stop = "union"
    assert (
        records_of(c, tmp_path / "union")[1]["rollout/truncated_fraction"]
        < records_of(run_config(tmp_path), tmp_path / "one")[1]["rollout/truncated_fraction"]
    )
    assert set(model_io.open_model(str(tmp_path / "union")).tokenizer.eos_ids) == {257, *range(97, 200)}


def test_stop_ids_that_the_student_does_not_know_are_left_out(tmp_path):
    """They are masked and never drawn; written down, they would make the run's own tokenizer unreadable."""
    student = LoadedModel({}, models.tiny_config(), lib.byte())
    teacher = LoadedModel({}, models.tiny_config(), special(tmp_path / "t", normalized=False).stopping_at([257, 259]))
    assert [model.tokenizer.eos_ids for model in pair._share_stops(student, teacher)] == [(257,), (257,)]


def test_prompts_of_both_have_the_same_rows_and_ids(file):
    student, teacher = pipeline.Encoder(reader(), 32, "refuse"), pipeline.Encoder(reader(file(QUESTION)), 64, "refuse")
    examples = [tasks.Example(i, "ab" * (1 + i)) for i in range(5)]
    batch = pipeline.Pipeline(examples, student, teacher, prompts_per_step=4, group_size=2, seed=0).batch(0)
    assert batch.prompts.id_B.tolist() == batch.teacher_prompts.id_B.tolist()
    for row, example in enumerate(e for e in batch.examples for _ in range(2)):
        assert text_of(real(batch.prompts, row)) == example.prompt
        assert text_of(real(batch.teacher_prompts, row)) == f"[user] {example.prompt}\n[answer] "
    alone = pipeline.Pipeline(examples, student, prompts_per_step=4, group_size=2, seed=0).batch(0)
    assert alone.teacher_prompts is alone.prompts


def real(prompts: Prompts, row: int) -> list[int]:
    return np.asarray(prompts.tokens_BS[row])[np.asarray(prompts.mask_BS[row])].tolist()


# ---- real tokenizers


@pytest.fixture(scope="module")
def deepseek(shared_data):
    return lib.load(str(shared_data / "tokenizers" / "deepseek_r1"))


@pytest.fixture(scope="module")
def gpt2(shared_data):
    return lib.load(str(shared_data / "tokenizers" / "gpt2"))


@pytest.mark.shared
def test_deepseek_reads_its_chat_as_transformers_does(deepseek, shared_data):
    """One beginning-of-sequence token: the template spells it, and the tokenizer's own habit does not add a second."""
    fast = transformers.AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "deepseek_r1")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "12 + 345 = ?"}]
    expected = fast.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)["input_ids"]
    ids = reader("chat", tokenizer=deepseek, system="Be brief.").encode_prompt("12 + 345 = ?")
    assert ids == expected and ids.count(deepseek.bos_id) == 1
    assert deepseek.adds_bos and deepseek.encode_prompt("a")[0] == deepseek.bos_id


@pytest.mark.shared
def test_a_published_template_with_a_thinking_switch(deepseek, shared_data, file):
    template = json.loads((shared_data / "tokenizers" / "qwen3_template" / "tokenizer_config.json").read_text())["chat_template"]
    off, on = (reader(file(template), tokenizer=deepseek, thinking=name).render("2+2?") for name in ("off", "on"))
    assert on == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert off == on + "<think>\n\n</think>\n\n"


@pytest.mark.shared
def test_two_bare_files_are_gpt2(gpt2, shared_data):
    theirs = transformers.GPT2TokenizerFast.from_pretrained(shared_data / "tokenizers" / "gpt2")
    for text in lib.PROBES:
        assert gpt2.encode(text) == theirs.encode(text) and gpt2.decode(gpt2.encode(text)) == text.replace("<|endoftext|>", "")
    assert (gpt2.vocab_size, gpt2.eos_ids) == (50257, (50256,))


@pytest.mark.shared
def test_real_tokenizers_fit_themselves_and_not_each_other(gpt2, deepseek, tmp_path):
    lib.check_compatible(gpt2, gpt2)
    lib.check_compatible(deepseek, deepseek)
    with pytest.raises(UserError, match=r"teacher.path: .*choose a teacher of the student's family"):
        lib.check_compatible(gpt2, deepseek)
    deepseek.save(tmp_path)
    again = lib.load(str(tmp_path))
    assert again.chat_template == deepseek.chat_template
    lib.check_compatible(deepseek, again)


@pytest.mark.shared
def test_padding_rows_of_a_real_vocabulary_are_never_drawn(deepseek):
    """DeepSeek's models have 129,280 rows for 128,815 ids: the rest has no mass, however large its logits."""
    from opd_jax import teachers
    from opd_jax.models import transformer

    params, config = models.tiny_model(vocab_size=129280, num_hidden_layers=1)
    params["embed"] = params["embed"].at[deepseek.vocab_size :].mul(100.0)
    masked = teachers.mask_padding(LoadedModel(params, config, deepseek), deepseek, field="teacher.path").config
    tokens_BS = jax.numpy.asarray([deepseek.encode_prompt("12 + 345")], jax.numpy.int32)
    logits_BV, _ = transformer.prefill(params, masked, tokens_BS, tokens_BS >= 0, cache_length=tokens_BS.shape[1])
    assert np.asarray(logits_BV).argmax() < 128815 and np.isneginf(np.asarray(logits_BV)[0, 128815:]).all()
