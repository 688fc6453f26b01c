"""What is logged: as people read it, or, with ``ARDIFF_LOG=json``, one JSON object a line for what collects logs.

::

    {"time": "2026-01-31T12:00:00.000+00:00", "level": "INFO", "logger": "ray_jobs.training.job", "message": "metrics",
     "run": "train-dit-20260131-115500-0a1b", "job": "train-dit", "host": "worker-3", "rank": 5, "world_size": 8,
     "step": 1200, "loss": 0.0312, "samples_per_second": 812.0}

Every line says of which run and job it is, and of which machine; those of training workers also rank, world size and
the number of updates made. A job hands run and job to the processes that it starts by environment variables.
"""

import json
import logging
import math
import os
import socket
import sys
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from ardiff.errors import ConfigError

FORMAT, RUN, JOB = "ARDIFF_LOG", "ARDIFF_RUN", "ARDIFF_JOB"
"""Environment variables: ``text`` or ``json``; the run and the job of the lines."""
_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Where Ray tells a submitted job its name."""
_place: dict[str, int | str] = {}


def structured() -> bool:
    """Whether lines are JSON. Raises ConfigError for a value of ``ARDIFF_LOG`` that is not known."""
    match os.environ.get(FORMAT, "text"):
        case "json":
            return True
        case "text" | "":
            return False
        case other:
            raise ConfigError(f"{FORMAT}={other}: give text or json.")


def begin(job: str, output: str | None) -> None:
    """Names the run of this process and of those it will start, and sets logging up, if lines are JSON.

    The run is Ray's submission of this job, else the name of the ``output`` folder, else the job.
    """
    if not structured():
        return
    submission = json.loads(os.environ.get(_RAY_JOB) or "{}").get("metadata", {}).get("job_submission_id")
    os.environ[RUN] = submission or (output or "").rstrip("/").rpartition("/")[2] or job
    os.environ[JOB] = job
    set_up()


def begun() -> bool:
    """Whether this process logs JSON lines."""
    return any(isinstance(handler.formatter, JsonLines) for handler in logging.getLogger().handlers)


def place(**where: int | str) -> None:
    """What else the next lines of this process say of where they come from: rank, world size and step, or replica."""
    _place.update(where)


def environment() -> dict[str, str]:
    """The variables that other processes of the run need, empty for text."""
    return {name: os.environ[name] for name in (FORMAT, RUN, JOB)} if structured() else {}


def set_up() -> None:
    """Has this process log JSON lines to standard error, if that is configured, in place of what it logged there."""
    if not structured():
        return
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    for logger in (root, *(logging.getLogger(name) for name in ("ray", "ray.data", "ray.train"))):
        others = [h for h in logger.handlers if getattr(h, "stream", None) not in (sys.stdout, sys.stderr)]
        if logger is root or len(others) < len(logger.handlers):
            logger.handlers = [*others, handler]
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    sys.excepthook = _report


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logging.getLogger(__name__).critical("%s", error, exc_info=(kind, error, trace))


class JsonLines(logging.Formatter):
    """A record as one line of JSON; what is given as ``extra={"fields": {...}}`` becomes part of it."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "run": os.environ.get(RUN),
            "job": os.environ.get(JOB),
            "host": socket.gethostname(),
            **_place,
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps({k: _jsonable(v) for k, v in line.items() if v is not None}, default=str)


def _jsonable(value: Any) -> Any:
    """JSON knows neither NaN nor infinities."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
