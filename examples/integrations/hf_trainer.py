"""Fine-tune a tiled vision transformer with the Hugging Face Trainer, pack it, and load it with ``from_pretrained``.

    python examples/integrations/hf_trainer.py

The folder is an ordinary one of transformers: ``config.json`` says how the layers are tiled, ``model.safetensors``
holds their bits. Checkpoints of the Trainer are of the same kind, and training resumes from them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from digits import datasets
from torch.utils.data import Dataset, TensorDataset
from transformers import (
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

import tbn_compiler as tbn


class ForTrainer(Dataset[dict[str, Any]]):
    """Items as the Trainer takes them."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self.data[index]
        return {"pixel_values": image, "labels": label}


def main(argv: Sequence[str] | None = None) -> float:
    """Train, pack, save, load and test; returns the accuracy of the loaded model."""
    parser = argparse.ArgumentParser(description="Train a tiled vision transformer with the Trainer.")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("runs/digits-vit"), help="folder of the model")
    arguments = parser.parse_args(argv)
    set_seed(0)
    train, test = datasets()
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, id2label={digit: str(digit) for digit in range(10)},
    )  # fmt: skip
    qat = tbn.transform(
        ViTForImageClassification(config), tbn.TilingConfig(p=4, min_size=0, float_layers=("classifier",))
    )
    trainer = Trainer(
        qat,
        TrainingArguments(
            str(arguments.output / "checkpoints"), num_train_epochs=arguments.epochs, learning_rate=2e-3,
            per_device_train_batch_size=64, lr_scheduler_type="cosine", save_strategy="epoch", save_total_limit=1,
            report_to=[], logging_strategy="no", disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=ForTrainer(train),
    )  # fmt: skip
    trainer.train()
    tbn.lower(qat.cpu()).save_pretrained(arguments.output)

    packed = AutoModelForImageClassification.from_pretrained(arguments.output)
    x, y = test.tensors
    with torch.no_grad():
        answers = packed(pixel_values=x).logits.argmax(1)
    result = float((answers == y).float().mean())
    size = (arguments.output / "model.safetensors").stat().st_size
    print(f"{arguments.output}: {size:,} bytes of weights, test accuracy {result:.1%}")
    return result


if __name__ == "__main__":
    main()
