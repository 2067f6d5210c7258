"""Training speed of the 34M llama against transformers.Trainer and a plain PyTorch loop, in turns A B A B.

    python benchmarks/training_speed.py                  # all three
    python benchmarks/training_speed.py --skip-plain     # without the slow fp32 loop

Every side trains the same shape on the same tokens: 8 layers, width 512, 8 heads, vocabulary 8192 (untied), 512 tokens,
batch 8, AdamW, gradient clipping at 1.0. The table comes last.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from alternate import STEPS_FOR_EVER, Contender, alternate, take_turns
from transformers_side import arguments, calling

from trainwright.base.device import measure_matmul_peak
from trainwright.models import count_flops, preset

ROWS, LENGTH, VOCABULARY = 8, 512, 8192


def token_rows(count: int) -> torch.Tensor:
    """Rows of `LENGTH + 1` tokens with a Zipf-like distribution, as real text has."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(count, LENGTH + 1, generator=generator)
    kinds = VOCABULARY - 8  # room for the special tokens of a character tokenizer
    return (kinds**uniform - 1).long().clamp(max=kinds - 1)


def train_ours(step_done: Callable[[], None]) -> None:
    """The product itself: `Trainer.fit` on a recipe, with logging and its loader."""
    from trainwright.trainer import Callback, Trainer

    class Tick(Callback):
        name = "tick"

        def on_step_end(self, run: object, report: object) -> None:
            step_done()

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "text.txt"
        rows = token_rows(2000)
        source.write_text("".join(chr(0x4E00 + int(t)) for t in rows.flatten()), encoding="utf-8")
        Trainer(
            {
                "model": {"preset": "llama-34m", "vocab_size": VOCABULARY},
                "data": {
                    "source": str(source),
                    "tokenizer": {"train": "char"},
                    "sequence_length": LENGTH,
                    "validation": "none",
                    "cache": folder,
                },
                "train": {"steps": STEPS_FOR_EVER, "batch_tokens": ROWS * LENGTH, "micro_batch": ROWS, "compile": True},
                "optim": {"lr": 1e-3, "schedule": "constant"},
                "precision": "bf16",
                "checkpoint": {"every": "never"},
                "monitor": {"console": "quiet", "tensorboard": False},
                "run": {"dir": folder, "name": "speed"},
            },
            callbacks=[Tick()],
        ).fit()


def train_transformers(step_done: Callable[[], None]) -> None:
    """transformers.Trainer with bf16 autocast, torch.compile, fused AdamW and SDPA attention."""
    import transformers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(hugging_face_config())
    rows = token_rows(2000)[:, :LENGTH]
    dataset = [{"input_ids": row, "labels": row} for row in rows]
    given = arguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=ROWS,
        torch_compile=True,
        max_grad_norm=1.0,
        learning_rate=1e-3,
        weight_decay=0.1,
        dataloader_num_workers=0,
    )
    transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**given),
        train_dataset=dataset,
        callbacks=[calling(step_done)],
    ).train()


def hugging_face_config() -> object:
    import transformers

    shape = preset("llama-34m")
    return transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=shape.max_position_embeddings,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        use_cache=False,
    )


def train_plain(step_done: Callable[[], None]) -> None:
    """A hand-written fp32 eager loop over the transformers model, as a first script would have it."""
    import transformers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(hugging_face_config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    rows = token_rows(2000)
    for step in range(STEPS_FOR_EVER):
        first = (step * ROWS) % (len(rows) - ROWS)
        batch = rows[first : first + ROWS]
        logits = model(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step_done()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--skip-plain", action="store_true")
    options = parser.parse_args()
    sides = {
        "trainwright": train_ours,
        "transformers.Trainer": train_transformers,
        "plain loop, fp32 eager": train_plain,
    }
    if options.side:
        take_turns(sides[options.side])
        return

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peaks = [measure_matmul_peak(device, torch.bfloat16)]
    contenders = [Contender(name) for name in sides if not (options.skip_plain and name.startswith("plain"))]
    alternate(contenders, turns=options.turns, steps=options.steps, warmup=3)
    peaks.append(measure_matmul_peak(device, torch.bfloat16))

    flops = count_flops(preset("llama-34m"), LENGTH)
    peak = max(peaks)
    print(f"\nbf16 matmul peak before and after: {peaks[0] / 1e12:.3f} and {peaks[1] / 1e12:.3f} TFLOP/s")
    print(f"{flops / 1e6:.1f} MFLOP per token (matrix products 6 x parameters, causal attention counted half)\n")
    print("| side | s/step (fastest-slowest turn) | tokens/s | share of bf16 matmul peak | trainwright is |")
    print("|---|---|---|---|---|")
    ours = contenders[0].seconds()
    for contender in contenders:
        seconds = contender.seconds()
        low, high = contender.spread()
        rate = ROWS * LENGTH / seconds
        print(
            f"| {contender.name} | {seconds:.3f} ({low:.3f}-{high:.3f}) | {rate:,.0f} | {rate * flops / peak:.1%} |"
            f" {seconds / ours:.2f}x |"
        )


if __name__ == "__main__":
    main()
