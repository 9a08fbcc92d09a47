"""Environment and ports for several processes on one machine."""

import contextlib
import random
import socket
import sys

LOOPBACK = "lo" if sys.platform == "linux" else "lo0"
ON_CPUS = {
    "ACCELERATE_USE_CPU": "true",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": LOOPBACK,
}


def free_port():
    """Return a free TCP port that the system does not use for outgoing connections."""
    while True:
        port = random.SystemRandom().randrange(20_000, 30_000)  # the system uses 32768 and higher
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
