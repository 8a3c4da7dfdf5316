"""System One: questions that a model answers by a choice, a yes or no, or a score (servers from 0.35 on)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence  # noqa: TC003  (pydantic reads the annotations)
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from .types import Model

SystemOneContent: TypeAlias = str | dict[str, Any] | list[Any]
"""A text, or JSON that the model reads as text."""


class SystemOneChoiceQuestion(Model):
    """Which of 2 to 26 things is it?"""

    type: Literal["choice"] = "choice"
    """Always this."""
    instructions: SystemOneContent
    """What is asked."""
    criteria: Mapping[str, str | None]
    """What each choice means, by its name; ``None`` where the name says it. Their order counts."""


class SystemOneNoulQuestion(Model):
    """Is it so?"""

    type: Literal["noul"] = "noul"
    """Always this."""
    instructions: SystemOneContent
    """What is asked."""
    criteria: Mapping[Literal["false", "true"], str] | None = None
    """What no and yes mean."""


class SystemOneScoreQuestion(Model):
    """How much is it?"""

    type: Literal["score"] = "score"
    """Always this."""
    instructions: SystemOneContent
    """What is asked."""
    criteria: Sequence[str]
    """What each step of the scale means, from the lowest on."""


SystemOneQuestion: TypeAlias = Annotated[
    SystemOneChoiceQuestion | SystemOneNoulQuestion | SystemOneScoreQuestion, Field(discriminator="type")
]


class SystemOneRequest(Model):
    """A request of ``systemone``."""

    model: str
    """Name of the model."""
    state: SystemOneContent
    """What the questions are about."""
    questions: Mapping[str, SystemOneQuestion]
    """The questions by names that you choose."""
    keep_alive: float | str | None = None
    """How long the model stays loaded."""


class SystemOneChoiceAnswer(Model):
    """Which one it is."""

    type: Literal["choice"]
    """Always this."""
    choice: str
    """Name of the choice."""
    probabilities: Mapping[str, float]
    """Probability of each choice."""
    confidence: float
    """How sure the model is, 0 to 1."""


class SystemOneNoulAnswer(Model):
    """Whether it is so."""

    type: Literal["noul"]
    """Always this."""
    noul: float
    """Probability that it is, 0 to 1."""


class SystemOneScoreAnswer(Model):
    """How much it is."""

    type: Literal["score"]
    """Always this."""
    score: float
    """Where on the scale."""
    legend: Mapping[str, str]
    """What each step of the scale means."""
    probabilities: Mapping[str, float]
    """Probability of each step."""
    confidence: float
    """How sure the model is, 0 to 1."""


SystemOneAnswer: TypeAlias = Annotated[
    SystemOneChoiceAnswer | SystemOneNoulAnswer | SystemOneScoreAnswer, Field(discriminator="type")
]


class SystemOneUsage(Model):
    """What the request has used."""

    input_tokens: int
    """Tokens that were read."""
    output_tokens: int
    """Tokens that were written."""


class SystemOneResponse(Model):
    """An answer of ``systemone``."""

    model: str
    """The model that answers."""
    answers: Mapping[str, SystemOneAnswer]
    """The answers by the names of their questions."""
    usage: SystemOneUsage
    """What the request has used."""
