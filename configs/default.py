"""All options with their defaults and meanings. The other configs set only what differs.

Override any option on the command line: `--config.merge.every=100`.
"""

from ml_collections import ConfigDict

from modelstock_jax.data.published_sets import IMAGENET


def get_config() -> ConfigDict:
    config = ConfigDict()

    # What to run: 'finetune' (train replicas, merge, evaluate), 'learning_rate' (select the
    # learning rate on validation data) or 'pretrain' (train a CLIP from scratch).
    config.task = "finetune"
    # Pretrained model: a directory or a Hugging Face hub id with safetensors: CLIP, SigLIP, ViT,
    # DeiT, DINOv2, ConvNeXt or ResNet in Hugging Face format, or CLIP in OpenCLIP or OpenAI format
    # (docs/models.md). 'glyph-clip' and 'glyph-clip-1' ship with the package.
    config.pretrained = "glyph-clip"
    # Side of the input images in pixels; 0 uses the checkpoint's size. For any other size, the
    # position embeddings are resized once, before training.
    config.image_size = 0
    # Random seed. Replica r draws its data order and augmentation from (seed, r).
    config.seed = 0
    # Number of seeds to run: seed, seed + 1, and so on. With more than one, the tables show means
    # and standard errors.
    config.num_seeds = 1
    # N, the number of replicas to fine-tune.
    config.num_replicas = 2
    # Also train the same replicas without merging, for the table rows that merge after training.
    config.compare = False

    # Passes over the training images.
    config.epochs = 10
    # Examples per replica and optimizer step, over all devices.
    config.batch_size = 512
    # Micro-batches per optimizer step (gradient accumulation). They are processed sequentially, and
    # the step uses the mean of their gradients: the same update in less memory. The size of a
    # micro-batch must be a multiple of the number of devices along the data axis.
    config.gradient_accumulation_steps = 1
    # Label smoothing: the fraction of each target that is spread over all classes; 0 disables it.
    config.label_smoothing = 0.0

    config.data = ConfigDict()
    # Dataset: 'glyphs' (the synthetic benchmark, rendered and not read from disk), 'imagenet',
    # 'cifar10' or 'cifar100' (as prepared by TensorFlow Datasets), or 'folder' (your own images).
    config.data.name = "glyphs"
    # Directory of the dataset; not used by 'glyphs'.
    config.data.root = ""
    # Path of each dataset, absolute or relative to data.root; "" searches the usual locations.
    config.data.paths = ConfigDict(dict.fromkeys(("train", "validation", "test", *IMAGENET), ""))
    # Require the published number of classes and images in the datasets of ImageNet and CIFAR.
    config.data.check_counts = True
    # Training images per class of ImageNet or CIFAR to hold out for validation. The paper trains on
    # all of ImageNet; Model Soups holds out 26, to select the members of a greedy soup and the
    # learning rate.
    config.data.held_out_per_class = 0
    # Shifted (OOD) test sets to evaluate, in the order of the table. () uses all sets of the
    # dataset; for CIFAR-10, it uses CIFAR-10.1 if it is available.
    config.data.shifts = ()
    # Also evaluate the test images with reassessed labels (ReaL, Beyer et al. 2020).
    config.data.real_labels = False
    # Class names of the zero-shot head: a .txt file, one name per line in the order of the labels,
    # or a .json list. "" uses the dataset's own names; for 'folder', the folder names.
    config.data.class_names = ""
    # Prompt templates of the zero-shot head ('{}' is replaced by the class name): a .txt file, one
    # per line, or a .json list. "" uses the dataset's own; for 'folder', 'a photo of a {}.'.
    config.data.templates = ""
    # For 'folder': the fraction of each class to hold out if no such folder exists.
    config.data.validation_fraction = 0.1
    config.data.test_fraction = 0.1
    # How stored images are read.
    config.data.loader = ConfigDict()
    # Decoding threads per process; 0 uses one per core.
    config.data.loader.threads = 0
    # Worker processes in addition to the main process.
    config.data.loader.workers = 0
    # Batches to prefetch.
    config.data.loader.prefetch = 2
    # If an image cannot be decoded: 'error', or 'skip' (leave it out and name it in the log).
    config.data.loader.unreadable = "error"
    # Where stored images are cropped, resized and flipped: 'host', or 'device' (the results differ
    # by at most 2 gray levels). The device relieves the cores of the host (docs/input.md).
    config.data.resize_on = "host"
    # Directory in which to cache the decoded and resized training images. The first run writes it;
    # all runs read it without decoding. "" decodes every time (docs/input.md).
    config.data.decoded_cache_dir = ""
    # Short side of the cached images, in pixels.
    config.data.decoded_cache_short_side = 256
    # Augmentation of stored training images. The glyphs have a separate augmentation.
    config.data.augment = ConfigDict()
    # Random resized crop: min and max fraction of the area, and min and max aspect ratio.
    config.data.augment.crop_area = (0.9, 1.0)
    config.data.augment.crop_ratio = (0.75, 1.3333333333333333)
    # Flip horizontally with probability 0.5.
    config.data.augment.flip = False
    # RandAugment (Cubuk et al. 2020): operations per image (0 disables it) and magnitude, 0-30.
    config.data.augment.randaugment_ops = 0
    config.data.augment.randaugment_magnitude = 0
    # Mixup's alpha; 0 disables it.
    config.data.augment.mixup = 0.0

    # Loss and trained parameters (docs/methods.md).
    config.objective = ConfigDict()
    # 'cross_entropy', 'car_ft', 'flyp', 'l2_sp', 'linear_probe' (trains the head only), 'bitfit'
    # (trains biases and the head) or 'lp_ft' (trains the head only, then all parameters from there;
    # the anchor of the merges is then the probed model).
    config.objective.name = "cross_entropy"
    # Initial head: 'zero_shot' (the checkpoint's own head if its class names agree with the data;
    # else from the prompts of a CLIP or SigLIP) or 'random'. lp_ft starts from a random head if the
    # model has neither.
    config.objective.head = "zero_shot"
    # car_ft: weight of the divergence between context distributions.
    config.objective.car_ft_alpha = 1.0
    # l2_sp: alpha/2 |w - w0|^2 for pretrained parameters, beta/2 |w|^2 for the head. Use it with
    # optimizer.weight_decay=0.
    config.objective.l2_sp_alpha = 0.01
    config.objective.l2_sp_beta = 0.01
    # lp_ft: epochs and learning rate of the first phase. A zero-shot head is exp(logit_scale) times
    # unit columns and needs a far higher learning rate than a tower: 0.1 on the glyphs
    # (docs/results.md).
    config.objective.probe_epochs = 5
    config.objective.probe_learning_rate = 1e-3

    config.optimizer = ConfigDict()
    # 'adamw', or 'sgd' with momentum.
    config.optimizer.name = "adamw"
    # Peak learning rate.
    config.optimizer.learning_rate = 3e-5
    # Decoupled weight decay toward 0, multiplied by the learning rate.
    config.optimizer.weight_decay = 0.1
    # Decoupled decay toward the pretrained weights, multiplied by the learning rate.
    config.optimizer.decay_to_pretrained = 0.0
    # AdamW: decay rates of the first and second moment, and the constant in the denominator that
    # prevents division by 0.
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    # SGD: momentum.
    config.optimizer.momentum = 0.9
    # Projection of each layer's weights onto a radius around the pretrained weights.
    config.optimizer.projection = ConfigDict()
    # 'none', 'ftp' (radii learned during training) or 'tpgm' (radii learned after training, on
    # validation images).
    config.optimizer.projection.name = "none"
    # Norm that a radius limits: 'mars' or 'l2'.
    config.optimizer.projection.norm = "mars"
    # Learning rate of the radii.
    config.optimizer.projection.learning_rate = 1e-2
    # ftp: factor in [0, 1] on gradients that would shrink a radius.
    config.optimizer.projection.k = 1.0
    # tpgm: number of optimization steps.
    config.optimizer.projection.steps = 200
    # Max global gradient norm per replica; 0 disables clipping.
    config.optimizer.clip_norm = 1.0
    # The warm-up is warmup_steps plus warmup_fraction of all steps. After it the learning rate
    # follows a cosine down to final_lr_fraction of its peak.
    config.optimizer.warmup_steps = 0
    config.optimizer.warmup_fraction = 0.0
    config.optimizer.final_lr_fraction = 0.0

    # Values per replica, one for each, that replace the options above: a search of Model Soups as
    # one program, `--config.num_replicas=3 --config.per_replica.epochs="(4,6,8)"`. () uses the same
    # value for all replicas. A replica with fewer than `epochs` epochs stops changing after its
    # last one.
    config.per_replica = ConfigDict()
    config.per_replica.learning_rate = ()
    config.per_replica.weight_decay = ()
    config.per_replica.epochs = ()
    config.per_replica.label_smoothing = ()
    config.per_replica.mixup = ()
    # Strength of the glyphs' augmentation: 0 leaves images unchanged, 1 is the usual strength.
    config.per_replica.augment_strength = ()
    # RandAugment of stored images: operations and magnitude.
    config.per_replica.randaugment_ops = ()
    config.per_replica.randaugment_magnitude = ()

    config.merge = ConfigDict()
    # When replicas merge: 'epoch' (at the end of each epoch), a number of steps, 'end' or 'never'.
    # With any value except 'never', replicas also merge at the end of the run.
    config.merge.every = "epoch"
    # 'model_stock' (equation 3) or 'uniform_mean' (t = 1, the control).
    config.merge.method = "model_stock"
    # Merge unit, the parameters that share one angle: 'tensor', 'layer', 'filter', 'head', 'block'
    # or 'global'.
    config.merge.unit = "tensor"
    # Adam moments of the replicas at a merge: 'keep', 'average' or 'reset'.
    config.merge.opt_state = "keep"
    # Noise carried over merges (an extension): 'off', 'every' (shrink it at every merge) or 'last'
    # (shrink it at the last merge only).
    config.merge.carry_noise = "off"
    # Statistics of batch norms (ResNet) in merged models: 'keep' (those of the pretrained model,
    # which replicas are trained with) or 're_estimate' (one pass over the training images before a
    # merged model is evaluated or exported, as in SWA).
    config.merge.batch_norm_statistics = "keep"

    config.compute = ConfigDict()
    # Arithmetic in the towers: 'float32', 'bfloat16', 'float16', or 'float64' (with
    # JAX_ENABLE_X64=1; without it, JAX uses float32). Weights and optimizer state stay float32.
    config.compute.dtype = "float32"
    # Attention implementation: 'xla' or 'cudnn'.
    config.compute.attention_impl = "xla"
    # Recompute activations in the backward pass (saves memory).
    config.compute.remat = False
    # How replicas run: 'vmap' (in parallel), 'map' (sequentially, on one device) or 'auto': 'map'
    # on a CPU and for convolutional nets, if all replicas are on one device; else 'vmap'.
    config.compute.replica_mode = "auto"
    # Directory in which compiled programs are cached between runs. Nobody else may have write
    # access to it. 'auto' uses JAX_COMPILATION_CACHE_DIR; if it is not set, and the run has one
    # process, a private directory in $XDG_CACHE_HOME or ~/.cache (at most 1 GiB). 'off' uses none.
    # "" uses only JAX_COMPILATION_CACHE_DIR.
    config.compute.compilation_cache = "auto"

    config.mesh = ConfigDict()
    # Devices along each mesh axis; 0 chooses automatically (1 device: both replicas on it;
    # 2 devices: one replica on each).
    config.mesh.replica = 0
    config.mesh.data = 0
    # Min number of elements for a tensor to be sharded over the data axis (FSDP), together with its
    # Adam moments. Smaller tensors are replicated; 0 shards none. The default 2**18 (1 MiB) shards
    # every kernel of a CLIP, over 99 % of its parameters, but not its many small biases and norms.
    config.mesh.fsdp_min_size = 2**18

    config.checkpoint = ConfigDict()
    # Steps between checkpoints of the training state, in addition to the one at each merge.
    config.checkpoint.save_every_steps = 500
    # Number of training states and of merged models to keep; 0 keeps all. The last merged model of
    # each kept state is kept too. If a state is damaged, the run resumes from the one before it.
    config.checkpoint.keep = 2
    config.checkpoint.keep_merged = 0

    config.monitor = ConfigDict()
    # If the loss or gradient of a replica is not finite: 'stop' (an error that names the replica,
    # the step and the tensor), 'skip_step' (the replica keeps its weights and optimizer state) or
    # 'restore_last_merge' (it restarts from the last merged model, with a new optimizer state).
    config.monitor.on_non_finite = "stop"
    # Abort the run after more than this many non-finite steps, counted over all replicas.
    config.monitor.max_non_finite_steps = 20
    # Log a loss or gradient norm in events.jsonl (and do nothing else) if it is this many standard
    # deviations above its running mean; 0 disables it. In normally distributed noise, one value in
    # 10^9 exceeds 6 deviations; both quantities have longer tails, and 4 would fill the file.
    config.monitor.spike_deviations = 6.0
    # Approximate window of the running mean and deviation, in lines of metrics; about an epoch.
    config.monitor.spike_window = 100
    # Implicit transfers between host and devices in the training loop: 'allow', 'log' (print each)
    # or 'disallow' (an error with a traceback). Each one makes the device wait; the loop has none.
    config.monitor.transfer_guard = "allow"

    # Steps between lines of metrics.
    config.log_every_steps = 10

    config.evaluation = ConfigDict()
    # Evaluation batch size, over all devices.
    config.evaluation.batch_size = 500
    # Evaluate only the first images of each shifted test set, at most this many; 0 evaluates all.
    config.evaluation.max_shift_images = 0
    # alpha of the WiSE-FT curves, w0 + alpha (w - w0), of one replica and of the mean.
    config.evaluation.wise_ft_alphas = (0.25, 0.5, 0.75)
    # Merge units to compare on the same replicas trained without merging, in addition to merge.unit
    # (requires `compare`).
    config.evaluation.units = ()

    config.export = ConfigDict()
    # Checkpoint formats of the merged model. 'hugging_face' is always written, to model/;
    # 'open_clip' and 'openai' are written to model_open_clip/ and model_openai/.
    config.export.formats = ("hugging_face",)

    # For task 'learning_rate'.
    config.search = ConfigDict()
    # Learning rates to try.
    config.search.learning_rates = (5e-4, 1e-3, 2e-3, 4e-3)

    # For task 'pretrain'.
    config.pretrain = ConfigDict()
    # Training steps.
    config.pretrain.num_steps = 4000
    # Directory of the tokenizer, or the name of the bundled one.
    config.pretrain.tokenizer = "glyph-clip"
    # Sizes of the CLIP, as in Hugging Face's config.json.
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
