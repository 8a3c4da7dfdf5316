"""How the server's certificate is checked: the options that were given, and the context made from them."""

from __future__ import annotations

import os
import ssl
from typing import TYPE_CHECKING, Any

import httpx

from ollama_async._errors import RequestError

if TYPE_CHECKING:
    from ollama_async._secret import Secret


class TlsOptions:
    """The options of TLS; only ``verify=False`` turns the check off.

    Attributes:
        verify: True, False, a path, or a context. ``None`` means not given, as in httpx, so it is True.
        cert: A client certificate in the forms of httpx, or None.
        trust_env: Whether ``SSL_CERT_FILE`` and ``SSL_CERT_DIR`` are used.

    Raises:
        RequestError: One of them is something else. A value that is merely falsy does not count as False.
    """

    def __init__(self, verify: object, cert: Secret[Any], trust_env: object) -> None:
        verify = True if verify is None else verify
        if not isinstance(verify, bool | ssl.SSLContext) and not (isinstance(verify, str) and verify):
            raise RequestError(
                f"verify={_shown(verify)}: give True, False, an ssl.SSLContext, or the path of a file of certificates"
            )
        if not _is_certificate(cert):
            raise RequestError(
                f"cert={type(cert.value).__name__}: give the path of a certificate, or (certificate, key[, password])"
            )
        self.verify: ssl.SSLContext | str | bool = verify
        # It may contain a password.
        self.cert = cert
        self.trust_env = bool(trust_env)

    def context(self) -> ssl.SSLContext:
        """Read the certificates, which takes tens of milliseconds.

        Raises:
            RequestError: The certificates cannot be read.
        """
        try:
            made = self._verifying()
            if self.cert.value is not None:
                made.load_cert_chain(*_parts(self.cert.value))
        except (OSError, ValueError) as exc:
            flaw = str(exc)
        else:
            return made
        raise RequestError(f"the certificates of verify= or cert= cannot be used: {flaw}")

    def _verifying(self) -> ssl.SSLContext:
        if isinstance(self.verify, ssl.SSLContext):
            return self.verify
        if isinstance(self.verify, bool):
            return httpx.create_ssl_context(verify=self.verify, trust_env=self.trust_env)
        # httpx can do this too, but warns that it will stop.
        if os.path.isdir(self.verify):
            return ssl.create_default_context(capath=self.verify)
        return ssl.create_default_context(cafile=self.verify)


def _is_certificate(cert: Secret[Any]) -> bool:
    parts = _parts(cert.value)
    return cert.value is None or (1 <= len(parts) <= 3 and all(isinstance(part, str) and part for part in parts))


def _parts(cert: str | tuple[Any, ...] | None) -> tuple[Any, ...]:
    return cert if isinstance(cert, tuple) else (cert,)


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, int | str | float) else type(value).__name__
