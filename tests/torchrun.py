"""The environment that torchrun gives to a process, for tests that are one themselves."""

import socket

__all__ = ["environment"]


def environment() -> dict[str, str]:
    """Of the only rank, with a free port."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    return {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
