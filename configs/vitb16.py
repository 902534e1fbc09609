"""Model Stock on CLIP ViT-B/16 and ImageNet.

    python launch.py --config=configs/vitb16.py --workdir=runs/vitb16 --config.data.root=DIR
    python launch.py --config=configs/vitb16.py:strong --workdir=runs/vitb16-strong \\
        --config.data.root=DIR

Results in the paper (top-1 on ImageNet / mean of V2, R, A and Sketch; Table 3 does not include
ObjectNet, so the mean is over four datasets):

    plain     84.1 / 62.4    Table 3
    :strong   85.2 / 60.1    Table 3

See `configs/imagenet.py` for the sources of the values. Add --dry-run to print the requirements.
"""

from configs import imagenet


def get_config(setup="plain"):
    config = imagenet.get_config(setup)
    config.pretrained = "openai/clip-vit-base-patch16"
    return config
