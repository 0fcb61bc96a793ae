"""The program that forking.py's `interpreter` names: asks for a fork, passes signals on to it, and ends as it does."""

import contextlib
import json
import os
import signal
import socket
import struct
import sys


def ask(place, arguments, folder, variables, streams):
    """
    Ask the process that listens at `place` for a fork with these arguments of Python, folder, variables and streams.

    Returns a socket: a byte sent there is the number of a signal for the fork, closing it kills the fork, and the exit
    code comes out of it.
    """
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(place)
    request = json.dumps([arguments, folder, variables]).encode()
    socket.send_fds(connection, [struct.pack('i', len(request))], streams)
    connection.sendall(request)
    return connection


def answer(connection):
    """The exit code that comes out of the socket, negative for a signal."""
    return struct.unpack('i', connection.recv(4))[0]


def main(place, *arguments):
    """Be the program that Python would be with these arguments."""
    numbers = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    connection = ask(place, arguments, os.getcwd(), dict(os.environ), [0, 1, 2])

    def pass_on(number, frame):
        with contextlib.suppress(OSError):  # it has ended
            connection.send(bytes([number]))

    for number in numbers:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    code = answer(connection)
    if code >= 0:
        os._exit(code)
    if -code in numbers:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)


if __name__ == '__main__':
    main(*sys.argv[1:])
