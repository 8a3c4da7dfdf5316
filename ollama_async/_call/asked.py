"""``Asked``: what a call asked of a model, as far as its answer or another call has to know."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


def full_name(model: str) -> str:
    """Return the name under which the server lists a model: without a tag it is ``latest``."""
    return model if ":" in model.rpartition("/")[2] else f"{model}:latest"


class Asked:
    """The model of a call and its context.

    Args:
        body: The body of the request.
        lengths: As below.

    Attributes:
        num_ctx: Tokens of context that the request asked for, if it did.
        cut: Whether the server cut the prompt; ``None`` where that is not known.
        lengths: Tokens of context of the models that the server was asked about, for all calls of a client.
    """

    __slots__ = ("_given_model", "cut", "lengths", "num_ctx")

    def __init__(self, body: Mapping[str, Any], lengths: dict[str, int | None]) -> None:
        self._given_model: str = body["model"]
        options = body.get("options")
        self.num_ctx: int | None = options.get("num_ctx") if options else None
        self.lengths: dict[str, int | None] = lengths
        # What the server may not cut, and answers, it has not cut.
        self.cut: bool | None = False if body.get("truncate") is False else None

    @property
    def model(self) -> str:
        """Name of the model, with its tag."""
        return full_name(self._given_model)

    @property
    def limit(self) -> int | None:
        """How many tokens the context has, as far as that is known."""
        return self.num_ctx or self.lengths.get(self.model)
