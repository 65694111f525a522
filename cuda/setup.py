"""The wheel adaattn-cuda, of a checkout: `pip wheel ./cuda`. cuda/build.py says what the environment does."""

import importlib.util
import re
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent


class BuildLibrary(build_py):
    """Compiles the library into the package."""

    def run(self) -> None:
        """Fails where the library cannot be built: there is nothing else in this wheel."""
        super().run()
        spec = importlib.util.spec_from_file_location("cuda_build", HERE / "build.py")
        cuda = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(cuda)
        try:
            cuda.build(Path(self.build_lib) / "adaattn_cuda", Path(self.build_lib).parent)
        except cuda.CudaBuildError as error:
            raise SystemExit(f"adaattn-cuda: {error}") from None


class AnyPython(bdist_wheel):
    """A wheel for one platform and every Python: the library knows nothing of it."""

    def get_tag(self) -> tuple[str, str, str]:
        """Its tags."""
        return "py3", "none", super().get_tag()[2]


class Binary(Distribution):
    """Says that the wheel is not pure."""

    def has_ext_modules(self) -> bool:
        """True, though the library is no extension module."""
        return True


version = re.search(r'ADA_VERSION "(.+)"', (HERE.parent / "csrc" / "adaattn.h").read_text())[1]

setup(
    version=version,
    install_requires=[f"adaattn=={version}"],
    packages=["adaattn_cuda"],
    distclass=Binary,
    cmdclass={"build_py": BuildLibrary, "bdist_wheel": AnyPython},
)
