"""Model Stock on a ViT-B/16 of ImageNet-21k, fine-tuned on ImageNet-1K with LP-FT.

    python launch.py --config=configs/vit.py --workdir=runs/vit --config.data.root=DIR
    python launch.py --config=configs/vit.py:strong --workdir=runs/vit-strong --config.data.root=DIR

The checkpoint has no classifier and no text tower. Linear probing therefore trains a random head
first (LP-FT, Kumar et al. 2022). The probed model is the anchor of the replicas and of every merge.

The paper has no such model, and no accuracy of a merged one is known. For comparison, single models
that were fine-tuned from these weights: 81.2 on ImageNet at 224 pixels, 84.6 at 384 (README of
github.com/google-research/vision_transformer, October 2020; SGD).

Values that are not in `configs/imagenet.py`, all our choice and not tuned:
- AdamW with learning rate 3e-5 and weight decay 0.1, as for CLIP.
- The probe: 5 epochs with a learning rate of 1e-3. Its head is random, so it needs a higher
  learning rate than the tower.

The same config fits other image towers without a classifier:
--config.pretrained=facebook/dinov2-base --config.image_size=224. Add --dry-run to print the
requirements.
"""

from configs import imagenet


def get_config(setup="plain"):
    config = imagenet.get_config(setup)
    config.pretrained = "google/vit-base-patch16-224-in21k"
    config.objective.name = "lp_ft"
    config.objective.probe_epochs = 5
    config.objective.probe_learning_rate = 1e-3
    return config
