"""Exports a trained network to PyTorch and to programs that have only jax (and flatbuffers, which jax.export needs).

cskd-jax export WORKDIR --out=DIR [--network=teacher] [--best]

  WORKDIR        folder of a run, of one of its networks (WORKDIR/teacher), or of an imported one; --workdir=WORKDIR is
                 the same
  --network      student or teacher of a run; default: student
  --best         exports the network as it was after its best epoch, not after the last one
  --out          new folder

  Images of an imported network, if its checkpoint does not describe them:
  --size         HEIGHT,WIDTH in pixels
  --mean         per channel, or one for all, of pixels in [0, 1]
  --std          in the same form as --mean

DIR then holds

- weights.safetensors: the state dict under PyTorch's names, for `load_state_dict(safetensors.torch.load_file(PATH))` of
  the network as torchvision, the code of Chen et al. 2020 (https://github.com/xeanzheng/CSKD) or that of Tian et al.
  2020 (https://github.com/HobbitLong/RepDistiller) defines it; Vision Transformers as timm does. That network takes
  images [B, C, H, W] that are scaled to [0, 1] and normalized by the mean and standard deviation of network.json.
  The file is left out if a method replaces the prediction of the network (simkd), which PyTorch's network does not do;
- network.jax_export: the network in evaluation mode, normalization included, from uint8 images [B, H, W, C] of any
  number B to logits [B, number of classes]. In an environment with only jax and flatbuffers:
      network = jax.export.deserialize(bytearray(open(PATH, "rb").read()))
      logits = network.call(images)
- network.json: name, width, names of the classes (`categories`) in the order of the logits (null if an import did not
  name them), size of the images, mean and standard deviation.

`python -m cskd_jax.interop.export` is the same command.

Exit codes: 0 done; 2 something to fix in the command or the checkpoint.
"""

from typing import Any

from cskd_jax.commands import command_line
from cskd_jax.commands.arguments import check_new, numbers, one_folder
from cskd_jax.errors import UserError, printable
from cskd_jax.files import local_folder, write_bytes, write_json

WEIGHTS, FUNCTION, DESCRIPTION = "weights.safetensors", "network.jax_export", "network.json"
# The platforms on which the exported function runs.
_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def main(argv: list[str]) -> int:
    """Parses the command line, exports, and returns the exit code."""
    return command_line.run_program(_run, __doc__, argv)


def _parse(argv):
    parser = command_line.Parser()
    parser.add_argument("--workdir")
    parser.add_argument("--network", choices=("student", "teacher"), default="student")
    parser.add_argument("--best", action="store_true")
    parser.add_argument("--out", type=local_folder)
    parser.add_argument("--size", type=numbers(int, 1, 10**5))
    parser.add_argument("--mean", type=numbers(float, 0, 1))
    parser.add_argument("--std", type=numbers(float, 1e-6, 1e6))
    values = parser.parse(argv)
    values.workdir = one_folder(values, "workdir", example="cskd-jax export runs/digits/kd-seed0 --out=exported")
    return values


def _run(argv):
    arguments = _parse(argv)
    check_new(arguments.out)
    # Imported late, so that mistakes in the command are reported without loading everything.
    import safetensors.numpy

    from cskd_jax import console
    from cskd_jax.interop.names import to_torch
    from cskd_jax.models import count_parameters, create_model
    from cskd_jax.training.adapters import LinenNetwork
    from cskd_jax.training.checkpoint import FOLDER, load_variables
    from cskd_jax.training.prediction import (
        PredictingModule,
        PredictingNetwork,
        parameters_of,
        restore_prediction,
        without_prediction,
    )
    from cskd_jax.training.state import check_variables

    has_phases = not (arguments.workdir / FOLDER).is_dir()
    if not has_phases and "network" in arguments.given and arguments.network != arguments.workdir.name:
        raise UserError(f"{arguments.workdir} holds one network, not a student and a teacher: leave out --network")
    path = arguments.workdir / arguments.network if has_phases else arguments.workdir
    saved = load_variables(str(path), best=arguments.best)
    variables, record = saved.variables, saved.record
    network = record.packaged_network()
    images = _images(arguments, record)
    classes = saved.num_classes
    if record.categories is not None and len(record.categories) != classes:
        raise UserError(f"{path} is damaged: it names {len(record.categories):,} classes, and has {classes:,}")
    module = create_model(**network, num_classes=classes)
    network_of_module = LinenNetwork(module)
    check_variables(network_of_module, without_prediction(variables), (*images["size"], record.channels), str(path))
    predicting = restore_prediction(network_of_module, variables, record, str(path))
    files = {}
    if isinstance(predicting, PredictingNetwork):
        files[FUNCTION] = export_function(PredictingModule(predicting), variables, record.channels, **images)
    else:
        files[FUNCTION] = export_function(module, variables, record.channels, **images)
        # PyTorch readers of such files look for the entry "format".
        state_dict = to_torch(module, variables, batches=saved.step)
        files[WEIGHTS] = safetensors.numpy.save(state_dict, metadata={"format": "pt"})
    description = {
        **network,
        "num_classes": classes,
        "categories": record.categories,
        "channels": record.channels,
        "images": images,
        "step": saved.step,
        "finished": record.finished,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_bytes(arguments.out / name, content)
    write_json(arguments.out / DESCRIPTION, description)
    trained = "" if record.finished else ", not fully trained"
    parameters = f"{count_parameters(parameters_of(variables)):,} parameters"
    written = ", ".join(str(arguments.out / name) for name in (*files, DESCRIPTION))
    console.say(printable(f"{record.describe_network()}, {parameters}, step {saved.step}{trained}: {written}"))


def _images(arguments, record) -> dict[str, Any]:
    """Returns {"size", "mean", "std"} of the images that the network was trained on, or as given."""
    given = {"size": arguments.size, "mean": arguments.mean, "std": arguments.std}
    wrong = [name for name, value in given.items() if value is not None and name in record.images]
    if wrong:
        raise UserError(f"{arguments.workdir} already describes its training images: leave out --{', --'.join(wrong)}")
    missing = [name for name, value in given.items() if value is None and name not in record.images]
    if missing:
        raise UserError(f"{arguments.workdir} does not describe its training images: give --{', --'.join(missing)}")
    for name, allowed in (("size", (2,)), ("mean", (1, record.channels)), ("std", (1, record.channels))):
        if name not in record.images and len(given[name]) not in allowed:
            raise UserError(f"--{name} has {len(given[name])} values; it must have {' or '.join(map(str, allowed))}")
    return given | record.images


def export_function(module: Any, variables: Any, channels: int, *, size: Any, mean: Any, std: Any) -> bytes:
    """Serializes the `jax.export` of a function from uint8 images [B, H, W, C] to logits [B, K], for any B.

    Args:
      module: Network without an `axis_name`.
      variables: Variables {"params", "batch_stats"} of the network, which become constants.
      channels: Number C of channels.
      size: Size (H, W) of the images.
      mean: Mean of the pixels in [0, 1], one number per channel or one for all.
      std: Standard deviation of the pixels in [0, 1], one number per channel or one for all.

    Returns:
      The serialized function.
    """
    import jax
    import jax.numpy as jnp

    from cskd_jax.data.augment import Normalize

    normalize = Normalize(mean, std)
    variables = jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), variables)
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *size, channels), jnp.uint8)
    logits = jax.jit(lambda images: module.apply(variables, normalize(images), train=False).logits)
    return bytes(jax.export.export(logits, platforms=_PLATFORMS)(images).serialize())


if __name__ == "__main__":
    command_line.start(main)
