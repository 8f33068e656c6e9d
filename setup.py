"""Builds the native CPU library beside its Python: plain C++17, no headers but the compiler's own, no network.

Each instruction set is compiled with its own flags and chosen at run time, so a wheel runs on any processor of the
architecture. Where there is no compiler, or it refuses, the installation goes on without: `dqbart doctor` says so.
"""

import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("kernels/dqbart_kernels/cpu/src")
COMMON = ["-O3", "-std=c++17", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra"]
INSTRUCTION_SETS = {
    "x86_64": {
        "isa_avx2": ["-mavx2", "-mfma"],
        "isa_avxvnni": ["-mavx2", "-mfma", "-mavxvnni"],
        "isa_avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mfma"],
    },
    "aarch64": {"isa_neon": ["-march=armv8.2-a+dotprod"]},
}
MACHINES = {"x86_64": "x86_64", "AMD64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}


class BuildNative(build_ext):
    """Compiles every source with its own flags; instruction sets that the compiler doesn't know are left out."""

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        sets = INSTRUCTION_SETS.get(MACHINES.get(platform.machine(), ""), {})
        known = {name: flags for name, flags in sets.items() if self._knows(flags)}
        macros = [(name.replace("isa_", "DQ_").upper(), None) for name in known]
        objects: list[str] = []
        for source in sorted(SOURCES.glob("*.cpp")):
            if source.stem.startswith("isa_") and source.stem != "isa_portable" and source.stem not in known:
                continue
            flags = [*COMMON, *known.get(source.stem, [])]
            objects += self.compiler.compile(
                [str(source)], output_dir=self.build_temp, macros=macros, extra_postargs=flags,
                depends=[str(header) for header in [*SOURCES.glob("*.h"), *SOURCES.glob("*.inc")]],
            )  # fmt: skip
        self.compiler.link_shared_object(objects, str(target), extra_postargs=["-pthread"], target_lang="c++")

    def _knows(self, flags: list[str]) -> bool:
        probe = Path(self.build_temp) / "probe.cpp"
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("int main() { return 0; }\n")
        try:
            self.compiler.compile([str(probe)], output_dir=str(probe.parent), extra_postargs=flags)
        except Exception:  # whatever a compiler fails with: it does not know these flags
            return False
        return True


setup(
    ext_modules=[Extension("dqbart_kernels.cpu.libdqbart_cpu", sources=[], language="c++", optional=True)],
    cmdclass={"build_ext": BuildNative},
)
