"""Run the viewer's server until Ctrl-C."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable
from importlib import import_module
from secrets import token_urlsafe

from metalens.display.server.requests import Limits
from metalens.utils.errors import MissingPackageError, UnavailableError

ADDRESS = "127.0.0.1"
GRACE = 1  # seconds for answers that are on their way, after Ctrl-C
KEY_BYTES = 16  # 128 random bits
STEP = 3.0  # seconds for the step that the model is in, after that


def require_packages() -> None:
    """Check that the server's packages are installed.

    Raises:
        MissingPackageError: if one is not.
    """
    try:
        import_module("starlette")
        import_module("uvicorn")
    except ImportError as error:
        raise MissingPackageError(
            f"`metalens view` needs {error.name}: pip install 'metalens[view]'. With --save it writes the page as a file and needs neither."
        ) from error


def listen(port: int) -> socket.socket:
    """Return a socket that listens on this machine only.

    Args:
        port: the port; 0 = any free one.

    Raises:
        UnavailableError: if the port is taken.
    """
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((ADDRESS, port))
        found.listen(128)  # with SO_REUSEADDR, a second program could bind the port until one listens
    except OSError as error:
        found.close()
        why = "is in use" if error.errno == errno.EADDRINUSE else f"can't be used ({error.strerror})"
        raise UnavailableError(f"Port {port} {why}. Choose another one with --port, or 0 for any free one.") from error
    return found


def hosts_of(port: int) -> list[str]:
    """Return what the header Host holds in requests to this server. Browsers leave out port 80."""
    names = (ADDRESS, "localhost")
    return [*(f"{name}:{port}" for name in names), *(names if port == 80 else ())]


def serve(load: Callable[[], object], title: str, lenses: list[str], limits: Limits, listening: socket.socket, ready: Callable[[str], None]) -> None:
    """Load a model and serve the page, until Ctrl-C.

    The thread of the model may still be in a long step when this returns or raises, and MLX may abort in the end of a Python whose other threads have
    evaluated arrays: end the process with `os._exit`.

    Args:
        load: function that returns a `Session`; it runs in the thread of the model.
        title, lenses, limits: as in `application`.
        listening: result of `listen`.
        ready: is called with the address when the model is loaded and the server answers. The address has a new key.

    Raises:
        MetalensError: if the model can't be loaded.
        KeyboardInterrupt: at Ctrl-C while it is loaded.
    """
    import uvicorn

    from metalens.display.server.application import application
    from metalens.display.server.jobs import ModelThread

    port, key = listening.getsockname()[1], token_urlsafe(KEY_BYTES)
    model: ModelThread = ModelThread(load)  # type: ignore[type-arg]
    config = uvicorn.Config(
        application(model, title, lenses, limits, hosts_of(port), key),
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_graceful_shutdown=GRACE,
        timeout_keep_alive=30,
        limit_concurrency=64,
        h11_max_incomplete_event_size=64 * 1024,
    )

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            ready(f"http://{ADDRESS}:{port}/{key}/")

        def handle_exit(self, sig: int, frame: object) -> None:
            model.cancel()
            super().handle_exit(sig, frame)  # type: ignore[arg-type]

    try:
        model.loaded.result()
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signal again after its shutdown
            Server(config).run(sockets=[listening])
    finally:
        model.close(STEP)
