"""What a mistyped setting was meant to be."""

import difflib
from collections.abc import Iterable

from cnn.config.values import fold

# What other programs call a setting, whatever section it is in.
ALIASES = {
    "optim.lr": "learning_rate learningrate lr0 base_lr init_lr initial_lr max_lr",
    "optim.weight_decay": "wd decay l2",
    "optim.name": "optimizer optimiser opt",
    "data.batch_size": "bs batch batchsize batches train_batch_size",
    "data.num_workers": "workers worker nw n_workers num_worker",
    "data.image_size": "img_size imgsz img imagesize size input_size resolution crop_size resize",
    "data.root": "data_dir data_path data_root dataset_path train_dir path dir",
    "data.name": "dataset dataset_name",
    "data.channels": "in_channels in_chans n_channels num_channels",
    "data.augment": "augmentation augmentations aug transform transforms",
    "data.val_fraction": "val_split val_size val_ratio validation_split valid_fraction",
    "data.test_fraction": "test_split test_size test_ratio",
    "data.folds": "k_folds kfold kfolds num_folds n_splits",
    "data.positive": "pos pos_label positive_class",
    "data.group": "patient patient_id patients",
    "model.name": "arch architecture backbone net network",
    "model.weights": "checkpoint ckpt pretrained_path load_from init_checkpoint",
    "loss.name": "criterion loss_fn",
    "loss.label_smoothing": "smoothing smooth label_smooth",
    "loss.class_weights": "class_weight weight pos_weight",
    "schedule.name": "scheduler lr_scheduler lr_schedule sched",
    "schedule.warmup_epochs": "warmup warmup_epoch warm_up",
    "train.epochs": "epoch num_epochs max_epochs n_epochs num_epoch",
    "train.precision": "amp fp16 bf16 half mixed_precision use_amp",
    "train.early_stop_patience": "patience early_stop early_stopping",
    "train.clip_grad_norm": "clip clip_grad grad_clip max_norm max_grad_norm gradient_clip_val",
    "train.accumulate": "grad_accum accumulation_steps gradient_accumulation_steps",
    "train.ema_decay": "ema model_ema ema_rate",
    "checkpoint.monitor": "metric eval_metric best_metric",
    "checkpoint.every_epochs": "save_every save_freq save_period save_interval",
    "log.every_seconds": "log_interval print_freq log_every log_freq",
    "seed": "random_seed manual_seed random_state",
    "device": "cuda gpu use_cuda",
    "run": "exp exp_name experiment run_name save_dir output_dir out_dir log_dir",
}
# What is no setting.
ELSEWHERE = {
    "num_classes n_classes nc": "it comes from the data",
    "dropout drop_rate width": "an argument of the model: model.args={NAME: VALUE}",
    "modalities modality": "data.tag names one; for several, see examples/two_modalities.py",
    "gpus ngpu num_gpus world_size": "torchrun --nproc_per_node=NUMBER train.py",
    "resume go_on_train": "an option: --resume",
    "config cfg": "an option: --config FILE",
}
NEAR = 0.75  # of 1, how alike two last words are at least


def suggest_key(word: str, known: Iterable[str]) -> str:
    """Returns the end of a message that says what an unknown key was meant to be.

    The last word of the key counts more than its section: first what other programs call a setting,
    then a known key that ends with the same or a similar word, in the same section if there is one.

    Args:
        word: the unknown key, such as "train.lr".
        known: the known keys.

    Returns:
        The text, such as " — did you mean 'optim.lr'?"; "" if there is nothing to suggest.
    """
    section, _, last = fold(word).rpartition(".")
    known = list(known)
    for words, where in ELSEWHERE.items():
        if last in words.split() and "train.epochs" in known:
            return f" — {where}"
    found = [key for key, words in ALIASES.items() if key in known and last in words.split()]
    if not found:
        lasts = {key.rpartition(".")[2] for key in known}
        near = [last] if last in lasts else difflib.get_close_matches(last, lasts, 1, NEAR)
        found = [key for key in known if near and key.rpartition(".")[2] == near[0]]
        found.sort(key=lambda key: key.rpartition(".")[0] != section)
    found = found or difflib.get_close_matches(fold(word), known, 1)
    return f" — did you mean '{found[0]}'?" if found else ""
