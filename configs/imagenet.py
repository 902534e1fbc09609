"""The paper's two training setups on ImageNet, shared by the configs of ViT-B/32, B/16 and L/14.

    --config=configs/vitb32.py           10 epochs, minimal augmentation
    --config=configs/vitb32.py:strong    16 epochs, strong augmentation (the asterisk in the paper)

From the paper (Jang et al. 2024, section 4.1): N = 2, AdamW, batch size 512 (64 for L/14), weight
decay 0.1, the classifier from the text tower, the epochs, a merge at the end of every epoch.

Not in the paper, from other sources:
- The learning rate 3e-5, 500 warm-up steps, then a cosine to 0; a random resized crop of 90 to
  100 % of the area, no flip: the fine-tuning of WiSE-FT (github.com/mlfoundations/wise-ft).
- Gradients clipped to a norm of 1: `finetune.py` of Model Soups
  (github.com/mlfoundations/model-soups), which uses a learning rate of 2e-5 at batch size 256 over
  8 epochs.
- `:strong` follows "one of Model Soup's LP initialization setup"; the paper does not state which
  one. Model Soups (Wortsman et al. 2022) drew its setups at random: label smoothing 0 to 0.225,
  mixup 0 to 0.875, RandAugment with 0 to 2 operations and magnitude 1 to 20, learning rates 1e-6 to
  1e-4. The values below are our choice near the middle of these ranges; 0.08 to 1.0 is the usual
  crop.
- The merge unit `layer` is that of the authors' notebooks (a tensor of OpenAI's state dict).
"""

from configs import default
from modelstock_jax.errors import UserError

SETUPS = ("plain", "strong")


def get_config(setup: str = "plain"):
    """Return the options of one setup, without a model."""
    if setup not in SETUPS:
        raise UserError(f"unknown setup ':{setup}'; choose one of :{', :'.join(SETUPS)}")
    config = default.get_config()
    config.num_replicas = 2
    config.batch_size = 512
    config.epochs = 10

    config.data.name = "imagenet"
    config.data.shifts = ("v2", "r", "sketch", "objectnet", "a")
    config.data.real_labels = True
    config.data.augment.crop_area = (0.9, 1.0)

    config.optimizer.learning_rate = 3e-5
    config.optimizer.weight_decay = 0.1
    config.optimizer.warmup_steps = 500

    config.merge.every = "epoch"
    config.merge.unit = "layer"
    # Several times faster than float32 on a GPU or TPU; on a CPU, use float32.
    config.compute.dtype = "bfloat16"
    config.log_every_steps = 50

    if setup == "strong":
        config.epochs = 16
        config.label_smoothing = 0.1
        config.data.augment.crop_area = (0.08, 1.0)
        config.data.augment.flip = True
        config.data.augment.randaugment_ops = 2
        config.data.augment.randaugment_magnitude = 10
        config.data.augment.mixup = 0.4
    return config
