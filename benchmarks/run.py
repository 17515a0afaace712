#!/usr/bin/env python
"""Measures LoLA: every speed behind a check against `lola.reference`, beside the machine's ceilings and its peers."""

import os

# NumPy's BLAS chooses its kernel when it is loaded; these would make it choose a worse one than it has.
FORCED = {name: os.environ.pop(name, None) for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")}

import argparse  # noqa: E402
import dataclasses  # noqa: E402
import datetime  # noqa: E402
import json  # noqa: E402
import signal  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
try:
    import lola  # noqa: E402, F401
except ImportError:  # a checkout that was built in place
    sys.path.insert(1, str(HERE.parent))

import harness  # noqa: E402
import sections  # noqa: E402

EXAMPLES = """examples:
  python benchmarks/run.py --quick                      a minute: does everything run and pass its checks?
  python benchmarks/run.py --json cpu.json              everything, on all cores that this process may use
  taskset -c 0-3 python benchmarks/run.py               the same on four of them
  python benchmarks/run.py --only decode,update         two of the sections
  python benchmarks/run.py --show cpu.json              prints what was measured before
  python benchmarks/run.py --show cpu.json --plot a.png its curves as a picture (takes matplotlib)
  python benchmarks/run.py --device cuda --json h100.json   the GPU: five minutes; --quick one, of what kernels change
"""


def parts(device: str):
    """The sections of a device: by name, what a full and a quick run measure, and the names that --quick takes by itself."""
    if device == "cpu":
        return sections.SECTIONS, sections.FULL, sections.QUICK, tuple(sections.SECTIONS)
    import gpu_sections

    return gpu_sections.SECTIONS, gpu_sections.FULL, gpu_sections.QUICK, gpu_sections.QUICK_SECTIONS


def backend_of(options):
    if options.device == "cpu":
        from cpu import Cpu

        return Cpu(options.threads)
    from gpu import Gpu

    return Gpu()


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to measure (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small sizes and few repeats: a test of the harness, not a measurement")
    parser.add_argument("--only", metavar="NAMES", help="sections, with commas between (default: all; see README.md)")
    parser.add_argument("--threads", type=int, metavar="N", help="measure up to N threads of the CPU (default: all cores of this process)")
    parser.add_argument("--repeats", type=int, metavar="N", help="rounds of each group at most, at least 3 (default: 20; 3 with --quick)")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="about so long for each group of runs (default: 30; 1 with --quick)")
    parser.add_argument("--json", metavar="FILE", help="write the figures, with machine, versions and commit")
    parser.add_argument("--plot", metavar="FILE", help="draw the curves: updates against sparse, time and memory against length")
    parser.add_argument("--show", metavar="FILE", help="print a file of --json and measure nothing")
    options = parser.parse_args(argv)
    if options.show:
        return options
    try:
        known, _, _, quick = parts(options.device)
    except ImportError as error:
        parser.error(f"--device {options.device} takes torch: {error}")
    options.only = options.only.split(",") if options.only else list(quick if options.quick else known)
    unknown = [name for name in options.only if name not in known]
    if unknown:
        parser.error(f"--only takes names of {', '.join(known)}; got {', '.join(unknown)}")
    for name, least in (("threads", 1), ("repeats", 3)):
        if (value := getattr(options, name)) is not None and value < least:
            parser.error(f"--{name} must be at least {least}, got {value}")
    return options


def commit() -> tuple[str | None, bool]:
    """The commit of the checkout that this file is in, and whether something tracked has changed since."""

    def git(*words):
        return subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, text=True)

    try:
        head = git("rev-parse", "HEAD")
        return (head.stdout.strip() or None), bool(git("status", "--porcelain", "--untracked-files=no").stdout.strip())
    except OSError:
        return None, False


def main(argv=None) -> int:
    """0: all was measured; 1: a check failed, and something was not; 2: there is no such device."""
    options = arguments(argv)
    if options.show:
        with open(options.show, encoding="utf-8") as file:
            data = json.load(file)
        harness.show(data)
        if options.plot:
            harness.plot(data, options.plot)
        return 0
    begun = time.perf_counter()
    known, full, quick, _ = parts(options.device)
    plan = quick if options.quick else full
    changes = {name: getattr(options, name) for name in ("repeats", "budget") if getattr(options, name) is not None}
    plan = dataclasses.replace(plan, **changes)
    try:
        backend = backend_of(options)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    head, dirty = commit()
    settings = {
        "quick": options.quick,
        "only": options.only,
        "repeats": plan.repeats,
        "budget": plan.budget,
        "unset": [name for name, value in FORCED.items() if value is not None],
    }
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    report = harness.Report(settings, {**backend.describe(), "commit": head, "dirty": dirty, "time": now})
    harness.show_machine(report.data)
    for name in settings["unset"]:
        print(f"{name} was set and has been unset: BLAS shall use its best kernel")
    report.data["complete"] = False
    failed: list[dict] = []
    # What was measured is kept when a run is cut short, by Ctrl-C or by a time limit's SIGTERM.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    try:
        for name in options.only:
            known[name](backend, report, plan)
        report.data["complete"] = True
    finally:
        signal.signal(signal.SIGTERM, before)
        backend.close()
        failed += [skipped for skipped in report.data["skipped"] if "CHECK FAILED" in skipped["why"]]
        report.data["passed"] = not failed
        report.data["seconds"] = round(time.perf_counter() - begun, 1)
        if options.json:
            report.write(options.json)
        harness.show_goals(report.data)
    print(f"\n{len(report.data['checks'])} checks, {len(failed)} parts left out for a failed one; {report.data['seconds']:.0f} s")
    if options.plot:
        harness.plot(report.data, options.plot)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
