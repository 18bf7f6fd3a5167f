"""Recipes of a config -> the folders that they made: models and stores; and the config that evaluates a finished run."""

import dataclasses
from collections.abc import Callable

from opd_jax import config as config_lib
from opd_jax import teachers
from opd_jax.config import Config
from opd_jax.types import UserError


def _needs_beginning(config: Config) -> bool:
    """Whether a resumed run needs the student as it was: the base of an adapter, or a teacher or reference that it began as."""
    paths = [member.path for member in teachers.asked(config).values()]
    looked_at = (*paths, *([config.reference.path] if config_lib.needs_reference(config) else []))
    return bool(config.student.lora.rank) or teachers.STUDENT_INIT in looked_at


def run_recipes(config: Config, make_model: Callable[[str, str], str], *, resumed: bool = False) -> Config:
    """Replaces recipes by the folders that their runs made; a path that is given goes before a recipe (of the reference: after it).

    A `resumed` run's student is made where its beginning is needed.
    """

    def made(source, default: str = ""):
        if not source.recipe or source.path != default:
            return source
        return dataclasses.replace(source, path=make_model(source.recipe, config.cache_dir), recipe="")

    teacher = made(config.teacher)
    teacher = dataclasses.replace(teacher, members={name: made(member) for name, member in teacher.members.items()})
    reference = made(config.reference, config_lib.Reference.path) if config_lib.needs_reference(config) else config.reference
    student = made(config.student) if not resumed or _needs_beginning(config) else config.student
    return dataclasses.replace(config, student=student, teacher=teacher, reference=reference)


def check(config: Config, *, resumed: bool = False) -> None:
    """Refuses recipes that are no configs, those that they name themselves included. Raises ConfigError."""
    sources = [config.teacher, *config.teacher.members.values()]
    sources += [config.student] if not resumed or _needs_beginning(config) else []
    named = [source.recipe for source in sources if source.recipe and not source.path]
    if config_lib.needs_reference(config) and config.reference.recipe and config.reference.path == config_lib.Reference.path:
        named.append(config.reference.recipe)
    if config.rollout.cache_recipe and not config.rollout.cache:
        named.append(config.rollout.cache_recipe)
    for recipe in dict.fromkeys(named):
        check(config_lib.parse(config_lib.load_config(recipe)))


def with_store(config: Config, make_store: Callable[[str, str], str]) -> Config:
    """Replaces rollout.cache_recipe by the folder of its store; a folder that is given goes before it."""
    if not config.rollout.cache_recipe:
        return config
    folder = config.rollout.cache or make_store(config.rollout.cache_recipe, config.cache_dir)
    return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, cache=folder, cache_recipe=""))


def of_run(config: Config, workdir: str) -> Config:
    """The config with the newest student of a run; a teacher that is the student as it was before training stays that. Raises UserError."""
    asked, beginning = config.teacher, {"path": config.student.path, "recipe": config.student.recipe}

    def before(source):
        if source.path != teachers.STUDENT_INIT:
            return source
        if not any(beginning.values()):
            raise UserError(
                f"config field teacher.path = {source.path!r}: the student began with random weights, which are not kept; give "
                "--config.teacher.path=DIR, or --config.teacher.path= for no teacher"
            )
        return dataclasses.replace(source, **beginning)

    members = {name: before(member) for name, member in asked.members.items()}
    teacher = dataclasses.replace(before(asked), members=members, update="frozen")
    return dataclasses.replace(config, student=config_lib.Student(path=workdir), teacher=teacher)
