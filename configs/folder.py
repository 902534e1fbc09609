"""Fine-tune on your own images: class folders, and optional folders of shifted test sets.

    python launch.py --config=configs/folder.py --workdir=runs/mine --config.data.root=DIR

DIR contains one folder per class, and may contain more:

    DIR/train/dog/1.jpg           training images; without `train`, DIR/dog/1.jpg
    DIR/val/dog/7.jpg             validation images; without `val`, a tenth of each class of `train`
    DIR/test/dog/8.jpg            the row 'id' of the table; without `test`, another tenth
    DIR/shifts/sketch/dog/9.jpg   any number of shifted test sets; each may have a subset of classes

Class names are the folder names, with '_' replaced by spaces. --config.data.class_names=names.txt
provides better names, one per line in the order of the folder names. The classifier is initialized
from 'a photo of a {}.'; --config.data.templates=prompts.txt provides your own prompts.

The test sets are used for evaluation only. Select the learning rate on validation images:

    python launch.py --config=configs/folder.py --workdir=runs/rate --config.data.root=DIR \\
        --config.task=learning_rate --config.search.learning_rates="(3e-6,1e-5,3e-5)"

For a larger model, on a GPU or TPU: --config.pretrained=openai/clip-vit-large-patch14
--config.compute.dtype=bfloat16. Add --dry-run to print the requirements and what is missing.

Large images are read faster after they are resized once:

    python -m modelstock_jax.data prepare DIR/train --name train --out SMALL --resize 256

`--config.data.root=SMALL` then reads SMALL/train.
"""

from configs import default


def get_config():
    config = default.get_config()
    # A checkpoint directory works too, and so does 'glyph-clip', which ships with the package.
    config.pretrained = "openai/clip-vit-base-patch32"
    config.data.name = "folder"
    config.data.augment.crop_area = (0.9, 1.0)
    config.data.augment.flip = True

    config.epochs = 10
    config.batch_size = 64
    config.optimizer.learning_rate = 1e-5
    config.optimizer.warmup_fraction = 0.1
    # Also train the same two replicas without merging, for the other rows of the table.
    config.compare = True
    config.merge.every = "epoch"
    config.evaluation.batch_size = 64
    return config
