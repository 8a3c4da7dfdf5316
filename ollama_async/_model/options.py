"""``Options``: how a model is run."""

from __future__ import annotations

from collections.abc import Sequence  # noqa: TC003  (pydantic reads the annotations)
from typing import Annotated, Any

from pydantic import BeforeValidator

from .types import Model


def _as_list(value: Any) -> Any:
    # The server wants a list and answers a text with status 500.
    return [value] if isinstance(value, str) else value


class Options(Model):
    """Options of a model; those that are not given are left to the model, and unknown ones are passed on.

    Where ``options=`` is wanted a plain dict does as well; it is checked against this. The server keeps a default for
    each; a change of one that is marked *load* makes it load the model again.
    """

    num_ctx: int | None = None
    """Tokens of context (load)."""
    num_batch: int | None = None
    """Tokens of the prompt that are read at once (load)."""
    num_gpu: int | None = None
    """Layers on the GPU; -1 lets the server decide (load)."""
    main_gpu: int | None = None
    """The GPU for what is not spread over several (load)."""
    use_mmap: bool | None = None
    """Whether the model file is mapped into memory (load)."""
    num_thread: int | None = None
    """Threads; 0 lets the server decide (load)."""
    draft_num_predict: int | None = None
    """Tokens that a draft model guesses ahead (load; servers newer than 0.24)."""
    num_keep: int | None = None
    """Tokens of the prompt that stay when the context is full."""
    seed: int | None = None
    """Seed of the random numbers; -1 for another one each time."""
    num_predict: int | None = None
    """Most tokens to answer with; -1 for no limit."""
    top_k: int | None = None
    """Choose among this many of the most likely tokens."""
    top_p: float | None = None
    """Choose among the most likely tokens that have this probability together."""
    min_p: float | None = None
    """Choose among tokens with this part of the most likely one's probability."""
    typical_p: float | None = None
    """Choose among tokens that are about as surprising as one expects."""
    repeat_last_n: int | None = None
    """How far back repetition is looked for; 0 for not at all, -1 for the whole context."""
    temperature: float | None = None
    """How much chance there is in the choice; 0 for none."""
    repeat_penalty: float | None = None
    """How much repetition is punished; 1 for not at all."""
    presence_penalty: float | None = None
    """How much a token is punished for being there already."""
    frequency_penalty: float | None = None
    """How much a token is punished for each time that it is there already."""
    stop: Annotated[Sequence[str] | None, BeforeValidator(_as_list)] = None
    """Texts that end the answer."""
