"""Builds libclipfast (csrc/) with CMake where nvcc is; without it the package is pure Python.

CLIPFAST_CUDA=1 makes a build that fails, or a missing nvcc, an error; CLIPFAST_CUDA=0 skips it. Otherwise a failure
leaves one warning and a package without the library. Everything else is in pyproject.toml.
"""

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
WANTED = os.environ.get("CLIPFAST_CUDA", "")


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    path = os.pathsep.join([os.environ.get("PATH", ""), *(os.path.join(home, "bin") for home in homes if home)])
    return os.environ.get("CUDACXX") or shutil.which("nvcc", path=path)


class BuildLibrary(build_ext):
    def get_ext_filename(self, fullname):
        # a plain library, not a Python module: no interpreter's suffix
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext):
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # kept between builds, so that an installation where nothing changed compiles nothing
        build = ROOT / "build" / "cmake"
        try:
            nvcc = find_nvcc()
            if nvcc is None:
                raise FileNotFoundError("nvcc not found on PATH, in CUDA_HOME or in /usr/local/cuda")
            options = [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCLIPFAST_OUTPUT={output}"]
            subprocess.run(["cmake", "-S", str(ROOT), "-B", str(build), *options], check=True)
            subprocess.run(["cmake", "--build", str(build)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            outcome = "it is optional and left out" if ext.optional else "CLIPFAST_CUDA=1 requires it"
            raise CompileError(f"the CUDA library was not built ({outcome}): {error}") from error


class AnyPython(bdist_wheel):
    def get_tag(self):
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


wants_library = WANTED == "1" or (WANTED != "0" and find_nvcc() is not None)
library = Extension("clipfast.kernels.libclipfast", sources=[], optional=WANTED != "1")
setup(
    ext_modules=[library] if wants_library else [],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPython},
)
