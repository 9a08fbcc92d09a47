"""Environment and ports for several processes on one machine."""

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
    """Return a TCP port that is currently free."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
