from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli.terminal import Terminal

from peftctl.errors import DataError, Interrupted, NonFiniteError, Problem, RecipeError

STUBBED = [sys.executable, str(Path(__file__).with_name("stubbed.py"))]
MERGE = ["merge", "runs/x", "--output", "out"]


def test_two_problems_at_once(peftctl, verbs):
    """The session that design.md shows."""
    verbs.read.result = RecipeError.of(
        [
            Problem("bad.yaml:3:3: model.quantise: unknown key", "did you mean `quantization`?"),
            Problem("bad.yaml:7:10: method.alpha: expected a number; got `big`"),
        ]
    )
    session = peftctl("train", "bad.yaml")
    assert session.code == 1
    assert session.out == ""
    assert session.err == (
        "error: bad.yaml:3:3: model.quantise: unknown key\n"
        "  hint: did you mean `quantization`?\n"
        "error: bad.yaml:7:10: method.alpha: expected a number; got `big`\n"
    )
    assert verbs.train.calls == []


def test_with_json_the_problems_are_on_both_streams(peftctl, verbs):
    verbs.merge.result = DataError("rows.jsonl:3: not JSON", "mend the line")
    session = peftctl(*MERGE, "--json")
    assert session.json() == {"error": [{"text": "rows.jsonl:3: not JSON", "hint": "mend the line"}]}
    assert session.err == "error: rows.jsonl:3: not JSON\n  hint: mend the line\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NonFiniteError("step 3: loss nan"), 1),
        (Interrupted("stopped by SIGINT after step 3 of 9, saved", "go on with `--resume`"), 75),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(peftctl, verbs, error, code):
    verbs.train.result = error
    assert peftctl("train", "my.yaml").code == code


def test_no_answer_to_a_question_is_an_interruption(peftctl, monkeypatch):
    monkeypatch.setattr("sys.stdin", Terminal(""))  # at its end, as after Ctrl-D; Ctrl-C is told likewise
    session = peftctl("init", "my.yaml", "--model", "m", "--data", "d.jsonl")
    assert (session.code, session.err.splitlines()[-1]) == (130, "error: interrupted")


def test_an_interruption_leaves_one_line(peftctl, verbs):
    verbs.train.result = KeyboardInterrupt()
    assert peftctl("train", "my.yaml").err == "error: interrupted\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("trian my.yaml", "`trian`: no such command\n  hint: did you mean `train`?"),
        ("frobnicate", "`frobnicate`: no such command\n  hint: `peftctl --help` lists the commands"),
        ("recipes shwo x", "`shwo`: no such command\n  hint: did you mean `show`?"),
        ("train my.yaml --outptu x", "`--outptu`: no such option\n  hint: did you mean `--output`?"),
        ("train my.yaml --dry_run", "`--dry_run`: no such option\n  hint: did you mean `--dry-run`?"),
        ("train my.yaml -q", "`-q`: no such option\n  hint: `peftctl train --help` shows what it takes"),
        ("--verbose", "`--verbose`: no such option\n  hint: did you mean `--version`?"),
        ("train", "`RECIPE` is missing\n  hint: `peftctl train --help` shows what it takes"),
        ("validate", "`RECIPE ...` is missing\n  hint: `peftctl validate --help` shows what it takes"),
        ("merge runs/x", "`--output DIR` is missing\n  hint: `peftctl merge --help` shows what it takes"),
        ("merge runs/x --output o --into z", "`--into`: `z` is not one of `base`, `dequantised`\n  hint: "),
        ("export runs/x --output o --format gguf", "`--format`: `gguf` is not one of `peft`, `safetensors`\n  hint: "),
        ("generate runs/x t --beams 0", "`--beams`: "),
        ("generate runs/x t --top-p 2", "`--top-p`: "),
        ("generate runs/x t --seed", "option `--seed` requires an argument\n  hint: `peftctl generate --help` "),
        ("generate runs/x", "`TEXT` is missing\n  hint: "),
        ("schema more", "got unexpected extra argument"),
    ],
)
def test_a_wrong_command_line(peftctl, verbs, words, said):
    session = peftctl(*words.split())
    assert (session.code, session.out) == (2, "")
    assert session.err.startswith(f"error: {said}")
    assert session.err.count("error:") == 1


