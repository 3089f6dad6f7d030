"""Measures how many images per second a recipe's data give, in memory and streamed.

python benchmarks/input.py --config=RECIPE [--seconds=10] [--config.KEY=VALUE ...]

It takes batches as the training does and puts them on the devices, with nothing else to do. In memory, images are
decoded once, when the data are loaded. A stream is decoded by `dataset.workers` processes, which start with the first
batch.
"""

import pathlib
import sys
import time

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks.measuring import Part, render
from cskd_jax.commands import command_line
from cskd_jax.commands.arguments import number
from cskd_jax.data import read_batches
from cskd_jax.distributed.devices import Devices
from cskd_jax.runs import recipes, schema
from cskd_jax.runs.build import load_data, make_sampler

_STEPS = 10**6  # More than there is time for.


def measure(config, seconds: float) -> Part:
    """Loads the data in both ways, and takes batches for `seconds`."""
    devices, rows = Devices(), []
    for name, streaming in (("memory", False), ("stream", True)):
        config.dataset.streaming = streaming
        start = time.perf_counter()
        dataset = load_data(config)
        loaded = time.perf_counter()
        sampler = make_sampler(config, dataset)
        batches = read_batches(dataset.train.images, map(sampler.indices, range(_STEPS)))
        next(batches)
        first, images = time.perf_counter(), 0
        while time.perf_counter() < first + seconds:
            images += devices.shard({"image": next(batches)})["image"].block_until_ready().shape[1]
        rate = images * devices.count / (time.perf_counter() - first)
        batches.close()
        row = {"images in": name, "loading s": loaded - start, "first batch s": first - loaded, "images/s": rate}
        rows.append(row)
    height, width, channels = dataset.image_shape
    notes = [f"{len(dataset.train.labels):,} images of {height}x{width}x{channels}, batches of {config.batch_size}"]
    return Part(f"Input: {dataset.name}", rows, notes)


def main(argv: list[str]) -> int:
    """Measures and prints."""
    return command_line.run_program(_run, __doc__, argv)


def _run(argv):
    parser = command_line.Parser(takes_config=True)
    parser.add_argument("--seconds", type=number(float, 0, 86400), default=10.0)
    values = parser.parse(argv)
    config = recipes.load_recipe(parser.recipe(values), values.overrides)
    schema.validate(config)
    command_line.set_up_jax()
    print(render(measure(config, values.seconds)))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
