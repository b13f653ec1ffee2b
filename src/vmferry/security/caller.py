"""The caller of a connection: its certificate's names, its unix user, or its address alone."""

from __future__ import annotations

import pwd
import socket
import struct
from dataclasses import dataclass

from vmferry.security.names import CertificateNames


@dataclass(frozen=True, slots=True)
class Caller:
    """The other end of one connection."""

    address: str
    """ "ip:port", or "unix"."""
    names: CertificateNames | None = None
    """Of its certificate; None: it has shown none."""
    host: str | None = None
    """The host of our domain that the certificate names."""
    user: str | None = None
    """The unix user of the process that connected."""

    def __str__(self) -> str:
        if self.names is not None:
            return self.names.uris[0] if self.names.uris else str(self.names)
        return f"user:{self.user}" if self.user is not None else "anonymous"


@dataclass(frozen=True, slots=True)
class PeerProcess:
    """The process that connected a unix socket (unix(7), SO_PEERCRED)."""

    pid: int
    uid: int
    gid: int

    @classmethod
    def of(cls, connection: socket.socket) -> PeerProcess:
        pid, uid, gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return cls(pid, uid, gid)

    @property
    def user(self) -> str:
        """The user's name, or its number where the host knows no name."""
        try:
            return pwd.getpwuid(self.uid).pw_name
        except KeyError:
            return str(self.uid)
