"""Makes a teacher's checkpoint from a PyTorch file. Nothing in the file is executed; PyTorch is not needed.

cskd-jax import-torch FILE --model=resnet101 --width=0.5 --num_classes=100 --out=DIR
cskd-jax import-torch FILE --out=DIR    a file of docs/checkpoints.md, which is recognized

  --model        a network of docs/networks.md
  --width        factor on its channels; default: 1
  --num_classes  number of classes; 0 for a Vision Transformer without a head
  --num_heads    number of attention heads of a Vision Transformer, if it is not that of --model
  --channels     channels of the images; default: 3
  --categories   file of the names of the classes, one per line
  --multilabel   images have any number of classes (multi-label)
  --key          entry of the network, if the file is a dictionary that holds several
  --prefix       prefix of the names of the network's tensors, such as student. if the file also holds a teacher
  --names        file of renaming rules, for a network with names of its own
  --out          new folder of the checkpoint

  Images that the network was trained on, if that is known:
  --size         HEIGHT,WIDTH in pixels
  --mean         per channel, or one for all, of pixels in [0, 1]
  --std          in the same form as --mean

  Evaluation before anything is written:
  --verify       data set, on whose test split the network is measured; it needs mean and std
  --data_dir     folder of prepared data sets and downloads
  --path         folder of the images, for --verify=image_folder; photographs need --size, with equal sides

FILE is a state dict, a dictionary that holds one (such as {"epoch", "model", "optimizer"}), or a whole pickled network,
in the zip format of torch.save or the older one; or a .safetensors file. Its tensors must have the names of torchvision
or of the code of Chen et al. 2020, https://github.com/xeanzheng/CSKD (ResNets), of torchvision (Inception), or of the
code of Tian et al. 2020, https://github.com/HobbitLong/RepDistiller (all others; cskd_jax/interop/families.py), and
Vision Transformers those of timm or DINOv2, whose patch size, depth and other settings are read from the file. Networks
without a max-pool may also call their classifier linear and their shortcuts shortcut. The prefixes module., model.,
student. and teacher. are found if only one of them fits the network. docs/interop.md explains --names.

Some things cannot be read from a file, and are up to you unless the file is a known one:

- Classes are numbers in the file: their ORDER must be that of the data set. That is the alphabetical order of the
  names for CIFAR-10, CIFAR-100 and image folders. With --categories the names are checked when a run uses the teacher.
- Without --mean and --std, the images that it was trained on must have been normalized by the run's dataset.mean and
  dataset.std. With them, a run normalizes the images of the teacher as it needs them.
- Some networks have the same tensors but compute something else, so --model must name the right one: mobilenet_v2 and
  mobilenet_v2_crd differ in activations and strides, and resnet18 to resnet152 have a max-pool, which resnet18_crd to
  resnet152_crd lack. inception_v3 has the tensors of torchvision, but pads its convolutions and reduces the image less
  often, so its outputs differ from torchvision's.

DIR is then what --config.teacher.checkpoint takes, with the same --config.teacher.name and --config.teacher.width.
`python -m cskd_jax.interop.import_torch` is the same command.

Exit codes: 0 done; 2 something to fix in the command or the file.
"""

import hashlib
import pathlib
from typing import Any

from cskd_jax.commands import command_line
from cskd_jax.commands.arguments import check_new, number, numbers
from cskd_jax.errors import UserError, printable
from cskd_jax.files import local_folder, write_json
from cskd_jax.inputs import MAX_TEXT, is_text, open_regular, read_bytes

_MAX_NAMES = 64 << 20  # bytes of the file with the class names, of which there are at most a million

# End of the names of the counters that PyTorch keeps in every batch normalization.
_COUNTER = "num_batches_tracked"

# Images in a batch of the evaluation.
_BATCH = 256


def main(argv: list[str]) -> int:
    """Parses the command line, imports, and returns the exit code."""
    return command_line.run_program(_run, __doc__, argv)


