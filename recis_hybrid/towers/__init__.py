"""Pretrained towers: models of Hugging Face in torch or JAX, with the same parameters in both.

Models are found on this machine and read from safetensors; nothing in their files is executed. The package imports
transformers and JAX when a tower is built.
"""

from __future__ import annotations

from recis_hybrid.towers.corpus import TextTokenizer as TextTokenizer, embed_corpus as embed_corpus
from recis_hybrid.towers.files import PretrainedFiles as PretrainedFiles, find_pretrained as find_pretrained
from recis_hybrid.towers.fine_tuning import freeze as freeze, param_groups as param_groups, select as select
from recis_hybrid.towers.hf_tower import HfTower as HfTower, hf_tower as hf_tower
from recis_hybrid.towers.lora import add_lora as add_lora, load_lora as load_lora, save_lora as save_lora
from recis_hybrid.towers.pooling import pool as pool
from recis_hybrid.towers.unique import on_distinct_rows as on_distinct_rows
