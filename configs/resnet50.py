"""Model Stock on a ResNet-50 and ImageNet, from the checkpoint's own classifier.

    python launch.py --config=configs/resnet50.py --workdir=runs/resnet50 --config.data.root=DIR
    python launch.py --config=configs/resnet50.py:strong --workdir=runs/resnet50-strong \\
        --config.data.root=DIR

The model was pretrained on ImageNet-1K, so its classifier is the initial head. For your own images:

    python launch.py --config=configs/folder.py --workdir=runs/mine --config.data.root=DIR \\
        --config.pretrained=microsoft/resnet-50 --config.objective.name=lp_ft

The paper has no accuracy of such a model, and none is known, so none is stated here.

The optimizer is that of BiT (Kolesnikov et al. 2020; bit_pytorch/train.py of
github.com/google-research/big_transfer), which fine-tunes ResNets: SGD with momentum 0.9, learning
rate 0.003 at batch size 512, no weight decay, no clipping of gradients, 500 warm-up steps. Our
choices: a cosine instead of BiT's steps, the epochs and the crop of `configs/imagenet.py`, and a
horizontal flip, which BiT uses too. BiT's ResNets have group norms; this one has batch norms, whose
stored statistics are used and kept (docs/models.md).

Add --dry-run to print the requirements.
"""

from configs import imagenet


def get_config(setup="plain"):
    config = imagenet.get_config(setup)
    config.pretrained = "microsoft/resnet-50"
    config.data.augment.flip = True
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.003
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 0.0
    # An attention would have q, k and v to join; without one, 'layer' equals 'tensor'.
    config.merge.unit = "tensor"
    return config
