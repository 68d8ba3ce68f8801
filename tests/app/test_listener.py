"""The listener: how its queue ends."""

import socket
import sys

import pytest

from app.listener import bind, listen, turn_away
from app.settings import Settings

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's filter is Linux's")


def test_who_is_connected_is_taken_and_who_comes_later_never_believes_to_be():
    settings = Settings(host="127.0.0.1", port=0)
    with bind(settings) as listener:
        listen(listener, settings)
        address = listener.getsockname()[:2]
        with socket.create_connection(address, timeout=10) as early:
            turn_away(listener)
            with pytest.raises(TimeoutError):
                socket.create_connection(address, timeout=0.3)
            early.sendall(b"a request")  # what is no beginning still comes through
            connection, _ = listener.accept()
            with connection:
                assert connection.recv(100) == b"a request"
                connection.sendall(b"an answer")
                assert early.recv(100) == b"an answer"
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.accept()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=10)


def test_the_next_server_on_the_address_is_reached():
    settings = Settings(host="127.0.0.1", port=0)
    with bind(settings) as listener:
        listen(listener, settings)
        port = listener.getsockname()[1]
        turn_away(listener)
    settings = Settings(host="127.0.0.1", port=port)
    with bind(settings) as listener:
        listen(listener, settings)
        with socket.create_connection(("127.0.0.1", port), timeout=10):
            listener.accept()[0].close()
