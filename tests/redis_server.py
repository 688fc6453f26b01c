"""A real Redis server for tests, Debian's, in its own process, without files and with a password."""

import secrets
import shutil
import subprocess

from ports import free_ports


class RedisServer:
    """``with RedisServer() as server``: Redis on a free port of 127.0.0.1."""

    def __init__(self) -> None:
        self.program = shutil.which("redis-server")
        if self.program is None:
            raise RuntimeError("There is no Redis server: run `make redis`.")
        self.port, self.password = free_ports(), secrets.token_hex(16)

    def __enter__(self) -> "RedisServer":
        settings = f"port {self.port}\nbind 127.0.0.1\nrequirepass {self.password}\nsave ''\nappendonly no\n"
        self.process = subprocess.Popen(
            [str(self.program), "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/"
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(settings)
        self.process.stdin.close()
        for line in self.process.stdout:
            if "Ready to accept connections" in line:
                return self
        raise RuntimeError(f"Redis did not start, and ended with {self.process.wait()}.")

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait()
