"""Who may reach a server: its address, its token, its certificates. The same for every protocol."""

from __future__ import annotations

import hmac
import ipaddress
import socket
import ssl
from dataclasses import dataclass

from engine.errors import ConfigError, ConnectorError


@dataclass(frozen=True)
class Address:
    """Where a server listens.

    Example:
        >>> Address.of("[::1]:8080", "http"), Address.of(":8080", "http").is_loopback
        (Address(host='::1', port=8080), False)
    """

    host: str
    port: int

    @classmethod
    def of(cls, text: str, flag: str) -> Address:
        """The address of a text `HOST:PORT`; without a host all of the machine's.

        Raises:
            ConfigError: It is none.
        """
        host, colon, port = text.rpartition(":")
        host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        if not colon or not (port.isascii() and port.isdigit() and int(port) < 1 << 16) or (":" in host and "[" not in text):
            raise ConfigError(f"--{flag} {text!r} is no address; write HOST:PORT, or :PORT for all of this machine's addresses")
        return cls(host or "0.0.0.0", int(port))

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def listen(self, flag: str) -> socket.socket:
        """A socket that listens there.

        Raises:
            ConnectorError: It is taken, or not of this machine.
        """
        try:
            return socket.create_server(
                (self.host, self.port), family=socket.AF_INET6 if ":" in self.host else socket.AF_INET, backlog=2048
            )
        except OSError as error:
            raise ConnectorError(f"--{flag} {self}: {error.strerror or error}; give another address") from None

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Certificates:
    """Files, in PEM: the server's certificate and key, and whose certificates clients must show; None: none.

    Raises:
        ConfigError: They cannot be used.
    """

    certificate: str
    key: str
    clients: str | None = None

    def __post_init__(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.certificate, self.key, password=lambda: "")
        except (OSError, ssl.SSLError, ValueError) as error:
            raise ConfigError(f"--tls-cert {self.certificate}, --tls-key {self.key}: {_reason(error)}") from None
        if self.clients is not None:
            try:
                context.load_verify_locations(self.clients)
            except (OSError, ssl.SSLError) as error:
                raise ConfigError(f"--tls-client-ca {self.clients}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return f"no certificate and key in PEM that fit each other, without a password ({error.reason})"
    return getattr(error, "strerror", None) or str(error)


class Token:
    """The secret that clients show, `Authorization: Bearer ...`; from a file, which may change, or as it is.

    Args:
        text: The token.
        file: Or where it stands: all of the file but white space around it.

    Raises:
        ConfigError: The file cannot be read, or the token is empty or has characters that no header takes. It is not shown.

    Example:
        >>> Token("s3cret").matches(b"Bearer s3cret"), Token("s3cret").matches(b"Bearer guess"), Token("s3cret")
        (True, False, Token(...))
    """

    def __init__(self, text: str | None = None, file: str | None = None) -> None:
        self._file = file
        self._wanted = b""
        if file is not None:
            self.read_again()
        else:
            self._wanted = self._checked(text or "", "the token")

    @staticmethod
    def _checked(text: str, what: str) -> bytes:
        text = text.strip()
        if not text or not text.isascii() or not text.isprintable() or " " in text:
            raise ConfigError(f"{what} is empty, or has characters that no header takes; write one of ASCII letters and digits")
        return b"Bearer " + text.encode()

    def read_again(self) -> None:
        """Take the file's token from now on; if that cannot be, the one so far stays."""
        if self._file is None:
            return
        try:
            with open(self._file, encoding="ascii") as file:
                text = file.read(1 << 16)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not ASCII"
            raise ConfigError(f"--token-file {self._file}: {reason}") from None
        self._wanted = self._checked(text, f"--token-file {self._file}")

    def matches(self, shown: bytes) -> bool:
        """Whether a header shows it; takes as long whatever is shown."""
        return hmac.compare_digest(shown, self._wanted)

    def __repr__(self) -> str:
        return "Token(...)"
