"""Named recipes: the flags of models of known size.

A preset is the kind of run it belongs to and its flags; what it does not name has the
default. ``scripts/print_presets.py`` prints models_hparams.md from this table.

``tiny-*`` train on two CPU cores, ``base-*`` on one GPU (the README's example), ``adm-*`` are
the published architectures of Dhariwal and Nichol 2021 and take their converted weights (of a
class-conditional file one class, ``--class_id``), and ``diff-dalle-*`` is the cascade of 1.5
billion parameters.
"""

from __future__ import annotations

from typing import Any

Flags = dict[str, Any]

_TINY_TEXT: Flags = {
    "text_length": 48,
    "enc_attn_dim": 128,
    "enc_depth": 2,
    "enc_head_channels": 32,
}
_TINY: Flags = {
    **_TINY_TEXT,
    "num_res_blocks": 1,
    "num_head_channels": 32,
    "norm_groups": 8,
    "dropout": 0.0,
    "learn_sigma": False,
    "resblock_updown": False,
    "optimizer": "muon",
    "lr": 2e-3,
    "warmup_steps": 100,
    "anneal_lr": True,
    "batch_size": 16,
    "ema_rate": "0.999",
}
# What is predicted: docs/decisions.md, by `benchmarks/objectives.py`. `adm-*` are as published.
_UPSAMPLER: Flags = {
    "gaussian_blur": True,
    "noise_schedule": "linear",
    "prediction": "x0",
    "low_res_residual": True,
}
_BASE: Flags = {
    "noise_schedule": "flow",
    "prediction": "flow",
    "schedule_sampler": "logit-normal",
}
_EFFICIENT: Flags = {"unet_layout": "efficient", "resblock_updown": False}

