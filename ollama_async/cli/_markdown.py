"""An answer on a terminal as Markdown, drawn anew while it grows, with a line under it that tells how it goes."""

from __future__ import annotations

import contextlib
import re
import time
from typing import TYPE_CHECKING, Literal, TypeAlias

from markdown_it import MarkdownIt
from rich.console import Group
from rich.markdown import Markdown
from rich.padding import Padding
from rich.segment import Segment, Segments
from rich.text import Text

from ._footer import Footer, stripped
from ._limit import Limit
from ._output import printable
from ._screen import Answer, AnyChunk, Screen, parts, plural, style_of

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from markdown_it.token import Token
    from rich.console import Console, RenderableType

__all__ = ["Growing", "MarkdownScreen"]

# Nothing of what a model says may vanish: HTML and definitions of links are shown as they are, and so are the addresses
# of images and links.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).disable(["reference", "image"])

_Line: TypeAlias = list[Segment]

_DRAW_SECONDS = 0.08
# Of a block that is longer, the end is drawn as it is until the block is finished.
_LONG = 20_000
_SILENT_SECONDS = 3.0
# What takes more of the processor's time is drawn as plain text: whoever wrote it may have meant it to. Less for what
# is drawn again soon.
_LIMIT_SECONDS, _AGAIN_SECONDS = 1.0, 0.3


class Growing:
    """Markdown that grows: what of it is finished, and what may still change."""

    def __init__(
        self, bounded: Callable[[Callable[[], list[Token]]], list[Token] | None] = lambda parse: parse()
    ) -> None:
        """Make it.

        Args:
            bounded: Runs the parser, and returns ``None`` where that takes too long or fails.
        """
        self._bounded = bounded
        self._whole = ""
        # What is new is put behind it when somebody looks: to copy all for each token would take quadratic time.
        self._new: list[str] = []
        self._looked: int = 0

    @property
    def rest(self) -> str:
        """What is not finished."""
        if self._new:
            self._whole += "".join(self._new)
            self._new.clear()
        return self._whole

    def add(self, text: str) -> None:
        """Add to its end."""
        self._new.append(text)

    def finished(self) -> str:
        """Take out the blocks that no text to come can change, and return them."""
        rest = self.rest
        # A line that is not complete can still become something else: "#" is a heading, and "#1" is not.
        end = rest.rfind("\n") + 1
        # Looking again and again at a long block would take all the time.
        if end == self._looked or end - self._looked < end // 50:
            return ""
        tokens = self._bounded(lambda: _PARSER.parse(rest[:end]))
        if tokens is None:
            taken = rest[:end]
        else:
            starts = [token.map[0] for token in tokens if not token.level and token.map and token.nesting >= 0]
            taken = "".join(_lines_of(rest[:end])[: starts[-1]]) if len(starts) > 1 else ""
        self._whole = rest[len(taken) :]
        self._looked = end - len(taken)
        return taken


def _lines_of(text: str) -> list[str]:
    """Return its lines as the parser counts them."""
    return [f"{line}\n" for line in text.split("\n")]


