"""Pretrain a small CLIP from scratch by image-text contrast, like those that ship with the package.

    python launch.py --config=configs/glyph_pretrain.py --workdir=runs/glyph-clip

This writes 'glyph-clip' to runs/glyph-clip/model in Hugging Face format. With --config.seed=1 it
writes 'glyph-clip-1', a second anchor for studies. Other seeds give more anchors.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.task = "pretrain"
    config.pretrained = ""
    config.num_replicas = 1
    config.batch_size = 256
    config.merge.every = "never"
    config.optimizer.learning_rate = 1.5e-3
    config.optimizer.b2 = 0.98
    config.optimizer.weight_decay = 0.05
    config.optimizer.warmup_steps = 150
    config.pretrain.num_steps = 4000
    config.checkpoint.save_every_steps = 250
    config.log_every_steps = 25
    return config
