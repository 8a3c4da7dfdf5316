"""How the certificate of a server is checked: what was given for it, and the context that is made of that."""

from __future__ import annotations

import os
import ssl
from typing import TYPE_CHECKING, Any

import httpx

from ollama_async._errors import RequestError

if TYPE_CHECKING:
    from ollama_async._secret import Secret


class TlsOptions:
    """What was given for TLS; nothing but ``verify=False`` turns the check off.

    Attributes:
        verify: True, False, a path, or a context. ``None`` was not given, as httpx has it, and so is True.
        cert: A client certificate, or None, as httpx takes it.
        trust_env: Whether ``SSL_CERT_FILE`` and ``SSL_CERT_DIR`` are followed.

    Raises:
        RequestError: One of them is something else. What is merely false must not pass for False.
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
        # It may have a password in it.
        self.cert = cert
        self.trust_env = bool(trust_env)

    def context(self) -> ssl.SSLContext:
        """Read the certificates, which takes tens of milliseconds.

        Raises:
            RequestError: They cannot be read.
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
        # httpx can do this as well, and warns that it will not for ever.
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
