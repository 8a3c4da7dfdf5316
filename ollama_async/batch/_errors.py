"""What ends a batch before its time."""

from __future__ import annotations

from typing import ClassVar

from ollama_async._errors import OllamaError

__all__ = ["BatchError", "DiskError", "HostsGone", "InputRefused", "OutputRefused"]


class BatchError(OllamaError):
    """Base of what ends a batch before its time; ``partial`` is the ``BatchResult`` so far, if it had begun.

    The same call resumes the batch, once the cause is mended.
    """

    exit_code: ClassVar[int] = 1
    """Exit status of the command line."""


class InputRefused(BatchError, ValueError):
    """The input cannot be used as it is; nothing was asked."""

    exit_code = 2


class HostsGone(BatchError):
    """No host was in service for longer than ``wait_hosts``."""

    exit_code = 69


class OutputRefused(BatchError):
    """The output is locked by another batch, is that of another job, is damaged, or cannot be created."""

    exit_code = 73


class DiskError(BatchError):
    """The output cannot be written on: the disk is full, say. It ends with its last whole line."""

    exit_code = 74
