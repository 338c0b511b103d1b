"""A server as it is usually written: FastAPI, a pydantic model of the request, and a torch module with nn.Embedding.

    python -m benchmarks.peers.fastapi_server WEIGHTS PORT

WEIGHTS is a safetensors file: ``ids``, ``table.NAME`` with a row for each id, and the state of :func:`mlp`. The handler
is ``async``, which answers more requests in a second here than one in FastAPI's thread pool.
"""

from __future__ import annotations

import sys

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from safetensors.torch import load_file
from torch import Tensor, nn


class Request(BaseModel):
    columns: dict[str, list[int]]


def mlp(width: int) -> nn.Sequential:
    """Return the tower."""
    return nn.Sequential(
        nn.Linear(width, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 1), nn.Flatten(0), nn.Sigmoid()
    )


class Ranker(nn.Module):
    def __init__(self, ids: list[int], tables: dict[str, Tensor]) -> None:
        super().__init__()
        self.rows = {name: {each: row for row, each in enumerate(ids)} for name in tables}
        self.tables = nn.ModuleDict({name: nn.Embedding.from_pretrained(table) for name, table in tables.items()})
        self.tower = mlp(sum(table.shape[1] for table in tables.values()))

    def forward(self, columns: dict[str, list[int]]) -> Tensor:
        vectors = [
            table(torch.tensor([self.rows[name][each] for each in columns[name]]))
            for name, table in self.tables.items()
        ]
        scores: Tensor = self.tower(torch.cat(vectors, 1))
        return scores


def main() -> None:
    """Serve until a signal."""
    torch.set_num_threads(1)
    state = load_file(sys.argv[1])
    tables = {name.removeprefix("table."): state.pop(name) for name in list(state) if name.startswith("table.")}
    model = Ranker(state.pop("ids").tolist(), tables).eval()
    model.tower.load_state_dict(state)
    app = FastAPI()

    @app.post("/predict")
    async def predict(request: Request) -> dict[str, dict[str, list[float]]]:
        with torch.inference_mode():
            return {"outputs": {"score": model(request.columns).tolist()}}

    @app.get("/health")
    def health() -> dict[str, bool]:
        return {"ready": True}

    uvicorn.run(
        app, port=int(sys.argv[2]), log_level="warning", access_log=False, server_header=False, proxy_headers=False
    )


if __name__ == "__main__":
    main()
