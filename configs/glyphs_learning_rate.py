"""Select the learning rate of configs/glyphs.py on in-distribution validation data only.

python launch.py --config=configs/glyphs_learning_rate.py --workdir=runs/learning-rate
"""

from configs import glyphs


def get_config():
    config = glyphs.get_config()
    config.task = "learning_rate"
    config.compare = False
    # A seed that no other run uses.
    config.seed = 1000
    return config
