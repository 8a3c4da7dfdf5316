"""What can be wrong with a registry."""

from __future__ import annotations

from ollama_async._errors import OllamaError

__all__ = ["RegistryClosed", "RegistryUnavailable"]


class RegistryUnavailable(OllamaError, ConnectionError):
    """Redis did not answer."""


class RegistryClosed(OllamaError, RuntimeError):
    """A registry was used after it had been closed."""
