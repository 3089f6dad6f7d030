"""Two handwritten digits in each image of 16x16 pixels: the smallest multi-label job, without a download.

An image has the categories of its digits; networks are judged by their mean average precision. `--config=
configs/digit_pairs.py` is the paper's category structure for several categories per image beside the distillation of
logits, `:bkd` leaves category structure out, `:bce` the teacher (configs/methods.py).
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from cskd_jax.configs import methods, networks


def get_config(word="mlcskd"):
    teacher, student, method = networks.split_word(word, ("resnet18", 0.25), ("resnet18", 0.0625))
    config = ConfigDict()
    config.method = method  # name of the method in results and in the default workdir
    config.seed = 0  # of the weights, the order of the images, the augmentation
    config.batch_size = 64  # images per step, over all devices
    config.drop_last = False  # leave out the last, smaller batch of an epoch
    config.epochs = 16  # of the student
    config.dtype = "float32"  # of the computation in the networks: float32, bfloat16, or float64 with JAX_ENABLE_X64=1
    config.log_every = 10  # steps between rows of metrics.jsonl
    config.keep_checkpoints = 2  # newest checkpoints kept, beside the best

    config.dataset = ConfigDict()
    config.dataset.name = "digit_pairs"  # the multi-label data set
    config.dataset.data_dir = placeholder(str)  # not used by digit_pairs
    config.dataset.path = placeholder(str)  # not used by digit_pairs
    config.dataset.train_examples = placeholder(int)  # the first so many training images; None: all
    config.dataset.image_size = placeholder(int)  # side of the square to which images are cut; None: as they are
    config.dataset.streaming = placeholder(bool)  # decode batch by batch; None: only what would fill the memory
    config.dataset.workers = placeholder(int)  # processes that decode what is streamed; None: one a processor
    config.dataset.mean = (0.1528,)  # per channel, of pixels in [0, 1]
    config.dataset.std = (0.3067,)

    config.sampler = ConfigDict()
    config.sampler.name = "uniform"  # every image once an epoch; balanced batches need images of one category
    config.sampler.samples_per_category = 4  # not used

    config.augment = ConfigDict()
    config.augment.resize = 0  # pixels of the shorter side, to which an image is enlarged before the crop; 0: none
    config.augment.crop_padding = 1  # pixels of black around an image before it is cropped at random; 0: no crop
    config.augment.flip = False  # mirror half of the images: a mirrored digit is another sign

    config.teacher = ConfigDict()
    config.teacher.name, config.teacher.width = teacher  # docs/networks.md; factor on the channels
    config.teacher.checkpoint = placeholder(str)  # folder of a trained teacher (WORKDIR/teacher); None: train one
    config.teacher.epochs = 16  # with binary cross-entropy and the student's recipe

    config.student = ConfigDict()
    config.student.name, config.student.width = student

    # NAME.weight, its schedule, and the hyper-parameters of NAME
    config.losses = methods.losses(method, multilabel=True)

    config.optimizer = ConfigDict()  # SGD
    config.optimizer.learning_rate = 0.2
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 1e-4  # L2, on every parameter
    config.optimizer.milestones = (10, 14)  # epochs that lower the learning rate
    config.optimizer.decay_factor = 0.1  # by this factor
    config.optimizer.restart_momentum = False  # start every epoch with zero momentum
    return config
