"""Free ports for the servers that the tests start."""

import contextlib
import secrets
import socket


def free_ports(count: int = 1) -> int:
    """The first of ``count`` consecutive free ports.

    They are below those that the system gives to connections and above those of Ray's workers, either of which would
    take one before its server listens on it.
    """
    while True:
        first = 20000 + secrets.randbelow(12000)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for number in range(count):
                stack.enter_context(socket.socket()).bind(("", first + number))
            return first
