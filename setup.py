"""Builds lola._lola: every C file with the flags that it needs, on all cores, with whatever gcc or clang is there."""

import hashlib
import os
import platform
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


setup(
    ext_modules=[
        Extension(
            "lola._lola",
            sources=sorted(
                [*glob("csrc/core/*.c"), *glob("csrc/cpu/*.c"), "csrc/cpu/isa/scalar.c", *glob("csrc/python/*.c")]
            ),
            include_dirs=["csrc", "csrc/include", numpy.get_include()],
            depends=sorted(glob("csrc/**/*.h", recursive=True)),
        )
    ],
    cmdclass={"build_ext": BuildExt},
)
