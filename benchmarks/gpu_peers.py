"""The arms of peft with TRL and of Unsloth on a GPU."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu_case import DEVICE, TIMED, WARM, Case, folder, tick
from benchmarks.job import Clock
from benchmarks.prepare import WORK


def theirs(case: Case, clock: Clock) -> None:
    """TRL's trainer, with a model of peft's or of Unsloth's."""
    model = unsloth(case) if case.arm == "Unsloth" else with_peft(case)
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    class Told(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.ready()

        def on_log(self, _: Any, __: Any, ___: Any, logs: dict[str, float], **____: Any) -> None:
            if "loss" in logs:
                tick(clock, logs["loss"], case.length)

    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(256, (WARM + TIMED, case.length), generator=draw).tolist()
    with tempfile.TemporaryDirectory() as temporary:
        arguments = SFTConfig(
            output_dir=temporary,
            max_steps=WARM + TIMED,
            per_device_train_batch_size=1,
            learning_rate=2e-4,
            bf16=True,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            use_liger_kernel=case.arm != "Unsloth" and importlib.util.find_spec("liger_kernel") is not None,
            max_length=None,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        data = Dataset.from_dict({"input_ids": rows, "labels": rows})
        tokenizer = AutoTokenizer.from_pretrained(stand_in(case.shape))
        made = SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)
        made.add_callback(Told())
        made.train()


def with_peft(case: Case) -> Any:
    """The same random weights as peftctl's, with peft's LoRA."""
    import peft
    import torch
    from transformers import BitsAndBytesConfig

    flash = importlib.util.find_spec("flash_attn") is not None
    options: dict[str, Any] = {"attn_implementation": "flash_attention_2" if flash else "sdpa"}
    if case.quantised:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    base = random_weights(case.shape, DEVICE, options)
    if case.quantised:  # what `from_pretrained` leaves behind: peft and Trainer look for it
        from transformers.quantizers.auto import AutoHfQuantizer

        base.hf_quantizer = AutoHfQuantizer.from_config(options["quantization_config"], pre_quantized=False)
        base.is_loaded_in_4bit = True
    lora = peft.LoraConfig(r=case.r, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(base, lora)


def unsloth(case: Case) -> Any:
    """Unsloth's model, read from weights that peftctl's stand-in was written to."""
    from unsloth import FastLanguageModel  # type: ignore[import-not-found]  # before all else: it patches transformers and trl

    written = WORK / f"llama-{case.shape}-weights"
    if not written.is_dir():
        from transformers import AutoTokenizer

        random_weights(case.shape, "cpu", {}).save_pretrained(written)
        AutoTokenizer.from_pretrained(stand_in(case.shape)).save_pretrained(written)
    model, _ = FastLanguageModel.from_pretrained(
        str(written), max_seq_length=case.length, dtype=None, load_in_4bit=case.quantised
    )
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return FastLanguageModel.get_peft_model(
        model, r=case.r, lora_alpha=16, lora_dropout=0, target_modules=every, use_gradient_checkpointing="unsloth"
    )


def stand_in(shape: str) -> str:
    """The folder of peftctl's stand-in: configuration and a tokenizer of bytes."""
    from peftctl.models.base import Model
    from peftctl.models.dummy import placed

    return placed(Model(name_or_path=folder(shape), load_format="dummy")).name_or_path


def random_weights(shape: str, device: str, options: dict[str, Any]) -> Any:
    """peftctl's stand-in as a model of transformers."""
    import torch

    from peftctl.models import dummy
    from peftctl.models.head import CAUSAL

    return dummy.load(Path(stand_in(shape)), CAUSAL, torch.bfloat16, torch.device(device), options)
