"""Checks what nvcc made of the kernels: their instructions, their registers, and what did not fit into these.

    python tests/cuda/disassembly.py lola/_cuda.*.so

It needs no GPU, but cuobjdump and nvdisasm, from the CUDA Toolkit or `pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`.
For each kernel of one architecture it prints registers, static shared memory, bytes of local memory, instructions, matrix ones of
them (HMMA: mma.sync, one warp's; HGMMA: wgmma, four warps' together), and reads and writes of local memory, in all and in main
loops. A main loop is the innermost loop (a natural loop of the control flow graph) around matrix instructions; in a kernel
without any, every innermost loop. It fails where

- the module lacks code for a target of setup.py (or of LOLA_CUDA_ARCHS), or PTX of the last one,
- a kernel of MATRIX is not there or lacks its instruction,
- an instruction takes a descriptor of two registers from an odd one, which ptxas of CUDA 13.0 makes of copies with a cache
  hint to an address that a whole warp shares: an illegal instruction,
- a wait for copies (cp.async.wait_group) can be reached from a copy that nothing has committed before: it does not wait for it,
- a kernel of sm_90a uses more local memory than LOCAL allows, or has more instructions than MOST_INSTRUCTIONS.
"""

import argparse
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass, field

# Which matrix instruction a kernel must hold. The scan scores and folds, tensor_kernel projects features.
MATRIX = {
    r"attend_wgmma_kernel<.*>": "HGMMA",
    r"attend_mma_kernel<.*>": "HMMA",
    r"wgmma_scan::(scan|update)_wgmma_kernel<.*>": "HGMMA",
    r"generic_scan::scan_kernel<generic_scan::cache_kind<(bf16|fp16), .*>>": "HMMA",
    r"tensor_kernel<.*>": "HMMA",
    r"decode_kernel<(bf16|fp16), [01]>": "HMMA",
    r"decode_pipeline_kernel<(bf16|fp16)>": "HMMA",
    r"decode_small_kernel<(bf16|fp16)>": "HMMA",
}

# Bytes of local memory that a kernel may have, and its reads and writes in main loops, as nvcc 13.0 compiles it for sm_90a.
# What is not named here may have none.
LOCAL = {
    # Once a tile of queries, and by the warps that only copy.
    r"attend_wgmma_kernel<.*, 128, .*>": (72, 0),
    r"attend_wgmma_kernel<.*, 64, .*>": (96, 0),
    # For head sizes that attend_wgmma does not take, and for architectures without it.
    r"attend_mma_kernel<.*, 64, 1, 64, 4>": (24, 4),
    r"attend_mma_kernel<.*, 128, 1, 64, 3>": (32, 4),
    r"attend_mma_kernel<.*, 128, 2, 64, 2>": (64, 14),
    # Around the call that breaks ties, and once a chunk.
    r"wgmma_scan::scan_wgmma_kernel<.*>": (16, 0),
    r"wgmma_scan::update_wgmma_kernel<.*>": (16, 0),
    # For pairs that do not fit in shared memory.
    r"generic_scan::scan_kernel<generic_scan::cache_kind<(bf16|fp16), false>>": (120, 0),
    r"generic_scan::scan_kernel<generic_scan::cache_kind<(bf16|fp16), true>>": (88, 0),
    # lola.kernels.select alone.
    r"select_kernel": (8, 1),
}

# Of kernels that do not run long enough for instructions to come beside the data, as nvcc 13.0 compiles them for sm_90a. With
# 6,259, half of them copies of the other half, a step for 16 rows took 2 us longer than with 3,476.
MOST_INSTRUCTIONS = {
    r"decode_pipeline_kernel<(bf16|fp16)>": 3700,
}


@dataclass
class Kernel:
    registers: int = 0
    shared: int = 0
    local: int = 0
    count: Counter = field(default_factory=Counter)          # of INSTRUCTION
    in_loops: int = 0                                        # of LOCAL, in main loops
    forgotten: int = 0                                       # waits that do not wait for a copy before them


# ----------------------------------------------------------------------------------- tools

