"""An S3 server: OpenStack Swift with its s3api middleware. Run by the Python of .venv-s3, which has Swift, not ours.

    python launch.py ROOT PORT SECRET

PORT serves S3 to the access keys ``ardiff:writer`` (all rights) and ``ardiff:reader`` (what it is granted); the three
ports after it are Swift's own. What is stored lies in ROOT and is there again after a restart. Prints READY when
requests are answered, and stops all that it started on SIGTERM or when its standard input closes, so also when the
process that started it dies.
"""

import getpass
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

from swift.common.ring.builder import RingBuilder

KINDS = ("account", "container", "object")
PIPELINE = ("catch_errors", "gatekeeper", "healthcheck", "listing_formats", "s3api", "tempauth", "copy", "bulk", "slo")


def configure(root: Path, port: int, secret: str) -> None:
    """Writes configuration and rings: one device, one replica."""
    (root / "devices" / "disk").mkdir(parents=True, exist_ok=True)
    common = f"bind_ip = 127.0.0.1\nswift_dir = {root}\nuser = {getpass.getuser()}\nworkers = 0\nlog_level = WARNING\n"
    common += f"log_address = {root}/no-log\n"
    # Each server waits for the others as long as a busy machine takes: what is given up here would be done later by
    # daemons that do not run, so a file would be missing from listings.
    common += "conn_timeout = 60\nnode_timeout = 120\ncontainer_update_timeout = 120\n"
    common += "error_suppression_limit = 1000000\n"
    (root / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = tests\n\n[storage-policy:0]\nname = one\n")
    for number, kind in enumerate(KINDS, 1):
        device = {"region": 1, "zone": 1, "ip": "127.0.0.1", "port": port + number, "device": "disk", "weight": 1}
        builder = RingBuilder(4, 1, 0)
        builder.add_dev({**device, "replication_ip": "127.0.0.1", "replication_port": port + number, "meta": ""})
        builder.rebalance()
        builder.get_ring().save(str(root / f"{kind}.ring.gz"))
        (root / f"{kind}.conf").write_text(
            f"[DEFAULT]\n{common}bind_port = {port + number}\ndevices = {root}/devices\nmount_check = false\n"
            f"disable_fallocate = true\nfallocate_reserve = 0\n\n[pipeline:main]\npipeline = {kind}-server\n\n"
            f"[app:{kind}-server]\nuse = egg:swift#{kind}\n"
        )
    settings = {
        "tempauth": f"user_ardiff_writer = {secret} .admin\nuser_ardiff_reader = {secret}\n",
        # Tests of multipart uploads need not send 5 MB a part.
        "s3api": "location = us-east-1\nmin_segment_size = 1\n",
    }
    filters = f"[filter:request_log]\npaste.filter_factory = request_log:factory\npath = {root}/requests.log\n"
    filters += "".join(f"[filter:{name}]\nuse = egg:swift#{name}\n{settings.get(name, '')}\n" for name in PIPELINE)
    order = " ".join(("request_log", *PIPELINE))
    (root / "proxy.conf").write_text(
        f"[DEFAULT]\n{common}bind_port = {port}\n\n[pipeline:main]\npipeline = {order} proxy-server\n\n"
        f"[app:proxy-server]\nuse = egg:swift#proxy\naccount_autocreate = true\n\n{filters}"
    )


def main() -> int:
    root, port, secret = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    configure(root, port, secret)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
    servers = []
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}  # for request_log
    try:
        for kind in (*KINDS, "proxy"):
            with (root / f"{kind}.log").open("ab") as log:
                command = [sys.executable, str(Path(sys.executable).with_name(f"swift-{kind}-server"))]
                command += [str(root / f"{kind}.conf")]
                output = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
                servers.append(subprocess.Popen(command, env=environment, **output))
        ready = False
        while not stop.wait(0.1):
            dead = [server for server in servers if server.poll() is not None]
            if dead:
                print(f"FAILED: {' '.join(dead[0].args)} ended; its log is in {root}", flush=True)
                return 1
            if not ready and answers(port):
                ready = True
                print("READY", flush=True)
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            try:
                server.wait(5)
            except subprocess.TimeoutExpired:
                server.kill()
    return 0


def answers(port: int) -> bool:
    """Whether the server answers: not only its front, but the servers behind it."""
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/healthcheck", timeout=2).close()
        for number in (1, 2, 3):
            urllib.request.urlopen(f"http://127.0.0.1:{port + number}/recon/version", timeout=2).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


if __name__ == "__main__":
    raise SystemExit(main())
