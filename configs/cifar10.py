"""Fine-tune a CLIP on CIFAR-10 or CIFAR-100, as prepared by TensorFlow Datasets.

    python launch.py --config=configs/cifar10.py --workdir=runs/cifar10 --config.data.root=DIR
    python launch.py --config=configs/cifar10.py --workdir=runs/cifar100 --config.data.root=DIR \\
        --config.data.name=cifar100 --config.data.held_out_per_class=50

DIR is the data_dir of TensorFlow Datasets (~/tensorflow_datasets by default). The project does
not download datasets. Prepare the data once, in an environment with TensorFlow:

    tfds build cifar10 cifar10_1/v6 --file_format=array_record --data_dir=DIR

- A tenth of the training images is held out for validation. The 10,000 test images are the row
  'id'.
- The shifted test set is CIFAR-10.1 (Recht et al. 2018), if it is available. Select others by their
  names in TensorFlow Datasets: --config.data.shifts="('cifar10_1/v6','cifar10_corrupted/fog_5')".
  TensorFlow Datasets has none for CIFAR-100.
- Images of 32 x 32 pixels are resized to the input size of the model (bicubic).
- The classifier is initialized from CLIP's 18 prompts for CIFAR.

The paper has no table on CIFAR. The values below are usual ones for fine-tuning a CLIP and are
not tuned. To select the learning rate on the held-out images:

    python launch.py --config=configs/cifar10.py --workdir=runs/rate --config.data.root=DIR \\
        --config.task=learning_rate --config.search.learning_rates="(3e-6,1e-5,3e-5)"
"""

from configs import default


def get_config():
    config = default.get_config()
    config.pretrained = "openai/clip-vit-base-patch32"
    config.data.name = "cifar10"
    # A tenth of each class: 500 of 5,000 images.
    config.data.held_out_per_class = 500
    config.data.augment.crop_area = (0.9, 1.0)
    config.data.augment.flip = True

    config.epochs = 8
    config.batch_size = 128
    config.optimizer.learning_rate = 1e-5
    config.optimizer.warmup_fraction = 0.1
    # Also train the same two replicas without merging, for the other rows of the table.
    config.compare = True
    config.merge.every = "epoch"
    config.evaluation.batch_size = 250
    return config
