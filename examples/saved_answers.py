"""Keep conversations in a database: each answer is saved once, however it ended, also if nobody watched it.

The question is saved before the answer is begun, the answer when it has ended. What is "running" in the database, and
not among `answers.list()`, was lost with its process.
"""

import asyncio
import secrets
import sqlite3
import sys

from ollama_async import AsyncClient
from ollama_async.durable import DurableAnswers, Result

SCHEMA = """
CREATE TABLE IF NOT EXISTS turns (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, question TEXT NOT NULL,
    answer TEXT NOT NULL DEFAULT '', outcome TEXT NOT NULL DEFAULT 'running', reason TEXT
)
"""


class Conversations:
    """Turns of conversations in a file. SQLite writes to this machine's disk: where that is slow, give it a thread."""

    def __init__(self, path: str) -> None:
        self._database = sqlite3.connect(path)
        with self._database:
            self._database.execute(SCHEMA)

    def ask(self, owner: str, question: str) -> str:
        """Save a question, and return the id for its answer."""
        turn = secrets.token_urlsafe(24)
        with self._database:
            self._database.execute("INSERT INTO turns (id, owner, question) VALUES (?, ?, ?)", (turn, owner, question))
        return turn

    def save(self, result: Result) -> None:
        """Save an answer, or as much of it as came: this is what `on_end` calls."""
        reason = None if result.reason is None else str(result.reason)
        with self._database:
            self._database.execute(
                "UPDATE turns SET answer = ?, outcome = ?, reason = ? WHERE owner = ? AND id = ?",
                (result.text, result.outcome, reason, result.owner, result.id),
            )

    def of(self, owner: str) -> list[tuple[str, str, str, str | None]]:
        """Return an owner's turns."""
        query = "SELECT question, answer, outcome, reason FROM turns WHERE owner = ? ORDER BY rowid"
        return self._database.execute(query, (owner,)).fetchall()

    def close(self) -> None:
        """Close the file."""
        self._database.close()


async def main(path: str) -> None:
    conversations = Conversations(path)
    # One process; "redis://localhost" for several.
    async with (
        AsyncClient() as client,
        DurableAnswers.from_url("memory://", on_end=conversations.save) as answers,
    ):
        turn = conversations.ask("ann", "Why is the sky blue?")
        answer = await answers.begin(client.chat("llama3.2", "Why is the sky blue?", stream=True), turn, owner="ann")
        await answer.wait()  # nobody has watched it

        turn = conversations.ask("ann", "Tell me a long story.")
        answer = await answers.begin(client.chat("llama3.2", "Tell me a long story.", stream=True), turn, owner="ann")
        async with await answers.attach(turn, owner="ann") as viewer:
            async for event in viewer:
                if event.number == 4:
                    await answers.stop(turn, "Stop was pressed", owner="ann")
        await answer.wait()

    for question, text, outcome, reason in conversations.of("ann"):
        print(f"{question} [{outcome}{f': {reason}' if reason else ''}] {text!r}")
    conversations.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "conversations.db"))
