"""How the certificate of a server is checked: what was given for it, and the context that is made of that."""

from __future__ import annotations

import ssl
from typing import Any

import httpx

from ._errors import RequestError

__all__ = ["TlsOptions"]


class TlsOptions:
    """What was given for TLS; nothing but ``verify=False`` turns the check off.

    Attributes:
        verify: True, False, a path, or a context. ``None`` was not given, as httpx has it, and so is True.
        cert: A client certificate, or None.
        trust_env: Whether ``SSL_CERT_FILE`` and ``SSL_CERT_DIR`` are followed.

    Raises:
        RequestError: One of them is something else. What is merely false must not pass for False.
    """

    def __init__(self, verify: object, cert: object, trust_env: object) -> None:
        verify = True if verify is None else verify
        if not isinstance(verify, bool | ssl.SSLContext) and not (isinstance(verify, str) and verify):
            raise RequestError(
                f"verify={_shown(verify)}: give True, False, an ssl.SSLContext, or the path of a file of certificates"
            )
        if cert is not None and not _is_certificate(cert):
            # Not shown: a password may be in it.
            raise RequestError(
                f"cert={type(cert).__name__}: give the path of a client certificate, or (certificate, key[, password])"
            )
        self.verify: Any = verify
        self.cert: Any = cert
        self.trust_env = bool(trust_env)

    def context(self) -> ssl.SSLContext:
        """Read the certificates, which takes tens of milliseconds.

        Raises:
            RequestError: They cannot be read.
        """
        why = ""
        try:
            made: object = httpx.create_ssl_context(verify=self.verify, cert=self.cert, trust_env=self.trust_env)
        except (OSError, ValueError) as exc:
            made, why = None, str(exc)
        if not isinstance(made, ssl.SSLContext):
            raise RequestError(f"the certificates of verify= or cert= cannot be used: {why}")
        return made


def _is_certificate(cert: object) -> bool:
    parts: tuple[object, ...] = cert if isinstance(cert, tuple) else (cert,)
    return 1 <= len(parts) <= 3 and all(isinstance(part, str) and part for part in parts)


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, int | str | float) else type(value).__name__
