"""``python tests/worker.py -u -c CODE``: a worker of pytest-xdist, as a fork of the nursery.

Each of its own would spend five seconds of a processor on the same imports. xdist starts this in place of Python
(``tests/conftest.py``), and it stands for the fork: with its descriptors, until it ends, with its status.
"""

import json
import os
import select
import signal
import socket
import sys

ADDRESS = "TESTS_NURSERY"  # as in tests/nursery.py, which would have to be imported


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the fork has it, too
    order = {"code": sys.argv[-1], "environ": dict(os.environ), "cwd": os.getcwd()}  # noqa: PTH109
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as nursery:
        nursery.connect("\0" + os.environ[ADDRESS])
        socket.send_fds(nursery, [json.dumps(order).encode()], [0, 1, 2])
        fork = int(nursery.recv(64))
        ended = select.poll()
        ended.register(os.pidfd_open(fork), select.POLLIN)
        ended.poll()
        nursery.send(json.dumps({"reap": fork}).encode())
        return int(nursery.recv(64))


if __name__ == "__main__":
    sys.exit(main())
