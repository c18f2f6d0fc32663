from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TWEETS = ROOT / "recipes" / "data" / "tweets"


def test_the_script_makes_the_files_of_the_repository(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "scripts" / "make_tweets.py", tmp_path], check=True, capture_output=True)
    for name in ("train.jsonl", "held-out.jsonl"):
        assert (tmp_path / name).read_bytes() == (TWEETS / name).read_bytes()


def test_the_files_are_what_they_say() -> None:
    ratings = {}
    for line in (TWEETS / "tweets.jsonl").read_text("utf-8").splitlines():
        tweet = json.loads(line)
        ratings.setdefault(tweet["text"].strip(), tweet["rating"])
    texts: list[str] = []
    for name, number in (("train.jsonl", 800), ("held-out.jsonl", 400)):
        rows = [json.loads(line)["messages"] for line in (TWEETS / name).read_text("utf-8").splitlines()]
        assert len(rows) == number
        for system, user, assistant in rows:
            assert system == {
                "role": "system",
                "content": "Classify the sentiment of the tweet as positive or negative.",
            }
            assert abs(ratings[user["content"]]) > 0.5
            label = "positive" if ratings[user["content"]] > 0 else "negative"
            assert assistant == {"role": "assistant", "content": label}
            texts.append(" ".join(user["content"].split()).casefold())
        assert 0.6 < sum(row[2]["content"] == "positive" for row in rows) / number < 0.75
    assert len(set(texts)) == 1200
