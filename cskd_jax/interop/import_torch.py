"""Makes a teacher's checkpoint of a file that PyTorch wrote. Nothing in the file is executed; PyTorch is not needed.

cskd-jax import-torch FILE --model=resnet101 --width=0.5 --num_classes=100 --out=DIR

  --model        a network of docs/networks.md
  --width        factor on its channels; default: 1
  --num_classes  number of categories
  --channels     channels of the images; default: 3
  --categories   file of the names of the categories, one a line
  --multilabel   an image has any number of categories
  --key          of the network, in a dictionary that holds several
  --out          new folder of the checkpoint

FILE is a state dict, a dictionary that holds one (such as {"epoch", "model", "optimizer"}), or a whole pickled network,
in the zip format of torch.save or the older one; or a .safetensors file. Its tensors must have the names of torchvision
or of the code of Chen et al. 2020, https://github.com/xeanzheng/CSKD (ResNets), of torchvision (Inception), or of the
code of Tian et al. 2020, https://github.com/HobbitLong/RepDistiller (all others; cskd_jax/interop/names.py). Some
things cannot be read from a file and are up to you:

- Classes are numbers in the file: their ORDER must be that of the data set. That is the alphabetical order of the
  names for CIFAR-10, CIFAR-100 and image folders. With --categories the names are checked when a run uses the teacher.
- The images that it was trained on must have been normalized by the run's dataset.mean and dataset.std.
- mobilenet_v2 and mobilenet_v2_crd have the same tensors, but not the same activations and strides. inception_v3 has
  the tensors of torchvision, but pads, and halves the side of an image less often, so its outputs differ.

DIR is then what --config.teacher.checkpoint takes, with the same --config.teacher.name and --config.teacher.width.
`python -m cskd_jax.interop.import_torch` is the same command.

Exit codes: 0 done; 2 something to mend in the command or the file.
"""

import hashlib
import pathlib

from cskd_jax.commands import command_line
from cskd_jax.commands.arguments import check_new, number
from cskd_jax.errors import UserError
from cskd_jax.files import local_folder, write_json
from cskd_jax.inputs import read_bytes

_MAX_NAMES = 64 << 20  # bytes of the file of the classes, of which there are at most a million


def main(argv: list[str]) -> int:
    """Parses the command line, imports, and returns the exit code."""
    return command_line.run_program(_run, __doc__, argv)


def _parse(argv):
    parser = command_line.Parser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--width", type=number(float, 1e-3, 64), default=1.0)
    parser.add_argument("--num_classes", type=number(int, 2, 10**6), required=True)
    parser.add_argument("--channels", type=number(int, 1, 1024), default=3)
    parser.add_argument("--categories", type=pathlib.Path)
    parser.add_argument("--multilabel", action="store_true")
    parser.add_argument("--key")
    parser.add_argument("--out", type=local_folder, required=True)
    values = parser.parse(argv)
    if len(values.words) != 1:
        raise UserError(f"name one file, such as teacher.pth; got {' and '.join(values.words) or 'none'}")
    values.file = pathlib.Path(values.words[0])
    return values


def _run(argv):
    arguments = _parse(argv)
    check_new(arguments.out)
    categories = _read_categories(arguments)
    # Imported late: mistakes in the command should not wait for everything.
    from cskd_jax.interop.names import from_torch
    from cskd_jax.interop.torch_file import read_state_dict
    from cskd_jax.models import create_model
    from cskd_jax.training.checkpoint import FOLDER, Checkpoints, Record

    module = create_model(arguments.model, num_classes=arguments.num_classes, width=arguments.width)
    state_dict = read_state_dict(arguments.file, arguments.key)
    network = f"{arguments.model} of width {arguments.width:g} with {arguments.num_classes} classes"
    try:
        variables, used, unused = from_torch(module, arguments.channels, state_dict)
    except (UserError, ValueError) as error:
        raise UserError(f"{arguments.file} as {network}: {error}") from None
    record = Record(
        network={"name": arguments.model, "width": arguments.width},
        channels=arguments.channels,
        categories=categories,
        multilabel=arguments.multilabel,
        method="imported",
        finished=True,
    )
    tree = {"params": {"network": variables["params"]}, "collections": {"batch_stats": variables["batch_stats"]}}
    with Checkpoints(arguments.out / FOLDER, keep=1) as checkpoints:
        checkpoints.save(0, tree, record)
    report = {
        "file": str(arguments.file),
        "sha256": _sha256(arguments.file),
        "used": used,
        "unused": unused,
    }
    report_path = arguments.out / "import.json"
    write_json(report_path, report)
    print(f"{arguments.file}: {network}")
    print(f"{len(used)} tensors used, 0 missing, {len(unused)} not needed (by name in {report_path})")
    print(
        f"checkpoint {arguments.out}: --config.teacher.checkpoint={arguments.out} "
        f"--config.teacher.name={arguments.model} --config.teacher.width={arguments.width:g}"
    )


def _sha256(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_categories(arguments):
    """Returns the names of the classes, or None."""
    if arguments.categories is None:
        return None
    try:
        names = read_bytes(arguments.categories, _MAX_NAMES).decode("utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{arguments.categories} is not a text file") from None
    if len(names) != arguments.num_classes or len(set(names)) != len(names):
        raise UserError(
            f"{arguments.categories} holds {len(names)} names, {len(set(names))} different; "
            f"it must hold {arguments.num_classes} different ones, one in each line, as --num_classes says"
        )
    return names


if __name__ == "__main__":
    command_line.start(main)
