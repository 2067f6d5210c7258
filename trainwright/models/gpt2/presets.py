"""Named sizes of the gpt2 family: nanoGPT's CPU run on tiny Shakespeare, and the four sizes OpenAI published."""

from __future__ import annotations

from trainwright.models.gpt2.config import GPT2Config

__all__ = ["GPT2_PRESETS"]


def _gpt2(layers: int, hidden: int, heads: int) -> GPT2Config:
    return GPT2Config(
        vocab_size=50257,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        intermediate_size=4 * hidden,
        embd_dropout=0.1,
        attn_dropout=0.1,
        resid_dropout=0.1,
        bos_token_id=50256,
        eos_token_id=50256,
    )


GPT2_PRESETS: dict[str, GPT2Config] = {
    # nanoGPT, train_shakespeare_char on a CPU: 65 characters, no biases, exact GELU, no dropout
    "gpt2-nano": GPT2Config(
        vocab_size=65,
        hidden_size=128,
        num_layers=4,
        num_heads=4,
        intermediate_size=512,
        max_position_embeddings=64,
        activation="gelu",
        bias=False,
    ),
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
}
