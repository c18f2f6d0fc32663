from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from cli.steps import Clock, step
from cli.terminal import Terminal
from hypothesis import given
from hypothesis import strategies as st

from peftctl.cli.lines import bar_line, step_line
from peftctl.cli.live import Live, Plain, listening
from peftctl.cli.pace import Pace
from peftctl.cli.screen import screen

STUBBED = [sys.executable, str(Path(__file__).with_name("stubbed.py"))]
PLAN = {
    "event": "plan",
    "rows": [["model", "tiny, float32 on cpu"], ["training", "4 steps of 8 rows, adamw at 0.0004"]],
}
TRAINED = {"event": "trained", "rows": [["adapter", "runs/x/adapter  (1.0 MiB)"], ["time", "4 s"]]}
FIGURES = {"event": "table", "title": "evaluation", "columns": ["metric", "base"], "rows": [["loss", "2.1"]]}


def run_of_four(teller: Plain | Live, clock: Clock, seconds: float) -> None:
    """A whole session; between two steps go `seconds`."""
    teller.hear({"event": "note", "text": "reading [bold]tiny[/bold]\x1b[31m"})
    teller.hear({"event": "warning", "text": "2 rows are cut", "hint": "raise `dataset.max_length`"})
    for done in range(9):
        teller.hear({"event": "progress", "what": "reading", "done": done, "total": 8})
    teller.hear(PLAN)
    for number in range(1, 5):
        clock.now += seconds
        teller.hear(step(number))
        if number % 2 == 0:
            teller.hear({"event": "eval", "step": number, "loss": 1 / number, "best": number == 2})
            teller.hear({"event": "saved", "step": number, "path": f"runs/x/checkpoints/step-{number:06}"})
    teller.hear(TRAINED)
    teller.hear(FIGURES)
    teller.close()


def test_a_plain_session():
    stream, clock = io.StringIO(), Clock()
    run_of_four(Plain(screen(stream), clock), clock, 3.0)
    assert [line.rstrip() for line in stream.getvalue().splitlines()] == [
        "reading [bold]tiny[/bold]\\x1b[31m",
        "warning: 2 rows are cut",
        "  hint: raise `dataset.max_length`",
        "reading: 0 % (0 of 8)",
        "reading: 25 % (2 of 8)",
        "reading: 50 % (4 of 8)",
        "reading: 75 % (6 of 8)",
        "reading: 100 % (8 of 8)",
        "model     tiny, float32 on cpu",
        "training  4 steps of 8 rows, adamw at 0.0004",
        "step 1/4  epoch 0.25  loss 2.0000  lr 2e-4  1,200 tok/s  1.50 GiB  0:02 left",
        "evaluated at step 2: loss 0.5000, the best so far",
        "saved step 2: runs/x/checkpoints/step-000002",
        "step 3/4  epoch 0.75  loss 1.1759  lr 2e-4  1,200 tok/s  1.50 GiB  0:02 left",
        "step 4/4  epoch 1.00  loss 0.9794  lr 2e-4  1,200 tok/s  1.50 GiB",
        "evaluated at step 4: loss 0.2500",
        "saved step 4: runs/x/checkpoints/step-000004",
        "",
        "adapter  runs/x/adapter  (1.0 MiB)",
        "time     4 s",
        "",
        "evaluation",
        "metric   base",
        "loss      2.1",
    ]


def live(width: int, clock: Clock) -> tuple[Live, Terminal]:
    terminal = Terminal()
    return Live(screen(terminal, width=width, color_system=None), clock, auto_refresh=False), terminal


def test_a_live_session():
    clock = Clock()
    teller, terminal = live(80, clock)
    run_of_four(teller, clock, 3.0)
    assert terminal.screen() == (
        "reading [bold]tiny[/bold]\\x1b[31m\n"
        "warning: 2 rows are cut\n"
        "  hint: raise `dataset.max_length`\n"
        "model     tiny, float32 on cpu\n"
        "training  4 steps of 8 rows, adamw at 0.0004\n"
        "evaluated at step 2: loss 0.5000, the best so far\n"
        "evaluated at step 4: loss 0.2500\n"
        "step 4/4  loss 0.9794 ↓  lr 2e-4  1,200 tok/s  1.50 GiB\n"
        "\n"
        "adapter  runs/x/adapter  (1.0 MiB)\n"
        "time     4 s\n"
        "\n"
        "evaluation\n"
        "metric   base\n"
        "loss      2.1\n"
    )
    assert "\x1b[?25l" not in terminal.getvalue()


def test_while_it_goes_on_the_last_line_lives():
    clock = Clock()
    teller, terminal = live(80, clock)
    teller.hear({"event": "progress", "what": "reading", "done": 2, "total": 8})
    clock.now += 6
    teller.display.refresh()
    assert terminal.screen() == "reading  ━━━━────────────  2/8  0:18 left\n"
    teller.hear({"event": "progress", "what": "reading", "done": 8, "total": 8})
    teller.display.refresh()
    assert terminal.screen() == "\n"

    clock.now += 0.5
    teller.hear(step(1))
    clock.now += 0.5
    teller.hear(step(2))
    teller.hear({"event": "note", "text": "news"})
    clock.now += 0.4
    teller.display.refresh()
    assert terminal.screen() == "news\nstep 2/4  loss 1.4737 ↓  lr 2e-4  1,200 tok/s  1.50 GiB  0:01 left\n"
    teller.close()
    assert terminal.screen() == "news\nstep 2/4  loss 1.4737 ↓  lr 2e-4  1,200 tok/s  1.50 GiB  0:01 left\n"


