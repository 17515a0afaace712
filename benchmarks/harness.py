"""Timing in turn, figures with their spread, and the report: one dictionary that is printed and written as JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

import workload


@dataclass(frozen=True)
class Figure:
    """One measured quantity: the median of `repeats` values, and the least and greatest of them."""

    section: str
    name: str
    case: str
    unit: str
    median: float
    min: float
    max: float
    repeats: int
    note: str = ""


def alternate(backend, runs: dict[str, Callable[[], float | None]], repeats: int, budget: float) -> dict[str, np.ndarray]:
    """Runs everything in turn, round after round, and returns each one's value of every round.

    A run's value is what it returns, or the seconds that it took where it returns None. Whatever disturbs the machine for a
    while then disturbs all of a round, so ratios are taken round by round. There are `repeats` rounds, fewer if `budget`
    seconds are spent, but never fewer than three. A first round warms up and does not count.
    """
    values: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    begin = time.perf_counter()
    for i in range(repeats):
        for name in list(runs)[:: 1 if i % 2 else -1]:
            backend.settle()
            seconds, value = backend.timed(runs[name])
            values[name].append(seconds if value is None else value)
        if i >= 2 and time.perf_counter() - begin > budget:
            break
    return {name: np.array(of) for name, of in values.items()}


class Report:
    """Figures, checks and goals, gathered section by section."""

    def __init__(self, settings: dict, machine: dict):
        self.data: dict = {"settings": settings, **machine, "checks": [], "figures": [], "curves": [], "goals": [], "skipped": []}
        self.section = ""

    def begin(self, section: str, title: str):
        self.section = section
        print(f"\n{title}\n{'-' * len(title)}", flush=True)

    def checked(self, checks: list[workload.Check]):
        """Prints and keeps checks; raises `workload.CheckFailed` at one that did not pass, so that no speed follows."""
        for check in checks:
            self.data["checks"].append(
                {"section": self.section, "what": check.what, "error": float(check.error), "bound": float(check.bound), "passed": check.passed}
            )
            print(f"  check  {check.what}: error {check.error:.1e}, bound {check.bound:.1e}", flush=True)
        workload.require(checks)

    def figure(self, name: str, case: str, unit: str, values, note: str = "") -> float:
        """Prints and keeps a figure; returns its median."""
        values = np.asarray(values, np.float64)
        made = Figure(
            self.section, name, case, unit, float(np.median(values)), float(values.min()), float(values.max()), len(values), note
        )
        self.data["figures"].append(asdict(made))
        print(line(asdict(made)), flush=True)
        return made.median

    def curve(self, name: str, x: str, y: dict[str, list[float]], at: list[float], case: str):
        self.data["curves"].append({"section": self.section, "name": name, "case": case, "x": x, "at": at, "y": y})

    def skip(self, what: str, why: str):
        self.data["skipped"].append({"section": self.section, "what": what, "why": why})
        print(f"  skipped  {what}: {why}", flush=True)

    def goal(self, name: str, what: str, goal: float, floor: float, figure: float, unit: str = "", most: bool = False):
        """One line of the table of goals; `most` where the figure should not exceed them."""
        reached = (lambda x: figure <= x) if most else (lambda x: figure >= x)
        verdict = "goal" if reached(goal) else "floor" if reached(floor) else "below"
        if most and verdict == "below":
            verdict = "above"
        self.data["goals"].append(
            {"name": name, "what": what, "goal": goal, "floor": floor, "figure": float(figure), "unit": unit, "verdict": verdict}
        )

    def write(self, path: str):
        # Whole before the file is opened: NumPy's own numbers and truth values become Python's.
        text = json.dumps(self.data, indent=1, default=lambda number: number.item())
        with open(path, "w", encoding="utf-8") as file:
            file.write(text + "\n")


# ------------------------------------------------------------------------------------------------------------- printing


def number(x: float) -> str:
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.1f}" if abs(x) >= 10 else f"{x:.2f}" if abs(x) >= 0.1 else f"{x:.4f}"


def line(figure: dict) -> str:
    spread = f"{number(figure['min'])} .. {number(figure['max'])}, {figure['repeats']}x"
    note = f"  {figure['note']}" if figure["note"] else ""
    return f"  {figure['name']:<46} {number(figure['median']):>8} {figure['unit']:<10} ({spread}){note}"


def show_goals(data: dict):
    """The table of goals; what the verdicts mean is said below it."""
    if not data["goals"]:
        return
    print("\ngoals (ratios within this run; goal: reached, floor: between floor and goal, below: under the floor)")
    print(f"  {'':<4} {'what':<72} {'goal':>6} {'floor':>6} {'figure':>7}")
    for g in data["goals"]:
        print(f"  {g['name']:<4} {g['what']:<72} {number(g['goal']):>6} {number(g['floor']):>6} {number(g['figure']):>7}  {g['verdict']}")
    if data["settings"]["quick"]:
        print("  --quick: sizes far below those of the goals, so the verdicts say little")


def show_machine(data: dict):
    device, versions = data["device"], data["versions"]
    if device["kind"] == "cpu":
        print(f"{device['name']}, {device['threads']} threads (of {device['cores']} cores), last-level cache {device['cache_bytes'] >> 20} MiB")
        code = f"lola's instruction set {device['isa']}"
    else:
        print(f"{device['name']}, {device['multiprocessors']} multiprocessors, {device['memory_bytes'] >> 30} GiB, L2 {device['cache_bytes'] >> 20} MiB")
        code = f"compute capability {device['capability']}"
    print(", ".join(f"{name} {version}" for name, version in versions.items() if version))
    commit = data["commit"] or "unknown"
    print(f"{code}; commit {commit[:12]}{' with changes' if data['dirty'] else ''}")
    for library in data["blas"]:
        print(f"BLAS: {', '.join(f'{name} {value}' for name, value in library.items())}")


def plot(data: dict, path: str):
    """The curves of a report as one picture: updates against the size of the sparse cache, time and memory against length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[str, list[tuple[str, list, list]]] = {}
    for curve in data["curves"]:
        sharing = next((name for name in ("kv_head", "query_head") if name in curve["case"]), "")
        for name, values in curve["y"].items():
            panels.setdefault(f"{name}|{curve['x']}", []).append((sharing, curve["at"], values))
    if not panels:
        raise ValueError("there is no curve to plot: run the sections scaling and update")
    figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 2.8), layout="constrained", squeeze=False)
    for ax, (name, curves) in zip(axes[0], panels.items()):
        title, x = name.split("|")
        for label, at, values in curves:
            ax.plot(at, values, "o-", label=label)
        ax.set(title=title, xlabel=x, xscale="log", ylim=(0, None))
        ax.set_xticks(curves[0][1], [f"{v // 1024}K" if v >= 2048 else str(v) for v in curves[0][1]], fontsize="small")
        ax.minorticks_off()
        if len(curves) > 1:
            ax.legend(frameon=False)
    figure.savefig(path, dpi=120)


def show(data: dict):
    """A whole report, as it was printed when it was measured."""
    show_machine(data)
    section = None
    for figure in data["figures"]:
        if (figure["section"], figure["case"]) != section:
            section = figure["section"], figure["case"]
            print(f"\n{figure['section']}: {figure['case']}")
        print(line(figure))
    for skipped in data["skipped"]:
        print(f"  skipped  {skipped['what']}: {skipped['why']}")
    passed = sum(check["passed"] for check in data["checks"])
    print(f"\n{passed} of {len(data['checks'])} checks passed{'' if data['complete'] else '; the run was cut short'}")
    show_goals(data)
