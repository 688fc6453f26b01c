"""The database of jobs: its schema, and connections to SQLite or PostgreSQL.

::

    service     one row: the version of the schema, and when expired jobs were last removed
    jobs        one row per job; the fields of its record that no statement needs are JSON in ``record``
    segments    the videos of running jobs so far, with what another replica needs to continue them; they outlive the
                job for a minute

All times that decide anything come from :class:`clock`, the clock of the database.
"""

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy import Boolean, Column, Double, Index, Integer, LargeBinary, Table, Text, event, exc
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.pool import QueuePool
from sqlalchemy.sql.functions import FunctionElement

from ardiff.errors import ConfigError, DataError
from ardiff.serving.config import POSTGRESQL

VERSION = 1
"""Version of the schema below."""
MIGRATIONS: dict[int, tuple[str, ...]] = {}
"""The statements that lead to each version from the one before. A new database gets the schema below at once."""
CONNECT_SECONDS = 5
_SCHEMA_LOCK = 1


class clock(FunctionElement):  # noqa: N801 - a function of SQL
    """Seconds since 1970 by the clock of the database."""

    type = Double()
    inherit_cache = True


@compiles(clock, "postgresql")
def _clock_of_postgresql(element: clock, compiler: Any, **options: Any) -> str:
    return "extract(epoch from clock_timestamp())::float8"


@compiles(clock, "sqlite")
def _clock_of_sqlite(element: clock, compiler: Any, **options: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


metadata = sa.MetaData()
service = Table(
    "service",
    metadata,
    Column("version", Integer, nullable=False),
    Column("swept_at", Double, nullable=False),
)
jobs = Table(
    "jobs",
    metadata,
    Column("id", Text, primary_key=True),
    Column("owner", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("lease", Integer, nullable=False),
    Column("heartbeat", Integer, nullable=False),
    Column("crashes", Integer, nullable=False),
    Column("cancelled", Boolean, nullable=False),  # a client has cancelled it, and its replica shall stop it
    Column("num_changes", Integer, nullable=False, default=0),
    Column("changes", Text, nullable=False, default="[]"),  # JSON, which only requests write, not its replica
    Column("idempotency", Text),
    Column("ended_at", Double),
    Column("expires_at", Double),
    Column("has_files", Boolean, nullable=False),  # storage may hold files of it, which expire
    Column("record", Text, nullable=False),
    sa.UniqueConstraint("owner", "idempotency"),
)
_OPEN = jobs.c.ended_at.is_(None)
Index("jobs_of_owner", jobs.c.owner, jobs.c.id)
Index("jobs_open", jobs.c.status, jobs.c.model, jobs.c.crashes, jobs.c.id, postgresql_where=_OPEN, sqlite_where=_OPEN)
Index("jobs_open_of_owner", jobs.c.owner, postgresql_where=_OPEN, sqlite_where=_OPEN)
Index("jobs_expiring", jobs.c.has_files, jobs.c.expires_at)
segments = Table(
    "segments",
    metadata,
    Column("job_id", Text, primary_key=True),
    Column("begun", Integer, primary_key=True),  # the lease under which the video began
    Column("start", Integer, primary_key=True),  # bytes of the stream before this segment
    Column("data", LargeBinary, nullable=False),
    Column("latents", LargeBinary, nullable=False),  # of the generated frames of the segment
    Column("state", LargeBinary),  # of the sampling after them; the last segment has it
)


def read_password(reference: str) -> str:
    """The password that ``env:NAME``, an environment variable, or a file holds. Raises DataError if there is none."""
    kind, _, name = reference.partition(":")
    try:
        return os.environ[name] if kind == "env" else Path(reference).read_text().strip()
    except KeyError as error:
        raise DataError(f"The environment variable {name} with the password of the database is not set.") from error
    except OSError as error:
        raise DataError(f"Cannot read the password of the database in {reference}: {error.strerror}.") from error


class Database:
    """Runs statements. Every method raises DataError if the database is unavailable."""

    def __init__(self, uri: str, password: str | None = None, connections: int = 4, timeout: float = 15.0) -> None:
        """
        Args:
            uri: Path of a SQLite file, or ``postgresql://USER@HOST/NAME``.
            password: ``env:NAME`` or a file, read for each new connection.
            connections: Most connections at the same time.
            timeout: Seconds after which a statement fails.
        """
        pool = {"poolclass": QueuePool, "pool_size": connections, "max_overflow": 0, "pool_timeout": timeout}
        pool |= {"pool_use_lifo": True}
        self._file = None if uri.startswith(POSTGRESQL) else Path(uri)
        if self._file is None:
            self._engine = _postgresql_engine(uri, password, timeout, pool)
        else:
            self._engine = _sqlite_engine(self._file, timeout, pool)
        self._single = self._engine.execution_options(isolation_level="AUTOCOMMIT")

    def prepare(self) -> None:
        """Creates the schema, or changes an older one to the present version.

        Raises:
            ConfigError: A newer release has changed the schema.
        """
        if self._file is not None:
            try:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                self._file.touch()
            except OSError as error:
                raise DataError(f"Cannot write {self._file}: {error.strerror}. Check its folder.") from error
        with self.transaction(_SCHEMA_LOCK) as connection:
            service.create(connection, checkfirst=True)
            version = connection.scalar(sa.select(service.c.version))
            if version is None:
                metadata.create_all(connection)
                connection.execute(sa.insert(service).values(version=VERSION, swept_at=0.0))
                return
            if version > VERSION:
                raise ConfigError(
                    f"The database of jobs has version {version}, but this release of ardiff knows {VERSION} only: "
                    "use the release that changed it, or a newer one."
                )
            for number in range(version + 1, VERSION + 1):
                for statement in MIGRATIONS[number]:
                    connection.execute(sa.text(statement))
            connection.execute(sa.update(service).values(version=VERSION))

    def rows(self, statement: sa.Executable) -> Sequence[Any]:
        """Runs one statement on its own. Returns its rows."""
        with _as_data_errors(), self._single.connect() as connection:
            return connection.execute(statement).all()

    def change(self, statement: sa.Executable) -> int:
        """Runs one statement on its own. Returns the number of rows that it changed."""
        with _as_data_errors(), self._single.connect() as connection:
            return connection.execute(statement).rowcount

    @contextlib.contextmanager
    def transaction(self, lock: int | None = None) -> Iterator[sa.Connection]:
        """A transaction, during which no other one holds the same ``lock``. SQLite has one lock for all."""
        with _as_data_errors(), self._engine.begin() as connection:
            if lock is not None and self._file is None:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(lock)))
            yield connection

    def now(self) -> float:
        """Seconds since 1970 by the clock of the database."""
        return float(self.rows(sa.select(clock()))[0][0])

    def close(self) -> None:
        """Closes the connections that are not in use."""
        self._engine.dispose()


