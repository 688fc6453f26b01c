"""Logging as text, or, with ``ARDIFF_LOG=json``, as one JSON object per line for log collectors.

::

    {"time": "2026-01-31T12:00:00.000+00:00", "level": "INFO", "logger": "ray_jobs.training.callbacks",
     "message": "metrics", "run": "train-dit-20260131-115500-0a1b", "job": "train-dit", "host": "worker-3", "rank": 5,
     "world_size": 8, "step": 1200, "loss": 0.0312, "samples_per_second": 812.0}

Every line names the run, the job and the host. Lines of training workers also have rank, world size and step. A job
passes its run and job to other processes in environment variables.
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
"""Environment variables: the format, ``text`` or ``json``; the run and the job of the lines."""
_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Variable in which Ray passes its submission ID to a job."""
_context: dict[str, int | str] = {}


def is_json() -> bool:
    """Whether to log JSON. Raises ConfigError for an unknown value of ``ARDIFF_LOG``."""
    match os.environ.get(FORMAT, "text"):
        case "json":
            return True
        case "text" | "":
            return False
        case other:
            raise ConfigError(f"{FORMAT}={other}: give text or json.")


def start_run(job: str, output: str | None) -> None:
    """Names the run of this process and of the processes it starts; sets up JSON logging if it is configured.

    The run is Ray's submission ID, else the name of the ``output`` folder, else the job.
    """
    if not is_json():
        return
    submission = json.loads(os.environ.get(_RAY_JOB) or "{}").get("metadata", {}).get("job_submission_id")
    os.environ[RUN] = submission or (output or "").rstrip("/").rpartition("/")[2] or job
    os.environ[JOB] = job
    set_up()


def is_set_up() -> bool:
    """Whether this process logs JSON."""
    return any(isinstance(handler.formatter, JsonLines) for handler in logging.getLogger().handlers)


def set_context(**fields: int | str) -> None:
    """Adds fields to all further lines of this process, such as rank, step or replica."""
    _context.update(fields)


def environment() -> dict[str, str]:
    """The variables that other processes of the run need; none for text."""
    return {name: os.environ[name] for name in (FORMAT, RUN, JOB)} if is_json() else {}


def set_up() -> None:
    """Logs JSON to standard error if it is configured, instead of what this process logged there before."""
    if not is_json():
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
    sys.excepthook = _log_exception


def _log_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logging.getLogger(__name__).critical("%s", error, exc_info=(kind, error, trace))


class JsonLines(logging.Formatter):
    """Formats a record as one line of JSON, including the ``fields`` of ``extra={"fields": {...}}``."""

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
            **_context,
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps({k: _jsonable(v) for k, v in line.items() if v is not None}, default=str)


def _jsonable(value: Any) -> Any:
    """JSON has no NaN and no infinities."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
