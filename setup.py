"""Builds lola._lola, every C file with the flags that it needs, with whatever gcc or clang is there; and lola._cuda where nvcc is.

LOLA_CUDA=auto|0|1         auto (the default) builds the CUDA part where nvcc is found, 1 fails without it
LOLA_CUDA_ARCHS="80 90a"   the compute capabilities to compile for; PTX of the last goes with them
LOLA_WERROR=1              warnings are errors
"""

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

WARNINGS = ["-Wall", "-Wextra"]
FLAGS = ["-std=c11", "-O3", *WARNINGS, "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-pthread"]

# Compiled beside scalar.c, chosen among at run time: file, macro that says so to the other files, flags.
ISAS = {
    "x86_64": [
        ("avx512", "LOLA_HAVE_AVX512", ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]),
        ("avx2", "LOLA_HAVE_AVX2", ["-mavx2", "-mfma", "-mf16c"]),
    ],
    "aarch64": [("neon", "LOLA_HAVE_NEON", [])],
}

CUDA_ARCHS = "80 89 90a 100 120"
# Contraction into fused multiply-adds stays on, as nvcc has it; no flag trades exactness for speed.
CUDA_FLAGS = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler=-Wall,-Wextra,-fPIC,-fvisibility=hidden"]


def find_nvcc():
    """The path of nvcc or None, as LOLA_CUDA asks for it."""
    wanted = os.environ.get("LOLA_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise PlatformError(f"LOLA_CUDA must be auto, 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [str(Path(home, "bin")) for home in [*homes, "/usr/local/cuda"] if home]
    nvcc = shutil.which("nvcc", path=os.pathsep.join([*places[:-1], os.environ.get("PATH", ""), places[-1]]))
    if not nvcc and wanted == "1":
        raise PlatformError(
            "LOLA_CUDA=1 asks for the CUDA part of lola, but nvcc was not found: install the CUDA Toolkit (12.8 or newer) and put "
            "its bin folder on PATH or name its folder in CUDA_HOME, or leave LOLA_CUDA away"
        )
    return nvcc


def cuda_targets():
    archs = os.environ.get("LOLA_CUDA_ARCHS", CUDA_ARCHS).replace(",", " ").replace(";", " ").split()
    if not archs or not all(re.fullmatch(r"\d{2,3}[af]?", arch) for arch in archs):
        raise PlatformError(f"LOLA_CUDA_ARCHS must hold compute capabilities such as '80 90a', got {' '.join(archs)!r}")
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*targets, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def target_machine(compiler):
    """What the compiler compiles for, which on macOS and in cross builds is not always this machine."""
    names = []
    words = shlex.split(os.environ.get("ARCHFLAGS", ""))
    names = [after for word, after in zip(words, words[1:]) if word == "-arch"]
    if len(set(names)) > 1:
        raise PlatformError(f"lola builds for one architecture at a time, but ARCHFLAGS names {', '.join(names)}")
    if not names:
        try:
            triple = subprocess.run([*compiler, "-dumpmachine"], capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            triple = platform.machine()
        names = [triple.strip().split("-")[0]]
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(names[0].lower(), names[0].lower())


class BuildExt(build_ext):
    def build_extension(self, ext):
        if ext.name == "lola._cuda":
            self.build_cuda(ext)
        else:
            self.build_core(ext)

    def build_cuda(self, ext):
        nvcc, host = find_nvcc(), os.environ.get("NVCC_CCBIN")
        flags = [*CUDA_FLAGS, *cuda_targets(), *(["-ccbin", host] if host else [])]
        if os.environ.get("LOLA_WERROR") == "1":
            flags += ["-Werror=all-warnings", "-Xcompiler=-Werror"]
        folder = Path(self.build_temp) / ("cuda-" + hashlib.sha256(repr((nvcc, flags)).encode()).hexdigest()[:12])
        folder.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{path}" for path in [*ext.include_dirs, *self.include_dirs]]
        newest = max(os.path.getmtime(path) for path in [__file__, *ext.depends])

        def run(*command):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.stdout or done.stderr:
                print(done.stdout, done.stderr, sep="", flush=True)
            if done.returncode:
                raise CompileError(f"{' '.join(command)} failed (LOLA_CUDA=0 builds lola without its CUDA part)")

        def compile_one(source):
            made = folder / (source.replace("/", "-") + ".o")
            if self.force or not made.exists() or made.stat().st_mtime < max(newest, os.path.getmtime(source)):
                run(nvcc, *flags, *includes, "-c", source, "-o", str(made))
            return str(made)

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            # The largest first, so that none is left over at the end.
            objects = list(pool.map(compile_one, sorted(ext.sources, key=os.path.getsize, reverse=True)))
        target = self.get_ext_fullpath(ext.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        run(nvcc, *flags, "-shared", "-cudart=static", "-o", target, *sorted(objects))

    def build_core(self, ext):
        compiler = self.compiler.compiler_so if self.compiler.compiler_type == "unix" else None
        if not compiler:
            raise PlatformError("lola needs gcc or clang on Linux or macOS")
        if not shutil.which(compiler[0]):
            raise CompileError(
                f"lola needs a C compiler, and {compiler[0]!r} was not found: install gcc or clang, or name one in CC"
            )
        machine = target_machine(compiler)
        isas = ISAS.get(machine, [])
        macros = [(macro, None) for _, macro, _ in isas]
        extra = {f"csrc/cpu/isa/{name}.c": flags for name, _, flags in isas}
        sources = [*ext.sources, *extra]
        common = FLAGS + (["-Werror"] if os.environ.get("LOLA_WERROR") == "1" else [])
        theirs = shlex.split(os.environ.get("CFLAGS", ""))  # once more at the end, where they win

        # Objects of other flags lie in another folder, so that an old object is never mistaken for a new one.
        recipe = repr((compiler, common, extra, macros, theirs, numpy.__version__))
        folder = Path(self.build_temp) / hashlib.sha256(recipe.encode()).hexdigest()[:12]
        newest = max(os.path.getmtime(path) for path in [__file__, *ext.depends])

        def compile_one(source):
            (made,) = self.compiler.object_filenames([source], output_dir=str(folder))
            if not self.force and os.path.exists(made):
                if os.path.getmtime(made) > max(newest, os.path.getmtime(source)):
                    return made
            self.compiler.compile(
                [source],
                output_dir=str(folder),
                macros=macros,
                include_dirs=ext.include_dirs,
                extra_postargs=[*common, *extra.get(source, []), *theirs],
            )
            return made

        # The longest compilations first.
        sources.sort(key=lambda source: "/isa/" not in source)
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            objects = list(pool.map(compile_one, sources))
        self.compiler.link_shared_object(
            sorted(objects),
            self.get_ext_fullpath(ext.name),
            libraries=["m"],
            extra_postargs=["-pthread"],
            build_temp=self.build_temp,
        )


extensions = [
    Extension(
        "lola._lola",
        sources=sorted([*glob("csrc/core/*.c"), *glob("csrc/cpu/*.c"), "csrc/cpu/isa/scalar.c", *glob("csrc/python/*.c")]),
        include_dirs=["csrc", "csrc/include", numpy.get_include()],
        depends=sorted(glob("csrc/**/*.h", recursive=True)),
    )
]
if find_nvcc():
    extensions.append(
        Extension(
            "lola._cuda",
            sources=[*sorted(glob("csrc/cuda/*.cu")), "csrc/cuda/module.c", "csrc/core/message.c"],
            include_dirs=["csrc", "csrc/include"],
            depends=sorted([*glob("csrc/cuda/*.cuh"), *glob("csrc/core/*.h"), *glob("csrc/include/**/*.h", recursive=True)]),
        )
    )
setup(ext_modules=extensions, cmdclass={"build_ext": BuildExt})
