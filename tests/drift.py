"""Digests of everything that tiny runs have trained: what no change of the code may change by accident.

python -m tests.drift [--record] [CASE ...]

Golden values notice a changed formula. They do not notice a changed key, initial weight, or order of a sum. A digest
notices all of them, but only on the machine and with the packages that it was recorded with: `fingerprint` says which.
Without --record, the digests are compared with those in tests/golden/drift.json if that file knows the fingerprint.
Elsewhere, compare two commits: run one with --record, and the other without it on the drift.json that the first wrote.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
RECORDED = ROOT / "tests" / "golden" / "drift.json"
METHODS = ("cskd", "ce", "cskd_paper", "kd", "crd", "vid", "kdgan", "fitnet", "dkd")
# Number of devices and type of the numbers: each case is a process of its own.
CASES = {f"{devices} x {dtype}": (devices, dtype) for dtype in ("float32", "float64") for devices in (1, 2)}
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def fingerprint() -> str:
    """Names the machine and the packages, which decide how sums are rounded."""
    lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    machine = f"{platform.machine()}-{os.cpu_count()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
    versions = "-".join(f"{name}{importlib.metadata.version(name)}" for name in _PACKAGES)
    return f"{machine}-{versions}"


def digest_of_run(workdir: pathlib.Path) -> str:
    """Returns one digest of all arrays of the newest checkpoint of every phase in a workdir, whatever their names."""
    found = []
    for phase in ("teacher", "student"):
        checkpoints = workdir / phase / "checkpoints"
        if checkpoints.exists():
            newest = max(checkpoints.iterdir(), key=lambda path: int(path.name))
            record = json.loads((newest / "record" / "metadata").read_text(encoding="utf-8"))
            found += [phase, *sorted(record["digests"].values())]
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:16]


def run_all(folder: pathlib.Path, dtype: str, methods: list[str]) -> dict[str, str]:
    """Trains with every method in this process; returns the digest of each."""
    from cskd_jax.main import main

    def run(recipe, method, teacher):
        workdir = folder / method
        arguments = [
            f"--config={ROOT}/configs/{recipe}.py:{method}",
            f"--workdir={workdir}",
            f"--config.dtype={dtype}",
            "--config.dataset.train_examples=64",
            "--config.batch_size=32",
            "--config.epochs=2",
            "--config.teacher.epochs=1",
            *[f"--config.{network}.name=resnet8" for network in ("teacher", "student")],
            *[f"--config.{network}.width=0.25" for network in ("teacher", "student")],
        ]
        if teacher is not None:
            arguments.append(f"--config.teacher.checkpoint={teacher}")
        code = main(["main", *arguments])
        if code:
            raise SystemExit(code)
        return digest_of_run(workdir)

    digests = {}
    if methods:
        digests["cskd"] = run("digits", "cskd", None)
        for method in methods:
            if method not in digests and method != "mlcskd":
                digests[method] = run("digits", method, None if method == "ce" else folder / "cskd" / "teacher")
        if "mlcskd" in methods:
            digests["mlcskd"] = run("digit_pairs", "mlcskd", None)
    return digests


def digests_of(case: str, methods: tuple[str, ...] = (*METHODS, "mlcskd")) -> dict[str, str]:
    """Runs a case in a process of its own; returns {method: digest}."""
    devices, dtype = CASES[case]
    variables = {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_ENABLE_X64": str(int(dtype == "float64")),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.drift", "--inside", folder, "--dtype", dtype, *methods]
        process = subprocess.run(command, cwd=ROOT, env=os.environ | variables, text=True, capture_output=True)
        if process.returncode:
            raise RuntimeError(f"{case}: {process.stdout}\n{process.stderr}")
        return json.loads(process.stdout.splitlines()[-1])


def recorded() -> dict[str, dict[str, str]]:
    """Returns {case: {method: digest}} of this machine and these packages; empty if they were never recorded."""
    everything = json.loads(RECORDED.read_text(encoding="utf-8")) if RECORDED.exists() else {}
    return everything.get(fingerprint(), {})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--inside")
    parser.add_argument("--dtype")
    options = parser.parse_args()
    if options.inside:
        print(json.dumps(run_all(pathlib.Path(options.inside), options.dtype, options.cases)))
        return 0
    wrong, known = 0, recorded()
    for case in options.cases or CASES:
        found = digests_of(case)
        if options.record:
            everything = json.loads(RECORDED.read_text(encoding="utf-8")) if RECORDED.exists() else {}
            everything.setdefault(fingerprint(), {})[case] = found
            RECORDED.write_text(json.dumps(everything, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        expected = known.get(case, {})
        different = [method for method in expected if found.get(method) != expected[method]]
        wrong += len(different) + (not expected)
        unknown = [method for method in found if method not in expected]
        print(f"{case}: {len(expected) - len(different)} equal, different: {', '.join(different) or 'none'}", end="")
        print(f", not recorded: {', '.join(unknown)}" if unknown else "", flush=True)
    return bool(wrong and not options.record)


if __name__ == "__main__":
    sys.exit(main())