PRESETS: dict[str, tuple[str, Flags]] = {
    "tiny-64": (
        "generator",
        {
            **_TINY,
            "image_size": 64,
            "patch_size": 4,
            "num_channels": 64,
            "channel_mult": "1,2,2",
            "attention_resolutions": "8,4",
            "attention_positions": True,
            "noise_schedule": "cosine",
            "prediction": "x0",
            "schedule_sampler": "logsnr-normal",
            "logsnr_mean": -3.0,
            "logsnr_std": 2.0,
            "lr": 3e-3,
        },
    ),
    "tiny-256": (
        "generator",
        {
            **_TINY,
            **_UPSAMPLER,
            "image_size": 256,
            "small_size": 64,
            "crop_size": 64,
            "patch_size": 2,
            "num_channels": 32,
            "channel_mult": "1,2,3",
            "attention_resolutions": "",
            "middle_attention": False,
        },
    ),
    "tiny-1024": (
        "generator",
        {
            **_TINY,
            **_UPSAMPLER,
            "image_size": 1024,
            "small_size": 256,
            "crop_size": 128,
            "patch_size": 4,
            "num_channels": 32,
            "channel_mult": "1,2,3",
            "attention_resolutions": "",
            "middle_attention": False,
            "batch_size": 8,
        },
    ),
    "tiny-clip": (
        "classifier",
        {
            "image_size": 64,
            "classifier_width": 32,
            "classifier_depth": 1,
            "classifier_patch_size": 2,
            "classifier_channel_mult": "1,2,4",
            "classifier_attention_resolutions": "8",
            "classifier_head_channels": 32,
            "classifier_enc_attn_dim": 128,
            "classifier_enc_depth": 2,
            "classifier_embed_dim": 128,
            "noise_schedule": "cosine",
            "lr": 1e-3,
            "weight_decay": 0.1,
            "batch_size": 64,
            "eval_interval": 250,
        },
    ),
    "base-64": (
        "generator",
        {
            "image_size": 64,
            "num_channels": 128,
            "num_res_blocks": 2,
            "enc_attn_dim": 512,
            "dropout": 0.1,
            **_BASE,
            "lr": 3e-4,
            "batch_size": 512,
            "microbatch": 64,
        },
    ),
    "base-256": (
        "generator",
        {
            **_UPSAMPLER,
            "image_size": 256,
            "small_size": 64,
            "num_channels": 128,
            "num_res_blocks": 2,
            "enc_attn_dim": 512,
            "lr": 3e-4,
            "batch_size": 256,
            "microbatch": 16,
        },
    ),
    "base-1024": (
        "generator",
        {
            **_UPSAMPLER,
            "image_size": 1024,
            "small_size": 256,
            "crop_size": 256,
            "num_channels": 64,
            "num_res_blocks": 2,
            "channel_mult": "1,1,2,2,4,4",
            "attention_resolutions": "",
            "middle_attention": False,
            "enc_attn_dim": 512,
            "lr": 3e-4,
            "batch_size": 256,
            "microbatch": 32,
        },
    ),
    "base-clip": (
        "classifier",
        {
            "image_size": 64,
            "classifier_depth": 2,
            "classifier_width": 128,
            "classifier_enc_attn_dim": 512,
            "iterations": 300_000,
            "batch_size": 128,
            "lr": 3e-4,
            "weight_decay": 0.1,
        },
    ),
    "adm-64": (
        "generator",
        {
            "image_size": 64,
            "num_channels": 192,
            "num_res_blocks": 3,
            "use_new_attention_order": True,
            "dropout": 0.1,
            "noise_schedule": "cosine",
            "cond_text": False,
            "lr": 1e-4,
            "batch_size": 128,
        },
    ),
    "adm-256": (
        "generator",
        {
            "image_size": 256,
            "num_channels": 256,
            "num_res_blocks": 2,
            "noise_schedule": "linear",
            "cond_text": False,
            "lr": 1e-4,
            "batch_size": 64,
            "microbatch": 8,
        },
    ),
    "adm-up-256": (
        "generator",
        {
            "image_size": 256,
            "small_size": 64,
            "num_channels": 192,
            "num_res_blocks": 2,
            "num_heads": 4,
            "noise_schedule": "linear",
            "cond_text": False,
            "aug_level_cond": False,
            "aug_level_max": 0.0,
            "lr": 1e-4,
            "batch_size": 64,
            "microbatch": 8,
        },
    ),
    "diff-dalle-64": (
        "generator",
        {
            "image_size": 64,
            "num_channels": 256,
            "num_res_blocks": 3,
            "enc_attn_dim": 1024,
            "enc_depth": 12,
            **_BASE,
            "lr": 1e-4,
            "batch_size": 64,
            "microbatch": 16,
        },
    ),
    "diff-dalle-256": (
        "generator",
        {
            **_UPSAMPLER,
            "image_size": 256,
            "small_size": 64,
            **_EFFICIENT,
            "num_channels": 128,
            "channel_mult": "1,2,4,6",
            "num_res_blocks": "2,4,8,4",
            "attention_resolutions": "16",
            "enc_attn_dim": 768,
            "enc_depth": 12,
            "lr": 1e-4,
            "batch_size": 32,
            "microbatch": 8,
        },
    ),
    "diff-dalle-1024": (
        "generator",
        {
            **_UPSAMPLER,
            "image_size": 1024,
            "small_size": 256,
            "crop_size": 256,
            **_EFFICIENT,
            "num_channels": 64,
            "num_res_blocks": "2,4,8,8",
            "attention_resolutions": "",
            "middle_attention": False,
            "enc_attn_dim": 512,
            "lr": 1e-4,
            "batch_size": 32,
            "microbatch": 8,
        },
    ),
    "diff-dalle-clip": (
        "classifier",
        {
            "image_size": 64,
            "classifier_width": 128,
            "classifier_depth": 4,
            "classifier_enc_attn_dim": 512,
            "classifier_enc_depth": 8,
            "iterations": 400_000,
            "batch_size": 1024,
            "microbatch": 128,
            "lr": 5e-4,
            "weight_decay": 0.2,
            "warmup_steps": 3000,
        },
    ),
}
