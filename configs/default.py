"""Every option once, with its meaning. The other files of this folder set only what differs.

Override any of them on the command line: `--config.merge.every=100`.
"""

from ml_collections import ConfigDict

from modelstock_jax.data.published_sets import IMAGENET


def get_config() -> ConfigDict:
    config = ConfigDict()

    # What to run: 'finetune' (replicas, merges, evaluation), 'learning_rate' (its choice on
    # validation data) or 'pretrain' (a CLIP from scratch).
    config.task = "finetune"
    # The pretrained CLIP: a directory or a hub id with safetensors, in Hugging Face's, OpenCLIP's
    # or OpenAI's layout; 'glyph-clip' and 'glyph-clip-1' ship with the package.
    config.pretrained = "glyph-clip"
    # Side of the images in pixels; 0 takes the checkpoint's. Another one resizes its position
    # embeddings, once, before training.
    config.image_size = 0
    # Replica r of a run uses the data order and augmentation of (seed, r).
    config.seed = 0
    # Runs seeds seed, seed + 1, ...; the tables then show means and standard errors.
    config.num_seeds = 1
    # N, the copies being fine-tuned.
    config.num_replicas = 2
    # Also trains the same replicas unmerged, for the rows that merge after training.
    config.compare = False

    # Passes over the training images.
    config.epochs = 10
    # Examples that a replica sees in a step, over all devices.
    config.batch_size = 512
    # Parts that a step cuts its batch into, one after the other, for one update by the mean of
    # their gradients: the same update in less memory. A multiple of the devices must fit a part.
    config.gradient_accumulation_steps = 1
    # The share of a target that is spread over all classes; 0 turns it off.
    config.label_smoothing = 0.0

    config.data = ConfigDict()
    # 'glyphs' is rendered, nothing is read from disk; 'imagenet', 'cifar10', 'cifar100' (as
    # TensorFlow Datasets prepares them) and 'folder' lie in data.root.
    config.data.name = "glyphs"
    config.data.root = ""
    # Where a set lies, from data.root on or as a whole path; "" looks in the usual places.
    config.data.paths = ConfigDict(dict.fromkeys(("train", "validation", "test", *IMAGENET), ""))
    # Whether the sets of ImageNet and CIFAR must have as many classes and images as were published.
    config.data.check_counts = True
    # Training images of each class, of ImageNet or CIFAR, that are kept for validation: the paper
    # trains on all of ImageNet; Model Soups keeps 26, to choose the members of a greedy soup and
    # the learning rate.
    config.data.held_out_per_class = 0
    # Shift sets to measure, in the table's order; () takes all that the data set has, of CIFAR-10
    # CIFAR-10.1 where it is there.
    config.data.shifts = ()
    # Also measure the test images by their reassessed labels (ReaL, Beyer et al. 2020).
    config.data.real_labels = False
    # Class names and templates ('{}' stands for the name) of the zero-shot head: .txt files, one a
    # line in the order of the labels, or .json lists. "" takes the data set's own; of 'folder',
    # the folders' names and 'a photo of a {}.'.
    config.data.class_names = ""
    config.data.templates = ""
    # For 'folder': the share of each class to hold out where there is no such folder.
    config.data.validation_fraction = 0.1
    config.data.test_fraction = 0.1
    # How stored images are read: threads that decode in each process (0: one a core), processes
    # beside this one, batches held ready, and whether an image that cannot be decoded is an 'error'
    # or left out and named in the log ('skip').
    config.data.loader = ConfigDict()
    config.data.loader.threads = 0
    config.data.loader.workers = 0
    config.data.loader.prefetch = 2
    config.data.loader.unreadable = "error"
    # A directory for the training images decoded and with this short side: written by the first
    # run, read without decoding by all; "" decodes each time (docs/input.md).
    config.data.decoded_cache_dir = ""
    config.data.decoded_cache_short_side = 256
    # What happens to stored training images. The glyphs have an augmentation of their own.
    config.data.augment = ConfigDict()
    # Random resized crop, bicubic: the share of the area, and the aspect ratio.
    config.data.augment.crop_area = (0.9, 1.0)
    config.data.augment.crop_ratio = (0.75, 1.3333333333333333)
    config.data.augment.flip = False
    # RandAugment (Cubuk et al. 2020): operations an image gets (0: off) and their strength, 0-30.
    config.data.augment.randaugment_ops = 0
    config.data.augment.randaugment_magnitude = 0
    # Mixup's alpha; 0 turns it off.
    config.data.augment.mixup = 0.0

    # What is minimized and what is trained (docs/methods.md): 'cross_entropy', 'car_ft', 'flyp',
    # 'l2_sp', 'linear_probe' (the head alone), 'bitfit' (biases and head), or 'lp_ft' (the head
    # alone first, then everything from there; the merge's anchor is then the probed model).
    config.objective = ConfigDict()
    config.objective.name = "cross_entropy"
    # The head that training starts from: 'zero_shot' (the checkpoint's own where it has one) or
    # 'random'.
    config.objective.head = "zero_shot"
    # car_ft: the weight of the divergence between context distributions.
    config.objective.car_ft_alpha = 1.0
    # l2_sp: alpha/2 |w - w0|^2 for what was pretrained, beta/2 |w|^2 for the head. Set
    # optimizer.weight_decay=0 with it.
    config.objective.l2_sp_alpha = 0.01
    config.objective.l2_sp_beta = 0.01
    # lp_ft: the length and the learning rate of its first phase. A zero-shot head, of
    # exp(logit_scale) times unit columns, needs far more than a tower: 0.1 on the glyphs
    # (docs/results.md).
    config.objective.probe_epochs = 5
    config.objective.probe_learning_rate = 1e-3

    config.optimizer = ConfigDict()
    # 'adamw', or 'sgd' with momentum.
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 3e-5
    # Decoupled, toward 0, and toward the pretrained weights; both are multiplied by the rate.
    config.optimizer.weight_decay = 0.1
    config.optimizer.decay_to_pretrained = 0.0
    # AdamW's decay rates of the moments, and what keeps it from dividing by 0.
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    # SGD's.
    config.optimizer.momentum = 0.9
    # Weights held within a radius of the pretrained ones, layer by layer: 'none', 'ftp' (radii
    # learned in the steps) or 'tpgm' (after training, on validation images). The radii's norm is
    # 'mars' or 'l2', `learning_rate` is theirs; `k` is ftp's, `steps` tpgm's.
    config.optimizer.projection = ConfigDict()
    config.optimizer.projection.name = "none"
    config.optimizer.projection.norm = "mars"
    config.optimizer.projection.learning_rate = 1e-2
    config.optimizer.projection.k = 1.0
    config.optimizer.projection.steps = 200
    # Largest global norm of a replica's gradient; 0 turns clipping off.
    config.optimizer.clip_norm = 1.0
    # The warm-up is the sum of the two; after it a cosine falls to final_fraction of the rate.
    config.optimizer.warmup_steps = 0
    config.optimizer.warmup_fraction = 0.0
    config.optimizer.final_lr_fraction = 0.0

    # Numbers of each replica's own, one a replica, in place of the one above: a search of Model
    # Soups as one program, `--config.num_replicas=3 --config.per_replica.epochs="(4,6,8)"`; () is
    # the same for all. A replica that ends before `epochs` stays as it is.
    config.per_replica = ConfigDict()
    config.per_replica.learning_rate = ()
    config.per_replica.weight_decay = ()
    config.per_replica.epochs = ()
    config.per_replica.label_smoothing = ()
    config.per_replica.mixup = ()
    # Of the glyphs' own augmentation: 0 leaves images as they are, 1 is the usual.
    config.per_replica.augment_strength = ()
    # Of stored images: RandAugment's two.
    config.per_replica.randaugment_ops = ()
    config.per_replica.randaugment_magnitude = ()

    config.merge = ConfigDict()
    # When replicas merge: 'epoch' (at each epoch's end), a number of steps, 'end' or 'never'.
    # Whatever it is, a run that merges at all merges once more at its end.
    config.merge.every = "epoch"
    # 'model_stock' (equation 3) or 'uniform_mean' (t = 1, the control).
    config.merge.method = "model_stock"
    # Which numbers share one angle: tensor, layer, filter, head, block, global.
    config.merge.unit = "tensor"
    # The replicas' Adam moments at a merge: 'keep', 'average' or 'reset'.
    config.merge.opt_state = "keep"
    # Noise carried over merges, an extension of ours: 'off', 'every' (shrink at every merge)
    # or 'last' (shrink at the last one only).
    config.merge.carry_noise = "off"

    config.compute = ConfigDict()
    # 'float32' or 'bfloat16' arithmetic in the towers; weights and moments stay float32.
    config.compute.dtype = "float32"
    # 'xla' or 'cudnn'.
    config.compute.attention_impl = "xla"
    # Recompute activations in the backward pass.
    config.compute.remat = False
    # How replicas run: 'vmap' (side by side), 'map' (one after the other, one device) or 'auto'.
    config.compute.replica_mode = "auto"
    # A directory for compiled programs, from run to run; nobody else may write there. "" leaves it
    # to JAX_COMPILATION_CACHE_DIR.
    config.compute.compilation_cache = ""

    config.mesh = ConfigDict()
    # Devices along each axis; 0 lets the code choose (1 device: both replicas on it; 2: one each).
    config.mesh.replica = 0
    config.mesh.data = 0
    # Tensors of at least so many elements are split over the data axis (FSDP), with their Adam
    # moments; smaller ones lie whole on every device, and 0 splits none. 2**18 (1 MiB) takes every
    # kernel of a CLIP, over 99 % of it, and leaves out biases and norms, which are many and small.
    config.mesh.fsdp_min_size = 2**18

    config.checkpoint = ConfigDict()
    # Steps between saves of the training state, besides the one at each merge.
    config.checkpoint.save_every_steps = 500
    # How many training states, and how many merged models, to keep (0: all). A kept state's last
    # merged model is kept with it; where a state is damaged, the run goes on from the one before.
    config.checkpoint.keep = 2
    config.checkpoint.keep_merged = 0

    config.monitor = ConfigDict()
    # When a replica's loss or gradient is not finite: 'stop' (an error that names replica, step and
    # tensor), 'skip_step' (the replica keeps its weights and moments) or 'restore_last_merge' (it
    # starts anew from the last merged model, with fresh moments).
    config.monitor.on_non_finite = "stop"
    # More such steps of replicas than this end the run: it goes nowhere.
    config.monitor.max_non_finite_steps = 20
    # A loss or gradient norm this many deviations above its running mean is a line in
    # events.jsonl, and nothing else; 0 turns it off. Of normal noise 6 deviations are one value in
    # 10^9; both have longer tails, and 4 would fill the file.
    config.monitor.spike_deviations = 6.0
    # How many lines of metrics that mean and deviation remember, about: an epoch or so.
    config.monitor.spike_window = 100

    # Steps between two lines of metrics.
    config.log_every_steps = 10

    config.evaluation = ConfigDict()
    # Images at once, over all devices.
    config.evaluation.batch_size = 500
    # The first so many images of each shift set; 0 takes all.
    config.evaluation.max_shift_images = 0
    # Points of the WiSE-FT curves, w0 + alpha (w - w0), of one replica and of the mean.
    config.evaluation.wise_ft_alphas = (0.25, 0.5, 0.75)
    # Merge units to compare on the same unmerged replicas, besides merge.unit (compare only).
    config.evaluation.units = ()

    config.export = ConfigDict()
    # Layouts of the merged model. model/ is Hugging Face's, always written; 'open_clip' and
    # 'openai' lie beside it, in model_open_clip/ and model_openai/.
    config.export.formats = ("hugging_face",)

    # With task 'learning_rate': the rates to try.
    config.search = ConfigDict()
    config.search.learning_rates = (5e-4, 1e-3, 2e-3, 4e-3)

    # With task 'pretrain': sizes of the CLIP as in Hugging Face's config.json, and a directory
    # with its tokenizer (or the bundled one's name).
    config.pretrain = ConfigDict()
    config.pretrain.num_steps = 4000
    config.pretrain.tokenizer = "glyph-clip"
    config.pretrain.clip = ConfigDict(
        {
            "model_type": "clip",
            "projection_dim": 64,
            "vision_config": {
                "image_size": 24,
                "patch_size": 6,
                "hidden_size": 96,
                "intermediate_size": 384,
                "num_hidden_layers": 4,
                "num_attention_heads": 3,
            },
            "text_config": {
                "vocab_size": 272,
                "max_position_embeddings": 26,
                "hidden_size": 64,
                "intermediate_size": 256,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "bos_token_id": 0,
                "eos_token_id": 1,
                "pad_token_id": 1,
            },
        }
    )
    return config
