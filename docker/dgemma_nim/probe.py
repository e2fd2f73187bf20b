"""The container's health check: whether the front end says that it is ready. Knows the address by variables only."""

from __future__ import annotations

import http.client
import os
import ssl
import sys
from collections.abc import Mapping

from dgemma_nim.configuration import resolve
from dgemma_runtime.errors import ConfigurationError

PATH = "/v1/health/ready"
_TIMEOUT_S = 3


def address(environment: Mapping[str, str]) -> tuple[int, bool]:
    """Port on loopback, and whether it speaks TLS; raises ConfigurationError."""
    configuration = resolve([], environment).configuration
    if configuration.health_port is not None:
        return configuration.health_port, False
    if configuration.ssl_mode == "mtls":
        raise ConfigurationError("NIM_SSL_MODE is 'mtls' and there is no client certificate here; set NIM_HEALTH_PORT")
    return configuration.server_port, configuration.ssl_mode == "tls"


def ready(port: int, encrypted: bool) -> bool:
    """Whether it answers 200 in time; on loopback the certificate is not held to a name."""
    connection = (
        http.client.HTTPSConnection("127.0.0.1", port, timeout=_TIMEOUT_S, context=ssl._create_unverified_context())
        if encrypted
        else http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
    )
    try:
        connection.request("GET", PATH)
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def main() -> None:
    """Exit status 0 where it is ready, else 1."""
    try:
        sys.exit(0 if ready(*address(os.environ)) else 1)
    except ConfigurationError as error:
        sys.exit(f"probe: {error}")


if __name__ == "__main__":
    main()
