"""`{"instruction": "...", "input": "...", "output": "..."}`, Stanford Alpaca's form (Taori et al., 2023).

The question is the instruction, a blank line and the input. The message keeps the input by itself too, so that the chat
template `alpaca` can write it under its own heading; other templates read nothing of it.
"""

from __future__ import annotations

from peftctl.data.file import Row
from peftctl.data.formats.form import Form, Problems, kind, optional_text, text_at
from peftctl.data.formats.kinds import Chat, Message
from peftctl.errors import Problem


def read(row: Row, problems: Problems) -> Chat:
    instruction, output = text_at(row, "instruction", problems), text_at(row, "output", problems)
    given, system = optional_text(row, "input", problems), optional_text(row, "system", problems)
    question: Message = {"role": "user", "content": instruction}
    if given.strip():
        question = {"role": "user", "content": f"{instruction}\n\n{given}", "input": given}
    before: list[Message] = [{"role": "system", "content": system}] if system else []
    before += _history(row, problems)
    return Chat(row.place, [*before, question, {"role": "assistant", "content": output}])


def _history(row: Row, problems: Problems) -> list[Message]:
    """Earlier questions and answers, which are trained as well."""
    history, place = row.value.get("history"), f"{row.place}: history"
    if history is None:
        return []
    if not isinstance(history, list):
        problems.append(Problem(f"{place}: expected a list of questions with their answers; got {kind(history)}"))
        return []
    said: list[Message] = []
    for index, pair in enumerate(history):
        if isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair):
            said += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        else:
            problems.append(Problem(f"{place}[{index}]: expected a question and its answer, both texts, in a list"))
    return said


ALPACA = Form(name="alpaca", required=("instruction", "output"), optional=("input", "system", "history"), read=read)