def _parse(argv):
    parser = command_line.Parser()
    parser.add_argument("--model")
    parser.add_argument("--width", type=number(float, 1e-3, 64), default=1.0)
    parser.add_argument("--num_classes", type=number(int, 0, 10**6))
    parser.add_argument("--num_heads", type=number(int, 1, 1024))
    parser.add_argument("--channels", type=number(int, 1, 1024), default=3)
    parser.add_argument("--categories", type=pathlib.Path)
    parser.add_argument("--multilabel", action="store_true")
    parser.add_argument("--key")
    parser.add_argument("--prefix")
    parser.add_argument("--names", type=pathlib.Path)
    parser.add_argument("--size", type=numbers(int, 1, 10**5))
    parser.add_argument("--mean", type=numbers(float, 0, 1))
    parser.add_argument("--std", type=numbers(float, 1e-6, 1e6))
    parser.add_argument("--verify")
    parser.add_argument("--data_dir")
    parser.add_argument("--path")
    parser.add_argument("--out", type=local_folder)
    values = parser.parse(argv)
    if len(values.words) != 1:
        raise UserError(f"name one file, such as teacher.pth; got {' and '.join(values.words) or 'none'}")
    values.file = pathlib.Path(values.words[0])
    if values.key is not None and values.file.suffix.lower() == ".safetensors":
        raise UserError("--key chooses a network of a PyTorch file; a .safetensors file holds one: leave out --key")
    if values.verify is None and (values.data_dir is not None or values.path is not None):
        raise UserError("--data_dir and --path belong to --verify, which is not given")
    if values.num_classes == 1:
        raise UserError("--num_classes is 1; it must be at least 2, or 0 for a network without a head")
    return values


def _run(argv):
    arguments = _parse(argv)
    check_new(arguments.out)
    # Imported late, so that mistakes in the command are reported without loading everything.
    from cskd_jax import console

    console.start()
    digest, known = _identify(arguments)
    categories = _read_categories(arguments) or (None if known is None else known.categories)
    from cskd_jax.interop.matching import match
    from cskd_jax.interop.renames import read_rules, rename, with_prefix
    from cskd_jax.interop.torch_file import read_state_dict
    from cskd_jax.models import create_model
    from cskd_jax.training.saved import Record, Saved

    given = {} if arguments.num_heads is None else {"num_heads": arguments.num_heads}
    module = create_model(arguments.model, num_classes=arguments.num_classes, width=arguments.width, settings=given)
    rules = [] if arguments.names is None else read_rules(arguments.names)
    state_dict = read_state_dict(arguments.file, arguments.key)
    network = f"{arguments.model} of width {arguments.width:g} with {arguments.num_classes} classes"
    try:
        size = _images(arguments, known).get("size")
        found = match(module, arguments.channels, state_dict, prefix=arguments.prefix, rules=rules, image_size=size)
    except (UserError, ValueError) as error:
        raise UserError(f"{arguments.file} as {network}: {error}") from None
    names = with_prefix(state_dict, found.prefix)
    if rules and rename(names, rules) == names:
        raise UserError(f"--names={arguments.names} has no rule that changes a name of {arguments.file}: leave it out")
    settings = given | found.settings
    record = Record(
        network={"name": arguments.model, "width": arguments.width} | ({"settings": settings} if settings else {}),
        channels=arguments.channels,
        categories=categories,
        multilabel=arguments.multilabel,
        images=_images(arguments, known),
        method="imported",
        finished=True,
    )
    console.say(printable(f"{arguments.file}: {network}{_origin(known)}"))
    report: dict[str, Any] = {"file": str(arguments.file), "sha256": digest, "prefix": found.prefix}
    if known is not None:
        report |= {"source": f"{known.repository}/blob/HEAD/{known.path}", "dataset": known.dataset}
    if arguments.verify is not None:
        report["verified"] = _verify(arguments, module.clone(**found.settings), Saved(found.variables, record, 0, ""))
    _write(arguments, found, record, report)


def _write(arguments, found, record, report):
    """Writes the checkpoint and import.json, and prints what was done."""
    from cskd_jax.console import say
    from cskd_jax.runs.imports import IMPORT
    from cskd_jax.runs.lock import LOCK, locked
    from cskd_jax.training.checkpoint import FOLDER, Checkpoints

    variables = found.variables
    collections = {name: collection for name, collection in variables.items() if name != "params"}
    tree = {"params": {"network": variables["params"]}, "collections": collections}
    folder, path = arguments.out / FOLDER, arguments.out / IMPORT
    with locked(arguments.out / LOCK, f"another import into {arguments.out} is running"):
        if folder.exists():
            raise UserError(f"--out={arguments.out} was written by another import; name a new or empty folder")
        with Checkpoints(folder, keep=1) as checkpoints:
            checkpoints.save(0, tree, record)
        write_json(path, report | {"used": found.used, "unused": found.unused})
    prefix = f" under the prefix {found.prefix}" if found.prefix else ""
    kind = ""
    if found.unused and all(name.endswith(_COUNTER) for name in found.unused):
        kind = f", all of them {_COUNTER}, PyTorch's counters of batches"
    unused = f"{len(found.unused)} not needed{kind} (listed in {path})"
    say(printable(f"{len(found.used)} tensors used{prefix}, 0 missing, {unused}"))
    flags = {"checkpoint": arguments.out, "name": arguments.model, "width": f"{arguments.width:g}"}
    flags = " ".join(f"--config.teacher.{name}={value}" for name, value in flags.items())
    say(printable(f"checkpoint {arguments.out}: {flags}"))


