"""The child process of `tune` in its tests: hands its files to a fork of `fake_candidates.py`, which serves a socket at
the given path, and ends as the fork ends."""

import os
import socket
import sys

with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(sys.argv[1])
    socket.send_fds(connection, [b"."], [0, 1, 2])
    code = int(connection.recv(16))
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
