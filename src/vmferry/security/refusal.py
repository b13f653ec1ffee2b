"""Causes for which a connection is refused, told apart from the errors of OpenSSL, and counted."""

from __future__ import annotations

import ssl
import time
from collections import Counter
from enum import StrEnum


class Cause(StrEnum):
    """The cause of a refused connection or call: the label of the metric, and a field of the log."""

    NOT_TLS = "not_tls"
    OLD_TLS = "old_tls"
    NO_CERTIFICATE = "no_certificate"
    UNKNOWN_AUTHORITY = "unknown_authority"
    EXPIRED = "expired"
    NOT_YET_VALID = "not_yet_valid"
    REVOKED = "revoked"
    STALE_REVOCATIONS = "stale_revocations"
    BAD_CERTIFICATE = "bad_certificate"
    WRONG_NAME = "wrong_name"
    REFUSED_BY_PEER = "refused_by_peer"
    HANDSHAKE = "handshake"
    SILENT = "silent"
    TOO_MANY = "too_many"
    NOT_PERMITTED = "not_permitted"
    FOREIGN_MIGRATION = "foreign_migration"


LOG_EVERY_S = 1.0

_OF_CERTIFICATE = {
    3: Cause.STALE_REVOCATIONS,
    9: Cause.NOT_YET_VALID,
    10: Cause.EXPIRED,
    11: Cause.STALE_REVOCATIONS,
    12: Cause.STALE_REVOCATIONS,
    18: Cause.UNKNOWN_AUTHORITY,
    19: Cause.UNKNOWN_AUTHORITY,
    20: Cause.UNKNOWN_AUTHORITY,
    21: Cause.UNKNOWN_AUTHORITY,
    23: Cause.REVOKED,
}
"""X509_V_ERR_* of openssl/x509_vfy.h."""
_OF_REASON = {
    "UNSUPPORTED_PROTOCOL": Cause.OLD_TLS,
    "HTTP_REQUEST": Cause.NOT_TLS,
    "WRONG_VERSION_NUMBER": Cause.NOT_TLS,
    "RECORD_LAYER_FAILURE": Cause.NOT_TLS,
    "PACKET_LENGTH_TOO_LONG": Cause.NOT_TLS,
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": Cause.NO_CERTIFICATE,
}


def cause_of(error: BaseException) -> Cause | None:
    """The cause of a failed handshake. None: the other end went away, which is no refusal."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _OF_CERTIFICATE.get(error.verify_code, Cause.BAD_CERTIFICATE)
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return None
    if isinstance(error, ssl.SSLError):
        reason = error.reason or ""
        if "ALERT" in reason:
            return Cause.REFUSED_BY_PEER
        return _OF_REASON.get(reason, Cause.HANDSHAKE)
    if isinstance(error, TimeoutError) or "longer than" in str(error):  # asyncio says ConnectionAbortedError
        return Cause.SILENT
    return None


def words_of(error: BaseException) -> str:
    """The error for people: OpenSSL's own words, without its file names."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message or "the certificate cannot be verified"
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.lower().replace("_", " ")
    return str(error) or type(error).__name__


class Refusals:
    """Counts refused connections and calls by port and cause, since the start of the daemon."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, Cause]] = Counter()
        self._logged_s: dict[tuple[str, Cause], float] = {}

    def note(self, port: str, cause: Cause) -> bool:
        """Counts one. Returns whether it belongs into the log: one a second of each kind."""
        now_s = time.monotonic()
        self._counts[port, cause] += 1
        due = now_s - self._logged_s.get((port, cause), -LOG_EVERY_S) >= LOG_EVERY_S
        if due:
            self._logged_s[port, cause] = now_s
        return due

    def counts(self) -> dict[tuple[str, str], int]:
        """The counts by (port, cause)."""
        return {(port, cause.value): count for (port, cause), count in self._counts.items()}