@contextlib.contextmanager
def _as_data_errors() -> Iterator[None]:
    try:
        yield
    except exc.DBAPIError as error:
        raise DataError(f"The database of jobs is unavailable: {str(error.orig).strip()}") from error
    except (exc.TimeoutError, exc.InvalidRequestError) as error:  # all are busy, or the file changes again and again
        raise DataError("There is no connection to the database of jobs.") from error


def _postgresql_engine(uri: str, password: str | None, timeout: float, pool: dict[str, Any]) -> sa.Engine:
    milliseconds = int(1000 * timeout)
    limits = {
        "connect_timeout": CONNECT_SECONDS,
        "tcp_user_timeout": milliseconds,
        "options": f"-c statement_timeout={milliseconds} -c idle_in_transaction_session_timeout={milliseconds}",
        "application_name": "ardiff",
    }
    url = sa.make_url(uri).set(drivername="postgresql+psycopg")
    engine = sa.create_engine(url, connect_args=limits, **pool)

    def add_password(dialect: Any, record: Any, args: Any, parameters: dict[str, Any]) -> None:
        if password is not None:
            parameters["password"] = read_password(password)

    event.listen(engine, "do_connect", add_password)
    return engine


def _sqlite_engine(file: Path, timeout: float, pool: dict[str, Any]) -> sa.Engine:
    engine = sa.create_engine("sqlite://", creator=lambda: _open_file(file, timeout), **pool)

    def remember_file(connection: sqlite3.Connection, record: Any) -> None:
        record.info["file"] = _identity(file)

    def check_file(connection: sqlite3.Connection, record: Any, proxy: Any) -> None:
        """Closes a connection whose file is not at its path any more, for example because a disk was unmounted."""
        if record.info["file"] != _identity(file):
            raise exc.DisconnectionError

    event.listen(engine, "connect", remember_file)
    event.listen(engine, "checkout", check_file)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _open_file(path: Path, timeout: float) -> sqlite3.Connection:
    """Opens a file that exists: a missing one may be on a disk that is not mounted."""
    uri = f"file:{quote(str(path))}?mode=rw"
    connection = sqlite3.connect(uri, uri=True, timeout=timeout, check_same_thread=False)
    _use_write_ahead_log(connection, timeout)
    connection.execute("PRAGMA synchronous=NORMAL")
    return connection


def _use_write_ahead_log(connection: sqlite3.Connection, timeout: float) -> None:
    """Sets the journal mode. It waits for other connections by itself: of several that set it in a new file, SQLite
    rejects some at once, whatever its timeout."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                connection.close()
                raise
            time.sleep(0.01)


def _identity(path: Path) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        status = path.stat()
        return status.st_dev, status.st_ino
    return None


def _begin_sqlite(connection: sa.Connection) -> None:
    """Takes the lock for writing at once: a transaction that reads first could not get it later."""
    if connection.get_execution_options().get("isolation_level") != "AUTOCOMMIT":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
