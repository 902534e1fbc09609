"""Model Stock on CLIP ViT-B/32 and ImageNet.

    python launch.py --config=configs/vitb32.py --workdir=runs/vitb32 --config.data.root=DIR
    python launch.py --config=configs/vitb32.py:strong --workdir=runs/vitb32-strong \\
        --config.data.root=DIR

Results in the paper (top-1 on ImageNet / mean of V2, R, Sketch, ObjectNet, A):

    plain     79.89 / 50.99    Table 2
    :strong   81.19 / 48.69    Table 2; another table of the authors reports 81.33 / 48.82

See `configs/imagenet.py` for the sources of the values. Add --dry-run to print the requirements.
"""

from configs import imagenet


def get_config(setup="plain"):
    config = imagenet.get_config(setup)
    config.pretrained = "openai/clip-vit-base-patch32"
    return config
