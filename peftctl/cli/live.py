"""What a verb tells while it works: one line that lives on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live as RichLive
from rich.text import Text

from peftctl.cli.console import one_line, show, tell
from peftctl.cli.layout import aligned, message, table
from peftctl.cli.lines import bar_line, step_line
from peftctl.cli.pace import Pace, figures
from peftctl.cli.screen import is_live, screen

Event = dict[str, Any]
Listen = Callable[[Event], None]


@contextmanager
def listening(console: Console | None = None) -> Iterator[Listen]:
    """A listener for one verb, by default on standard error; at the end, however it comes, the screen is tidy."""
    console = console or screen()
    teller = Live(console) if is_live(console) else Plain(console)
    try:
        yield teller.hear
    finally:
        teller.close()


class Teller:
    """Tells every event that is told once; what comes again and again differs by where it is shown."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self.clock = console, clock
        self.pace = Pace(clock)

    def hear(self, event: Event) -> None:
        """One event; an unknown kind is not told."""
        handler = getattr(self, f"on_{event['event']}", None)
        if handler is not None:
            handler(event)

    def tell(self, *lines: Text) -> None:
        """Lines that stay."""
        tell(*lines, on=self.console)

    def rows(self, rows: list[list[str]]) -> None:
        """Labels and values."""
        columns = self.console.width if self.console.is_terminal else None
        pairs = [(label, value) for label, value in rows]
        self.tell(*(Text.assemble((label, "bold"), value) for label, value in aligned(pairs, columns)))

    def on_note(self, event: Event) -> None:
        self.tell(Text(one_line(event["text"])))

    def on_warning(self, event: Event) -> None:
        self.tell(*message("warning", event["text"], event.get("hint")))

    def on_plan(self, event: Event) -> None:
        self.rows(event["rows"])

    def on_table(self, event: Event) -> None:
        self.tell(Text(), Text(one_line(event["title"]), "bold"))
        show(table(event["columns"], event["rows"]), self.console)

    def on_eval(self, event: Event) -> None:
        best = ", the best so far" if event["best"] else ""
        others = list(event.get("losses", {}).items())[1:]
        more = "".join(f", {one_line(name)} {loss:.4f}" for name, loss in others)
        beside = "".join(f", {word} {value}" for word, value in figures(event).items())
        self.tell(Text(f"evaluated at step {event['step']}: loss {event['loss']:.4f}{beside}{best}{more}"))

    def on_trained(self, event: Event) -> None:
        self.close()
        self.tell(Text())
        self.rows(event["rows"])

    def close(self) -> None:
        """Nothing more of what was going on will come."""


class Plain(Teller):
    """For logs: a line every few seconds, fewer as the run gets long, and always the first and the last step."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(console, clock)
        self.started = self.told_at = clock()
        self.told: Event = {}
        self.what, self.quarter = "", -1

    def on_step(self, event: Event) -> None:
        self.pace.hear(event)
        now = self.clock()
        due = now - self.told_at >= min(60, max(5, (now - self.started) / 50))
        if due or not self.told or self.pace.finished:
            self.tell_step()

    def tell_step(self) -> None:
        self.told, self.told_at = self.pace.last, self.clock()
        self.tell(step_line(self.pace))

    def on_saved(self, event: Event) -> None:
        self.tell(Text(f"saved step {event['step']}: {one_line(event['path'])}"))

    def on_progress(self, event: Event) -> None:
        what, done, total = event["what"], event["done"], max(event["total"], 1)
        quarter = 4 * done // total
        if what != self.what or quarter < self.quarter:
            self.what, self.quarter = what, -1
        if quarter > self.quarter:
            self.quarter = quarter
            self.tell(Text(f"{one_line(what)}: {100 * done // total} % ({done:,} of {total:,})"))

    def close(self) -> None:
        if self.pace.last is not self.told and self.pace.last:
            self.tell_step()


class Live(Teller):
    """For a terminal: one line, drawn four times a second; what is told once goes above it."""

    def __init__(
        self, console: Console, clock: Callable[[], float] = time.monotonic, *, auto_refresh: bool = True
    ) -> None:
        super().__init__(console, clock)
        self.progress: tuple[Event, float] | None = None
        self.lock = Lock()
        self.display = RichLive(self, console=console, transient=True, redirect_stdout=False, auto_refresh=auto_refresh)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        with self.lock:
            if self.progress is not None:
                event, since = self.progress
                yield bar_line(event, self.clock() - since, options)
            elif self.pace.last:
                yield step_line(self.pace, options)

    def on_step(self, event: Event) -> None:
        with self.lock:
            self.progress = None
            self.pace.hear(event)
        self.display.start(refresh=True)

    def on_progress(self, event: Event) -> None:
        with self.lock:
            same = self.progress is not None and self.progress[0]["what"] == event["what"]
            since = self.progress[1] if same and self.progress else self.clock()
            self.progress = (event, since) if event["done"] < event["total"] else None
        self.display.start(refresh=True)

    def close(self) -> None:
        """Clear the line, but leave the last step to be read."""
        self.display.stop()
        if self.pace.last:
            self.tell(step_line(self.pace, self.console.options))
            self.pace = Pace(self.clock)