def tool(name):
    """The toolkit's program: on PATH, in the toolkit's folder, or in the wheel of the package index."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [os.environ.get("PATH", ""), *(os.path.join(home, "bin") for home in homes if home)]
    wheels = importlib.util.find_spec("nvidia")
    for folder in wheels.submodule_search_locations if wheels else ():
        places += map(str, pathlib.Path(folder).glob("*/bin"))
    path = shutil.which(name, path=os.pathsep.join(places))
    if not path:
        sys.exit(f"{name} was not found: it comes with the CUDA Toolkit and with pip install nvidia-cuda-{name}")
    return path


def output(*command, cwd=None):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed: {done.stderr.strip()}")
    return done.stdout


def readable(names):
    """generic_scan::scan_kernel<generic_scan::cache_kind<bf16, true>> for what the linker calls it."""
    plain = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    result = {}
    for name, long in zip(names, plain.splitlines()):
        short = long.replace("(anonymous namespace)::", "").removeprefix("void ")
        short = short.partition("(")[0].replace(" >", ">")
        result[name] = short.replace("__nv_bfloat16", "bf16").replace("__half", "fp16").replace("float", "fp32")
    return result


# ----------------------------------------------------------------------------------- what is in the module

def targets_wanted():
    """As setup.py has them."""
    setup = pathlib.Path(__file__).parents[2] / "setup.py"
    archs = os.environ.get("LOLA_CUDA_ARCHS") or re.search(r'^CUDA_ARCHS = "(.*)"$', setup.read_text(), re.M)[1]
    return re.split(r"[ ,;]+", archs.strip())


def check_targets(module, cuobjdump):
    wanted = targets_wanted()
    code = Counter(re.findall(r"\.(sm_\w+)\.cubin", output(cuobjdump, "--list-elf", module)))
    ptx = Counter(re.findall(r"\.(sm_\w+)\.ptx", output(cuobjdump, "--list-ptx", "-all", module)))
    print(f"code for {', '.join(f'{a} ({n} files)' for a, n in code.items())}; PTX of {', '.join(ptx) or 'nothing'}")
    most = max(code.values(), default=0)
    wrong = [f"no code for sm_{a} in {most - code[f'sm_{a}']} of {most} files" for a in wanted if code[f"sm_{a}"] < max(most, 1)]
    if not ptx[f"sm_{wanted[-1]}"]:
        wrong.append(f"no PTX of sm_{wanted[-1]} for later architectures")
    return wrong


def resources(kernels, cubin, cuobjdump):
    """Registers, static shared memory and stack (where spilled registers and arrays of a thread lie)."""
    text = output(cuobjdump, "--dump-resource-usage", cubin)
    for name, reg, stack, shared, local in re.findall(
            r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text):
        kernel = kernels[name]
        kernel.registers, kernel.shared, kernel.local = int(reg), int(shared), int(stack) + int(local)


# ----------------------------------------------------------------------------------- instructions

INSTRUCTION = {
    "HMMA": re.compile(r"\bHMMA\."),
    "HGMMA": re.compile(r"\bHGMMA\."),
    "LOCAL": re.compile(r"\b(?:LDL|STL)\b"),
    "ANY": re.compile(r";"),
    "ODD": re.compile(r"desc\\?\[UR\d*[13579]\\?\]"),
}
# Copies from global to shared memory; what commits those before it, to a group or to a barrier; the wait for groups.
COPIES = re.compile(r"\b(?:(?P<copy>LDGSTS)|(?P<commit>LDGDEPBAR|ARRIVES\.LDGSTSBAR)|(?P<wait>DEPBAR\.LE SB0))\b")


def graphs(cubin, nvdisasm):
    """(function, entry, {basic block: its counts}, {basic block: its copies}, {basic block: next ones}) of each function."""
    name, blocks, copies, after, block = None, {}, {}, defaultdict(list), None
    for line in output(nvdisasm, "--output-control-flow-graph-with-basic-blocks", cubin).splitlines():
        if found := re.match(r'subgraph "cluster_(.*)" \{', line):
            name, blocks, copies, after = found[1], {}, {}, defaultdict(list)
        elif found := re.match(r'"(.*)":\w+:\w+ -> "(.*)":\w+:\w+ ', line):
            after[found[1]].append(found[2])
        elif found := re.match(r'"(.*)"$', line):
            block = found[1]
        elif line.startswith("[label="):
            text = line.replace("\\l", "\n").replace("\\ ", " ")
            blocks[block] = Counter({what: len(pattern.findall(text)) for what, pattern in INSTRUCTION.items()})
            copies[block] = [found.lastgroup for found in COPIES.finditer(text)]
        elif line == "}" and name is not None:
            yield name, next(iter(blocks), None), blocks, copies, after
            name = None


def order_of(entry, after):
    """The blocks that can be reached, each before those it leads to but for the ways back of loops."""
    order, seen, stack = [], {entry}, [(entry, iter(after[entry]))]
    while stack:
        block, rest = stack[-1]
        for following in rest:
            if following not in seen:
                seen.add(following)
                stack.append((following, iter(after[following])))
                break
        else:
            order.append(block)
            stack.pop()
    return order[::-1]


def loops_of(entry, after):
    """The natural loops: sets of blocks."""
    order = order_of(entry, after)
    place, before = {block: i for i, block in enumerate(order)}, defaultdict(list)
    for block in order:
        for following in after[block]:
            before[following].append(block)
    everything = (1 << len(order)) - 1
    above = dict.fromkeys(order, everything)                 # dominators, a bit for each block
    above[entry], changed = 1, True
    while changed:
        changed = False
        for block in order[1:]:
            mine = everything
            for previous in before[block]:
                mine &= above[previous]
            mine |= 1 << place[block]
            changed |= mine != above[block]
            above[block] = mine
    loops = {}
    for block in order:
        for head in after[block]:
            if above[block] >> place[head] & 1:
                loop, waiting = loops.setdefault(head, {head}), [block]
                while waiting:
                    if (one := waiting.pop()) not in loop:
                        loop.add(one)
                        waiting += before[one]
    return list(loops.values())


def main_loops(entry, blocks, after):
    """The blocks of all main loops, and those that hold matrix instructions outside of loops."""
    loops = sorted(loops_of(entry, after), key=len)
    matrix = [block for block, count in blocks.items() if count["HMMA"] or count["HGMMA"]]
    if matrix:
        return set().union(*(next((loop for loop in loops if block in loop), {block}) for block in matrix))
    return set().union(*(loop for loop in loops if not any(other < loop for other in loops)))


def forgotten_copies(entry, copies, after):
    """Waits that can be reached from a copy with no commit on the way."""
    pending, waiting, waits = dict.fromkeys(copies, False), [entry], set()
    seen = set()
    while waiting:
        block = waiting.pop()
        seen.add(block)
        under_way = pending[block]
        for i, what in enumerate(copies[block]):
            if what == "wait" and under_way:
                waits.add((block, i))
            under_way = what == "copy" or (under_way and what != "commit")
        for following in after[block]:
            if following not in seen or (under_way and not pending[following]):
                pending[following] |= under_way
                waiting.append(following)
    return len(waits)


def instructions(kernels, cubin, nvdisasm):
    for name, entry, blocks, copies, after in graphs(cubin, nvdisasm):
        if name not in kernels:                              # a function that kernels call: a division
            continue
        for count in blocks.values():
            kernels[name].count += count
        kernels[name].forgotten = forgotten_copies(entry, copies, after)
        kernels[name].in_loops = sum(blocks[block]["LOCAL"] for block in main_loops(entry, blocks, after))


def read(module, arch, cuobjdump, nvdisasm):
    kernels = defaultdict(Kernel)
    with tempfile.TemporaryDirectory() as folder:
        output(cuobjdump, "--extract-elf", f"{arch}.cubin", str(pathlib.Path(module).absolute()), cwd=folder)
        for cubin in sorted(pathlib.Path(folder).iterdir()):
            resources(kernels, cubin, cuobjdump)
            instructions(kernels, cubin, nvdisasm)
    names = readable(list(kernels))
    return {names[name]: kernel for name, kernel in sorted(kernels.items(), key=lambda item: names[item[0]])}


# ----------------------------------------------------------------------------------- what must hold

def check_matrix(kernels, arch):
    wrong = []
    for pattern, instruction in MATRIX.items():
        if instruction == "HGMMA" and arch != "sm_90a":      # nothing else has it, the kernels are empty there
            continue
        named = [name for name in kernels if re.fullmatch(pattern, name)]
        if not named:
            wrong.append(f"no kernel is named {pattern}")
        wrong += [f"{name} holds no {instruction}" for name in named if not kernels[name].count[instruction]]
    return wrong


def check_descriptors(kernels):
    return [f"{name} holds {kernel.count['ODD']} instructions with a descriptor in an odd register"
            for name, kernel in kernels.items() if kernel.count["ODD"]]


def check_copies(kernels):
    return [f"{name} waits {kernel.forgotten} times without waiting for a copy before it, which was not committed"
            for name, kernel in kernels.items() if kernel.forgotten]


def check_local(kernels):
    wrong = []
    for name, kernel in kernels.items():
        most, most_in_loops = next((most for pattern, most in LOCAL.items() if re.fullmatch(pattern, name)), (0, 0))
        if kernel.local > most:
            wrong.append(f"{name} has {kernel.local} bytes of local memory, {most} are allowed")
        if kernel.in_loops > most_in_loops:
            wrong.append(f"{name} reads or writes local memory {kernel.in_loops} times in main loops, {most_in_loops} are allowed")
    return wrong


def check_length(kernels):
    return [f"{name} has {kernel.count['ANY']} instructions, {most} are allowed" for name, kernel in kernels.items()
            for pattern, most in MOST_INSTRUCTIONS.items() if re.fullmatch(pattern, name) and kernel.count["ANY"] > most]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("module", help="the built lola/_cuda.*.so")
    parser.add_argument("--arch", default="sm_90a", help="print and check the kernels of this one (default: %(default)s)")
    options = parser.parse_args()
    cuobjdump, nvdisasm = tool("cuobjdump"), tool("nvdisasm")
    wrong = check_targets(options.module, cuobjdump)
    kernels = read(options.module, options.arch, cuobjdump, nvdisasm)
    width = max(map(len, kernels), default=6)
    print(f"\n{options.arch:<{width}}  registers  shared  local  instructions  HMMA  HGMMA  local accesses  in main loops")
    for name, k in kernels.items():
        print(f"{name:<{width}}  {k.registers:9}  {k.shared:6}  {k.local:5}  {k.count['ANY']:12}  {k.count['HMMA']:4}  "
              f"{k.count['HGMMA']:5}  {k.count['LOCAL']:14}  {k.in_loops:13}")
    wrong += check_matrix(kernels, options.arch) + check_descriptors(kernels) + check_copies(kernels)
    wrong += check_local(kernels) + check_length(kernels) if options.arch == "sm_90a" else []
    print("", *(wrong or ["as it should be"]), sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