def _identify(arguments):
    """Returns the SHA-256 of the file and its known-checkpoint entry, which fills in flags that are not given.

    Raises:
      UserError: The network is neither named nor known.
    """
    from cskd_jax.interop.checkpoints import known_checkpoints
    from cskd_jax.interop.torch_file import MAX_FILE

    with open_regular(arguments.file, MAX_FILE) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    known = known_checkpoints().get(digest)
    if known is not None and arguments.model not in (None, known.model):
        raise UserError(f"{arguments.file} holds a {known.model}, as it is a known checkpoint: leave out --model")
    if known is not None:
        arguments.model = known.model
        arguments.num_classes = arguments.num_classes or len(known.categories)
    missing = [f"--{name}" for name in ("model", "num_classes") if getattr(arguments, name) is None]
    if missing:
        raise UserError(f"{arguments.file} is not a known checkpoint: give {' and '.join(missing)}")
    return digest, known


def _origin(known):
    """Returns the end of a line that says which known checkpoint a file is."""
    if known is None:
        return ""
    stated = "no stated accuracy" if known.stated is None else f"stated accuracy {known.stated:.2f}"
    return f", which is {known.path} of {known.repository}, {known.dataset}, {stated}"


def _images(arguments, known) -> dict[str, Any]:
    """Returns {"size", "mean", "std"} of the images that the network was trained on, as far as they are known."""
    from cskd_jax.data.augment import Normalize

    given = {"size": arguments.size, "mean": arguments.mean, "std": arguments.std}
    if arguments.size is not None and len(arguments.size) != 2:
        raise UserError(f"--size has {len(arguments.size)} values; it must have 2, height and width")
    images = ({} if known is None else known.images) | {name: value for name, value in given.items() if value}
    if ("mean" in images) != ("std" in images):
        raise UserError("give both --mean and --std, or neither")
    if "mean" in images:
        Normalize(tuple(images["mean"]), tuple(images["std"])).checked(arguments.channels, "--")
    return images


def _verify(arguments, module, saved) -> dict[str, Any]:
    """Evaluates the network on the test split of a data set; prints and returns the metrics.

    Raises:
      UserError: The data set cannot be loaded or does not fit, the normalization of its images is unknown, or a metric
        is not finite.
    """
    from cskd_jax.console import pause, say
    from cskd_jax.data import load_dataset
    from cskd_jax.distributed.devices import Devices
    from cskd_jax.runs.trained import check_fits
    from cskd_jax.training.adapters import LinenNetwork
    from cskd_jax.training.evaluation import Evaluation
    from cskd_jax.training.metrics import check_measured
    from cskd_jax.training.state import check_variables

    if "mean" not in saved.record.images:
        raise UserError(f"--verify={arguments.verify} needs --mean and --std to normalize the images")
    size = saved.record.images.get("size")
    command_line.set_up_jax()
    with pause(f"loading the data set {arguments.verify}"):
        image_size = size[0] if arguments.verify == "image_folder" and size and size[0] == size[1] else None
        dataset = load_dataset(
            arguments.verify, data_dir=arguments.data_dir, path=arguments.path, image_size=image_size
        )
    normalize: Any = check_fits(str(arguments.file), saved, dataset)  # It is known, as checked above.
    network, devices = LinenNetwork(module), Devices()
    check_variables(network, saved.variables, dataset.image_shape, str(arguments.file))
    evaluation = Evaluation(
        network,
        dataset.test,
        dataset.num_classes,
        normalize=normalize,
        batch_size=devices.round_up(_BATCH),
        devices=devices,
    )
    with pause(f"evaluating on {len(dataset.test.labels):,} images"):
        values = evaluation(devices.replicate(saved.variables))
    check_measured(str(arguments.file), values)
    say(f"{arguments.verify}, {len(dataset.test.labels):,} test images: {evaluation.task.describe(values)}")
    return {"dataset": arguments.verify, "images": len(dataset.test.labels), **values}


def _read_categories(arguments):
    """Returns the names of the classes, or None."""
    if arguments.categories is None:
        return None
    try:
        names = read_bytes(arguments.categories, _MAX_NAMES).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{arguments.categories} is not a text file") from None
    for line, name in enumerate(names, start=1):
        if not is_text(name):
            raise UserError(
                f"{arguments.categories}, line {line}: a name has at most {MAX_TEXT:,} characters, none of them NUL"
            )
    if len(names) != arguments.num_classes or len(set(names)) != len(names):
        raise UserError(
            f"{arguments.categories} holds {len(names)} names, {len(set(names))} of them distinct; "
            f"it must hold {arguments.num_classes} distinct names, one per line, as --num_classes says"
        )
    return names


if __name__ == "__main__":
    command_line.start(main)
