"""A real PostgreSQL server for tests, Debian's, in its own processes and with a temporary folder.

The server refuses to run as root, so root starts it as the user ``nobody``.
"""

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

from ports import free_ports

SECRET = "ARDIFF_TEST_DATABASE_PASSWORD"
"""The environment variable that holds the password of all servers."""


def programs() -> Path | None:
    """The folder of the newest installed server's programs, or None."""
    folders = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    return max((file.parent for file in folders), key=lambda folder: int(folder.parent.name), default=None)


class PostgresServer:
    """``with PostgresServer() as server``: PostgreSQL on a free port of 127.0.0.1."""

    def __init__(self, max_connections: int = 100) -> None:
        folder = programs()
        if folder is None:
            raise RuntimeError("There is no PostgreSQL server: run `make postgresql`.")
        self.bin, self.port, self.max_connections = folder, free_ports(), max_connections
        self.root = Path(tempfile.mkdtemp(prefix="pg-", dir=os.environ.get("ARDIFF_TEST_DISK", "/var/tmp")))
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "PostgresServer":
        os.environ.setdefault(SECRET, secrets.token_hex(8))  # another server of this process may use it
        password = self.root / "password"
        password.write_text(os.environ[SECRET])
        if os.getuid() == 0:
            for path in (self.root, password):
                shutil.chown(path, "nobody", "nogroup")
        options = ["--username=ardiff", "--auth=scram-sha-256", f"--pwfile={password}", "--no-sync", "--encoding=UTF8"]
        self._run(self.bin / "initdb", f"--pgdata={self.root / 'data'}", *options)
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
        shutil.rmtree(self.root, ignore_errors=True)

    def start(self) -> None:
        """Starts the server and waits until it answers. A restart keeps port and data."""
        settings = {
            "port": self.port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "max_connections": self.max_connections,
            "fsync": "off",  # a crash of the machine is not tested
        }
        options = [f"-c{name}={value}" for name, value in settings.items()]
        command = [self.bin / "postgres", "-D", self.root / "data", *options]
        with (self.root / "log").open("ab") as log:
            self.process = subprocess.Popen(_as_nobody(command), stdout=log, stderr=log)
        answer = [self.bin / "pg_isready", "--quiet", "--host=127.0.0.1", f"--port={self.port}"]
        while subprocess.run(answer, check=False).returncode:
            if self.process.poll() is not None:
                raise RuntimeError(f"PostgreSQL did not start: {(self.root / 'log').read_text()[-2000:]}")

    def stop(self) -> None:
        """Ends all connections and the server, as a crash or a restart would. Its data stay."""
        process, self.process = self.process, None
        if process is not None:
            process.send_signal(signal.SIGQUIT)
            process.wait(60)

    def new_database(self) -> dict[str, str]:
        """Creates an empty database. Returns the settings ``database`` and ``database_password`` of a service."""
        name = f"test_{secrets.token_hex(6)}"
        connection = ["--host=127.0.0.1", f"--port={self.port}", "--username=ardiff"]
        environment = os.environ | {"PGPASSWORD": os.environ[SECRET]}
        subprocess.run([self.bin / "createdb", *connection, name], env=environment, check=True)
        uri = f"postgresql://ardiff@127.0.0.1:{self.port}/{name}"
        return {"database": uri, "database_password": f"env:{SECRET}"}

    def _run(self, *command: str | Path) -> None:
        subprocess.run(_as_nobody(list(command)), check=True, capture_output=True, cwd="/")


def _as_nobody(command: list[str | Path]) -> list[str | Path]:
    if os.getuid():
        return command
    return ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", *command]
