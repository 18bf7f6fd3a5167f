"""What a report relies on in the files of a run. Each function gives what is wrong in words, or nothing."""

from typing import Any

from opd_jax import config as config_lib
from opd_jax.files import shown

LARGEST = 1e100  # squares and sums of so large numbers are finite
MAX_STEP = 2**53  # a float holds it exactly
PER_TOKEN = ("token_ids", "tokens", "student_logp", "student_entropy", "teacher_logp", "teacher_entropy", "teacher_top")
POSITIONS = ("special", "given")  # lists of positions of tokens
KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def config_problem(fields: dict[str, Any], flat: dict[str, Any]) -> str:
    """Of a config as it is in the file and flat: values of other types than the fields have; fields of other versions are let be."""
    for name, default in config_lib.flatten(config_lib.Config()).items():
        kind = type(default)
        if name in flat and not (is_number(flat[name]) if kind is float else type(flat[name]) is kind):
            return f"{name} = {shown(flat[name])} must be {KINDS[kind]}"
        *blocks, last = name.split(".")
        block: Any = fields
        for depth, one in enumerate(blocks, start=1):
            block = block.get(one, {})
            if not isinstance(block, dict):
                return f"{'.'.join(blocks[:depth])} = {shown(block)} must be a block of fields"
        if isinstance(block.get(last), dict):
            return f"{name} must be {KINDS[kind]}, not a block"
    for name, value in flat.items():
        if any(isinstance(one, list | dict) for one in (value if isinstance(value, list) else ())):
            return f"{name} = {shown(value)} must be a text, a number, true, false, null or a list of these"
    return ""


def record_problem(record: dict[str, Any]) -> str:
    """Of a line of metrics.jsonl: numbers alone, and of an interval both ends."""
    for name, value in record.items():
        if problem := _step_problem(value) if name == "step" else _number_problem(name, value):
            return problem
        for end, other in (("_low", "_high"), ("_high", "_low")):
            pair = name.removesuffix(end) + other
            if name.endswith(end) and pair not in record:
                return f"{pair} is missing, it must be a number"
    return ""


def sample_problem(sample: dict[str, Any]) -> str:
    """Of a line of samples.jsonl: prompt and completion, and lists with a value for each token where there are some."""
    for name in ("prompt", "completion"):
        if not isinstance(sample.get(name), str):
            said = f" = {shown(sample[name])} must be text" if name in sample else " is missing, it must be text"
            return name + said
    lists = [name for name in PER_TOKEN if name in sample]
    for name in [*lists, *(name for name in POSITIONS if name in sample)]:
        if not isinstance(sample[name], list):
            return f"{name} = {shown(sample[name])} must be a list"
    for name in lists:
        if len(sample[name]) != len(sample[lists[0]]):
            return f"{name} has {len(sample[name])} values, {lists[0]} has {len(sample[lists[0]])}"
    count = len(sample[lists[0]]) if lists else 0
    values = ((name, i, value) for name in (*lists, *POSITIONS) for i, value in enumerate(sample.get(name, ())))
    problems = (_value_problem(name, f"{name}[{i}]", value, count) for name, i, value in values)
    return _step_problem(sample["step"]) or next(filter(None, problems), "")


def _value_problem(name: str, where: str, value: Any, count: int) -> str:
    """Of one value of a list of a sample with so many tokens."""
    if name == "tokens":
        return "" if isinstance(value, str) else f"{where} = {shown(value)} must be text"
    if name in POSITIONS:
        return "" if type(value) is int and 0 <= value < count else f"{where} = {shown(value)} must be the position of a token"
    if name == "teacher_top":
        return "" if _is_top(value) else f"{where} = {shown(value)} must be a list of [text, probability]"
    return "" if value is None else _number_problem(where, value, or_null=True)


def _is_top(value: Any) -> bool:
    pairs = isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value)
    return pairs and all(isinstance(text, str) and (p is None or not _number_problem("", p)) for text, p in value)


def _number_problem(name: str, value: Any, *, or_null: bool = False) -> str:
    if not is_number(value):
        return f"{name} = {shown(value)} must be a number{' or null' if or_null else ''}"
    return "" if abs(value) <= LARGEST else f"{name} = {shown(value)} must be at most {LARGEST:g} in size"


def _step_problem(step: int) -> str:
    return "" if 0 <= step <= MAX_STEP else f"step = {shown(step)} must be from 0 to {MAX_STEP}"
