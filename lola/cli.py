"""The ``lola`` command: ``lola eval``, ``lola info`` and ``lola convert``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import lola

__all__ = ["main"]

_EVAL = """\
Hides needles in long prompts and asks for them: first one needle in full, then a table that
compares softmax attention, the linearised base, the base with a longer window, LoLA with its
state unread, and LoLA."""

_EXAMPLES = """\
examples:
  lola eval                                        the bundled model, two tasks, two minutes
  lola eval --samples 200 --json table.json        the whole fixed list, and the rows as JSON
  lola eval --model needle-8k --lengths 4096 8192  another adapter, two lengths
  lola eval --tasks niah_multikey_1 --sparse 64    a harder task, a smaller sparse cache
  lola eval --score recency --sparse-per kv_head   another score, one sparse set per KV head
  lola eval --model ./my-llama --adapter ./maps    your own Llama folder with feature maps
  lola eval --device cuda                          the same table, LoLA's attention on a GPU
"""


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=26, width=100)


def _parser() -> argparse.ArgumentParser:
    # Not the tables in lola.eval: a word of help should not have to read models and word lists.
    parser = argparse.ArgumentParser(
        prog="lola",
        description="LoLA: low-rank linear attention with sparse caching.",
        epilog="lola eval --help says more.",
        formatter_class=_Formatter,
    )
    parser.add_argument("--version", action="version", version=f"lola {lola.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{eval,info,convert}")
    _add_convert(commands)

    info = commands.add_parser("info", help="versions, instruction set, threads, BLAS and CUDA", formatter_class=_Formatter)
    info.set_defaults(run=_info)

    ev = commands.add_parser("eval", help="needles in long prompts: base against LoLA", description=_EVAL, epilog=_EXAMPLES, formatter_class=_Formatter)
    ev.set_defaults(run=_eval)
    what = ev.add_argument_group("what to run")
    what.add_argument("--model", default="needle", metavar="NAME", help="needle, needle-8k, or a Llama folder (default: %(default)s)")
    what.add_argument("--adapter", metavar="FOLDER", help="folder with adapter.json and feature maps (default: the model's)")
    what.add_argument(
        "--tasks", nargs="+", default=["niah_single_1", "niah_single_2"], metavar="TASK",
        help="niah_single_1 .. 3, niah_multikey_1 .. 2, niah_multivalue, niah_multiquery, vt (default: niah_single_1 niah_single_2)",
    )  # fmt: skip
    what.add_argument("--lengths", nargs="+", type=int, default=[4096], metavar="N", help="tokens of prompt and answer (default: 4096)")
    what.add_argument("--samples", type=int, default=40, metavar="N", help="how many of the fixed list (default: %(default)s)")
    what.add_argument("--seed", type=int, default=42, metavar="N", help="which fixed list (default: %(default)s)")
    what.add_argument("--split", default="eval", choices=("eval", "other"), help="which held-out text (default: %(default)s)")
    how = ev.add_argument_group("LoLA")
    how.add_argument("--sparse", type=int, default=256, metavar="N", help="pairs in each sparse cache (default: %(default)s)")
    how.add_argument("--window", type=int, metavar="N", help="tokens in the window, a multiple of the chunk (default: the adapter's)")
    how.add_argument("--chunk", type=int, metavar="N", help="tokens between updates (default: the adapter's)")
    how.add_argument("--mixing", metavar="NAME", help="paper, gated, lolcats or cache_only (default: gated)")
    how.add_argument("--score", default="self_recall", metavar="NAME", help="self_recall, value_norm, key_norm, recency or random (default: %(default)s)")
    how.add_argument("--sparse-per", default="query_head", metavar="WHAT", help="query_head or kv_head (default: %(default)s)")
    where = ev.add_argument_group("where and how")
    where.add_argument("--device", default="cpu", metavar="NAME", help="where LoLA's caches lie and its attention runs: cpu, cuda, cuda:1 ..; softmax attention and the rest of the model run on the CPU, in NumPy (default: %(default)s)")
    where.add_argument("--threads", type=int, metavar="N", help="samples side by side (default: all processors)")
    where.add_argument("--dtype", default="float16", metavar="NAME", help="cached keys and values: float16 or float32 (default: %(default)s)")
    where.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 2 for wrong arguments, 130 after Ctrl-C.

    ``arguments`` are those after the program's name; by default the process's own. Wrong options end by ``SystemExit(2)``, as
    argparse has it.
    """
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("\nlola: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (`| head`). Python would fail once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError, ModuleNotFoundError, RuntimeError, MemoryError) as error:
        print(f"lola {options.command}: error: {error}", file=sys.stderr)
        return 2


def _eval(options) -> int:
    from lola.eval import run, table

    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise FileNotFoundError(f"--json: there is no folder {options.json.absolute().parent}")
    begun = time.perf_counter()
    # Everything is checked before the first answer, so that a wrong option does not cost its user a minute.
    comparison = run.Comparison(
        options.model, options.tasks, options.lengths, sparse=options.sparse, window=options.window, chunk=options.chunk,
        mixing=options.mixing, score=options.score, sparse_per=options.sparse_per, samples=options.samples, seed=options.seed,
        split=options.split, adapter=options.adapter, device=options.device, threads=options.threads, dtype=options.dtype,
    )  # fmt: skip
    if comparison.trained is None:
        print(f"{options.model} has no adapter: softmax attention only", file=sys.stderr)
    else:
        print(table.needle(comparison.needle(), options.lengths[0]), end="\n\n")
    print(table.explain(comparison.setups, comparison.trained), flush=True)

    progress = table.Progress("answers")
    last = None

    def on_row(values):
        nonlocal last
        at = values["task"], values["length"]
        text = table.row(values)
        if at != last:
            text = f"\n{table.title(*at, values['samples'])}\n{text}"
        last = at
        progress.write(text)

    try:
        rows = comparison.run(on_row, progress.update)
    finally:
        progress.close()

    print()
    if comparison.trained is not None:
        for length in options.lengths:
            print(table.savings(length, comparison.full_bytes(length), comparison.lola_bytes()))
    there = "" if comparison.device == "cpu" else f", LoLA's attention on {comparison.device}"
    print(f"{sum(row['samples'] for row in rows)} answers in {time.perf_counter() - begun:.0f} s on {comparison.threads} threads{there}")
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def _info(options) -> int:
    lines = {
        "lola": lola.__version__,
        "python": f"{platform.python_version()} ({platform.system()} {platform.machine()})",
        "numpy": np.__version__,
        **_kernels(),
        "BLAS": _blas(),
        "CUDA": _cuda(),
    }
    for name, value in lines.items():
        print(f"{name:<10}{value}")
    return 0


def _kernels() -> dict[str, str]:
    from lola.eval.run import processors

    extension = lola._lola
    return {
        "ISA": f"{extension.isa()} (of {', '.join(extension.available_isas())}; LOLA_ISA chooses)",
        "threads": f"{lola.get_num_threads()} (of {processors()} processors; LOLA_NUM_THREADS chooses)",
    }


def _blas() -> str:
    try:
        from threadpoolctl import threadpool_info
    except ModuleNotFoundError:
        pass
    else:
        for library in threadpool_info():
            if library["user_api"] == "blas":
                core = f", {library['architecture']}" if library.get("architecture") else ""
                return f"{library['internal_api']} {library['version']}{core}, {library['num_threads']} threads"
    blas = np.show_config(mode="dicts").get("Build Dependencies", {}).get("blas", {})
    return f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip()


def _cuda() -> str:
    reason = lola.cuda_unavailable_reason()
    return "available" if reason is None else f"not available: {reason}"


_CONVERT = """\
Writes a LoLCATs checkpoint - softmax base, distilled feature maps, LoRA weights - as one folder that transformers'
AutoModelForCausalLM reads once lola.torch is imported. Needs lola[torch]."""

_CONVERT_EXAMPLES = """\
examples:
  lola convert needle --output needle-lola
  lola convert ./Llama-3.1-8B distill/model.pt --lora ft-lora/model.pt --output llama-lola --dtype bfloat16
"""


def _add_convert(commands) -> None:
    cv = commands.add_parser("convert", help="a LoLCATs checkpoint for transformers", description=_CONVERT, epilog=_CONVERT_EXAMPLES, formatter_class=_Formatter)
    cv.set_defaults(run=_convert)
    cv.add_argument("base", help="folder or hub name of the softmax model; needle or needle-8k need nothing else")
    cv.add_argument("distill", nargs="?", help="feature maps and window factors: a file, or a folder with model.pt or feature_maps.safetensors")
    cv.add_argument("--lora", metavar="FILE", help="LoRA weights (default: those beside DISTILL if adapter.json speaks of any)")
    cv.add_argument("--output", required=True, metavar="FOLDER", help="a new folder")
    cv.add_argument("--alpha", type=float, metavar="N", help="LoRA's alpha (default: the adapter's, else 2 r)")
    cv.add_argument("--feature-map", choices=("softmax_dim", "exp_dim"), help="LoLCATs' name of the map (default: the adapter's, else softmax_dim)")
    cv.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="of the weights (default: as the base is stored)")
    for name in ("window", "chunk", "sparse"):
        cv.add_argument(f"--{name}", type=int, metavar="N", help=f"lola.Config's {name} (default: {'256' if name == 'sparse' else 'as trained'})")
    for name in ("mixing", "score", "sparse-per"):
        cv.add_argument(f"--{name}", metavar="NAME", help=f"lola.Config's {name.replace('-', '_')}")


def _convert(options) -> int:
    from lola.torch.convert import convert, size

    fields = ("window", "chunk", "sparse", "mixing", "score", "sparse_per")
    config = {name: value for name in fields if (value := getattr(options, name)) is not None}
    model = convert(
        options.base, options.distill, options.output, options.lora, config=config, feature_map=options.feature_map,
        alpha=options.alpha, dtype=options.dtype,
    )  # fmt: skip
    print(f"{options.output}: {size(model)}, {lola.Config(**model.config.lola['config'])}")
    return 0
