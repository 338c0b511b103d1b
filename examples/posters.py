"""Item ids beside posters: a column of encoded images, which Pillow decodes while reading, and a ViT.

    python examples/posters.py [--data FILE] [--tower FOLDER] [--framework jax]

FILE is Parquet with the integers user and item, poster (the bytes of a PNG, JPEG or WebP file) and label (0 or 1), in
order of time. Without it, posters are drawn whose color each user likes or not. The tower is a small random ViT, or
that of FOLDER, of which the last layer is fine-tuned. The program trains on the first 80 % of the rows, and compares
the AUC on the rest with that of ids alone. The last line is JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from functools import lru_cache, partial
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

import recis_hybrid as rh
from recis_hybrid.towers import HfTower, find_pretrained, hf_tower, param_groups

COLUMNS = ["user", "item", "poster", "label"]
DIM = 8
SMALL = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def draw_posters(rows: int) -> pa.Table:
    """Return ratings of films, which come out one after another, with posters in the color of their kind."""
    rng = np.random.default_rng(0)
    colors, films = np.array([[200, 40, 40], [40, 160, 60], [50, 70, 200], [200, 180, 60]]), 400
    kind, posters = rng.integers(0, len(colors), films), []
    for color in colors[kind]:
        pixels = np.clip(color + rng.normal(0, 40, (48, 32, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
        posters.append(file.getvalue())
    user, item = rng.integers(0, 100, rows), np.arange(rows) * films // rows
    taste = rng.normal(0, 2, (100, len(colors)))
    label = (rng.logistic(size=rows) < taste[user, kind[item]]).astype(np.float32)
    return pa.table({"user": user, "item": item, "poster": pa.array(posters).take(pa.array(item)), "label": label})


@lru_cache(maxsize=4096)
def decode(encoded: bytes, size: int) -> Tensor:
    """Return the pixels of an image, float32 ``[3, size, size]`` from -1 to 1, as most ViTs expect."""
    try:
        image = Image.open(io.BytesIO(encoded)).convert("RGB").resize((size, size))
    except OSError as error:
        raise ValueError(f"poster: {encoded[:8]!r}... is not an image that Pillow can read ({error})") from error
    return torch.from_numpy(np.array(image, np.float32)).permute(2, 0, 1) / 127.5 - 1


def decode_posters(batch: rh.Batch, size: int) -> rh.Batch:
    """Replace encoded posters by pixels, float32 ``[B, 3, size, size]``, in the reader's threads."""
    posters = batch["poster"]
    data, offsets = posters.values.numpy().tobytes(), posters.offsets.tolist()
    return {**batch, "poster": torch.stack([decode(data[low:high], size) for low, high in pairwise(offsets)])}


class Ranker(nn.Module):
    """A multilayer perceptron over a user vector, an item vector, which includes the poster, and their product."""

    def __init__(self, tower: HfTower | None) -> None:
        super().__init__()
        configs = {name: rh.EmbeddingConfig(dim=DIM, unknown="zeros") for name in ("user", "item")}
        self.engine = rh.EmbeddingEngine(configs, optimizer=rh.optim.Adam)
        self.project = None if tower is None else nn.Linear(tower.config["hidden_size"], DIM)
        self.head = nn.Sequential(nn.Linear(3 * DIM, 32), nn.ReLU(), nn.Linear(32, 1))
        self.image = tower

    def forward(self, batch: rh.Batch) -> Tensor:
        found = self.engine(batch)
        user, item = found["user"], found["item"]
        if self.image is not None:
            item = item + self.project(self.image(batch["poster"]))
        return self.head(torch.cat([user, item, user * item], dim=1))[:, 0]


def make_tower(folder: str | None, framework: str) -> HfTower:
    """Return a tower from pixels to the output of its first token."""
    source = folder or ViTModel(ViTConfig(**SMALL, intermediate_size=96), add_pooling_layer=False)
    freeze = find_pretrained(folder).config["num_hidden_layers"] - 1 if folder else False
    return hf_tower(source, framework, pool="cls", freeze=freeze)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="Parquet file (drawn posters)")
    parser.add_argument("--tower", help="folder with config.json and safetensors of a ViT (a small random one)")
    parser.add_argument("--framework", choices=("torch", "jax"), default="torch", help="of the tower (torch)")
    parser.add_argument("--rows", type=int, default=16_000, help="rows with drawn posters (16000)")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the training rows (3)")
    args = parser.parse_args()
    begin, aucs = time.perf_counter(), {}
    rows = pq.read_table(args.data) if args.data else draw_posters(args.rows)
    torch.manual_seed(0)
    vit, cut = make_tower(args.tower, args.framework), rows.num_rows * 4 // 5
    transform = partial(decode_posters, size=vit.config["image_size"])
    train = rh.ColumnDataset.from_arrow(rows[:cut], COLUMNS, 512, shuffle=True, transforms=transform)
    test = rh.ColumnDataset.from_arrow(rows[cut:], COLUMNS, 512, transforms=transform)
    for name, tower in (("ids", None), ("posters", vit)):
        model = Ranker(tower)
        groups = param_groups(model, {"image.*": {"lr": 1e-4 if args.tower else 1e-3}} if tower else {})
        optimizers = [torch.optim.Adam(groups, lr=3e-3), rh.optim.Adam(model.engine.parameters(), lr=1e-2)]
        step = rh.TorchStep(model, nn.functional.binary_cross_entropy_with_logits, optimizers)
        trainer = rh.Trainer(step, train, test, metrics={"auc": rh.metrics.AUC()})
        aucs[name] = trainer.fit([rh.Train(epochs=args.epochs), rh.Evaluate()])["eval"]["auc"]
    print(json.dumps({"auc": aucs, "seconds": time.perf_counter() - begin}))


if __name__ == "__main__":
    main()