def test_a_wrong_command_line_as_json(peftctl, verbs):
    session = peftctl("train", "--json", "--outptu")
    assert session.json() == {"error": [{"text": "`--outptu`: no such option", "hint": "did you mean `--output`?"}]}


def test_names_in_errors_are_shown_not_obeyed(peftctl, verbs):
    verbs.merge.result = DataError("a\x1b[2Jb\u202ec\x9bd\nerror: fake", "say `[red]x[/red]`\x07\r :smile:")
    assert peftctl(*MERGE).err == (
        "error: a\\x1b[2Jb\\u202ec\\x9bd\n  error: fake\n  hint: say `[red]x[/red]`\\x07\\x0d :smile:\n"
    ).replace("\\x0d", "\\r")


def test_a_mistyped_command_is_shown_not_obeyed(peftctl, verbs):
    assert "\x1b" not in peftctl("\x1b[31mtrain\x1b[0m").err


def test_a_bug_keeps_its_traceback(peftctl, verbs):
    verbs.merge.result = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        peftctl(*MERGE)


# In a process of its own, with the streams that a shell may give


def run(mode: str, *words: str, **streams: object) -> subprocess.CompletedProcess[bytes]:
    default = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 60}
    return subprocess.run([*STUBBED, mode, *words], **(default | streams))  # type: ignore[call-overload]


def unread_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def test_nobody_reads_the_output():
    done = run("quick", *MERGE, stdout=unread_pipe())
    assert done.returncode == 141
    assert b"Error" not in done.stderr


def test_nobody_reads_the_news():
    done = run("quick", *MERGE, stderr=unread_pipe())
    assert (done.returncode, done.stdout) == (0, b"runs/x\n")


def test_nobody_reads_the_help():
    done = run("quick", "--help", stdout=unread_pipe())
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_broken_socket_is_no_broken_pipe():
    done = run("socket", *MERGE)
    assert done.returncode == 1
    assert b"BrokenPipeError" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_full_disks():
    with open("/dev/full", "w") as full:
        done = run("quick", *MERGE, "--json", stdout=full)
        assert done.returncode == 1
        assert done.stderr.endswith(b"\nerror: standard output: no space left on device\n")
        done = run("quick", *MERGE, stderr=full)
        assert (done.returncode, done.stdout) == (0, b"runs/x\n")


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
@pytest.mark.parametrize(("closed", "said"), [(">&-", b""), ("2>&-", b"runs/x\n"), (">&- 2>&-", b"")])
def test_closed_streams(closed, said):
    line = " ".join([*STUBBED, "quick", *MERGE, closed])
    done = subprocess.run(["sh", "-c", line], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60)
    assert (done.returncode, done.stdout) == (0, said)


@pytest.mark.parametrize(
    ("encoding", "name"),
    [("utf-8", "é漢".encode()), ("latin-1", b"\xe9\\u6f22"), ("ascii", b"\\xe9\\u6f22")],
)
def test_an_output_that_is_not_utf8(encoding, name):
    done = run("quick", "merge", "é漢", "--output", "out", env={**os.environ, "PYTHONIOENCODING": encoding})
    assert (done.returncode, done.stdout) == (0, name + b"\n")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such file names")
def test_a_file_name_that_is_no_text_goes_out_as_it_came():
    done = run("quick", "merge", os.fsdecode(b"a\xff"), "--output", "out")  # type: ignore[arg-type]
    assert done.stdout == b"a\xff\n"


def test_control_c():
    with subprocess.Popen([*STUBBED, "wait", *MERGE], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line == b"waiting\n":
                process.send_signal(signal.SIGINT)
                break
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"", b"error: interrupted\n")