class _Block:
    """A block of Markdown by itself: so the space between blocks does not depend on how they came."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.markdown = Markdown("", hyperlinks=False)
        self.has_table = False
        # Letters and digits that have to be seen.
        self._letters: int = 0
        self._whole = True

    def add(self, token: Token) -> None:
        """Add a token of it."""
        self.markdown.parsed.append(token)
        self.has_table = self.has_table or token.type == "table_open"
        # Of what is nested still deeper the parser drops all.
        self._whole = self._whole and not (token.nesting == 1 and token.level >= _PARSER.options.maxNesting - 1)
        for part in token.children or (token,):
            self._letters += _letters(part.content)
            if part.type == "softbreak":  # models end lines where they mean it: poems, addresses
                part.type = "hardbreak"

    def is_whole(self, lines: list[_Line]) -> bool:
        """Return whether nothing was lost: what is nested deeper than the terminal is wide, or cut off in a table."""
        return self._whole and sum(_letters(part.text) for line in lines for part in line) >= self._letters


def _letters(text: str) -> int:
    return sum(map(str.isalnum, text))


def _text_of(lines: list[_Line]) -> str:
    return "".join(part.text for line in lines for part in line)


def _after(kept: str, lines: list[_Line]) -> tuple[list[_Line], str]:
    """Return lines without a text that they begin with, and what of that text is in later ones.

    It is told by its letters and digits: the lines may have been broken elsewhere, as wide as the terminal was then.
    """
    left = _letters(kept)
    for number, line in enumerate(lines):
        if not left:
            return lines[number:], ""
        text = _text_of([line])
        if (found := _letters(text)) > left:
            rest = _without_letters(left, text)
            # A comma, say, that stands behind the last letter in both.
            rest = rest.lstrip().removeprefix(re.split(r"[^\W_]", kept)[-1].strip())
            cut = len(text) - len(rest.lstrip())
            return [_cut(line, cut), *lines[number + 1 :]], ""
        left -= found
    return [], _without_letters(_letters(kept) - left, kept) if left else ""


def _without_letters(count: int, text: str) -> str:
    """Return what comes after so many letters and digits of a text."""
    end = 0
    while count:
        count -= text[end].isalnum()
        end += 1
    return text[end:]


def _cut(line: _Line, start: int) -> _Line:
    """Return a line from its n-th character on."""
    rest: _Line = []
    for part in line:
        rest += [Segment(part.text[start:], part.style)] if start < len(part.text) else []
        start = max(0, start - len(part.text))
    return rest


def _blocks(text: str) -> list[_Block]:
    """Return the blocks of a text."""
    lines, blocks = _lines_of(text), list[_Block]()
    for token in _PARSER.parse(text):
        if not token.level and token.nesting >= 0:
            first, last = token.map or (0, 0)
            blocks.append(_Block("".join(lines[first:last]).strip("\n")))
        blocks[-1].add(token)
    return blocks


def _is_empty(line: _Line) -> bool:
    return all(not part.text.strip() and not (part.style and part.style.bgcolor) for part in line)


def _joined(lines: list[_Line]) -> Segments:
    return Segments([part for line in lines for part in (*line, Segment.line())])


def _plain(text: str) -> list[_Line]:
    """Return a text as it is; the terminal itself breaks its lines."""
    return [[Segment(line)] for line in text.strip("\n").split("\n")]


def _thought(text: str) -> RenderableType:
    return Padding(Text(text, style="dim italic"), (0, 0, 0, 2))


class MarkdownScreen(Screen):
    """The answer on a terminal, as Markdown."""

    def __init__(self) -> None:
        super().__init__()
        self._notes = self.out  # always the terminal, wherever stderr goes
        self._drawing = _Drawing(self.out, "")

    @contextlib.contextmanager
    def waiting(self, model: str) -> Generator[None]:
        """Begin an answer: draw it as it comes, until the block ends."""
        self._begin()
        self._drawing = _Drawing(self.out, printable(model))
        with self._drawing.running():
            yield

    def add(self, chunk: AnyChunk) -> None:
        """Take a chunk, which is drawn soon."""
        thinking, text = parts(chunk)
        self.tokens += bool(thinking or text)
        self._shown += len(text)
        self._drawing.add(printable(thinking), printable(text), self.tokens)

    def told(self, row: int) -> None:
        """Take the row of the cursor, which the terminal was asked for."""
        self._drawing.told(row)

    def finish(self, whole: str) -> None:
        """Print the rest of the answer."""
        self._drawing.add("", printable(whole[self._shown :]), self.tokens)
        self._drawing.finish()

    def end(self, answer: Answer, said: str) -> None:
        """Say how the answer ended."""
        self.note(said, style_of(answer))
        self.out.print()


class _Drawing:
    """One answer on a terminal.

    Blocks that are finished are printed, and scroll away with all else; of the one that still grows the end is drawn
    anew, as much of it as the terminal is high. What is above that is printed, too, but for a table's rows, whose width
    the next one may change. So nothing is lost that scrolls off, and only little is ever drawn twice.
    """

    def __init__(self, console: Console, model: str) -> None:
        self._console = console
        self._model = model
        self._limit = Limit()
        self._answer, self._thoughts = Growing(lambda parse: self._limit.run(parse, _LIMIT_SECONDS)), ""
        # What was printed last.
        self._last: Literal["", "thoughts", "text"] = ""
        self._tokens = 0
        self._began, self._first_at, self._last_at = time.monotonic(), 0.0, 0.0
        self._answering = False
        self._drawn_state: object = None
        self._changed = False
        self._footer = Footer(console, asks=True)
        self.told = self._footer.told
        # The text of what grows that stands above the footer for good. It is not printed once more.
        self._kept = ""
        # Whether that can be told: the end of what grows is drawn as it will be printed.
        self._keeps = True

    @contextlib.contextmanager
    def running(self) -> Generator[None]:
        """Draw again and again, until the block ends."""
        try:
            with self._limit.ready():
                self._footer.start(_DRAW_SECONDS, self._draw)
                yield
        finally:
            self._footer.stop()

    def add(self, thinking: str, text: str, tokens: int) -> None:
        """Take the answer so far, and how much that is."""
        if not (thinking or text):
            return
        self._thoughts += thinking
        self._answer.add(text)
        self._answering = self._answering or bool(text)
        self._tokens, self._changed = tokens, True
        self._last_at = time.monotonic()
        self._first_at = self._first_at or self._last_at

    def finish(self) -> None:
        """Print all that is not printed."""
        self._note_kept()
        thoughts, rest = self._thoughts, self._answer.rest
        self._thoughts, self._answer = "", Growing()
        self._footer.shown = ""
        self._print(self._above(thoughts, rest))
        self._footer.stop()

    def _draw(self) -> None:
        if not self._footer.can_draw():
            return
        state = self._state()
        looks = state, self._console.size
        if not self._changed and looks == self._drawn_state:
            return
        self._changed, self._drawn_state = False, looks
        self._note_kept()
        # Of what the model thinks a line is finished when it is complete; all of it, when the answer begins.
        whole = self._answering or len(self._thoughts) > _LONG
        end = len(self._thoughts) if whole else self._thoughts.rfind("\n") + 1
        thoughts, self._thoughts = self._thoughts[:end], self._thoughts[end:]
        finished = self._answer.finished()
        above = self._above(thoughts, finished)
        above += self._grow(state)
        self._print(above)

    def _note_kept(self) -> None:
        """Note what a smaller terminal has pushed out of reach."""
        if self._keeps:
            self._kept += self._footer.scrolled_off()

    def _print(self, lines: list[_Line]) -> None:
        # With what is drawn below it, it is one write: nothing is seen twice, nothing flickers.
        if lines:
            self._console.print(_joined(lines), end="", crop=False)
        else:
            self._footer.refresh()

    def _above(self, thoughts: str, text: str) -> list[_Line]:
        """Render what is finished."""
        lines: list[_Line] = []
        if thoughts.strip():
            drawn = self._limit.run(lambda: self._lines(_thought(thoughts)), _LIMIT_SECONDS)
            new, self._kept = _after(self._kept, _plain(thoughts) if drawn is None else drawn)
            lines += new
            self._last = "thoughts"
        if text.strip():
            new, self._kept = _after(self._kept, self._text(text, _LIMIT_SECONDS, _plain))
            lines += new
            self._last = "text"
        return lines

    def _grow(self, state: str) -> list[_Line]:
        """Draw what grows below all else; return what has no room there, and can be printed."""
        lines: list[_Line] = []
        height = max(1, self._console.height - 3)
        rest = self._answer.rest
        self._keeps = len(rest) <= _LONG
        if not self._keeps:
            lines = self._folded(rest[-height * self._console.width :])
        elif rest.strip():
            lines = self._text(rest, _AGAIN_SECONDS, self._folded)
        elif self._thoughts.strip():
            lines = self._lines(_thought(self._thoughts))
        above: list[_Line] = []
        if len(rest) <= _LONG:
            lines, _ = _after(self._kept, lines)
        if self._keeps:
            above = lines[: max(0, len(lines) - height)]
            while above and not _letters(_text_of(above[-1:])):
                above.pop()
            self._kept += _text_of(above)
        shown = _joined(lines[len(above) :][-height:])
        self._footer.shown = Group(shown, Text(state, style="dim", no_wrap=True, overflow="ellipsis"))
        return above

    def _text(self, text: str, seconds: float, plain: Callable[[str], list[_Line]]) -> list[_Line]:
        """Render Markdown.

        Args:
            text: All of it.
            seconds: Of the processor's time that it may take.
            plain: Draws the blocks that take too long, or cannot be drawn as a whole.
        """
        self._keeps = True
        until = time.process_time() + seconds
        blocks = self._limit.run(lambda: _blocks(text), seconds)
        if blocks is None:
            blocks = [_Block(text)]
            until = 0.0
        lines: list[_Line] = []
        for block in blocks:
            drawn = self._limit.run(lambda block=block: self._whole(block), until - time.process_time())  # type: ignore[misc]
            if lines or self._last:
                lines.append([])
            lines += plain(block.source) if drawn is None else drawn
            self._keeps = self._keeps and drawn is not None and not block.has_table
        return lines

    def _whole(self, block: _Block) -> list[_Line] | None:
        lines = self._lines(block.markdown)
        return lines if block.is_whole(lines) else None

    def _folded(self, text: str) -> list[_Line]:
        return self._lines(Text(text))

    def _lines(self, shown: RenderableType) -> list[_Line]:
        """Render it, without the empty lines around it."""
        lines = [stripped(line) for line in self._console.render_lines(shown, pad=False)]
        while lines and _is_empty(lines[0]):
            del lines[0]
        while lines and _is_empty(lines[-1]):
            del lines[-1]
        return lines

    def _state(self) -> str:
        now = time.monotonic()
        if not self._tokens:
            waited = int(now - self._began)
            return f"waiting for the model {self._model} (it may be loading), {waited} s; Esc stops"
        doing = "answering" if self._answering else "thinking"
        span = self._last_at - self._first_at
        speed = f", {(self._tokens - 1) / span:.1f} tokens/s" if span > 0 else ""
        silent = now - self._last_at
        silence = f", nothing for {int(silent)} s" if silent > _SILENT_SECONDS else ""
        return f"{doing}: {plural(self._tokens, 'token')}{speed}{silence}; Esc stops"
