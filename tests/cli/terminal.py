"""A terminal of a few lines of Python: what stands on the screen after everything that was written to it."""

from __future__ import annotations

import io
import re

CODES = re.compile(r"\x1b\[(\d*)([A-Za-z])|(\r)|(\n)|([^\x1b\r\n]+)")


class Terminal(io.StringIO):
    """Takes text and the codes that move the cursor up and erase a line; knows no others, colours aside."""

    def isatty(self) -> bool:
        return True

    def screen(self) -> str:
        lines, row, column = [""], 0, 0
        for number, code, home, down, text in CODES.findall(re.sub(r"\x1b\[[\d;]*m", "", self.getvalue())):
            if text:
                lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
                column += len(text)
            elif home:
                column = 0
            elif down:
                row, column = row + 1, 0
                lines += [""] * (row + 1 - len(lines))
            elif code == "A":
                row -= int(number or 1)
            elif code == "K":
                assert number == "2"
                lines[row] = ""
            else:
                raise AssertionError(f"unknown code {code}")
        return "\n".join(line.rstrip() for line in lines).rstrip("\n") + "\n"
