"""Model Stock on SigLIP 2 ViT-B/16 and ImageNet, from the zero-shot head of its text tower.

    python launch.py --config=configs/siglip.py --workdir=runs/siglip --config.data.root=DIR
    python launch.py --config=configs/siglip.py:strong --workdir=runs/siglip-strong \\
        --config.data.root=DIR

Any other SigLIP of fixed resolution works: --config.pretrained=google/siglip-so400m-patch14-384.

The paper has no SigLIP, and no accuracy of a merged one is known. The anchor is published: 78.2 on
ImageNet (README_siglip2.md of github.com/google-research/big_vision). The prompts there are not the
80 of CLIP that this config uses, so the row 'zero_shot' differs somewhat.

All values are those of CLIP in `configs/imagenet.py`. To use them for SigLIP is our choice, and
they are not tuned for it. Select a learning rate on held-out training images:

    python launch.py --config=configs/siglip.py --workdir=runs/siglip-rate --config.data.root=DIR \\
        --config.task=learning_rate --config.data.held_out_per_class=26 \\
        --config.search.learning_rates="(1e-5,3e-5,1e-4)"

Add --dry-run to print the requirements.
"""

from configs import imagenet


def get_config(setup="plain"):
    config = imagenet.get_config(setup)
    config.pretrained = "google/siglip2-base-patch16-224"
    return config