def test_many_quick_steps_are_few_plain_lines():
    stream, clock = io.StringIO(), Clock()
    teller = Plain(screen(stream), clock)
    for number in range(1, 7201):  # two hours
        clock.now += 1.0
        teller.hear(step(number, 10_000))
    teller.close()
    lines = stream.getvalue().splitlines()
    assert 100 < len(lines) < 250
    assert lines[0].startswith("step     1/10000")
    assert lines[-1].startswith("step  7200/10000"), "the run was stopped early: its last step is told all the same"


@pytest.mark.parametrize("width", [40, 60, 72, 80, 100, 200])
def test_a_step_fits_the_terminal(width):
    options = screen(Terminal(), width=width).options
    pace = Pace(Clock())
    for number in range(980, 1000):
        pace.hear(step(number, 12_345, tokens=70_000, memory=78 * 2**30, seconds=30, loss=float(number)))
    line = step_line(pace, options)
    assert line.cell_len <= width
    assert line.plain.partition("step ")[2].startswith("  999/12345  loss ")
    assert ("left" in line.plain) == (width >= 60)
    assert ("lr 2e-4" in line.plain) == (width >= 80)
    assert ("━" in line.plain) == (width >= 100)


@given(st.integers(1, 200), st.text(max_size=300), st.integers(0, 10**9), st.integers(0, 10**9))
def test_a_bar_fits_the_terminal(width, what, done, total):
    options = screen(Terminal(), width=width).options
    line = bar_line({"what": what, "done": done, "total": total}, 3.0, options)
    assert line.cell_len <= width
    assert "\n" not in line.plain


def test_a_plain_line_tells_the_share_that_is_done():
    stream = io.StringIO()
    teller = Plain(screen(stream), Clock())
    for done in (8, 16, 24, 40):
        teller.hear({"event": "progress", "what": "rows", "done": done, "total": 40})
    assert [line.split(":")[1].split("(")[0] for line in stream.getvalue().splitlines()] == [
        " 20 % ",
        " 40 % ",
        " 60 % ",
        " 100 % ",
    ]


def test_a_terminal_without_unicode():
    class Ascii(Terminal):
        encoding = "ascii"

    options = screen(Ascii(), width=120).options
    pace = Pace(Clock())
    for number in range(1, 4):
        pace.hear(step(number))
    assert step_line(pace, options).plain.isascii()
    assert bar_line({"what": "x", "done": 1, "total": 2}, 3.0, options).plain == "x  ########--------  1/2  0:03 left"


def test_an_unknown_event_is_not_told():
    stream = io.StringIO()
    with listening(screen(stream)) as listen:
        listen({"event": "invented"})
    assert stream.getvalue() == ""


def test_an_error_leaves_the_last_step_and_no_line_that_lives():
    def fail(console):
        with listening(console) as listen:
            listen(step(1))
            raise ZeroDivisionError

    terminal = Terminal()
    with pytest.raises(ZeroDivisionError):
        fail(screen(terminal, width=80))
    assert terminal.screen() == "step 1/4  loss 2.0000 →  lr 2e-4  1,200 tok/s  1.50 GiB  0:01 left\n"


class Broken(Terminal):
    def write(self, text: str) -> int:
        raise BrokenPipeError


class BrokenLog(Broken):
    def isatty(self) -> bool:
        return False


@pytest.mark.parametrize("stream", [Broken(), BrokenLog()])
def test_a_screen_that_fails_does_not_stop_the_run(stream):
    with pytest.raises(BrokenPipeError):
        stream.write("x")
    with listening(screen(stream)) as listen:
        listen(PLAN)
        listen(step(1))
        listen(FIGURES)


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(
    ("changes", "lives"), [({}, True), ({"CI": "true"}, False), ({"CI": "false"}, True), ({"TERM": "dumb"}, False)]
)
def test_on_a_real_terminal(changes, lives):
    import pty
    import termios

    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 40))
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "NO_COLOR", "COLUMNS")}
    command = [*STUBBED, "steps", "merge", "runs/x", "--output", "out"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=theirs, env={**environment, "TERM": "xterm", **changes}
    ) as process:
        os.close(theirs)
        said = b""
        with suppress(OSError):  # how Linux says that the other end is closed
            while more := os.read(ours, 65536):
                said += more
        assert process.stdout is not None
        assert process.stdout.read() == b"runs/x\n"
    os.close(ours)
    assert process.returncode == 0
    assert (b"\x1b[2K" in said) == lives
    assert b"\x1b[?25l" not in said, "a hidden cursor stays hidden when a second Ctrl-C ends the process"
    assert b"step 40/40" in said.replace(b"\x1b[1m", b"").replace(b"\x1b[0m", b"").replace(b"\x1b[2m", b"")
