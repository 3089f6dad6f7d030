"""The flags of XLA with which tests run, and the commands that they start. XLA reads them when JAX is first used."""

import os

import jaxlib

_COUNT = "--xla_force_host_platform_device_count="
# Most tests run a program once: its speed does not matter, and compiling takes most of their time.
_FAST = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    # The tests occupy all cores already, and a program in parts takes a fifth more to compile.
    "--xla_cpu_parallel_codegen_split_count=1",
    # It takes a third less to compile. Newer versions do not know this flag, and XLA aborts for an unknown one.
    *(("--xla_cpu_use_fusion_emitters=false",) if jaxlib.version.__version_info__ < (0, 11) else ()),
)


def xla_flags(devices: int | None) -> str:
    """XLA_FLAGS for this number of CPU devices, or for no number; other flags that are set stay."""
    given = os.environ.get("XLA_FLAGS", "").split()
    kept = [flag for flag in given if flag not in _FAST and not flag.startswith(_COUNT)]
    return " ".join([*kept, *_FAST, *([] if devices is None else [f"{_COUNT}{devices}"])])
