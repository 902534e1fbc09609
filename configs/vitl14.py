"""Model Stock on CLIP ViT-L/14 and ImageNet.

    python launch.py --config=configs/vitl14.py --workdir=runs/vitl14 --config.data.root=DIR
    python launch.py --config=configs/vitl14.py:strong --workdir=runs/vitl14-strong \\
        --config.data.root=DIR

Expect from the paper (top-1 on ImageNet / mean of the shifts; Table 4 does not say whether of
four sets or of five with ObjectNet):

    plain     87.0 / 71.6    Table 4
    :strong   87.7 / 73.5    Table 4; the abstract says 87.8 / 74.9, of five sets

The batch is 64, not 512: "due to memory limitation" (the paper's footnote 4). The rate that went
with it is not published; 3e-5 is the one for 512. The other models' batch, in parts of the same
size: --config.batch_size=512 --config.gradient_accumulation_steps=8.

Where its values come from: `configs/imagenet.py`. What it needs: the same command with --dry-run.
"""

from configs import imagenet


def get_config(setup="plain"):
    config = imagenet.get_config(setup)
    config.pretrained = "openai/clip-vit-large-patch14"
    config.batch_size = 64
    return config
