"""The settings of a run: how they are defined, read, checked and written, without torch."""

from cnn.config.checks import is_value_range
from cnn.config.reader import load_config
from cnn.config.settings import (
    FITS,
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ScheduleConfig,
    code_keys,
    flat,
    for_scratch,
    import_paths,
    is_import_path,
    non_experiment_keys,
    resume_rules,
    to_dict,
    with_values,
)
from cnn.config.writer import as_text, to_yaml
