"""CUB-200-2011, teacher ResNet50, student ResNet18 (width 0.5): the supplement of Chen et al. 2020.

`--config=configs/cub200.py` is category-structure distillation in the variant of the released code, `:cskd_paper` in
that of the paper; `:METHOD` picks another (configs/methods.py). Settings for this data set are not published: those of
the optimizer are the paper's for Tiny ImageNet, which has as many categories.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from cskd_jax.configs import methods, networks


def get_config(word="cskd"):
    teacher, student, method = networks.split_word(
        word, ("resnet50_224", 1.0), ("resnet18_224", 0.5), small_images=False
    )
    config = ConfigDict()
    config.method = method  # name of the method in results and in the default workdir
    config.seed = 0  # of the weights, the order of the images, the augmentation
    config.batch_size = 200  # images per step, over all devices; as many as there are categories
    config.drop_last = False  # leave out the last, smaller batch of an epoch
    config.epochs = 200  # of the student
    config.dtype = "float32"  # of the computation in the networks: float32, bfloat16, or float64 with JAX_ENABLE_X64=1
    config.log_every = 10  # steps between rows of metrics.jsonl
    config.keep_checkpoints = 2  # newest checkpoints kept, beside the best

    config.dataset = ConfigDict()
    # digits, cifar10, cifar100, tiny_imagenet, cub200, image_folder, or another of tfds
    config.dataset.name = "cub200"
    config.dataset.data_dir = placeholder(str)  # of tfds; None: ~/tensorflow_datasets
    config.dataset.path = placeholder(str)  # folder with train/CLASS/* and test/CLASS/*, for image_folder
    config.dataset.train_examples = placeholder(int)  # a balanced part of the training split; None: all
    config.dataset.image_size = placeholder(int)  # side of the square to which images are cut; None: as they are
    config.dataset.streaming = placeholder(bool)  # decode batch by batch; None: only what would fill the memory
    config.dataset.workers = placeholder(int)  # processes that decode what is streamed; None: one a processor
    config.dataset.mean = (0.485, 0.456, 0.406)  # per channel, of pixels in [0, 1]; those of ImageNet
    config.dataset.std = (0.229, 0.224, 0.225)

    config.sampler = ConfigDict()
    config.sampler.name = "uniform"  # uniform: every image once an epoch; balanced: as many of each category in a batch
    config.sampler.samples_per_category = 4  # of balanced: images of a category in a batch, a divisor of batch_size

    config.augment = ConfigDict()
    config.augment.resize = 256  # pixels of the shorter side, to which an image is enlarged before the crop; 0: none
    config.augment.crop_padding = 0  # pixels of black around an image before it is cropped at random
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
    config.optimizer.weight_decay = 5e-4  # L2, on every parameter
    config.optimizer.milestones = (50, 100, 150)  # epochs that lower the learning rate
    config.optimizer.decay_factor = 0.1  # by this factor
    config.optimizer.restart_momentum = False  # start every epoch with zero momentum
    return config
