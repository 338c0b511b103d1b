"""Configurations: their keys, and parsing of YAML files.

Only ``app`` may import it. It uses ``CsvOptions`` and nothing else from the package.
"""

from __future__ import annotations

from recis_hybrid.app.config.load import load_config as load_config, parse_config as parse_config
from recis_hybrid.app.config.parse import ConfigError as ConfigError
from recis_hybrid.app.config.schema import (
    ColumnConfig as ColumnConfig,
    Config as Config,
    CsvConfig as CsvConfig,
    DataConfig as DataConfig,
    FeatureConfig as FeatureConfig,
    ModelConfig as ModelConfig,
    OptimizerConfig as OptimizerConfig,
    TrainConfig as TrainConfig,
    is_url as is_url,
)
