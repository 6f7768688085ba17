"""Start the processes of a group on this machine's loopback, with MLX's ring backend."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import mlx.core as mx
import pytest

try:
    from mlx._distributed_utils import launch as _launcher  # noqa: F401
except ImportError as _error:
    missing = f"this MLX has no mlx.launch ({_error})"
else:
    missing = "" if mx.distributed.is_available("ring") else "this MLX has no ring backend"
PATIENCE = 180  # seconds for a group of processes: a busy machine is not a failure
needs_ring = pytest.mark.skipif(bool(missing), reason=missing or "there is one")


def free_ports(n):
    """The first of n ports of the loopback that follow each other."""
    for _ in range(50):
        with socket.socket() as first:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
        others = [socket.socket() for _ in range(n)]
        try:
            for i, each in enumerate(others):
                each.bind(("127.0.0.1", port + i))
        except OSError:
            continue
        finally:
            for each in others:
                each.close()
        return port
    pytest.skip("there are no free ports")


def environment():
    return {k: v for k, v in os.environ.items() if not k.startswith(("METALENS_", "MLX_"))} | {"OMP_NUM_THREADS": "1"}


def written(out, ranks):
    """{name: results by rank}."""
    names = {path.name.split(".")[0] for path in out.glob("*.json")}
    return {name: [json.loads((out / f"{name}.{rank}.json").read_text()) for rank in range(ranks)] for name in names}


def launched(worker, n, folder, scenarios, patience=PATIENCE):
    """The results of scenarios, from n processes of a worker's module that mlx.launch starts."""
    out = folder / f"out-{time.monotonic_ns()}"
    out.mkdir()
    (out.parent / f"{out.name}.spec").write_text(json.dumps(scenarios))
    command = [sys.executable, "-c", "from mlx._distributed_utils.launch import main; main()"]
    command += ["-n", str(n), "--backend", "ring", "--hosts", "127.0.0.1", "-p", str(free_ports(n)), "--cwd", str(folder)]
    command += [sys.executable, worker.__file__, str(out.parent / f"{out.name}.spec"), str(out)]
    with (out.parent / f"{out.name}.log").open("w+") as log:
        process = subprocess.Popen(command, env=environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        try:
            process.wait(patience)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # whoever is left: of a launch that took too long, also what it started
            process.wait()
        log.seek(0)
        said = log.read()
    assert len(list(out.glob("*.json"))) == n * len(scenarios), said
    return written(out, n)


def started(worker, n, folder, scenarios):
    """n processes of a worker's module, started by hand. Their results go into the folder out-*."""
    out = folder / f"out-{time.monotonic_ns()}"
    out.mkdir()
    port = free_ports(n)
    spec, hosts = out.parent / f"{out.name}.spec", out.parent / f"{out.name}.hosts"
    spec.write_text(json.dumps(scenarios))
    hosts.write_text(json.dumps([[f"127.0.0.1:{port + rank}"] for rank in range(n)]))
    return [
        subprocess.Popen(
            [sys.executable, worker.__file__, str(spec), str(out)],
            env=environment() | {"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(n)
    ]


def ended(processes, but=(), patience=PATIENCE):
    """[(status, stderr)] of all but some, which are killed."""
    try:
        return [(process.wait(patience), process.stderr.read()) for rank, process in enumerate(processes) if rank not in but]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
