"""Makes the tweets' train and held-out files: sentiment as a conversation, the answer being one word.

    python scripts/make_tweets.py [FOLDER]

Reads `recipes/data/tweets/tweets.jsonl`; writes `train.jsonl` (800 rows) and `held-out.jsonl` (400 rows) into FOLDER,
which is where the tweets are unless said otherwise. Tweets rated between -0.5 and 0.5 are left out: their raters did
not agree on a side. Of tweets that differ only in case or spacing one stays, so that no text is in both files. Same
input, same bytes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random

TWEETS = Path(__file__).parent.parent / "recipes" / "data" / "tweets"
SYSTEM = "Classify the sentiment of the tweet as positive or negative."
TRAIN, HELD_OUT = 800, 400
LEAST = 0.5
SEED = 0


def chosen(tweets: list[dict[str, str | float]]) -> list[tuple[str, str]]:
    """Text and label of every tweet that takes a side, each text once, in a random order that never changes."""
    sides: dict[str, tuple[str, str]] = {}
    for tweet in tweets:
        text, rating = str(tweet["text"]).strip(), float(tweet["rating"])
        if abs(rating) > LEAST:
            sides.setdefault(" ".join(text.split()).casefold(), (text, "positive" if rating > 0 else "negative"))
    random = Random(SEED)
    return sorted(sides.values(), key=lambda _: random.random())


def line(text: str, label: str) -> str:
    """One row of chat messages."""
    messages = [("system", SYSTEM), ("user", text), ("assistant", label)]
    row = {"messages": [{"role": role, "content": content} for role, content in messages]}
    return json.dumps(row, ensure_ascii=False) + "\n"


def main(folder: Path) -> None:
    with (TWEETS / "tweets.jsonl").open(encoding="utf-8") as file:
        rows = chosen([json.loads(tweet) for tweet in file])
    for name, part in (("train", rows[:TRAIN]), ("held-out", rows[TRAIN : TRAIN + HELD_OUT])):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(line(*row) for row in part), encoding="utf-8", newline="\n")
        print(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else TWEETS)
