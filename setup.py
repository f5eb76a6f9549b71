"""Builds what is in csrc/ with CMake: libclipfast where nvcc is, libclipfast_cpu where GCC is.

CLIPFAST_CUDA=1 and CLIPFAST_CPU=1 make a build that fails, or a missing compiler, an error; 0 skips it. Otherwise a
failure leaves one warning and a package without that library. Everything else is in pyproject.toml.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    path = os.pathsep.join([os.environ.get("PATH", ""), *(os.path.join(home, "bin") for home in homes if home)])
    return os.environ.get("CUDACXX") or shutil.which("nvcc", path=path)


def find_gcc() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def find_cmake() -> str | None:
    # pip's environment, where the cmake package may be, is not on the PATH of what it runs
    own = str(Path(sys.executable).parent)
    return shutil.which("cmake") or shutil.which("cmake", path=own)


# library -> (switch, its compiler, CMake's name of that)
LIBRARIES = {
    "libclipfast": ("CUDA", find_nvcc, "CMAKE_CUDA_COMPILER"),
    "libclipfast_cpu": ("CPU", find_gcc, "CMAKE_CXX_COMPILER"),
}


class BuildLibrary(build_ext):
    def get_ext_filename(self, fullname):
        # a plain library, not a Python module: no interpreter's suffix
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext):
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        switch, find, variable = LIBRARIES[ext.name.rpartition(".")[2]]
        # kept between builds, so that an installation where nothing changed compiles nothing
        build = ROOT / "build" / f"cmake-{switch.lower()}"
        try:
            tools = {"cmake": find_cmake(), variable: find()}
            if missing := [name for name, path in tools.items() if path is None]:
                raise FileNotFoundError(f"not found: {', '.join(missing)}")
            options = [f"-DCLIPFAST_{other}={'ON' if other == switch else 'OFF'}" for other, *_ in LIBRARIES.values()]
            options += [f"-D{variable}={tools[variable]}", f"-DCLIPFAST_OUTPUT={output}"]
            subprocess.run([tools["cmake"], "-S", str(ROOT), "-B", str(build), *options], check=True)
            subprocess.run([tools["cmake"], "--build", str(build)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            outcome = "it is optional and left out" if ext.optional else f"CLIPFAST_{switch}=1 requires it"
            raise CompileError(f"{ext.name} was not built ({outcome}): {error}") from error


class AnyPython(bdist_wheel):
    def get_tag(self):
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


def extensions():
    for name, (switch, find, _) in LIBRARIES.items():
        wanted = os.environ.get(f"CLIPFAST_{switch}", "")
        if wanted == "1" or (wanted != "0" and find() is not None):
            yield Extension(f"clipfast.kernels.{name}", sources=[], optional=wanted != "1")


setup(ext_modules=[*extensions()], cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPython})
