"""TensorBoard and Weights & Biases beside metrics.jsonl, each by a switch of `log`. The only importer of tensorboardX and wandb.

metrics.jsonl is the record of a run; a tracker shows it elsewhere. What goes out is the step's record under the same names. A tracker
that fails while a run is under way (a full disk, a network that is down) is given up with one warning, and the run goes on.
"""

import dataclasses
import importlib
import json
import logging
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any, Protocol

from opd_jax import config as config_lib
from opd_jax import processes
from opd_jax.config import Config, ConfigError

log = logging.getLogger(__name__)

FLUSH_SECONDS = 5.0  # how late TensorBoard may be; before a checkpoint everything is on disk


class Tracker(Protocol):
    """One place where records are shown. Opened by its first record, so that a run with nothing to do leaves nothing behind."""

    def write(self, record: dict[str, Any]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


def check(settings: config_lib.Log) -> None:
    """Refuses a tracker whose package is missing, and a wandb project or login that cannot be used. Raises ConfigError."""
    for switch, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        if getattr(settings, switch):
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise ConfigError(
                    f"config field log.{switch} = True needs the package {package} ({error}); pip install {package}, or set it to False"
                ) from None
    if settings.wandb:
        _check_wandb(settings.wandb_project)


def _check_wandb(project: str) -> None:
    import wandb

    if not project:
        raise ConfigError("config field log.wandb_project = '' must name a project, because log.wandb = True")
    try:
        wandb.Settings(project=project)
    except wandb.Error as error:
        raise ConfigError(f"config field log.wandb_project = {project!r} cannot be used ({error}); give another name") from None
    if wandb.setup().settings.mode not in ("online", "shared"):
        return
    try:
        wandb.login()
    except wandb.Error as error:
        raise ConfigError(
            f"config field log.wandb = True cannot log in ({error}); run `wandb login`, or set the environment variable WANDB_MODE=offline"
        ) from None


def make(config: Config, workdir: pathlib.Path, *, kept: int) -> "Trackers":
    """The trackers of a config that passed `check`; none but in the first process.

    `kept`: the last step whose record stays from an earlier start, -1 at a fresh one.
    """
    chosen: dict[str, Tracker] = {}
    if not processes.first():
        return Trackers(chosen)
    if config.log.tensorboard:
        chosen["tensorboard"] = TensorBoard(config, workdir, kept=kept)
    if config.log.wandb:
        chosen["wandb"] = WeightsAndBiases(config, workdir, kept=kept)
    return Trackers(chosen)


class Trackers:
    """All trackers of a run."""

    def __init__(self, chosen: dict[str, Tracker]):
        self._chosen = chosen

    def write(self, record: dict[str, Any]) -> None:
        """Sends a step's record to each."""
        self._each(lambda tracker: tracker.write(record))

    def flush(self) -> None:
        """Brings what was written to disk."""
        self._each(lambda tracker: tracker.flush())

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._chosen.items()):
            try:
                act(tracker)
            except Exception as error:  # of any type: a display that breaks is no reason to lose a run
                del self._chosen[name]
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                log.warning("log.%s failed (%s) and is off until the run is started again; metrics.jsonl has every step", name, reason)


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """The metrics of a record that are numbers, without `step`, which is their axis."""
    return {name: value for name, value in record.items() if isinstance(value, int | float) and name != "step"}


class TensorBoard:
    """Event files in WORKDIR/tensorboard: one summary per step, and the config as text.

    A start from an earlier checkpoint opens a new file that begins with a session mark (tensorboardX calls it purge_step): TensorBoard
    then hides what older files hold from that step on.
    """

    def __init__(self, config: Config, workdir: pathlib.Path, *, kept: int):
        self._config, self._folder, self._first = config, workdir / "tensorboard", kept + 1
        self._writer = None
        self._flushed = time.monotonic()

    def _open(self):
        # Not tensorboardX.SummaryWriter: its thread dies of a full disk, after which a write waits for ever on a full queue.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import text

        self._folder.mkdir(exist_ok=True)
        # The name has seconds alone: two starts within one second would write the same file.
        self._writer = EventsWriter(str(self._folder / "events"), filename_suffix=f".{time.time_ns()}")
        now, code = time.time(), json.dumps(dataclasses.asdict(self._config), indent=2).replace("\n", "\n    ")
        self._writer.write_event(Event(wall_time=now, step=self._first, session_log=SessionLog(status=SessionLog.START)))
        self._writer.write_event(Event(wall_time=now, step=self._first, summary=text("config", f"    {code}")))

    def write(self, record: dict[str, Any]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        if self._writer is None:
            self._open()
        values = [Summary.Value(tag=name, simple_value=number) for name, number in numbers(record).items()]
        self._writer.write_event(Event(wall_time=time.time(), step=record["step"], summary=Summary(value=values)))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WeightsAndBiases:
    """A run of wandb, its files in WORKDIR/wandb. WORKDIR/wandb.json keeps its id and the last step sent.

    A resumed run goes on under the same id. wandb cannot take a step back: what it was sent before the run went back to a checkpoint is not
    sent again.
    """

    def __init__(self, config: Config, workdir: pathlib.Path, *, kept: int):
        self._config, self._workdir, self._resumed = config, workdir, kept >= 0
        self._file = workdir / "wandb.json"
        self._run = None
        self._sent = -1

    def _open(self):
        import wandb

        before = {"id": None, "step": -1}
        if self._resumed and self._file.exists():
            before = json.loads(self._file.read_text())
        self._sent = before["step"]
        self._run = wandb.init(
            project=self._config.log.wandb_project,
            dir=str(self._workdir),
            name=self._workdir.resolve().name,
            id=before["id"],
            resume="allow",
            reinit="create_new",  # a run that the user's own notebook has open stays open
            config=dataclasses.asdict(self._config),
            allow_val_change=True,  # steps may have grown
            settings=wandb.Settings(console="off"),  # the progress bar stays out of its log
        )

    def write(self, record: dict[str, Any]) -> None:
        if self._run is None:
            self._open()
        if record["step"] > self._sent:
            self._run.log(numbers(record), step=record["step"], commit=True)
            self._sent = record["step"]
            temporary = self._file.with_suffix(".tmp")
            temporary.write_text(json.dumps({"id": self._run.id, "step": self._sent}) + "\n")
            os.replace(temporary, self._file)

    def flush(self) -> None:
        """wandb's own process has what was sent."""

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None
