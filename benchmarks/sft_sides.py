"""What `sft_speed.py` compares: both sides, and what they start from. TRL's side needs no trainwright."""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alternate import STEPS_FOR_EVER
from transformers_side import arguments, calling

LENGTH, VOCABULARY = 512, 8192
LEARNING_RATE, BETAS, CLIP = 6e-4, (0.9, 0.95), 1.0
CHECKED = 3
"""Steps whose rows our side writes down for TRL."""
TEMPLATE = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- if message.role == 'assistant' -%}"
    "{% generation %}{{- message.content + '<|im_end|>' -}}{% endgeneration %}"
    "{%- else -%}{{- message.content + '<|im_end|>' -}}{%- endif -%}{{- '\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
StepDone = Callable[[list[float]], None]
"""Called after every step with its loss, its trained tokens, and the tokens in its rows (by the mean of all rows)."""


# --- what both sides start from ---


def prepare(source: Path, folder: Path) -> int:
    """Write `model/` (weights and tokenizer) and `chats.jsonl`; returns how many chats there are."""
    from trainwright.data.chat_encoding import ChatFormat
    from trainwright.data.tokenizers import train_tokenizer
    from trainwright.models import build_model, initialise, preset, replace, save_pretrained

    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not rows or not {"instruction", "output"} <= set(rows[0]):
        sys.exit(f"{source}: its rows have {sorted(rows[0]) if rows else 'nothing'}, expected instruction and output")
    texts = (f"{row['instruction']}\n{row['output']}" for row in rows)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    chat = ChatFormat(train_tokenizer("bpe", VOCABULARY, texts, special=special), TEMPLATE)
    model = build_model(replace(preset("llama-34m"), vocab_size=VOCABULARY))
    initialise(model, seed=0)
    save_pretrained(model, folder / "model")
    chat.tokenizer.save(folder / "model")
    count = 0
    with open(folder / "chats.jsonl", "w", encoding="utf-8") as out:
        for row in rows:
            messages = [
                {"role": "user", "content": row["instruction"].strip()},
                {"role": "assistant", "content": row["output"].strip()},
            ]
            if row["output"].strip() and len(chat.encode(messages).ids) <= LENGTH:
                out.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
                count += 1
    return count


# --- our side ---


def train_ours(folder: Path, step_rows: int, step_done: StepDone) -> None:
    """`Trainer.fit` on a recipe; first the rows of some steps are written down for TRL."""
    from trainwright.trainer import Callback, Trainer

    class Tick(Callback):
        name = "tick"

        def on_run_start(self, run: Any) -> None:
            self.row_tokens = float(run.dataset.lengths("train").mean()) * step_rows
            batches = [run.loader.batch(step) for step in range(CHECKED)]
            (folder / "rows.json").write_text(json.dumps([whole_chats(b) for b in batches]), encoding="utf-8")

        def on_step_end(self, run: Any, report: Any) -> None:
            step_done([float(report.loss), int(report.tokens), self.row_tokens])

    Trainer(
        {
            "model": {"path": str(folder / "model")},
            "task": {"name": "sft"},
            "data": {
                "source": str(folder / "chats.jsonl"),
                "sequence_length": LENGTH,
                "packing": "best_fit",
                "validation": "none",
                "cache": str(folder / "cache"),
            },
            "train": {"steps": STEPS_FOR_EVER, "batch_tokens": step_rows * LENGTH},
            "optim": {
                "name": "adamw",
                "lr": LEARNING_RATE,
                "betas": list(BETAS),
                "weight_decay": 0.0,
                "clip_norm": CLIP,
                "schedule": {"name": "constant", "warmup": 0},
            },
            "precision": "bf16",
            "checkpoint": {"every": "never"},
            "monitor": {"console": "quiet", "tensorboard": False},
            "run": {"dir": str(folder), "name": f"steps-of-{step_rows}-{os.getpid()}"},
        },
        callbacks=[Tick()],
    ).fit()


def whole_chats(batch: Any) -> list[dict[str, list[int]]]:
    """The rows of a batch as TRL has them: labels stand at their own tokens, and a chat's last token is there too."""
    rows = []
    for row, (ids, labels, documents) in enumerate(
        zip(batch["input_ids"], batch["labels"], batch["document_ids"], strict=True)
    ):
        made: dict[str, list[int]] = {"input_ids": [], "labels": [], "seq_lengths": []}
        for document in range(int(documents[: int(batch["lengths"][row])].max()) + 1):
            inside = documents == document
            last = labels[inside][-1:].tolist()  # a chat ends with a trained token: see `labelled_example`
            made["input_ids"] += ids[inside].tolist() + last
            made["labels"] += [-100, *labels[inside].tolist()]
            made["seq_lengths"].append(int(inside.sum()) + 1)
        rows.append(made)
    return rows


# --- TRL's side ---


@dataclass(frozen=True)
class Variant:
    """One way to run SFTTrainer."""

    micro: int
    compiled: bool
    packing: str = "bfd"

    def __str__(self) -> str:
        return f"TRL, {self.packing}, {'compiled' if self.compiled else 'eager'}, micro-batch {self.micro}"

    def arguments(self) -> list[str]:
        return ["--micro", str(self.micro), "--packing", self.packing, *(["--compiled"] if self.compiled else [])]


def train_trl(folder: Path, step_rows: int, variant: Variant, step_done: StepDone, *, same_rows: bool) -> None:
    """`SFTTrainer.train`, on its own packing or on the rows that our side wrote down."""
    import datasets
    import torch
    import transformers
    import trl

    class Counting(trl.SFTTrainer):  # type: ignore[misc]
        """Remembers what a step trained."""

        loss, trained = 0.0, 0

        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            samples, count = super().get_batch_samples(*args, **kwargs)
            self.loss, self.trained = 0.0, int(count)
            return samples, count

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            self.loss += float(loss)
            return loss

    datasets.disable_progress_bars()
    if same_rows:
        steps = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
        data = datasets.Dataset.from_list([row for step in steps for row in step])
    else:
        data = datasets.load_dataset(
            "json", data_files=str(folder / "chats.jsonl"), split="train", cache_dir=str(folder / "datasets")
        )
    given = arguments(
        output_dir=str(folder / "trl"),
        max_length=LENGTH,
        packing=True,
        packing_strategy=variant.packing,
        pad_to_multiple_of=variant.micro * LENGTH if variant.compiled and variant.packing == "bfd" else None,
        assistant_only_loss=not same_rows,
        dataset_kwargs={"skip_prepare_dataset": True} if same_rows else None,
        train_sampling_strategy="sequential" if same_rows else "random",
        per_device_train_batch_size=variant.micro,
        gradient_accumulation_steps=step_rows // variant.micro,
        torch_compile=variant.compiled,
        gradient_checkpointing=False,
        learning_rate=LEARNING_RATE,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        weight_decay=0.0,
        max_grad_norm=CLIP,
    )
    trainer = Counting(
        model=transformers.AutoModelForCausalLM.from_pretrained(
            folder / "model", attn_implementation="sdpa", dtype=torch.float32
        ),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder / "model"),
        train_dataset=data,
        callbacks=[calling(lambda: step_done([trainer.loss, trainer.trained, row_tokens]))],
        args=trl.SFTConfig(**given),
    )
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    row_tokens = statistics.mean(lengths) * step_rows
    trainer.train()
