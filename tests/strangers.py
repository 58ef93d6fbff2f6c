"""Connections to a Dask scheduler or worker by those who have no certificate of its run."""

import asyncio
import socket
import ssl
from functools import cache

import pytest
from distributed.comm import connect
from distributed.security import Security


def assert_strangers_are_refused(address: str) -> None:
    """A plain connection, one over TLS without a certificate, and one with a certificate of another run come to nothing."""
    host, _, port = address.removeprefix("tls://").rpartition(":")
    assert address.startswith("tls://")
    with socket.create_connection((host, int(port)), timeout=10) as plain:
        plain.sendall(b"\0" * 64)
        assert closed(plain), f"{address} answers a plain connection"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection((host, int(port)), timeout=10) as plain,
        pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"),
        context.wrap_socket(plain) as encrypted,
    ):
        encrypted.recv(1)
    for tried, security in ((address, own_certificate()), (address.replace("tls://", "tcp://"), Security())):
        with pytest.raises(OSError):
            asyncio.run(_greeted(tried, security))


@cache
def own_certificate() -> Security:
    return Security.temporary()


def closed(connection: socket.socket) -> bool:
    """Whether the other side closes a connection without an answer of Dask; an alert of TLS is none."""
    received = b""
    try:
        while data := connection.recv(4096):
            received += data
    except ConnectionResetError:
        pass
    return b"compression" not in received


async def _greeted(address: str, security: Security) -> None:
    comm = await connect(address, timeout=1, **security.get_connection_args("client"))
    await comm.close()
