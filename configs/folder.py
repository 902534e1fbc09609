"""Your own images: class folders to train on, and folders of images that look different.

    python launch.py --config=configs/folder.py --workdir=runs/mine --config.data.root=DIR

DIR holds one folder a class, and may hold more:

    DIR/train/dog/1.jpg           what is trained on; without `train`, DIR/dog/1.jpg
    DIR/val/dog/7.jpg             for choices; without it, a tenth of each class of `train`
    DIR/test/dog/8.jpg            the row 'id' of the table; without it, another tenth
    DIR/shifts/sketch/dog/9.jpg   any number of shifts; each may have some of the classes only

Class names are the folders' names with spaces for '_'; --config.data.class_names=names.txt gives
better ones, one a line in the order of the folders' names. The classifier starts from 'a photo of
a {}.'; --config.data.templates=prompts.txt gives your own prompts.

The test set and the shifts are only measured. Choose the learning rate on validation images:

    python launch.py --config=configs/folder.py --workdir=runs/rate --config.data.root=DIR \\
        --config.task=learning_rate --config.search.learning_rates="(3e-6,1e-5,3e-5)"

A larger model, on a GPU or TPU: --config.pretrained=openai/clip-vit-large-patch14
--config.compute.dtype=bfloat16. What it takes, and what is missing: the command with --dry-run.

Large images read faster when they are made smaller once:

    python -m modelstock_jax.data prepare DIR/train --name train --out SMALL --resize 256

`--config.data.root=SMALL` then reads SMALL/train.
"""

from configs import default


def get_config():
    config = default.get_config()
    # A checkpoint's directory works as well, such as the package's own small one, 'glyph-clip'.
    config.pretrained = "openai/clip-vit-base-patch32"
    config.data.name = "folder"
    config.data.augment.crop_area = (0.9, 1.0)
    config.data.augment.flip = True

    config.epochs = 10
    config.batch_size = 64
    config.optimizer.learning_rate = 1e-5
    config.optimizer.warmup_fraction = 0.1
    # Also trains the same two replicas without merging, for the table's other rows.
    config.compare = True
    config.merge.every = "epoch"
    config.evaluation.batch_size = 64
    return config
