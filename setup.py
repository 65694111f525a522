"""Builds the engine: every kernel file with its own ISA flags, probed first, so that one binary runs
everywhere.

Environment: ADAATTN_WERROR=1 makes warnings errors, ADAATTN_COVERAGE=1 instruments for gcov,
ADAATTN_SANITIZE=address,undefined builds with sanitizers, ADAATTN_EMULATE=amx,bf16 builds, for tests, kernels
whose instructions the machine lacks with those of AVX-512. ADAATTN_CUDA=1 builds the CUDA backend as well and
fails where it cannot, "auto" does so if there is an nvcc; the default is 0, because its kernels take minutes
to compile, of which most who install the package would have nothing. cuda/build.py has more.
"""

import importlib.util
import os
import re
import sys
import tempfile
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
VNNI = [*AVX512, "-mavx512vnni", "-mavx512vbmi"]
BF16 = [*VNNI, "-mavx512bf16"]
AMX = [*BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"]
# ISA, flags, and intrinsics that need them
ISAS = [
    ("avx2", AVX2, "_mm256_fmadd_ps(_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps())"),
    ("avx512", AVX512, "_mm512_and_ps(_mm512_setzero_ps(), _mm512_setzero_ps())"),
    (
        "avx512vnni",
        VNNI,
        "_mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), _mm512_set1_epi8(1))",
    ),
    ("avx512bf16", BF16, "_mm512_cvtneps_pbh(_mm512_setzero_ps())"),
    ("amx", AMX, "_tile_zero(0); _tile_dpbf16ps(0, 1, 2); _tile_dpbsud(0, 1, 2)"),
]
# Sets that a build for tests can do without: their kernels are compiled with other instructions.
EMULATIONS = {"amx": "amx", "bf16": "avx512bf16"}


def emulations() -> list[str]:
    """The names in ADAATTN_EMULATE."""
    names = list(filter(None, os.environ.get("ADAATTN_EMULATE", "").split(",")))
    if unknown := [name for name in names if name not in EMULATIONS]:
        raise SystemExit(f"ADAATTN_EMULATE: expected names among {sorted(EMULATIONS)}, got {unknown}")
    return names


def env_flags() -> tuple[list[str], list[str]]:
    """Compiler and linker flags that the environment asks for."""
    compile_flags = [f"-DADAATTN_EMULATE_{name.upper()}=1" for name in emulations()]
    link_flags = []
    if os.environ.get("ADAATTN_WERROR") == "1":
        compile_flags += ["-Wall", "-Wextra", "-Wshadow", "-Werror"]
    if os.environ.get("ADAATTN_COVERAGE") == "1":
        compile_flags += ["--coverage", "-O1"]
        link_flags += ["--coverage"]
    if sanitize := os.environ.get("ADAATTN_SANITIZE"):
        compile_flags += [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer", "-g"]
        link_flags += [f"-fsanitize={sanitize}"]
    return compile_flags, link_flags


class BuildEngine(build_ext):
    """Compiles the sources in groups, one for each ISA, and links them into one extension."""

    backend: Path | None = None  # the CUDA backend, where it was built

    def can_build(self, flags: list[str], statement: str) -> bool:
        """Whether the compiler takes the flags and knows the intrinsics behind them."""
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder, "probe.c")
            probe.write_text(f"#include <immintrin.h>\nvoid probe(void) {{ {statement}; }}\n")
            try:
                self.compiler.compile([str(probe)], output_dir=folder, extra_postargs=flags)
            except Exception:
                return False
        return True

    def build_extension(self, ext: Extension) -> None:
        """Builds the objects of each ISA, then lets setuptools compile the rest and link."""
        compile_flags, link_flags = env_flags()
        self.force = self.force or bool(compile_flags)
        ext.extra_compile_args = [*ext.extra_compile_args, *compile_flags]
        ext.extra_link_args = [*ext.extra_link_args, *link_flags]
        left_out = []
        emulated = [EMULATIONS[name] for name in emulations()]
        vnni = next(group for group in ISAS if group[0] == "avx512vnni")
        for isa, *group in ISAS:
            flags, statement = vnni[1:] if isa in emulated else group
            built = self.can_build(flags, statement)
            ext.define_macros.append((f"ADA_BUILD_{isa.upper()}", str(int(built))))
            if not built:
                left_out.append(f"{isa}: the compiler does not take {' '.join(flags)}")
                continue
            ext.extra_objects += self.compiler.compile(
                sorted(map(str, Path("csrc/kernels").glob(f"*_{isa}.c"))),
                output_dir=self.build_temp,
                include_dirs=ext.include_dirs,
                extra_postargs=[*ext.extra_compile_args, *flags],
                depends=ext.depends,
            )
        if len(left_out) == len(ISAS):
            self.warn("only scalar kernels are built, which are slow: the others are for x86-64")
        ext.define_macros.append(("ADA_BUILD_LEFT_OUT", '"' + "; ".join(left_out) + '"'))
        super().build_extension(ext)
        self.build_backend(ext)

    def copy_extensions_to_source(self) -> None:
        """With --inplace, what lies beside the extension as well."""
        super().copy_extensions_to_source()
        if self.backend is not None:
            self.copy_file(str(self.backend), "adaattn")

    def build_backend(self, ext: Extension) -> None:
        """Builds libadaattn_cuda.so beside the extension, as far as ADAATTN_CUDA asks for it."""
        wanted = os.environ.get("ADAATTN_CUDA", "0")
        if wanted not in ("0", "1", "auto"):
            raise SystemExit(f"ADAATTN_CUDA: expected 0, 1 or auto, got {wanted}")
        if wanted == "0":
            return
        spec = importlib.util.spec_from_file_location("cuda_build", "cuda/build.py")
        cuda = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(cuda)
        if wanted == "auto" and cuda.find_nvcc() is None:
            print("the CUDA backend is left out: there is no nvcc")
            return
        try:
            self.backend = cuda.build(Path(self.get_ext_fullpath(ext.name)).parent, Path(self.build_temp))
            print("built", self.backend)
        except cuda.CudaBuildError as error:
            if wanted == "1":
                raise SystemExit(f"ADAATTN_CUDA=1: {error}") from None
            print(f"the CUDA backend is left out: {error}")


sources = [
    *Path("csrc").glob("*.c"),
    *Path("csrc/python").glob("*.c"),
    *Path("csrc/kernels").glob("*_scalar.c"),
]
depends = [Path("setup.py"), Path("cuda/ada_cuda.h")]
depends += [path for suffix in ("*.[ch]", "*.def") for path in Path("csrc").rglob(suffix)]
engine = Extension(
    "adaattn._adaattn",
    sorted(map(str, sources)),
    include_dirs=[numpy.get_include()],
    define_macros=[("_GNU_SOURCE", "1"), ("NPY_TARGET_VERSION", "NPY_1_23_API_VERSION")],
    extra_compile_args=["-std=c11", "-O3", "-fvisibility=hidden", "-fno-math-errno", "-pthread", "-g1"],
    extra_link_args=["-pthread", "-lm", "-ldl"],
    depends=sorted(map(str, depends)),
)

version = re.search(r'ADA_VERSION "(.+)"', Path("csrc/adaattn.h").read_text())[1]

if sys.platform == "win32":
    raise SystemExit("adaattn needs a POSIX system (Linux or macOS): its thread pool is built on pthreads")

setup(version=version, ext_modules=[engine], cmdclass={"build_ext": BuildEngine})
