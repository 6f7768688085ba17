"""Build stand-alone programs from the CPU kernels' sources, without MLX. A machine's units and all flags are read from CMakeLists.txt."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
# Programs that compare the kernels with other loops.
CHECKS = (
    "attention_check",
    "gemm_check",
    "kernels_check",
    "lens_compare_check",
    "lens_kl_check",
    "lens_stats_check",
    "muon_check",
    "norm_check",
    "pool_check",
)


def units(machine):
    """Return the kernel units of a machine, {instruction set: (source, flags)}. Machines have CMake's names of processors."""
    kept, variables, flags = [True], {"METALENS_KERNELS": ""}, {}
    for line in (ROOT / "CMakeLists.txt").read_text().splitlines():
        words = re.sub(r"\$\{(\w+)\}", lambda name: variables.get(name[1], name[0]), line.strip())
        if words.startswith("if("):
            condition = re.search(r'CMAKE_SYSTEM_PROCESSOR MATCHES "(.+?)"', words)
            kept.append(condition is None or re.search(condition[1], machine) is not None)
        elif words.startswith("else()"):
            kept[-1] = not kept[-1]
        elif words.startswith("endif("):
            kept.pop()
        elif not all(kept):
            continue
        elif assigned := re.match(r"set\((\w+) (.*)\)$", words):
            variables[assigned[1]] = assigned[2].strip('"')
        elif appended := re.match(r"list\(APPEND METALENS_KERNELS (.*)\)$", words):
            variables["METALENS_KERNELS"] += " " + appended[1]
        elif options := re.match(r'set_source_files_properties\((.*) PROPERTIES COMPILE_OPTIONS "(.*)"\)$', words):
            flags |= dict.fromkeys(options[1].split(), options[2].split(";"))
    return {Path(source).stem: (ROOT / source, flags.get(source, [])) for source in variables["METALENS_KERNELS"].split()}


def release_flags():
    """Return the optimization and floating-point flags of the extension."""
    options = re.search(r"target_compile_options\(_ext PRIVATE (-O.*)\)", (ROOT / "CMakeLists.txt").read_text())[1]
    return [flag for flag in options.split() if not flag.startswith("-W")]


def build(folder, programs, *, machine, flags, isas, compiler=COMPILER):
    """Compile tests/csrc/<program>.cpp for each of `programs`, link it with the kernels, and return {program: path}.

    Only the units of `isas`, which will run, are compiled with `flags`. The linker needs the others too, which compile fast without them.
    """
    common = [compiler, "-std=c++20", "-Wno-psabi", f"-I{ROOT / 'csrc'}", f"-I{HERE}"]
    known = units(machine)
    assert set(isas) <= set(known), f"{isas} are not all units of {machine} in CMakeLists.txt: {sorted(known)}"
    jobs = {f"isa_{isa}": [*(flags if isa in isas else ["-O0"]), *options, source] for isa, (source, options) in known.items()}
    jobs |= {program: [*flags, HERE / f"{program}.cpp"] for program in programs}
    jobs |= {source.stem: [*flags, source] for source in (ROOT / "csrc/cpu").glob("*.cpp")}

    def run(*command):
        done = subprocess.run([*common, *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-5000:]

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(lambda job: run(*job[1], "-c", "-o", folder / f"{job[0]}.o"), jobs.items()))
        kernels = [folder / f"{name}.o" for name in jobs if name not in programs]
        list(pool.map(lambda program: run(*flags, folder / f"{program}.o", *kernels, "-pthread", "-o", folder / program), programs))
    return {program: folder / program for program in programs}
