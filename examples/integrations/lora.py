"""Train LoRA adapters (PEFT) on top of a packed language model, as QLoRA does on a 4-bit one.

    python examples/integrations/lora.py

The packed layers stay as they are; gradients pass through them to the adapters, which are saved alone. Merging them is
refused: a tile has no room for them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import tbn_compiler as tbn

TEXT = "the quick brown fox jumps over the lazy dog. " * 8


def tokens() -> Tensor:
    """The text as bytes, ``int64 [8, 45]``."""
    return torch.tensor(list(TEXT.encode())).view(8, -1)


def main(argv: Sequence[str] | None = None) -> tuple[float, float]:
    """Pack a model, train adapters on it, save and load them; returns the loss before and after."""
    parser = argparse.ArgumentParser(description="Train LoRA adapters on a packed model.")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", type=Path, default=Path("runs/lora"), help="folder of the model and its adapters")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    qat = tbn.transform(LlamaForCausalLM(config), tbn.TilingConfig(p=4, min_size=0))
    tbn.lower(qat).save_pretrained(arguments.output / "base")

    base = AutoModelForCausalLM.from_pretrained(arguments.output / "base")
    model = get_peft_model(
        base, LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj", "lm_head"])
    )
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    batch, losses = tokens(), []
    for _ in range(arguments.steps):
        loss = model(input_ids=batch, labels=batch).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(arguments.output / "adapter")

    fresh = AutoModelForCausalLM.from_pretrained(arguments.output / "base")
    loaded = PeftModel.from_pretrained(fresh, arguments.output / "adapter")
    with torch.no_grad():
        final = loaded(input_ids=batch, labels=batch).loss.item()
    print(f"{arguments.output}: loss {losses[0]:.3f} before, {final:.3f} with the adapters")
    return losses[0], final


if __name__ == "__main__":
    main()
