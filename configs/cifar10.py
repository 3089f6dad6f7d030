"""CIFAR-10, teacher ResNet101 (width 0.5), student ResNet18 (width 0.25): Chen et al. 2020, table 1, first row.

`--config=configs/cifar10.py` is category-structure distillation as the released code has it; `:METHOD` picks another
(configs/methods.py), with the same optimizer. Only `:cskd_paper` has that of the paper, which lowers the learning rate
once more and keeps the momentum from epoch to epoch.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from cskd_jax.configs import methods, networks


def get_config(word="cskd"):
    teacher, student, method = networks.split_word(word, ("resnet101", 0.5), ("resnet18", 0.25))
    released = method != "cskd_paper"  # one optimizer for all methods that are compared with the released code's
    config = ConfigDict()
    config.method = method  # name of the method in results and in the default workdir
    config.seed = 0  # of the weights, the order of the images, the augmentation
    config.batch_size = 128  # images per step, over all devices
    config.drop_last = False  # leave out the last, smaller batch of an epoch
    config.epochs = 200  # of the student
    config.dtype = "float32"  # of the computation in the networks: float32, bfloat16, or float64 with JAX_ENABLE_X64=1
    config.log_every = 50  # steps between rows of metrics.jsonl
    config.keep_checkpoints = 2  # newest checkpoints kept, beside the best

    config.dataset = ConfigDict()
    # digits, cifar10, cifar100, tiny_imagenet, cub200, image_folder, or another of tfds
    config.dataset.name = "cifar10"
    config.dataset.data_dir = placeholder(str)  # of tfds; None: ~/tensorflow_datasets
    config.dataset.path = placeholder(str)  # folder with train/CLASS/* and test/CLASS/*, for image_folder
    config.dataset.train_examples = placeholder(int)  # a balanced part of the training split; None: all
    config.dataset.image_size = placeholder(int)  # side of the square to which images are cut; None: as they are
    config.dataset.streaming = placeholder(bool)  # decode batch by batch; None: only what would fill the memory
    config.dataset.workers = placeholder(int)  # processes that decode what is streamed; None: one a processor
    config.dataset.mean = (0.4914, 0.4822, 0.4465)  # per channel, of pixels in [0, 1]
    config.dataset.std = (0.2023, 0.1994, 0.2010)

    config.sampler = ConfigDict()
    config.sampler.name = "uniform"  # uniform: every image once an epoch; balanced: as many of each category in a batch
    config.sampler.samples_per_category = 4  # of balanced: images of a category in a batch, a divisor of batch_size

    config.augment = ConfigDict()
    config.augment.resize = 0  # pixels of the shorter side, to which an image is enlarged before the crop; 0: as it is
    config.augment.crop_padding = 4  # pixels of black around an image before it is cropped at random; 0: no crop
    config.augment.flip = True  # mirror half of the images

    config.teacher = ConfigDict()
    config.teacher.name, config.teacher.width = teacher  # docs/networks.md; factor on the channels
    config.teacher.checkpoint = placeholder(str)  # folder of a trained teacher (WORKDIR/teacher); None: train one
    config.teacher.epochs = 200  # with cross-entropy and the student's recipe

    config.student = ConfigDict()
    config.student.name, config.student.width = student

    config.losses = methods.losses(method)  # NAME.weight, its schedule, and the hyper-parameters of NAME

    config.optimizer = ConfigDict()  # SGD
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 1e-4  # L2, on every parameter
    config.optimizer.milestones = (80, 120) if released else (80, 120, 160)  # epochs that lower the learning rate
    config.optimizer.decay_factor = 0.1  # by this factor
    config.optimizer.restart_momentum = released  # start every epoch with zero momentum, as the released code does
    return config
