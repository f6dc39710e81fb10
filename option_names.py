"""Names of options in LFM's arguments files and in other projects, and suggestions for unknown names."""

import difflib
from collections.abc import Iterable

__all__ = ["PUBLISHED_KEYS", "suggest"]

# Short keys in LFM's published test_args files. Every other key is a flag's name in capitals.
PUBLISHED_KEYS = {
    "STEPS": "num_steps",
    "IMG_SIZE": "image_size",
    "CFG": "cfg_scale",
    "ATTN_RES": "attn_resolutions",
    "BASE_CH": "nf",
    "Bs": "batch_size",
}

# Names of options in other projects (DiT, SiT, EDM, LightningDiT, diffusers) that do not resemble ours.
OTHER_NAMES = {
    "learning_rate": "lr", "max_grad_norm": "grad_clip", "gradient_accumulation_steps": "grad_accumulation",
    "epochs": "num_epoch", "num_train_epochs": "num_epoch", "max_train_steps": "max_steps", "train_batch_size": "batch_size",
    "class_dropout_prob": "label_dropout", "mixed_precision": "precision", "results_dir": "save_root", "outdir": "output_dir",
    "data": "datadir", "data_path": "datadir", "train_data_dir": "datadir", "resolution": "image_size",
    "model": "model_type", "vae": "pretrained_autoencoder_ckpt", "ckpt": "checkpoint", "num_samples": "n_sample",
    "num_fid_samples": "n_sample", "num_sampling_steps": "num_steps", "steps": "num_steps", "guidance_scale": "cfg_scale",
    "sampler": "method", "solver": "method",
}  # fmt: skip


def suggest(unknown: str, known: Iterable[str]) -> str:
    """Suggest the option among `known` that is meant by an unknown name; "" if none is close."""
    known, name = list(known), unknown.replace("-", "_").lower()
    other = OTHER_NAMES.get(name)
    near = [other] if other in known else difflib.get_close_matches(name, known, n=1)
    return f"; did you mean --{near[0]}?" if near else ""
